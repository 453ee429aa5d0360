"""Names and records of the nightly job: options, row kinds, the published night."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum

from pipeline.core.errors import PipelineError

# Names within a store of nights.
WORK, MANIFESTS, RUNS, PREFIX = "_work", "_manifests", "runs.parquet", "date="
# Names within a night. Rows and dropped ids are Parquet files too, but readers of a folder must not take them for rows
# of the dataset, and many read every *.parquet.
NIGHT, ROWS, DROPPED = "_night.json", "_rows.night", "_dropped.night"
# The names that earlier versions gave them.
EARLIER = {ROWS: "_rows.parquet", DROPPED: "_dropped.parquet"}
SNAPSHOT, PARTITION = "snapshot", "partition"


class NightError(PipelineError):
    """The store, the manifest or an option does not allow this night."""

    exit_code = 2


class NightUnfinished(PipelineError):
    """The night is not published; the same command continues it."""


class Kind(IntEnum):
    """Source of a row's result, given the previous night."""

    CARRIED = 0
    NEW = 1
    CHANGED = 2
    RETRIED = 3
    # In the previous night, which was made by another model, backend, ...
    ANEW = 4
    # The result of another row with the same bytes.
    DUPLICATE = 5


# Kinds whose images are read and embedded.
EMBEDDED = (Kind.NEW, Kind.CHANGED, Kind.RETRIED, Kind.ANEW)


@dataclass(frozen=True, slots=True)
class NightOptions:
    """Options of the nightly job besides the config of the main job.

    ``keep`` is the number of nights that stay, 0 for all. ``run`` names this run in its log and in those of its jobs.
    """

    store: str
    layout: str = SNAPSHOT
    keep: int = 0
    content: str = "auto"
    run: str = ""


@dataclass(frozen=True, slots=True)
class Night:
    """One published night, as ``_night.json`` and a row of ``runs.parquet`` hold it; times are in UTC.

    ``kinds`` counts rows by :class:`Kind` and the ids that left the manifest (``dropped``); ``counts`` is the rows of
    the manifest by status. ``embedded`` rows were read and decoded, ``images`` of them have an embedding. ``shared``
    parts are files of the previous night, ``written`` parts are new files. ``anew`` is the reason why nothing was
    carried from an existing previous night. ``dataset`` is empty for a partition without rows.
    """

    date: str
    layout: str
    dataset: str
    previous: str | None
    anew: str
    content: str
    started: str
    finished: str
    seconds: float
    rows: int
    kinds: Mapping[str, int]
    counts: Mapping[str, int]
    embedded: int
    images: int
    images_per_second: float
    shared: int
    written: int
    exit_code: int
    verdict: str
    fingerprints: str
    versions: Mapping[str, str] = field(default_factory=dict)
    # Facts that identify the job without running it, see pipeline.nightly.embed.signs_of.
    signs: Mapping[str, object] = field(default_factory=dict)
    # The manifests that parts of this dataset were written for, see pipeline.dataset.plan.source_of.
    sources: tuple[str, ...] = ()
