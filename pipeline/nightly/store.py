"""The store of nights: the published ones, files that two nights share, removal of old ones."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, fields
from datetime import date, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.core.errors import StorageError
from pipeline.dataset.commits import SUCCESS
from pipeline.nightly.records import MANIFESTS, NIGHT, PREFIX, RUNS, WORK, Night
from pipeline.storage.base import Storage
from pipeline.storage.factory import open_storage
from pipeline.storage.local import LocalStorage, sync
from pipeline.storage.object_store import ObjectStorage
from pipeline.storage.retry import retried
from pipeline.storage.urls import explained

log = logging.getLogger(__name__)
_TIME = pa.timestamp("ms", tz="UTC")
RUN_SCHEMA = pa.schema([
    ("date", pa.date32()), ("started", _TIME), ("finished", _TIME), ("seconds", pa.float64()), ("rows", pa.int64()),
    *((kind, pa.int64()) for kind in ("carried", "new", "changed", "retried", "anew", "duplicate", "dropped")),
    ("embedded", pa.int64()), ("images", pa.int64()), ("images_per_second", pa.float64()), ("shared", pa.int64()),
    ("written", pa.int64()), ("exit_code", pa.int64()), ("ok", pa.int64()), ("failed", pa.int64()),
    ("counts", pa.string()), ("layout", pa.string()), ("previous", pa.string()), ("reason", pa.string()),
    ("fingerprints", pa.string()), ("versions", pa.string()), ("dataset", pa.string()),
])  # fmt: skip


def url_of(storage: Storage, *names: str) -> str:
    """The address of a file or a folder in a storage."""
    return "/".join([storage.url.rstrip("/"), *names])


def open_below(storage: Storage, *names: str) -> Storage:
    """A folder of a storage as a storage of its own."""
    return open_storage(url_of(storage, *names))


def open_night(store: Storage, day: str) -> Storage:
    """The folder of a night."""
    return open_below(store, f"{PREFIX}{day}")


def days(store: Storage) -> list[str]:
    """The dates that have a folder, oldest first."""
    return sorted(day for name in store.folders() if is_day(day := name.removeprefix(PREFIX)) and day != name)


def is_day(text: str) -> bool:
    """True for a date such as 2026-11-22."""
    with suppress(ValueError):
        return date.fromisoformat(text).isoformat() == text
    return False


def read_night(store: Storage, day: str) -> Night | None:
    """A published night, or None if it is not published.

    Raises:
        StorageError: ``_night.json`` is torn.
    """
    storage = open_night(store, day)
    data = storage.read(NIGHT)
    if data is None:
        return None
    known = {each.name for each in fields(Night)}
    try:
        values = {name: value for name, value in dict(json.loads(data)).items() if name in known}
        return Night(**{**values, "sources": tuple(values.get("sources", ()))})
    except (ValueError, TypeError) as error:
        raise StorageError(
            f"{storage.url}/{NIGHT}: not readable ({error}); remove the night and run it again"
        ) from error


def newest_before(store: Storage, day: str) -> Night | None:
    """The newest published night that is older than ``day``."""
    for each in reversed([one for one in days(store) if one < day]):
        if (night := read_night(store, each)) is not None:
            return night
    return None


def append_runs(store: Storage, night: Night) -> None:
    """Add a night to ``runs.parquet``, and every published one whose run was killed before it did so.

    A night that was removed and made again keeps its new row only.

    Raises:
        StorageError: the file is damaged.
    """
    table, added = _read_runs(store), list[Night]()
    finished = dict(zip(table.column("date").to_pylist(), table.column("finished").to_pylist(), strict=True))
    for each in days(store):
        if each != night.date and date.fromisoformat(each) not in finished:
            try:
                other = read_night(store, each)
            except StorageError as error:
                log.warning("%s has no row in %s: %s", each, RUNS, error)
                continue
            if other is not None:
                added.append(other)
    day = date.fromisoformat(night.date)
    if finished.get(day) != datetime.fromisoformat(night.finished):
        table = table.filter(pc.not_equal(table.column("date"), pa.scalar(day)))
        added.append(night)
    if added:
        rows = pa.Table.from_pylist([_row_of(each) for each in added], schema=RUN_SCHEMA)
        sink = pa.BufferOutputStream()
        pq.write_table(pa.concat_tables([table.cast(RUN_SCHEMA), rows]), sink)
        store.write(RUNS, sink.getvalue().to_pybytes())


def _row_of(night: Night) -> dict[str, Any]:
    ok = night.counts.get("ok", 0)
    row = {
        **asdict(night),
        **night.kinds,
        "date": date.fromisoformat(night.date),
        "started": datetime.fromisoformat(night.started),
        "finished": datetime.fromisoformat(night.finished),
        "ok": ok,
        "failed": sum(night.counts.values()) - ok,
        "counts": json.dumps(night.counts),
        "versions": json.dumps(night.versions),
        "reason": night.anew,
        "anew": night.kinds.get("anew", 0),
    }
    return {name: row[name] for name in RUN_SCHEMA.names}


def _read_runs(store: Storage) -> pa.Table:
    data = store.read(RUNS)
    if data is None:
        return RUN_SCHEMA.empty_table()
    try:
        return pq.read_table(pa.BufferReader(data))
    except (pa.ArrowException, OSError) as error:
        raise StorageError(
            f"{store.url}/{RUNS}: not readable ({error}); move it away, and the same command writes it again from the "
            "published nights"
        ) from error


def last_success(store: Storage) -> float | None:
    """The time at which the newest night with exit code 0 was finished, in seconds since the epoch.

    Raises:
        StorageError: ``runs.parquet`` is damaged.
    """
    rows = _read_runs(store).select(["finished", "exit_code"]).to_pylist()
    done: list[datetime] = [row["finished"] for row in rows if row["exit_code"] == 0]
    return max(done).timestamp() if done else None


def remove_old(store: Storage, day: str, *, keep: int) -> Iterator[str]:
    """Remove nights older than the ``keep`` newest published ones up to ``day``; yield their dates.

    Nights that were never published do not count, and are removed with older ones.
    """
    older = [one for one in days(store) if one < day]
    published = [one for one in older if is_published(store, one)]
    if len(published) < keep - 1:
        return
    oldest = [*published, day][-keep]
    for each in [one for one in older if one < oldest]:
        # The marks first, so that a night that is half removed does not count.
        night = open_night(store, each)
        night.remove(NIGHT)
        night.remove(SUCCESS)
        remove_folder(store, f"{PREFIX}{each}")
        remove_folder(store, f"{WORK}/{PREFIX}{each}")
        open_below(store, MANIFESTS).remove(f"{PREFIX}{each}.parquet")
        yield each


def is_published(store: Storage, day: str) -> bool:
    """True if the night has a ``_night.json``."""
    return open_night(store, day).size(NIGHT) is not None


def clear_work(store: Storage) -> None:
    """Remove the work folders of published nights; a run that was killed at its end leaves one."""
    for name in open_below(store, WORK).folders():
        if is_day(day := name.removeprefix(PREFIX)) and is_published(store, day):
            remove_folder(store, f"{WORK}/{name}")


def remove_folder(storage: Storage, name: str) -> None:
    """Remove a folder with its content, if it exists."""
    place = f"{storage.url}/{name}"
    with explained(place):
        if isinstance(storage, LocalStorage):
            with suppress(FileNotFoundError):
                shutil.rmtree(storage.root / name)
        elif isinstance(storage, ObjectStorage):
            fs, path = storage.fs, f"{storage.root}/{name}"

            def remove() -> None:
                fs.invalidate_cache()
                if fs.exists(path):
                    fs.rm(path, recursive=True)

            retried(place, remove)


def share_file(source: Storage, name: str, target: Storage, new: str) -> None:
    """Give ``target`` a file of ``source`` under the name ``new``: a hard link, or a copy within the object store.

    An existing file is replaced, as it may be torn.
    """
    place = f"{target.url}/{new}"
    with explained(place):
        if isinstance(source, LocalStorage) and isinstance(target, LocalStorage):
            target.make()
            _link(source.root / name, target, new)
        elif isinstance(source, ObjectStorage) and isinstance(target, ObjectStorage):
            fs, old, path = target.fs, f"{source.root}/{name}", f"{target.root}/{new}"
            retried(place, lambda: fs.cp_file(old, path))


def _link(old: Path, target: LocalStorage, new: str) -> None:
    with target.staged() as staged:
        try:
            os.link(old, staged.path)
        except FileNotFoundError:
            raise
        except OSError:
            # Another disk, or one without hard links.
            shutil.copyfile(old, staged.path)
            sync(staged.path)
        # If the target is a link to the same file already, this does nothing.
        staged.path.replace(target.root / new)
        sync(target.root)
