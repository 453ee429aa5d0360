"""The start of a night: its manifest, the previous night, and the comparison of the two."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.config.schema import Config
from pipeline.dataset import plan
from pipeline.dataset.names import check_columns
from pipeline.dataset.saved_config import with_backend_of
from pipeline.manifest.ids import check_ids
from pipeline.manifest.manifest import MOST_SHARDS, Manifest, open_manifest
from pipeline.manifest.overlap import check_places
from pipeline.nightly.content_keys import BYTES, Content, find_content, id_type, read_keys, read_schema
from pipeline.nightly.diff import OF_COPYING, OF_DECODING, OF_READING, Rule, compare
from pipeline.nightly.records import (
    DROPPED,
    EARLIER,
    MANIFESTS,
    PREFIX,
    ROWS,
    SNAPSHOT,
    WORK,
    Kind,
    Night,
    NightError,
    NightOptions,
)
from pipeline.nightly.rows import copy_rows, read_batches
from pipeline.nightly.store import newest_before, open_below, open_night, remove_folder, url_of
from pipeline.storage.base import Storage
from pipeline.storage.local import LocalStorage
from pipeline.storage.moved import has_moved
from pipeline.storage.urls import explained

BEGUN, COUNTS, COMPARED, COPIED = "begun.json", "counts.json", "rows.parquet", "changed.json"
# The layout of the work folder: a night that was begun with another one begins again.
FORMAT = 2
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PendingNight:
    """A night that is not published yet.

    ``config`` is the main job's, with ``output`` as its output. ``work`` holds intermediate files. ``anew`` is the
    reason why nothing is carried from ``previous``; it is empty if rows are carried.
    """

    day: str
    config: Config
    options: NightOptions
    manifest: Manifest
    content: Content
    previous: Night | None
    anew: str
    store: Storage
    work: Storage
    output: Storage

    @property
    def snapshot(self) -> bool:
        """True if the night holds every row of the manifest, False if it holds those that are not carried."""
        return self.options.layout == SNAPSHOT

    @property
    def carried_from(self) -> Night | None:
        """The previous night, if rows are carried from it."""
        return None if self.anew else self.previous

    def compared(self, *columns: str) -> Iterator[pa.RecordBatch]:
        """Columns of the comparison (see :class:`~pipeline.nightly.diff.Compared`), a few rows at a time."""
        return read_batches(self.work, COMPARED, columns)

    def positions(self, kinds: Iterable[Kind]) -> NDArray[np.int64]:
        """The rows of the manifest of these kinds."""
        wanted = pa.array([*kinds], pa.int8())
        batches = self.compared("position", "kind")
        found = [batch["position"].filter(pc.is_in(batch["kind"], wanted)) for batch in batches]
        rows: NDArray[np.int64] = pa.chunked_array(found, pa.int64()).to_numpy()
        return rows


@dataclass(frozen=True, slots=True)
class Target:
    """The rows of a night's dataset as a manifest, and the config of a main job over it."""

    config: Config
    manifest: Manifest


def prepare(config: Config, options: NightOptions, store: Storage, day: str) -> PendingNight:
    """Open the manifest, find the previous night, and begin this one or find it begun.

    Raises:
        PipelineError: the manifest or the store does not allow this night.
    """
    if config.backend.quantization == "static" and config.backend.name == "onnx_int8":
        raise NightError(
            "backend.quantization=static calibrates the model on images of the manifest, so that every night would "
            "have another model; take backend.quantization=dynamic, or backend=torch_int8"
        )
    if config.manifest.image is None:
        raise NightError(
            "manifest.image=null: nights are of images, whose content is compared; embed texts alone with "
            "python -m pipeline.run"
        )
    output = open_night(store, day)
    config = config.changed({"output.dir": output.url})
    manifest = open_manifest(config.manifest)
    if not manifest.counted:
        raise NightError(
            f"manifest.path={config.manifest.path}: nights compare the rows of a manifest, and those of tars are not "
            "known before they are embedded; make one of them: python -m pipeline.manifest tar"
        )
    check_columns(config)
    check_places(config, manifest)
    if not manifest.has_rows_of(_begun(store, day).get("manifest")):
        check_ids(manifest)
    content = find_content(manifest, options.content)
    previous = newest_before(store, day)
    if previous is not None and previous.layout != options.layout:
        raise NightError(
            f"{store.url}: the previous nights have --layout {previous.layout}, and a store holds nights of one "
            f"layout; give --layout {previous.layout}, or another --store"
        )
    from pipeline.engine.batch_size import is_default_of_cuda

    if previous is not None:
        # auto stays with what the rows that are there were made by.
        recipe: Any = previous.signs.get("recipe", {})
        config = with_backend_of(config, recipe)
    if previous is not None and (config.loader.batch_size == 0 or is_default_of_cuda(config)):
        # auto measures for the rows of a job, and tonight's are few; a night before may have had another GPU.
        config = config.changed({"loader.batch_size": _batch_size(store, previous)})
    facts = {
        "format": FORMAT,
        "layout": options.layout,
        "manifest": manifest.fingerprint,
        "content": str(content),
        "previous": None if previous is None else [previous.date, previous.finished],
    }
    anew = _begin(store, day, json.loads(json.dumps(facts)))
    if not anew and previous is not None:
        anew = _incomparable(store, previous, manifest, content)
    log.info("%s: %d rows, content compared by %s", config.manifest.path, manifest.rows, content)
    if previous is not None:
        log.info("previous night: %s%s", previous.date, f"; nothing is carried: {anew}" if anew else "")
    work = open_below(store, WORK, f"{PREFIX}{day}", "anew" if anew else "carry")
    return PendingNight(day, config, options, manifest, content, previous, anew, store, work, output)


def begin_anew(pending: PendingNight, reason: str) -> PendingNight:
    """Begin the same night again without the previous one; remove what was made so far."""
    log.warning("%s: every row is embedded again: %s", pending.day, reason)
    outer = open_below(pending.store, WORK, f"{PREFIX}{pending.day}")
    facts: dict[str, Any] = json.loads(outer.read(BEGUN) or b"{}")
    remove_folder(pending.store, f"{PREFIX}{pending.day}")
    outer.write(BEGUN, json.dumps({**facts, "anew": reason}).encode())
    return replace(pending, anew=reason, work=open_below(outer, "anew"))


def compare_rows(pending: PendingNight) -> dict[str, int]:
    """Compare the manifest with the previous night, unless that is done; return rows by kind."""
    work = pending.work
    data = work.read(COUNTS)
    if data is not None:
        counts: dict[str, int] = json.loads(data)
        return counts
    rule = Rule(
        digest=pending.content.digest,
        shared=pending.snapshot,
        retried=_retried(pending.content, pending.manifest),
        anew=bool(pending.anew),
        id_type=id_type(pending.manifest),
    )
    before: Iterable[pa.RecordBatch] = ()
    if pending.previous is not None and _id_type(pending.store, pending.previous) == rule.id_type:
        before = read_batches(*_rows_of(pending.store, pending.previous))
    with _scratch(work) as scratch:
        found = compare(read_keys(pending.manifest, pending.content), before, rule, scratch)
        work.adopt(found.rows, COMPARED, replace=True)
        # Nobody reads the work folder as a dataset; the name is the one that earlier versions know.
        work.adopt(found.dropped, EARLIER[DROPPED], replace=True)
    work.write(COUNTS, json.dumps(found.counts).encode())
    return found.counts


def open_target(pending: PendingNight) -> Target:
    """The rows of the night's dataset: the whole manifest, or for a partition a copy of the rows not carried.

    The copy stays in the store for repairs. With ``manifest.shard_rows=auto`` the shards are as long as those of the
    previous night, which has equal parts then; without one, or with more rows than such shards hold, it stays ``auto``.
    """
    manifest, config = pending.manifest, pending.config
    if pending.previous is not None and not config.manifest.shard_rows:
        found = plan.read(open_night(pending.store, pending.previous.date))
        if found is not None and plan.count_shards(manifest.rows, found.shard_rows) <= MOST_SHARDS:
            config = config.changed({"manifest.shard_rows": found.shard_rows})
    if pending.snapshot:
        return Target(config, manifest)
    folder, name = open_below(pending.store, MANIFESTS), f"{PREFIX}{pending.day}.parquet"
    if pending.work.read(COPIED) is None or folder.size(name) is None:
        columns = config.manifest.columns
        copy_rows(manifest, pending.positions({*Kind} - {Kind.CARRIED}), columns, folder, name)
        pending.work.write(COPIED, b"{}\n")
    config = config.changed({"manifest.path": url_of(folder, name), "manifest.root": manifest.root})
    return Target(config, open_manifest(config.manifest))


@contextmanager
def _scratch(work: Storage) -> Iterator[Path]:
    """An empty folder on a local disk: in the work folder, or in TMPDIR for an object store."""
    place = None
    if isinstance(work, LocalStorage):
        work.make()
        place = work.root
    with explained(str(place or "a temporary folder (TMPDIR)")):
        made = tempfile.TemporaryDirectory(dir=place, prefix="_scratch-")
    with made as folder:
        yield Path(folder)


def _begin(store: Storage, day: str, facts: dict[str, Any]) -> str:
    """Begin a night, or find it begun with the same facts; return why it was begun anew, if it was."""
    outer, found = open_below(store, WORK, f"{PREFIX}{day}"), _begun(store, day)
    anew = str(found.pop("anew", ""))
    begun, now = found.get("manifest"), facts["manifest"]["root"]
    there = begun.get("root") if isinstance(begun, dict) else None
    if there is not None and now is not None and has_moved(there, now):
        facts = {**facts, "manifest": {**facts["manifest"], "root": there}}
    if found == facts:
        return anew
    if found:
        changed = ", ".join(sorted(name for name in facts if found.get(name) != facts[name]))
        log.warning("%s: was begun with another %s; it begins again", day, changed)
        remove_folder(store, f"{PREFIX}{day}")
    remove_folder(store, f"{WORK}/{PREFIX}{day}")
    outer.write(BEGUN, json.dumps(facts).encode())
    return ""


def _begun(store: Storage, day: str) -> dict[str, Any]:
    """The facts of a night that was begun, written behind the check of its ids; empty if it was not."""
    found: dict[str, Any] = json.loads(open_below(store, WORK, f"{PREFIX}{day}").read(BEGUN) or b"{}")
    return found


def _batch_size(store: Storage, previous: Night) -> int:
    found = plan.read(open_night(store, previous.date))
    size = int(found.fingerprints["batch_size"]) if found is not None else 0
    # A dataset of few rows has a small batch size, which is no measure for more rows.
    return size if found is not None and size < found.rows else 0


def _incomparable(store: Storage, previous: Night, manifest: Manifest, content: Content) -> str:
    """The reason why rows cannot be compared with those of the previous night; empty if they can."""
    ids = _id_type(store, previous)
    if ids != id_type(manifest):
        return f"ids of another type ({ids}, now {id_type(manifest)})"
    if previous.content != str(content):
        return f"content compared by {previous.content} there, now by {content}"
    return ""


def _id_type(store: Storage, previous: Night) -> pa.DataType:
    return read_schema(url_of(*_rows_of(store, previous))).field("id").type


def _rows_of(store: Storage, previous: Night) -> tuple[Storage, str]:
    """The folder of a night, and the name of the file with id, key and status of its rows."""
    night = open_night(store, previous.date)
    return night, ROWS if night.size(ROWS) is not None else EARLIER[ROWS]


def _retried(content: Content, manifest: Manifest) -> tuple[str, ...]:
    """The failures that may have passed."""
    if content.how == BYTES:
        return OF_DECODING if manifest.image_kind == "bytes" else (*OF_READING, *OF_DECODING)
    return (*OF_READING, *OF_DECODING, *(OF_COPYING if content.digest else ()))
