"""Before a night's first image: its manifest, the night before, and what becomes of every row."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config.schema import Config
from pipeline.manifest.ids import check_ids
from pipeline.manifest.manifest import Manifest, open_manifest
from pipeline.manifest.overlap import check_places
from pipeline.nightly.content_keys import BYTES, Content, find_content, id_type, read_keys
from pipeline.nightly.diff import OF_COPYING, OF_DECODING, OF_READING, Rule, compare
from pipeline.nightly.records import DROPPED, ROWS, SNAPSHOT, WORK, Night, NightError, Wanted
from pipeline.nightly.rows import read_batches
from pipeline.nightly.store import newest_before, open_below, open_night, remove_folder
from pipeline.storage.base import Storage
from pipeline.storage.local import LocalStorage
from pipeline.storage.urls import explained, open_arrow

BEGUN, COUNTS, COMPARED = "begun.json", "counts.json", "rows.parquet"
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Tonight:
    """A night that is being made: ``config`` writes to ``target``, ``work`` holds what is not published.

    ``anew`` says why nothing is carried from ``previous``, and is empty where rows are.
    """

    day: str
    config: Config
    wanted: Wanted
    manifest: Manifest
    content: Content
    previous: Night | None
    anew: str
    store: Storage
    work: Storage
    target: Storage


def prepare(config: Config, wanted: Wanted, store: Storage, day: str) -> Tonight:
    """Open the manifest, find the night before, and begin; or find that this very night was begun.

    Raises:
        PipelineError: the manifest or the store does not allow this night.
    """
    if config.backend.quantization == "static" and config.backend.name == "onnx_int8":
        raise NightError(
            "backend.quantization=static calibrates the model on images of the manifest, so that every night would "
            "have another model; take backend.quantization=dynamic, or backend=torch_int8"
        )
    target = open_night(store, day)
    config = replace(config, output=replace(config.output, dir=target.url))
    manifest = open_manifest(config.manifest)
    check_places(config, manifest)
    check_ids(manifest)
    content = find_content(manifest, wanted.content)
    previous = newest_before(store, day)
    if previous is not None and previous.layout != wanted.layout:
        raise NightError(
            f"{store.url}: the nights before are of --layout {previous.layout}, and a store holds nights of one "
            f"layout; give --layout {previous.layout}, or another --store"
        )
    if previous is not None and config.loader.batch_size == 0:
        # auto measures for the rows of a job, and tonight's are few.
        size = _batch_size(store, previous)
        config = replace(config, loader=replace(config.loader, batch_size=size))
    facts = {
        "layout": wanted.layout,
        "manifest": manifest.fingerprint,
        "content": str(content),
        "previous": None if previous is None else [previous.date, previous.finished],
    }
    anew = _begin(store, day, target, json.loads(json.dumps(facts)))
    if not anew and previous is not None:
        anew = _unlike(store, previous, manifest, content)
    log.info("%s: %d rows, told apart by %s", config.manifest.path, manifest.rows, content)
    if previous is not None:
        log.info("the night before is %s%s", previous.date, f"; nothing is carried: {anew}" if anew else "")
    work = open_below(store, WORK, f"date={day}", "anew" if anew else "carry")
    return Tonight(
        day=day, config=config, wanted=wanted, manifest=manifest, content=content, previous=previous, anew=anew,
        store=store, work=work, target=target,
    )  # fmt: skip


def begin_anew(tonight: Tonight, reason: str) -> Tonight:
    """The same night without the one before; what was made with it is thrown away."""
    log.warning("%s: everything is embedded anew, because of %s", tonight.day, reason)
    outer = open_below(tonight.store, WORK, f"date={tonight.day}")
    facts: dict[str, Any] = json.loads(outer.read(BEGUN) or b"{}")
    remove_folder(tonight.store, f"date={tonight.day}")
    outer.write(BEGUN, json.dumps({**facts, "anew": reason}).encode())
    return replace(tonight, anew=reason, work=open_below(outer, "anew"))


def compare_rows(tonight: Tonight) -> dict[str, int]:
    """Compare tonight's manifest with the night before, once; rows by kind. The files lie in ``work``."""
    work = tonight.work
    data = work.read(COUNTS)
    if data is not None:
        counts: dict[str, int] = json.loads(data)
        return counts
    kind, before = id_type(tonight.manifest), list[pa.RecordBatch]()
    rows: Iterable[pa.RecordBatch] = before
    if tonight.previous is not None and _ids_of(tonight.store, tonight.previous) == kind:
        rows = read_batches(open_night(tonight.store, tonight.previous.date), ROWS)
    rule = Rule(
        digest=tonight.content.digest,
        shared=tonight.wanted.layout == SNAPSHOT,
        retried=_retried(tonight.content, tonight.manifest),
        anew=bool(tonight.anew),
    )
    with scratch_of(work) as scratch, work.staged() as compared, work.staged() as dropped:
        keys = read_keys(tonight.manifest, tonight.content)
        counts = compare(
            keys, rows, rule, id_type=kind, scratch=scratch, rows=compared.path, dropped=dropped.path
        )  # fmt: skip
        compared.publish(COMPARED, replace=True)
        dropped.publish(DROPPED, replace=True)
    work.write(COUNTS, json.dumps(counts).encode())
    return counts


@contextmanager
def scratch_of(work: Storage) -> Iterator[Path]:
    """A folder on a local disk for what memory does not hold: beside the work, or TMPDIR's for an object store."""
    place = None
    if isinstance(work, LocalStorage):
        work.make()
        place = work.root
    with explained(str(place or "a temporary folder (TMPDIR)")):
        made = tempfile.TemporaryDirectory(dir=place, prefix="_scratch-")
    with made as folder:
        yield Path(folder)


def _begin(store: Storage, day: str, target: Storage, facts: dict[str, Any]) -> str:
    """Begin a night, or find it begun; returns why it was begun anew, if it was."""
    outer = open_below(store, WORK, f"date={day}")
    data = outer.read(BEGUN)
    found: dict[str, Any] = json.loads(data) if data is not None else {}
    anew = str(found.pop("anew", ""))
    if found == facts:
        return anew
    if found:
        changed = ", ".join(sorted(name for name in facts if found.get(name) != facts[name]))
        log.warning("%s: was begun with another %s; it begins again", day, changed)
        remove_folder(store, target.url.rstrip("/").rpartition("/")[2])
    remove_folder(store, f"{WORK}/date={day}")
    outer.write(BEGUN, json.dumps(facts).encode())
    return ""


def _batch_size(store: Storage, previous: Night) -> int:
    from pipeline.dataset.plan import read

    found = read(open_night(store, previous.date))
    size = int(found.fingerprints["batch_size"]) if found is not None else 0
    # Few rows have small batches, which are no measure for more.
    return size if found is not None and size < found.rows else 0


def _unlike(store: Storage, previous: Night, manifest: Manifest, content: Content) -> str:
    """Why the rows of the night before tell nothing of tonight's."""
    ids = _ids_of(store, previous)
    if ids != id_type(manifest):
        return f"ids of another type ({ids}, now {id_type(manifest)})"
    if previous.content != str(content):
        return f"contents told by {previous.content} there, now by {content}"
    return ""


def _ids_of(store: Storage, previous: Night) -> pa.DataType:
    url = f"{open_night(store, previous.date).url.rstrip('/')}/{ROWS}"
    with explained(url), open_arrow(url) as file:
        return pq.read_schema(file).field("id").type


def _retried(content: Content, manifest: Manifest) -> tuple[str, ...]:
    """The failures that may be over by now."""
    if content.how == BYTES:
        return OF_DECODING if manifest.image_kind == "bytes" else (*OF_READING, *OF_DECODING)
    return (*OF_READING, *OF_DECODING, *(OF_COPYING if content.digest else ()))
