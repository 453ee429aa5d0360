"""Parts of a :class:`~pipeline.core.run_report.RunReport` from clocks and a finished dataset."""

from __future__ import annotations

import platform
import resource
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.core.concurrency import in_order
from pipeline.core.errors import StorageError
from pipeline.core.records import OK, Clocks, Stage
from pipeline.report.scores import Extremes, Row, Scores
from pipeline.storage.factory import open_storage
from pipeline.storage.urls import open_arrow

PACKAGES = ("torch", "transformers", "tokenizers", "pillow", "pyarrow", "numpy", "hydra-core", "fsspec")
# With a larger share of its time spent waiting, the encoder is not the bottleneck.
WAITING = 0.25
# Labels on the page, and rows of each at either end of the scores.
SHEET_LABELS, EACH_END = 12, 4
# Advice for the failed rows of each status, one line of the page.
HINTS = {
    "no_image": "the cell of manifest.image is null",
    "empty": "the file has 0 bytes; copy it again",
    "not_found": "no such file; does manifest.root point to the folder that relative paths start from?",
    "permission": "the file may not be read by the user of this job",
    "unreadable": "the disk or the server returned no bytes; a rerun of the shard may get them",
    "timeout": "reading took longer than loader.read_seconds",
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

    ``scores`` are counts in equal steps from 0 to 1, ``odd`` the rows with the lowest scores of all.
    """

    labels: Mapping[str, int]
    failed: tuple[Failed, ...]
    scores: tuple[int, ...] = ()
    extremes: tuple[Extremes, ...] = ()
    odd: tuple[Row, ...] = ()

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
                table = pq.read_table(file, columns=[id, "label", "score", "status", "error"], use_threads=False)
        except pa.ArrowException as error:
            raise StorageError(
                f"{place}: not readable as Parquet ({error}); python -m pipeline.verify {folder} --repair does it again"
            ) from error
        return part[1], table

    scores = Scores(keep=EACH_END)
    failed: list[Failed] = []
    seen: Counter[str] = Counter()
    for start, table in in_order(read, parts, threads=open_storage(folder).threads):
        scores.add(table[id], table["label"], table["score"], start=start)
        bad = pc.indices_nonzero(pc.not_equal(table["status"], OK))
        # A few of each status are more useful than many of one.
        for place, row in zip(
            bad.to_pylist(), table.select([id, "status", "error"]).take(bad).to_pylist(), strict=True
        ):
            seen[row["status"]] += 1
            if len(failed) < examples and seen[row["status"]] <= max(3, examples // 8):
                failed.append(Failed(start + place, row[id], row["status"], row["error"]))
    return DatasetSummary(
        labels=scores.labels,
        failed=tuple(failed),
        scores=scores.histogram,
        extremes=scores.extremes(SHEET_LABELS),
        odd=scores.least_certain(EACH_END),
    )


def find_bound(
    clocks: Clocks,
    *,
    startup: float,
    wall: float,
    workers: int,
    decoder: str,
    streams: int,
    device: str,
    precision: str,
    cores: int,
) -> tuple[str, str]:
    """The bottleneck of a run and the advice against it, in words; ``startup`` and ``wall`` are seconds."""
    seconds = clocks.seconds
    wait_in, wait_out = seconds.get(Stage.WAIT_INPUT, 0.0), seconds.get(Stage.WAIT_OUTPUT, 0.0)
    # Batches that are encoded in parallel share their wall time.
    encoding = (seconds.get(Stage.ENCODE, 0.0) + seconds.get(Stage.LABEL, 0.0)) / streams
    loop = wait_in + wait_out + encoding
    if loop == 0:
        return "nothing", "every shard was done already"
    if startup > wall / 2:
        return "start-up", (
            f"start-up took {startup:.1f} of {wall:.1f} s (imports, opening the model, embedding the prompts); it does "
            "not grow with the number of images"
        )
    if wait_out / loop > WAITING:
        return "writing", "write to a faster disk, or raise manifest.shard_rows for fewer, larger parts"
    if wait_in / loop > WAITING:
        if seconds.get(Stage.READ, 0.0) > seconds.get(Stage.DECODE, 0.0):
            return (
                "reading",
                f"raise loader.workers (now {workers}): reading waits for storage, so more threads help",
            )
        if workers < cores:
            return "decoding", f"raise loader.workers from {workers} to {cores}, one for each core"
        if decoder == "exact":
            return "decoding", "images.decoder=fast decodes JPEGs two to three times as fast (README, Decoders)"
        return "decoding", f"all {cores} cores decode; smaller images or more cores would help"
    if device == "cpu" and precision == "fp32":
        return "encoding", (
            "the model is the slowest stage; use a GPU (backend.device=cuda), or backend.precision=bf16 on a processor "
            "with AVX512_BF16 or AMX"
        )
    if device == "cpu":
        return "encoding", "the model is the slowest stage; use a GPU (backend.device=cuda) or more cores"
    return (
        "encoding",
        "the GPU is the slowest stage; raise loader.batch_size until images/s stops rising",
    )


def memory() -> dict[str, float]:
    """Peak memory of this process in MiB: resident, and on the GPU if one was used."""
    figures = {"peak_rss_mib": round(_peak_rss() / 2**20, 1)}
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        figures["peak_gpu_mib"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
    return figures


def _peak_rss() -> int:
    """Bytes; getrusage would include the memory of the parent process at the fork."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def machine(device: str, cores: int) -> dict[str, object]:
    """Facts about the machine of a run."""
    facts: dict[str, object] = {
        "processor": _processor(),
        "cores": cores,
        "system": f"{platform.system()} {platform.machine()}",
        "device": device,
    }
    torch: Any = sys.modules.get("torch")
    if device.startswith("cuda") and torch is not None:
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts


def versions(more: Sequence[str] = ()) -> dict[str, str]:
    """Versions of Python, of the packages that affect results and speed, and of ``more``, as far as installed."""
    found = {"python": platform.python_version()}
    for name in (*PACKAGES, *more):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def headline(images: int, wall: float, rate: float, bound: str, *, where: str) -> str:
    """The report in one sentence; ``where`` is the place of the bottleneck, such as ``2 cores``."""
    bottleneck = f"{bound} on {where}" if where else bound
    return f"{images:,} images in {in_words_of_time(wall)} ({rate:,.1f} images/s); bottleneck: {bottleneck}"


def in_words_of_time(seconds: float) -> str:
    """A length of time such as ``45.2 s``, ``3 min 12 s`` or ``5 h 40 min``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, left = divmod(minutes, 60)
    if hours:
        return f"{hours} h {left} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(
                (line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), platform.machine()
            )
    except OSError:
        return platform.processor() or platform.machine()
