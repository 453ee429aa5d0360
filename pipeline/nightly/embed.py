"""Runs of the main job over a night's rows, and the check that they are of the same job as the previous night."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.config.schema import Config
from pipeline.core.errors import TooManyFailures
from pipeline.dataset import plan
from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.dataset.saved_config import recipe_of
from pipeline.nightly.diff import OF_COPYING, OF_DECODING, OF_READING
from pipeline.nightly.prepare import PendingNight, Target
from pipeline.nightly.records import EMBEDDED, Kind
from pipeline.nightly.rows import copy_rows
from pipeline.nightly.store import open_below, open_night, url_of
from pipeline.storage.urls import open_file

# Fingerprints of a dataset that two nights may differ in.
_OF_THE_NIGHT = ("manifest", "batch_size")


class OtherJob(Exception):
    """The previous night was made by another model, backend, ...: the night begins again without it.

    The text names what differs. It is caught by :mod:`pipeline.nightly.run` and never reaches the user.
    """


@dataclass(frozen=True, slots=True)
class EmbeddedRows:
    """Tonight's datasets of embedded rows; ``retried`` are the manifest rows of the second one, if there is one."""

    datasets: tuple[Dataset, ...]
    retried: NDArray[np.int64]


def embed_target(pending: PendingNight, target: Target) -> Dataset:
    """Run the main job over every row of the night's dataset."""
    config = target.config
    if not pending.snapshot:
        config = config.changed({"errors.max_fraction": 1.0})
    # The dataset is complete then; failures are counted over the night when it is published.
    with suppress(TooManyFailures):
        run_main_job(config, run=pending.options.run, recorded=_recorded(pending))
    return open_dataset(pending.output.url)


def embed_changes(pending: PendingNight, counts: Mapping[str, int]) -> EmbeddedRows:
    """Embed the rows that need it, then duplicates of those that could not be read.

    Raises:
        OtherJob: see :func:`check_job`.
    """
    rows = pending.positions(EMBEDDED)
    none = np.empty(0, dtype=np.int64)
    if not len(rows):
        return EmbeddedRows((), none)
    first = _embed_rows(pending, rows, "delta-0")
    check_job(pending, first)
    retried = _duplicates_of_unread(pending, first) if counts["duplicate"] else none
    if not len(retried):
        return EmbeddedRows((first,), none)
    return EmbeddedRows((first, _embed_rows(pending, retried, "delta-1")), retried)


def check_job(pending: PendingNight, dataset: Dataset) -> None:
    """Compare the fingerprints of a dataset of tonight with the previous night's.

    Raises:
        OtherJob: they differ, so that nothing can be carried.
    """
    previous, now = pending.carried_from, dataset.plan.fingerprints
    if previous is None or digest_of(now) == previous.fingerprints:
        return
    before = plan.read(open_night(pending.store, previous.date))
    what = _differences(before.fingerprints if before is not None else None, now)
    raise OtherJob(f"another {what} than on {previous.date}")


def check_job_without_rows(pending: PendingNight) -> None:
    """The same check for a night with no rows to embed: by config, versions and weights.

    If one of them differs, a few images of the manifest are embedded to get the fingerprints.
    """
    from pipeline.models.checkpoint import as_recorded, open_checkpoint

    previous, config = pending.carried_from, pending.config
    if previous is None:
        return
    checkpoint = as_recorded(open_checkpoint(config.model), _recorded(pending))
    if _without_places(signs_of(config, checkpoint.fingerprint)) != _without_places(previous.signs):
        rows = np.arange(min(config.parity.images, pending.manifest.rows))
        check_job(pending, _embed_rows(pending, rows, "probe"))


def run_main_job(config: Config, *, run: str, recorded: Mapping[str, Any] | None = None) -> None:
    """Run the main job without its page and closing message, which the night has itself.

    ``recorded`` is the model's fingerprint on the previous night, beside whose rows those of tonight are put.
    """
    # The command answers --help without this import.
    from pipeline.job.main import RunOptions, run_job

    options = RunOptions(run=run, notes=False, summary=False, recorded=recorded)
    run_job(config.changed({"report.html": False}), options)


def _recorded(pending: PendingNight) -> Mapping[str, Any] | None:
    """The model's fingerprint on the previous night."""
    previous = pending.previous
    return None if previous is None else plan.recorded(open_night(pending.store, previous.date), "model")


def digest_of(fingerprints: Mapping[str, Any]) -> str:
    """A digest of everything that must be equal for rows of two nights to be in one dataset."""
    kept = {name: value for name, value in fingerprints.items() if name not in _OF_THE_NIGHT}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def signs_of(config: Config, model: Any) -> dict[str, Any]:
    """Config, versions and weights: if they are equal, so are the fingerprints of the job.

    ``model`` is the checkpoint's fingerprint.
    """
    from pipeline.core.machine import versions
    from pipeline.models.heads import read_head

    recipe = recipe_of(config)
    for group in ("manifest", "errors", "parity"):
        recipe.pop(group, None)
    recipe.get("loader", {}).pop("batch_size", None)
    labels = None
    if config.prompts.path is not None:
        with open_file(config.prompts.path) as file:
            labels = hashlib.file_digest(file, "sha256").hexdigest()
    signs: dict[str, Any] = {
        "recipe": recipe,
        "labels": labels,
        "versions": versions(config.backend.info.packages),
        "model": model,
    }
    if config.labels.heads:
        # Nights before there were heads have no such entry.
        signs["heads"] = {head.name: head.fingerprint for head in map(read_head, config.labels.heads)}
    found: dict[str, Any] = json.loads(json.dumps(signs))
    return found


def _without_places(signs: Mapping[str, Any]) -> dict[str, Any]:
    """The signs without the addresses of model, labels and heads, whose contents they hold too."""
    recipe = {**signs.get("recipe", {})}
    for group, name in (("model", "name"), ("prompts", "path"), ("labels", "heads")):
        recipe[group] = {key: value for key, value in recipe.get(group, {}).items() if key != name}
    return {**signs, "recipe": recipe}


def _embed_rows(pending: PendingNight, positions: NDArray[np.int64], name: str) -> Dataset:
    """Embed some rows of the manifest into ``work``/``name``, or continue an earlier run of it."""
    config, manifest, work = pending.config, pending.manifest, pending.work
    file = f"{name}.parquet"
    if work.size(file) is None:
        copy_rows(manifest, positions, replace(config.manifest, keep=[]).columns, work, file)
    output = open_below(work, name).url
    config = config.changed(
        {
            "manifest.path": url_of(work, file),
            "manifest.keep": [],
            "manifest.root": manifest.root,
            "output.dir": output,
            # Failures are counted over the night as a whole.
            "errors.max_fraction": 1.0,
        }
    )
    run_main_job(config, run=pending.options.run, recorded=_recorded(pending))
    return open_dataset(output)


def _duplicates_of_unread(pending: PendingNight, dataset: Dataset) -> NDArray[np.int64]:
    """Duplicates of rows that could not be read: their own file may be readable."""
    statuses = pa.concat_tables(dataset.stream(["status"]))["status"]
    temporary = pa.array([*OF_READING, *OF_COPYING, *OF_DECODING])
    unread, found = pc.is_in(statuses, temporary).combine_chunks(), []
    for batch in pending.compared("position", "kind", "delta"):
        copies = batch.filter(pc.and_(pc.equal(batch["kind"], int(Kind.DUPLICATE)), batch["delta"].is_valid()))
        found.append(copies["position"].filter(unread.take(copies["delta"])))
    rows: NDArray[np.int64] = pa.chunked_array(found, pa.int64()).to_numpy()
    return rows


def _differences(before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> str:
    """The names of the fingerprints that differ."""
    ours = json.loads(json.dumps(now))
    names = sorted({*ours, *(before or {})} - set(_OF_THE_NIGHT))
    named = ", ".join(name for name in names if before is not None and before.get(name) != ours.get(name))
    return named or "the fingerprints"
