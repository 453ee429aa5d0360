"""Summary of a finished dataset for its report: labels, scores and failures."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.core.concurrency import in_order
from pipeline.core.errors import StorageError
from pipeline.core.plain import plain_table
from pipeline.core.records import OK
from pipeline.dataset.parts import short_error
from pipeline.report.scores import Extremes, Row, Scores, Similarities
from pipeline.storage.factory import open_storage
from pipeline.storage.urls import open_arrow

# Labels on the page, and rows of each at either end of the scores.
SHEET_LABELS, EACH_END = 12, 4
# Pairs of images and texts at either end of the similarity.
PAIRS = 8
# Advice for the failed rows of each status, one line of the page.
HINTS = {
    "no_image": "the cell of manifest.image is null",
    "no_text": "the cell of manifest.text is null, empty or white space",
    "not_text": "the cell of manifest.text holds bytes that are no UTF-8",
    "empty": "the file has 0 bytes; copy it again",
    "not_found": "no such file; does manifest.root point to the folder that relative paths start from?",
    "permission": "the file may not be read by the user of this job",
    "unreadable": "the disk or the server returned no bytes; a rerun of the shard may get them",
    "timeout": "reading took longer than loader.read_seconds",
    "damaged_tar": "the row stands for all images behind the damage of a tar; write or copy the tar again",
    "too_many_bytes": "larger than images.max_bytes",
    "too_many_pixels": "larger than images.max_pixels",
    "not_an_image": "the bytes are not an image, whatever the name of the file",
    "format_not_allowed": "a format that images.formats does not list",
    "unsupported": "a variant of its format that is not decoded; convert it",
    "truncated": "the file ends early; copy or download it again",
    "corrupt": "the bytes are damaged; copy or download it again",
    "out_of_memory": "decoding it takes more than loader.decode_memory",
    "decoder_timeout": "decoding it takes longer than loader.decode_seconds",
    "decoder_crashed": "decoding it ended the decoder process",
    "outside_root": "the path leads out of manifest.root; nothing was read",
    "scheme_not_allowed": "images.schemes does not list this kind of address; nothing was read",
    "address_not_allowed": "a private or local address; images.private_hosts lists exceptions",
}


def stored_as(stored: Mapping[str, Any]) -> str:
    """The form of stored embeddings, the field ``stored`` of a report, in a sentence."""
    text = f"embeddings are stored as {stored['dtype']}, {stored['dim']} numbers in {stored['bytes']} bytes"
    if "recall_at_10" in stored:
        text += f"; of the 10 nearest rows, {stored['recall_at_10']:.1%} are those of the model's float32 embeddings"
        text += f" (among {stored['sample']:,} rows of this run)"
    return text


@dataclass(frozen=True, slots=True)
class Failed:
    """One row that failed; ``number`` counts the rows of the manifest from 0."""

    number: int
    id: str | int
    status: str
    error: str


@dataclass(frozen=True, slots=True)
class DatasetSummary:
    """The content of a dataset: rows by label, the first failures of each status, and its scores.

    ``parts`` are the names of its files in ``folder``, each with the number of its first row. ``scores`` are counts in
    equal steps from 0 to 1, ``odd`` the rows with the lowest scores of all. ``similarity`` and ``pairs`` are of images
    and their texts: counts in equal steps from -1 to 1, and the rows at either end, whose texts are ``captions`` by the
    number of the row.
    """

    folder: str
    parts: tuple[tuple[str, int], ...]
    labels: Mapping[str, int]
    failed: tuple[Failed, ...]
    scores: tuple[int, ...] = ()
    extremes: tuple[Extremes, ...] = ()
    odd: tuple[Row, ...] = ()
    similarity: tuple[int, ...] = ()
    pairs: Extremes | None = None
    captions: Mapping[int, str] = field(default_factory=dict)

    @property
    def failures(self) -> tuple[Mapping[str, object], ...]:
        """The failures for the report."""
        return tuple({"id": row.id, "status": row.status, "error": row.error} for row in self.failed)


def summarize(folder: str, parts: Sequence[tuple[str, int]], *, id: str, examples: int) -> DatasetSummary:
    """Read the small columns of every part, several parts at a time.

    ``parts`` are names and the number of the first row of each, in order.
    """

    def read(part: tuple[str, int]) -> tuple[int, pa.Table]:
        place = f"{folder.rstrip('/')}/{part[0]}"
        try:
            with open_arrow(place) as file:
                # Not read_table, for which Arrow imports its data sets.
                parquet = pq.ParquetFile(file, pre_buffer=False)
                # Behind the kept columns, one of which may have the same name.
                names = parquet.schema_arrow.names
                own = names[names.index("embedding") :] if "embedding" in names else []
                pairs = [name for name in ("similarity",) if name in own]
                columns = [id, "label", "score", *pairs, "status", "error"]
                table = plain_table(parquet.read(columns=columns, use_threads=False))
        except pa.ArrowException as error:
            raise StorageError(
                f"{place}: not readable as Parquet ({error}); python -m pipeline.verify {folder} --repair does it again"
            ) from error
        return part[1], table

    scores, similar = Scores(keep=EACH_END), Similarities(keep=PAIRS)
    failed: list[Failed] = []
    seen: Counter[str] = Counter()
    for start, table in in_order(read, parts, threads=open_storage(folder).threads):
        scores.add(table[id], table["label"], table["score"], start=start)
        if "similarity" in table.column_names:
            similar.add(table[id], table["similarity"], start=start)
        bad = pc.indices_nonzero(pc.not_equal(table["status"], OK))
        # A few of each status are more useful than many of one.
        for place, row in zip(
            bad.to_pylist(), table.select([id, "status", "error"]).take(bad).to_pylist(), strict=True
        ):
            seen[row["status"]] += 1
            if len(failed) < examples and seen[row["status"]] <= max(3, examples // 8):
                # Earlier versions wrote longer ones.
                failed.append(Failed(start + place, row[id], row["status"], short_error(row["error"])))
    return DatasetSummary(
        folder=folder,
        parts=tuple(parts),
        labels=scores.labels,
        failed=tuple(failed),
        scores=scores.histogram,
        extremes=scores.extremes(SHEET_LABELS),
        odd=scores.least_certain(EACH_END),
        similarity=similar.histogram,
        pairs=similar.extremes,
    )


def headline(images: int, wall: float, rate: float, bound: str, *, where: str) -> str:
    """The report in one sentence; ``where`` is the place of the bottleneck, such as ``2 cores``."""
    bottleneck = f"{bound} on {where}" if where else bound
    return f"{images:,} images in {in_words_of_time(wall)} ({rate:,.1f} images/s); bottleneck: {bottleneck}"


def of_texts(sentence: str, config: Mapping[str, Any]) -> str:
    """A sentence about the images of a job, as one about its texts where it has no images."""
    if config["manifest"]["image"] is not None:
        return sentence
    # Not in the names of settings, such as images.formats.
    return re.sub(r"\bimage(s?)\b(?![.=])", r"text\1", sentence)


def in_words_of_time(seconds: float) -> str:
    """A length of time such as ``45.2 s``, ``3 min 12 s`` or ``5 h 40 min``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, left = divmod(minutes, 60)
    if hours:
        return f"{hours} h {left} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
