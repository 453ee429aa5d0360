"""One night, top to bottom: compared, embedded, put together, published, written down."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from pipeline.config.schema import Config
from pipeline.core.errors import PlanMismatch, ShardsGivenUp, TooManyFailures
from pipeline.dataset import lease, plan
from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.dataset.parts import part_format
from pipeline.dataset.saved_config import recipe_of
from pipeline.manifest.manifest import Manifest, open_manifest
from pipeline.manifest.shards import count_shards
from pipeline.nightly import embed
from pipeline.nightly.assemble import Assembly, assemble, origins
from pipeline.nightly.embed import AnotherJob, Embedded
from pipeline.nightly.prepare import COMPARED, Tonight, begin_anew, compare_rows, prepare
from pipeline.nightly.publish import Made, publish, report_of
from pipeline.nightly.records import MANIFESTS, SNAPSHOT, WORK, Night, NightError, NightUnfinished, Wanted
from pipeline.nightly.rows import Taken, cut_out, read_batches
from pipeline.nightly.store import append_runs, clear_work, forget, open_below, open_night, read_night
from pipeline.storage.base import Storage
from pipeline.storage.factory import open_storage
from pipeline.telemetry.logs import log_to_terminal

log = logging.getLogger(__name__)


def run_night(config: Config, wanted: Wanted, store: Storage, day: str, held: lease.Lease) -> Night:
    """Make a night, or find it published; then write it down, and remove what is not kept.

    Args:
        config: of the main job; its output is not looked at.
        wanted: the rest of what the nightly job was told.
        store: where the nights are.
        day: the date, such as 2026-11-22.
        held: the lease on the store.

    Raises:
        PipelineError: the night is not published; the same command goes on.
    """
    night = read_night(store, day)
    if night is None:
        try:
            night = _make(config, wanted, store, day, held)
        except PlanMismatch as error:
            begun = f"{store.url}/{WORK}/date={day} and {store.url}/date={day}"
            raise NightError(
                f"{day} was begun by another job:\n{error}\nThe command that began it goes on; to begin the night "
                f"again with this one, remove {begun}"
            ) from error
        except ShardsGivenUp as error:
            # Its own exit code stands for a night that is published.
            raise NightUnfinished(f"{day} is not published: {error}") from error
    else:
        told = f"{day}: is published already, in {night.dataset or store.url}; nothing to do"
        _say(config, wanted, told)
    held.confirm()
    with log_to_terminal(config.log, wanted.run):
        append_runs(store, night)
        if config.report.html and night.dataset:
            _draw(night, config.report.examples)
    if wanted.keep:
        for gone in forget(store, day, keep=wanted.keep):
            _say(config, wanted, f"date={gone}: removed, {wanted.keep} nights are kept")
    clear_work(store)
    return night


def _draw(night: Night, examples: int) -> None:
    """Write the page of a night, unless it is there; the night is published, and nothing depends on its page."""
    from pipeline.report.render import PAGE, redraw, try_to_publish

    storage = open_storage(night.dataset)
    if storage.size(PAGE) is None and try_to_publish(storage, partial(redraw, night.dataset, examples=examples)):
        log.info("report: %s/%s", night.dataset, PAGE)


def _make(config: Config, wanted: Wanted, store: Storage, day: str, held: lease.Lease) -> Night:
    began = time.time()
    with log_to_terminal(config.log, wanted.run):
        tonight = prepare(config, wanted, store, day)
        counts = compare_rows(tonight)
        _tell(day, counts)
    try:
        made = _embed(tonight, counts, held)
    except AnotherJob as other:
        with log_to_terminal(config.log, wanted.run):
            tonight = begin_anew(tonight, str(other))
            counts = compare_rows(tonight)
            _tell(day, counts)
        made = _embed(tonight, counts, held)
    held.confirm()
    return publish(tonight, counts, made, began)


def _tell(day: str, counts: Mapping[str, int]) -> None:
    log.info("%s: %s", day, ", ".join(f"{count:,} {kind}" for kind, count in counts.items()))


def _embed(tonight: Tonight, counts: Mapping[str, int], held: lease.Lease) -> Made:
    """Embed what has to be, and put the night's dataset together.

    Raises:
        AnotherJob: the night before cannot be carried on.
    """
    whole = tonight.wanted.layout == SNAPSHOT
    if not any(counts[kind.name.lower()] for kind in embed.OWN):
        # Rows may be new all the same: those whose bytes the night before has under another id.
        _believe(tonight)
        if not whole:
            return Made(None, (), 0, 0)
    manifest = tonight.manifest if whole else _changed_manifest(tonight)
    if not counts["duplicate"] and not (whole and counts["carried"]):
        # Every row of the dataset is embedded tonight, so the dataset is the main job's own.
        dataset = _run_directly(tonight, manifest)
        if counts["carried"]:
            _compare_jobs(tonight, dataset)
        return Made(dataset, (report_of(dataset.storage),), 0, len(dataset.commits))
    embedded = _run_changed(tonight, counts)
    with log_to_terminal(tonight.config.log, tonight.wanted.run):
        shared, written = _assemble(tonight, manifest, embedded, held)
    dataset = open_dataset(tonight.target.url)
    return Made(dataset, tuple(report_of(each.storage) for each in embedded.datasets), shared, written)


def _changed_manifest(tonight: Tonight) -> Manifest:
    """The rows that a partition holds, as a manifest that stays beside it, for repairs."""
    folder, name = open_below(tonight.store, MANIFESTS), f"date={tonight.day}.parquet"
    manifest = tonight.manifest
    done = tonight.work.read("changed.json")
    if done is None or folder.size(name) is None:
        columns = [manifest.id, manifest.image, *manifest.schema.names[1:]]
        cut_out(manifest, embed.changed_rows(read_batches(tonight.work, COMPARED, ["kind"])), columns, folder, name)
        tonight.work.write("changed.json", b"{}\n")
    path = f"{folder.url.rstrip('/')}/{name}"
    return open_manifest(replace(tonight.config.manifest, path=path, root=manifest.root))


def _run_directly(tonight: Tonight, manifest: Manifest) -> Dataset:
    config = tonight.config
    if manifest is not tonight.manifest:
        path = f"{open_below(tonight.store, MANIFESTS).url.rstrip('/')}/date={tonight.day}.parquet"
        config = replace(config, manifest=replace(config.manifest, path=path, root=manifest.root))
        config = replace(config, errors=replace(config.errors, max_fraction=1.0))
    try:
        embed.run_main_job(config, run=tonight.wanted.run)
    except TooManyFailures:
        # The dataset is complete; the night is judged when it is published.
        log.debug("too many failures")
    return open_dataset(tonight.target.url)


def _run_changed(tonight: Tonight, counts: Mapping[str, int]) -> Embedded:
    nothing = np.empty(0, dtype=np.int64)
    own = embed.embedded_rows(read_batches(tonight.work, COMPARED, ["kind"]))
    if not len(own):
        return Embedded((), nothing)
    log.info("%d of %d rows are embedded", len(own), tonight.manifest.rows)
    first = _run_rows(tonight, tonight.config, own, "delta-0")
    _compare_jobs(tonight, first)
    again = nothing
    if counts["duplicate"]:
        again = embed.twins_of_unread(read_batches(tonight.work, COMPARED, ["kind", "delta"]), first)
    if not len(again):
        return Embedded((first,), nothing)
    second = _run_rows(tonight, tonight.config, again, "delta-1")
    return Embedded((first, second), again)


def _compare_jobs(tonight: Tonight, dataset: Dataset) -> None:
    previous, prints = tonight.previous, dataset.plan.fingerprints
    if previous is None or tonight.anew or embed.digest_of(prints) == previous.fingerprints:
        return
    old = plan.read(open_night(tonight.store, previous.date))
    what = embed.differing(old.fingerprints if old is not None else None, prints)
    raise AnotherJob(f"another {what} than on {previous.date}")


def _believe(tonight: Tonight) -> None:
    """With nothing to embed, nothing shows which job this is: believe the config, the versions and the weights.

    Where one of them differs, a few images of the manifest are embedded, and tell.
    """
    previous = tonight.previous
    if previous is None or tonight.anew:
        return
    config = tonight.config
    if embed.signs_of(config, embed.model_now(config)) == previous.signs:
        return
    rows = np.arange(min(config.parity.images, tonight.manifest.rows))
    _compare_jobs(tonight, _run_rows(tonight, config, rows, "probe"))


def _assemble(tonight: Tonight, target: Manifest, embedded: Embedded, held: lease.Lease) -> tuple[int, int]:
    whole = tonight.wanted.layout == SNAPSHOT
    previous = None
    if whole and tonight.previous is not None and not tonight.anew:
        previous = open_dataset(open_night(tonight.store, tonight.previous.date).url)
    made = next(dataset for dataset in (*embedded.datasets, previous) if dataset is not None)
    config = tonight.config
    if target is not tonight.manifest:
        path = f"{open_below(tonight.store, MANIFESTS).url.rstrip('/')}/date={tonight.day}.parquet"
        config = replace(config, manifest=replace(config.manifest, path=path, root=target.root))
    shard_rows = config.manifest.shard_rows
    # As the main job has it for the whole manifest; that of few rows has smaller batches.
    size = min(config.loader.batch_size or int(made.plan.fingerprints["batch_size"]), shard_rows, target.rows)
    prints = {**made.plan.fingerprints, "manifest": target.fingerprint, "batch_size": size}
    sources = set[str]()
    if previous is not None and tonight.previous is not None:
        sources = {*tonight.previous.sources, plan.source_of(previous.plan.fingerprints)}
    wanted = plan.Plan(
        rows=target.rows,
        shards=count_shards(target.rows, shard_rows),
        shard_rows=shard_rows,
        fingerprints=prints,
        about={"model": config.model.name, "manifest": config.manifest.path},
        config=recipe_of(config),
        sources=sorted(sources),
    )
    form = part_format(
        target.schema,
        dim=made.dim,
        dtype=config.output.dtype,
        compression=config.output.compression,
        fingerprints=prints,
    )
    work = Assembly(
        target=target,
        plan=wanted,
        form=form,
        storage=tonight.target,
        previous=Taken(previous) if previous is not None else None,
        embedded=tuple(Taken(dataset) for dataset in embedded.datasets),
        again=embedded.again,
    )
    rows = read_batches(tonight.work, COMPARED, ["kind", "prev", "delta"])
    return assemble(work, origins(rows, changed=not whole), held)


def _run_rows(tonight: Tonight, config: Config, positions: NDArray[np.int64], name: str) -> Dataset:
    return embed.run_rows(config, tonight.manifest, positions, tonight.work, name, run=tonight.wanted.run)


def _say(config: Config, wanted: Wanted, text: str) -> None:
    with log_to_terminal(config.log, wanted.run):
        log.info("%s", text)
