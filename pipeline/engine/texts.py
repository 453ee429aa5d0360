"""Texts of a shard: read, without repeats, and cut into batches of token ids of a few static shapes.

The content of a batch follows from the manifest and the config alone, as for images: the texts of one shard without
repeats, in order, those of few tokens apart from the others, the last batch of each kind filled up with texts of its
own.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from pipeline.core.failpoints import failpoint
from pipeline.core.plain import plain_array, plain_type, text_bytes
from pipeline.core.records import Failure, ImageBatch, Shard, ShardRows
from pipeline.engine.padding import repeats
from pipeline.images.pool.processes import Abandoned
from pipeline.manifest.manifest import Manifest
from pipeline.manifest.shards import ShardReader, cut
from pipeline.models.tokens import Tokenizer

# Tokens of the narrower batches: most captions are shorter, and cost less than half there.
SHORT = 32
# Characters of a text that are tokenized; no tokenizer makes fewer than 77 tokens of so many.
LONGEST = 16_384
# Texts that are tokenized at a time.
CHUNK = 1024
# Positions of some texts, and their tokens.
_Some = tuple[NDArray[np.int64], torch.Tensor]
# Texts that the text tower is compared with fp32 on, and rows that are searched for them.
COMPARED, SEARCHED = 16, 512


@dataclass(frozen=True, slots=True)
class ShardTexts:
    """The texts of a shard.

    Attributes:
        shard: the shard.
        table: the id and the kept columns; empty beside images, whose loader has them.
        batches: each text once, as token ids and attention mask, int64 ``[B, 2, T]``.
        missing: why a row has no text, by its position.
        repeats: positions of further rows with a text, and the first row that has it.
        truncated: rows whose text has more tokens than the text tower takes.
    """

    shard: Shard
    table: pa.Table
    batches: tuple[ImageBatch, ...]
    missing: Mapping[int, Failure]
    repeats: Mapping[int, int]
    truncated: int

    @property
    def counts(self) -> dict[str, int]:
        """Rows for the report: with a text, without one, with one that another row has too, with one that was cut."""
        rows = self.shard.rows - len(self.missing)
        return {
            "rows": rows, "missing": len(self.missing), "repeats": len(self.repeats), "truncated": self.truncated
        }  # fmt: skip


class Texts:
    """The texts of shards, read in a thread of its own; use it as a context manager.

    Args:
        manifest: it names the column.
        tokenizer: of the model.
        batch_size: the static first dimension of every batch.
        device: where they are embedded; a GPU copies from pinned memory.
    """

    def __init__(self, manifest: Manifest, tokenizer: Tokenizer, batch_size: int, device: torch.device) -> None:
        self._manifest, self._tokenizer, self._batch_size = manifest, tokenizer, batch_size
        self._pinned = device.type == "cuda"
        # Beside images, the loader reads the other columns.
        others = () if manifest.image else manifest.schema.names
        self._reader = ShardReader(manifest, columns=(*others, manifest.text))
        self._thread = ThreadPoolExecutor(1, "texts", initializer=_take, initargs=(device,))
        self._begun: dict[int, Future[ShardTexts]] = {}
        self._stopped = threading.Event()

    def __enter__(self) -> Texts:
        return self

    def __exit__(self, *error: object) -> None:
        self._stopped.set()
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._reader.close()

    def begin(self, shard: Shard) -> None:
        """Read a shard, without waiting for it; not a tar, which the loader alone reads."""
        if self._manifest.counted:
            self._begun[shard.index] = self._thread.submit(self.read, shard)

    def take(self, rows: ShardRows) -> ShardTexts:
        """The texts of a shard that was begun, or those beside the images of a tar.

        Raises:
            ManifestError: the manifest cannot be read any more.
        """
        if self._manifest.counted:
            return self._begun.pop(rows.shard.index).result()
        cells = [cell for chunk in rows.table.column(self._manifest.text).chunks for cell in _cells(chunk)]
        return self._thread.submit(self._of, rows.shard, cells, pa.table({})).result()

    def stream(self, shards: Iterable[Shard]) -> Iterator[ShardTexts]:
        """Every shard in order; the next one is asked for and read while one is being embedded."""
        wanted = iter(shards)

        def following() -> ShardTexts | None:
            shard = next(wanted, None)
            return None if shard is None else self.read(shard)

        ahead = self._thread.submit(following)
        while (found := ahead.result()) is not None:
            ahead = self._thread.submit(following)
            yield found

    def read(self, shard: Shard) -> ShardTexts:
        """Read a shard now; see :meth:`begin`."""
        schema = pa.schema([]) if self._manifest.image else self._manifest.schema
        read, cells = list[pa.RecordBatch](), list[str | Failure]()
        for batch in self._reader.read(shard):
            failpoint("rows")
            self._go_on()
            read.append(pa.RecordBatch.from_arrays([batch.column(name) for name in schema.names], schema=schema))
            cells += _cells(batch.column(self._manifest.text))
        return self._of(shard, cells, pa.Table.from_batches(read, schema))

    def _of(self, shard: Shard, cells: Sequence[str | Failure], table: pa.Table) -> ShardTexts:
        missing, repeated, first = dict[int, Failure](), dict[int, int](), dict[str, int]()
        for position, cell in enumerate(cells):
            if isinstance(cell, Failure):
                missing[position] = cell
            elif (earlier := first.setdefault(cell, position)) != position:
                repeated[position] = earlier
        batches, cut_off = self._batches(shard, first)
        truncated = len(cut_off) + sum(earlier in cut_off for earlier in repeated.values())
        return ShardTexts(shard, table, tuple(batches), missing, repeated, truncated)

    def _go_on(self) -> None:
        if self._stopped.is_set():
            raise Abandoned

    def _batches(self, shard: Shard, first: Mapping[str, int]) -> tuple[list[ImageBatch], set[int]]:
        """Batches of texts by the position of each, and the positions of those that are cut."""
        narrow, wide, cut_off = list[_Some](), list[_Some](), set[int]()
        left = iter(first.items())
        while some := list(islice(left, CHUNK)):
            self._go_on()
            tokens, whole = tokenize(self._tokenizer, [text for text, _ in some])
            rows, short = np.array([position for _, position in some]), _are_short(tokens, self._tokenizer)
            cut_off |= {int(row) for row, is_whole in zip(rows, whole, strict=True) if not is_whole}
            narrow.append((rows[short.numpy()], tokens[short][:, :, :SHORT]))
            wide.append((rows[~short.numpy()], tokens[~short]))
        batches = list[ImageBatch]()
        for kind in (narrow, wide) if first else ():
            rows, tokens = np.concatenate([rows for rows, _ in kind]), torch.cat([tokens for _, tokens in kind])
            for start in range(0, len(rows), self._batch_size):
                part = tokens[start : start + self._batch_size]
                if len(part) < self._batch_size:
                    part = torch.cat([part, part[repeats(len(part), self._batch_size)]])
                part = part.pin_memory() if self._pinned else part
                batches.append(ImageBatch(shard, rows[start : start + self._batch_size], part, slot=-1))
        return batches, cut_off


class TextLoader:
    """The loader of a job of texts alone: batches of tokens in place of pixels.

    See :class:`~pipeline.engine.loader.Loader` for its methods.
    """

    def __init__(self, texts: Texts) -> None:
        self._texts = texts

    def __enter__(self) -> TextLoader:
        self._texts.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._texts.__exit__(*error)

    def stream(self, shards: Iterable[Shard]) -> Iterator[ImageBatch | ShardRows]:
        """Every shard's batches, then its rows: those without a text have failed."""
        for found in self._texts.stream(shards):
            yield from found.batches
            yield ShardRows(found.shard, found.table, found.missing, found.repeats, texts=found.counts)

    def fail(self, error: BaseException) -> None:
        """Do nothing: nobody waits for a buffer."""

    def release(self, batch: ImageBatch) -> None:
        """Do nothing: a batch has memory of its own."""


def _take(device: torch.device) -> None:
    if device.type == "cuda":
        # Pinned memory belongs to the current device of a thread.
        torch.cuda.set_device(device)


def tokenize(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[torch.Tensor, list[bool]]:
    """Token ids and attention masks of full length, int64 ``[N, 2, T]``, and which texts they hold in full."""
    short = [text[:LONGEST] for text in texts]
    tokens, width, pad = tokenizer(short), tokenizer.max_tokens, tokenizer.pad_id
    ids = tokens["input_ids"]
    mask = tokens.get("attention_mask", torch.ones_like(ids))
    free = width - ids.shape[1]
    padded = [torch.nn.functional.pad(each, (0, free), value=value) for each, value in ((ids, pad), (mask, 0))]
    # A cut text fills the last places; counting its tokens takes as long as making them.
    full = padded[0][:, -2] != pad
    whole = [
        len(text) <= LONGEST and (not is_full or tokenizer.count(text) <= width)
        for text, is_full in zip(texts, full.tolist(), strict=True)
    ]
    return torch.stack(padded, dim=1), whole


def first_texts(manifest: Manifest, tokenizer: Tokenizer) -> tuple[list[str], torch.Tensor]:
    """Up to :data:`COMPARED` texts of the first rows, and their tokens as of :func:`tokenize`."""
    shard, found = next(cut(manifest, SEARCHED)), dict[str, None]()
    with ShardReader(manifest, columns=(manifest.text,)) as reader:
        for batch in reader.read(shard):
            found |= {cell: None for cell in _cells(batch.column(manifest.text)) if isinstance(cell, str)}
            if len(found) >= SEARCHED:
                break
    texts = list(islice(found, COMPARED))
    return texts, tokenize(tokenizer, texts)[0] if texts else torch.empty(0)


def tokens_fingerprint(tokenizer: Tokenizer) -> dict[str, Any]:
    """Widths of batches and length of texts, on which embeddings depend besides the tower and the tokenizer."""
    return {"tokens": _widths(tokenizer), "characters": LONGEST}


def _widths(tokenizer: Tokenizer) -> list[int]:
    longest = tokenizer.max_tokens
    return [longest] if tokenizer.padded or longest <= SHORT else [SHORT, longest]


def _are_short(tokens: torch.Tensor, tokenizer: Tokenizer) -> torch.Tensor:
    """Which texts fit into :data:`SHORT` tokens, by their own tokens alone; none where padding is part of the text."""
    if len(_widths(tokenizer)) == 1:
        return torch.zeros(len(tokens), dtype=torch.bool)
    # From the last place on: some tokenizers pad with the token that ends a text.
    return (tokens[:, 0, SHORT - 1 :] == tokenizer.pad_id).all(dim=1)


def _cells(column: pa.Array) -> list[str | Failure]:
    """The texts of a column; why there is none in place of the others."""
    column = plain_array(column, plain_type(column.type))
    try:
        cells = column.to_pylist()
    except UnicodeDecodeError:
        cells = text_bytes(column)
    return [_cell(cell) for cell in cells]


def _cell(cell: str | bytes | None) -> str | Failure:
    if cell is None:
        return Failure("no_text", "the cell of manifest.text is null")
    if isinstance(cell, bytes):
        try:
            cell = cell.decode()
        except UnicodeDecodeError as error:
            return Failure("not_text", f"the text is no UTF-8: {error}")
    return cell if cell.strip() else Failure("no_text", "the text is empty, or holds white space alone")
