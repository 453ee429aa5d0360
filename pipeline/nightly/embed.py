"""What has to be embedded tonight, given to the main job as a manifest of its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.config.schema import Config
from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.dataset.saved_config import recipe_of
from pipeline.manifest.manifest import Manifest
from pipeline.nightly.diff import OF_COPYING, OF_DECODING, OF_READING
from pipeline.nightly.records import Kind
from pipeline.nightly.rows import cut_out, read_footers
from pipeline.nightly.store import open_below
from pipeline.storage.base import Storage
from pipeline.storage.urls import open_file

# Of a dataset's fingerprints those that two nights may differ in.
_OF_THE_NIGHT = ("manifest", "batch_size")
# What becomes of rows that are read and embedded.
OWN = (Kind.NEW, Kind.CHANGED, Kind.RETRIED, Kind.ANEW)


class AnotherJob(Exception):
    """No error: the night before was made by another model, backend, ..., and the night begins again without it.

    The text says what differs.
    """


@dataclass(frozen=True, slots=True)
class Embedded:
    """Tonight's datasets of embedded rows; ``again`` are the positions of the rows of the second, if there is one."""

    datasets: tuple[Dataset, ...]
    again: NDArray[np.int64]


def embedded_rows(rows: Iterable[pa.RecordBatch]) -> NDArray[np.int64]:
    """The positions of the rows that are read and embedded."""
    return _where(rows, lambda kinds: np.isin(kinds, OWN))


def changed_rows(rows: Iterable[pa.RecordBatch]) -> NDArray[np.int64]:
    """The positions of the rows that are not carried from the night before."""
    return _where(rows, lambda kinds: kinds != Kind.CARRIED)


def _where(rows: Iterable[pa.RecordBatch], choose: Any) -> NDArray[np.int64]:
    found, start = [np.empty(0, dtype=np.int64)], 0
    for batch in rows:
        found.append(np.flatnonzero(choose(batch.column("kind").to_numpy())) + start)
        start += batch.num_rows
    return np.concatenate(found)


def twins_of_unread(rows: Iterable[pa.RecordBatch], dataset: Dataset) -> NDArray[np.int64]:
    """Rows that were to share the result of another one, which could not be read: theirs may be there."""
    statuses = pa.chunked_array([footer.statuses for footer in read_footers(dataset)])
    unread = np.isin(statuses.to_numpy(), [*OF_READING, *OF_COPYING, *OF_DECODING])
    found, start = [np.empty(0, dtype=np.int64)], 0
    for batch in rows:
        delta = batch.column("delta").fill_null(-1).to_numpy()
        twins = (batch.column("kind").to_numpy() == Kind.DUPLICATE) & (delta >= 0)
        twins[twins] = unread[delta[twins]]
        found.append(np.flatnonzero(twins) + start)
        start += batch.num_rows
    return np.concatenate(found)


def run_rows(
    config: Config, manifest: Manifest, positions: NDArray[np.int64], work: Storage, name: str, *, run: str
) -> Dataset:
    """Embed some rows of a manifest into ``work``/``name``; goes on where an earlier run stopped.

    ``run`` is the name of the night's run in its log.

    Raises:
        PipelineError: as :func:`pipeline.job.main.run_job`, except for too many failures: the night is judged as a
        whole.
    """
    file = f"{name}.parquet"
    if work.size(file) is None:
        cut_out(manifest, positions, [manifest.id, manifest.image], work, file)
    run_main_job(
        replace(
            config,
            manifest=replace(config.manifest, path=f"{work.url.rstrip('/')}/{file}", keep=[], root=manifest.root),
            output=replace(config.output, dir=open_below(work, name).url),
            errors=replace(config.errors, max_fraction=1.0),
        ),
        run=run,
    )
    return open_dataset(open_below(work, name).url)


def run_main_job(config: Config, *, run: str) -> None:
    """The main job; a door that only asks for help does without it."""
    from pipeline.job.main import RunOptions, run_job

    # The night has a page and an ending of its own, which its job would not know enough for.
    run_job(replace(config, report=replace(config.report, html=False)), RunOptions(run=run, summary=False))


def digest_of(fingerprints: Mapping[str, Any]) -> str:
    """What must be the same for rows of two nights to stand in one dataset."""
    kept = {name: value for name, value in fingerprints.items() if name not in _OF_THE_NIGHT}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def differing(old: Mapping[str, Any] | None, new: Mapping[str, Any]) -> str:
    """In words, what differs in two jobs' fingerprints."""
    now = json.loads(json.dumps(new))
    names = sorted({*now, *(old or {})} - set(_OF_THE_NIGHT))
    named = ", ".join(name for name in names if old is not None and old.get(name) != now.get(name))
    return named or "the fingerprints"


def signs_of(config: Config, model: Any) -> dict[str, Any]:
    """What a night without a new image is believed by: if all this is as it was, so is the job.

    ``model`` is the checkpoint's fingerprint.
    """
    from pipeline.report.summary import versions

    recipe = recipe_of(config)
    for group in ("manifest", "errors", "parity"):
        recipe.pop(group, None)
    recipe.get("loader", {}).pop("batch_size", None)
    labels = None
    if config.prompts.path is not None:
        with open_file(config.prompts.path) as file:
            labels = hashlib.file_digest(file, "sha256").hexdigest()
    signs = {"recipe": recipe, "labels": labels, "versions": versions(), "model": model}
    found: dict[str, Any] = json.loads(json.dumps(signs))
    return found


def model_now(config: Config) -> Any:
    """The fingerprint of the checkpoint as it lies there tonight; no image is read for it."""
    from pipeline.models.checkpoint import open_checkpoint

    return open_checkpoint(config.model).fingerprint
