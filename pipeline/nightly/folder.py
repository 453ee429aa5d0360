"""Folders of images as the input of a job: the manifest beside the output, and updates once the folder has changed.

An update is a night of its own (:mod:`pipeline.nightly.run`): the finished dataset is the night before, and only new
and changed images are embedded. The new dataset is assembled beside the old one, in ``<output.dir>.update``, and takes
its place when it is whole. An update that was killed anywhere is continued by the same command.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config.schema import Config
from pipeline.core.errors import ConfigError, ManifestError, OutputBusy, PlanMismatch, Problem, TooManyFailures
from pipeline.core.run_report import RunReport
from pipeline.dataset import commits, lease, plan
from pipeline.dataset.commits import SUCCESS
from pipeline.dataset.dataset import open_dataset
from pipeline.dataset.saved_config import with_backend_of
from pipeline.manifest.build import from_folder
from pipeline.manifest.changes import changes_of, publish_manifest
from pipeline.manifest.folder import LeftOut
from pipeline.manifest.manifest import open_manifest
from pipeline.nightly.content_keys import AUTO, find_content, read_keys
from pipeline.nightly.embed import OtherJob, digest_of, run_main_job, signs_of
from pipeline.nightly.prepare import PendingNight, prepare
from pipeline.nightly.publish import NightDataset, publish
from pipeline.nightly.records import DROPPED, NIGHT, PREFIX, ROWS, SNAPSHOT, WORK, Night, NightOptions
from pipeline.nightly.run import make_dataset
from pipeline.nightly.store import open_night, read_night, remove_folder, share_file
from pipeline.report.history import earlier_runs
from pipeline.report.load import REPORT
from pipeline.storage.base import Storage
from pipeline.storage.factory import open_storage
from pipeline.storage.local import LocalStorage, sync
from pipeline.storage.urls import explained, is_local, local_file, within
from pipeline.telemetry.logs import NAME as RUN_LOG
from pipeline.telemetry.logs import log_to_terminal

# The dates of the finished dataset and of its update in the store of an update, which no user sees.
BEFORE, AFTER = "2000-01-01", "2000-01-02"
REPLACED = "replaced"
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FolderJob:
    """The job of a folder: its config with the manifest in place of the folder, and the name of the run.

    ``manifest`` is its address. ``store`` is where an update is made, beside the dataset itself, which a link may lead
    to.
    """

    config: Config
    manifest: str
    folder: str
    output: Storage
    run: str

    @property
    def place(self) -> Path:
        """The folder of the dataset on this machine."""
        return Path(os.path.realpath(self.output.url))

    @property
    def store(self) -> LocalStorage:
        """The store of the update; without one, an empty folder at most."""
        return LocalStorage(f"{self.place}.update")


def folder_job(config: Config, scratch: Path, *, run: str) -> Config:
    """The config of a job with a manifest of the folder ``manifest.path``.

    The manifest is written as ``<output.dir>.manifest.parquet``. If the output holds a dataset of an earlier state of
    the folder, that is updated first: what is left to the job is to find it complete.

    Args:
        config: the job's; an estimate (``run.dry``) writes nothing but to ``scratch``.
        scratch: an empty local folder, which stays until the job ends.
        run: the name of the run in its log.

    Raises:
        PipelineError: the folder cannot be listed, or the dataset not be updated.
    """
    folder, left_out, fresh = config.manifest.path or "", LeftOut(), scratch / "manifest.parquet"
    output = open_storage(config.output.dir)
    _check(config, folder)
    rows = from_folder(folder, str(fresh), left_out=left_out)
    if config.run.dry:
        return config.changed({"manifest.path": str(fresh)})
    manifest = f"{output.url.rstrip('/')}.manifest.parquet"
    job = FolderJob(config.changed({"manifest.path": manifest}), manifest, folder, output, run)
    with log_to_terminal(config.log, run):
        said = f"; {str(left_out).partition('; --all')[0]}" if str(left_out) else ""
        log.info("%s: %d images, listed in %s%s", folder, rows, job.manifest, said)
    begun = _recover(job) if isinstance(output, LocalStorage) else False
    changes = changes_of(job.manifest, fresh, folder=folder, output=output.url)
    if (begun or changes) and plan.read(output) is not None:
        with log_to_terminal(config.log, run):
            log.info("%s has changed since %s was made: %s", folder, output.url, changes or "an update was begun")
        _update(job, fresh, changes)
    elif changes is None or changes:
        try:
            # A job that has begun has opened the manifest, and must not read another one.
            with lease.take(output, seconds=config.output.lease_seconds):
                publish_manifest(fresh, job.manifest)
        except OutputBusy:
            # Another part of the same job may have written the same one.
            if changes_of(job.manifest, fresh, folder=folder, output=output.url) != "":
                raise
    return job.config


def _check(config: Config, folder: str) -> None:
    """Refuse an output among the images: the next run would take its parts for manifests, and its manifest for one."""
    if config.manifest.root is not None:
        allowed = "is for relative paths of a manifest; those of a folder of images start at the folder"
        raise ConfigError([Problem("manifest.root", config.manifest.root, allowed, "leave it out")])
    output = config.output.dir
    places = [str(local_file(each)) if is_local(each) else each for each in (output, folder)]
    if is_local(output) == is_local(folder) and (within(*places) or within(*reversed(places))):
        raise ManifestError(
            f"output.dir={output} and the images in {folder} lie in one another, and the next run would find the parts "
            "of the dataset among them; choose an output.dir elsewhere"
        )


def _update(job: FolderJob, fresh: Path, changes: str | None) -> None:
    config, output = job.config, job.output
    if not isinstance(output, LocalStorage) or config.cluster.part is not None or os.path.ismount(job.place):
        reason = "lies in a store" if not isinstance(output, LocalStorage) else "is a mount point"
        if config.cluster.part is not None:
            reason = "is made in parts (cluster.part)"
        raise ManifestError(
            f"{job.folder} has changed since {output.url} was made ({changes}), and a dataset that {reason} is not "
            "updated in its place: choose another output.dir, or make a manifest and let the nightly job embed what is "
            f"new: python -m pipeline.manifest folder {job.folder} photos.parquet, then python jobs/nightly.py --help"
        )
    if output.read(SUCCESS) is None:
        # The job of the earlier state ends first; what failed in it is said of the update.
        with suppress(TooManyFailures):
            run_main_job(config, run=job.run)
    seconds = config.output.lease_seconds
    with _held(job) as held:
        with lease.take(output, seconds=seconds):
            if read_night(job.store, BEFORE) is None:
                _seed(job)
            publish_manifest(fresh, job.manifest)
            night = _make_night(job, held)
        held.confirm()
        _swap(job)
        _end(job)
    with log_to_terminal(config.log, job.run):
        kinds = [(count, "removed" if kind == "dropped" else kind) for kind, count in night.kinds.items() if count]
        log.info("%s: updated: %s", output.url, ", ".join(f"{count:,} {kind}" for count, kind in kinds))


@contextmanager
def _held(job: FolderJob) -> Iterator[lease.Lease]:
    """Hold the lease of the store; remove the store afterwards if it is empty."""
    with lease.take(job.store, seconds=job.config.output.lease_seconds) as held:
        yield held
    with suppress(OSError):
        job.store.root.rmdir()


def _seed(job: FolderJob) -> None:
    """Make the finished dataset the night before the update: its files as links, and the content keys of its rows."""
    dataset, manifest = open_dataset(job.output.url), open_manifest(job.config.manifest)
    if dataset.plan.fingerprints["manifest"].get("digest") != manifest.fingerprint["digest"]:
        raise PlanMismatch(
            f"{job.output.url}: was made of another manifest than {job.manifest}, so what has changed is not known; "
            "choose another output.dir"
        )
    config = with_backend_of(job.config, dataset.plan.config)
    target = open_night(job.store, BEFORE)
    remove_folder(job.store, f"{PREFIX}{BEFORE}")
    names = [plan.NAME, SUCCESS, *(commit.part for commit in dataset.commits)]
    names += [f"{commits.FOLDER}/{name}" for name in job.output.sizes(commits.FOLDER)]
    Path(target.url, commits.FOLDER).mkdir(parents=True)
    for name in names:
        share_file(job.output, name, target, name)
    content = find_content(manifest, AUTO)
    statuses = pa.concat_tables(dataset.stream(["status"]))["status"].combine_chunks()
    at = 0
    with target.staged() as staged:
        writer = None
        for batch in read_keys(manifest, content):
            status = statuses.slice(at, batch.num_rows).cast(pa.string())
            rows = pa.RecordBatch.from_arrays([*batch.columns, status], names=["id", "key", "status"])
            writer = writer or pq.ParquetWriter(staged.path, rows.schema, compression="zstd")
            writer.write_batch(rows)
            at += batch.num_rows
        if writer is not None:
            writer.close()
        staged.publish(ROWS, replace=True)
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    figures = ("seconds", "embedded", "images", "images_per_second", "shared", "written", "exit_code")
    unknown: dict[str, Any] = {**dict.fromkeys(figures, 0), "kinds": {}, "counts": {}}
    night = Night(
        date=BEFORE, layout=SNAPSHOT, dataset=target.url, previous=None, anew="", content=str(content), started=now,
        finished=now, rows=manifest.rows, verdict="", fingerprints=digest_of(dataset.plan.fingerprints),
        signs=signs_of(config, dataset.plan.fingerprints["model"]), sources=tuple(dataset.plan.sources), **unknown,
    )  # fmt: skip
    target.write(NIGHT, json.dumps({each.name: getattr(night, each.name) for each in fields(Night)}).encode())


def _make_night(job: FolderJob, held: lease.Lease) -> Night:
    """Embed what is new, and publish the update in its store.

    Raises:
        PlanMismatch: this is another job than the one that made the dataset.
    """
    store, began = job.store, time.time()
    try:
        pending = prepare(job.config, NightOptions(store=store.url, run=job.run), store, AFTER)
        made = make_dataset(pending, held)
        _check_job(pending, made)
    except OtherJob as other:
        for name in (WORK, f"{PREFIX}{AFTER}"):
            remove_folder(store, name)
        reason = str(other).removesuffix(f" than on {BEFORE}")
        raise PlanMismatch(
            f"{job.output.url}: holds a dataset of another job, and a dataset never mixes two: this command has "
            f"{reason}. Choose another output.dir, or run the command that made it, which embeds what is new"
        ) from other
    except PlanMismatch as error:
        raise PlanMismatch(
            f"{job.output.url}: an update of it was begun by another job:\n{error}\nThe command that began it "
            f"continues it; to begin it again with this one, remove {store.url}/{WORK} and {store.url}/{PREFIX}{AFTER}"
        ) from error
    return publish(pending, made, began)


def _check_job(pending: PendingNight, made: NightDataset) -> None:
    """Compare an update in which no row is carried, too, with the dataset before it.

    Raises:
        OtherJob: it is of another job.
    """
    if pending.anew:
        raise OtherJob(pending.anew)
    if pending.previous is None or made.dataset is None:
        raise ValueError("an update has a dataset, and one before it")
    if digest_of(made.dataset.plan.fingerprints) != pending.previous.fingerprints:
        raise OtherJob("another model, backend or label set")


def _recover(job: FolderJob) -> bool:
    """Finish an update that was killed while it took its place; return whether one is begun that did not get there."""
    store = job.store
    if not {*store.folders()} - {lease.FOLDER}:
        return False
    before, output = open_night(store, BEFORE).read(SUCCESS), job.output.read(SUCCESS)
    # Of another dataset than the one that is there, it is done, or the dataset that it was begun for is no more.
    stale = read_night(store, BEFORE) is None or (output is not None and output != before)
    if not stale and read_night(store, AFTER) is None:
        return True
    with _held(job):
        if not stale:
            _swap(job)
        _end(job)
    return False


def _swap(job: FolderJob) -> None:
    """Put the update in the place of the dataset."""
    store, place = job.store, job.place
    new, old = store.root / f"{PREFIX}{AFTER}", store.root / REPLACED
    with explained(str(place)):
        if place.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.rename(place, old)
        _write_report(LocalStorage(str(new)), LocalStorage(str(old)))
        os.rename(new, place)
        sync(place.parent)


def _write_report(new: Storage, old: Storage) -> None:
    """Write the report of the update as that of a job, with the runs before it.

    Where nothing was embedded, the job that follows makes one, with the runs before it from the old one.
    """
    before, night = old.read(REPORT), json.loads(new.read(NIGHT) or b"{}")
    if not night["embedded"]:
        new.write(REPORT, before or b"{}")
        return
    values = {each.name: night["report"][each.name] for each in fields(RunReport)}
    values["history"] = earlier_runs(before)
    new.write(REPORT, (json.dumps(values, indent=1, ensure_ascii=False) + "\n").encode())


def _end(job: FolderJob) -> None:
    """Make an ordinary dataset of the update, with the log and other people's files of the old one; clear the store."""
    old, place = job.store.root / REPLACED, job.place
    with explained(str(place)):
        for path in old.iterdir() if old.is_dir() and place.is_dir() else ():
            own = path.name.startswith(("_", "part-")) and path.name != RUN_LOG
            if not own and not (place / path.name).exists():
                os.rename(path, place / path.name)
    for name in (ROWS, DROPPED, NIGHT) if old.is_dir() else ():
        job.output.remove(name)
    for name in job.store.folders():
        if name != lease.FOLDER:
            remove_folder(job.store, name)
