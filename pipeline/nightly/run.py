"""One night: compare, embed, assemble, publish, record."""

from __future__ import annotations

import logging
import time
from functools import partial

from pipeline.config.schema import Config
from pipeline.core.errors import PlanMismatch, ShardsGivenUp
from pipeline.dataset import lease
from pipeline.dataset.dataset import open_dataset
from pipeline.nightly.assemble import assemble
from pipeline.nightly.embed import OtherJob, check_job, check_job_without_rows, embed_changes, embed_target
from pipeline.nightly.prepare import PendingNight, begin_anew, compare_rows, open_target, prepare
from pipeline.nightly.publish import NightDataset, publish, report_of
from pipeline.nightly.records import EMBEDDED, PREFIX, WORK, Night, NightError, NightOptions, NightUnfinished
from pipeline.nightly.store import append_runs, clear_work, open_night, read_night, remove_old
from pipeline.storage.base import Storage
from pipeline.telemetry.logs import log_to_terminal

log = logging.getLogger(__name__)


def run_night(config: Config, options: NightOptions, store: Storage, day: str, held: lease.Lease) -> Night:
    """Make a night or find it published, then record it in ``runs.parquet`` and remove old nights.

    Args:
        config: of the main job; its output is replaced.
        options: the rest of the command line.
        store: the store of nights.
        day: the date, such as 2026-11-22.
        held: the lease on the store.

    Raises:
        PipelineError: the night is not published; the same command continues it.
    """
    # The main job's own log takes the place of this one while it runs.
    with log_to_terminal(config.log, options.run):
        night = read_night(store, day)
        if night is None:
            night = _make(config, options, store, day, held)
        else:
            log.info("%s: is published already, in %s; nothing to do", day, open_night(store, day).url)
        held.confirm()
        append_runs(store, night)
        if config.report.html and night.dataset:
            # Its address in the record is that of the day it was made.
            _write_page(open_night(store, day), config.report.examples)
        if options.keep:
            for removed in remove_old(store, day, keep=options.keep):
                log.info("%s%s: removed, %d nights are kept", PREFIX, removed, options.keep)
        clear_work(store)
    return night


def _make(config: Config, options: NightOptions, store: Storage, day: str, held: lease.Lease) -> Night:
    began = time.time()
    try:
        pending = prepare(config, options, store, day)
        try:
            dataset = make_dataset(pending, held)
        except OtherJob as other:
            pending = begin_anew(pending, str(other))
            dataset = make_dataset(pending, held)
    except PlanMismatch as error:
        begun = f"{store.url}/{WORK}/{PREFIX}{day} and {open_night(store, day).url}"
        raise NightError(
            f"{day} was begun by another job:\n{error}\nThe command that began it continues it; to begin the night "
            f"again with this one, remove {begun}"
        ) from error
    except ShardsGivenUp as error:
        # The exit code of that error means a published night here.
        raise NightUnfinished(f"{day} is not published: {error}") from error
    held.confirm()
    return publish(pending, dataset, began)


def make_dataset(pending: PendingNight, held: lease.Lease) -> NightDataset:
    """Embed the rows that need it, and assemble the night's dataset.

    Raises:
        OtherJob: the previous night cannot be continued.
    """
    kinds = compare_rows(pending)
    log.info("%s: %s", pending.day, ", ".join(f"{count:,} {kind}" for kind, count in kinds.items()))
    if not any(kinds[kind.name.lower()] for kind in EMBEDDED):
        # Rows may still be new: those whose bytes the previous night has under another id.
        check_job_without_rows(pending)
        if not pending.snapshot:
            return NightDataset(kinds)
    target = open_target(pending)
    if not kinds["duplicate"] and not (pending.snapshot and kinds["carried"]):
        # Every row of the dataset is embedded tonight, so that the main job writes it.
        made = embed_target(pending, target)
        if kinds["carried"]:
            check_job(pending, made)
        return NightDataset(kinds, made, (report_of(made),))
    embedded = embed_changes(pending, kinds)
    shared = assemble(pending, target, embedded, held)
    made = open_dataset(pending.output.url)
    return NightDataset(kinds, made, tuple(map(report_of, embedded.datasets)), shared)


def _write_page(storage: Storage, examples: int) -> None:
    """Write the page of a night unless it exists; a failure of it does not fail the night."""
    from pipeline.report.render import PAGE, redraw, try_to_publish

    if storage.size(PAGE) is None and try_to_publish(storage, partial(redraw, storage.url, examples=examples)):
        log.info("report: %s/%s", storage.url, PAGE)
