"""The frozen types of a night: what was asked for, what came of every row, and what is written down."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum

from pipeline.core.errors import PipelineError

# Names within a store of nights.
WORK, MANIFESTS, RUNS = "_work", "_manifests", "runs.parquet"
# Names within a night.
NIGHT, ROWS, DROPPED = "_night.json", "_rows.parquet", "_dropped.parquet"
SNAPSHOT, PARTITION = "snapshot", "partition"


class NightError(PipelineError):
    """The store, or what the nightly job was told, does not allow this night."""

    exit_code = 2


class NightUnfinished(PipelineError):
    """The night is not published; the same command goes on with it."""


class Kind(IntEnum):
    """What becomes of a row, by the night before."""

    CARRIED = 0
    NEW = 1
    CHANGED = 2
    RETRIED = 3
    # Known to the night before, which was made by another model, backend, ...
    ANEW = 4
    # The result of another row with the same bytes.
    DUPLICATE = 5


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the nightly job was told besides the config of the main job; ``keep`` is 0 for all nights.

    ``run`` is the name of this run in its log, and in those of the jobs that it runs.
    """

    store: str
    layout: str = SNAPSHOT
    keep: int = 0
    content: str = "auto"
    run: str = ""


@dataclass(frozen=True, slots=True)
class Night:
    """One published night, as ``_night.json`` and a row of ``runs.parquet`` hold it; times are in UTC.

    ``kinds`` counts rows by :class:`Kind` and those that left the manifest (``dropped``), ``counts`` the rows of the
    manifest by status. ``embedded`` rows were read and decoded, ``images`` of them came out with an embedding.
    ``shared`` parts are files of the night before, ``written`` ones were written. ``anew`` says why nothing was carried
    though there was a night before; ``dataset`` is empty where a partition has no rows.
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
    # What must be the same for a night without new rows to be believed, see pipeline.nightly.embed.
    signs: Mapping[str, object] = field(default_factory=dict)
    # The manifests that parts of this dataset were written for, see pipeline.dataset.plan.source_of.
    sources: tuple[str, ...] = ()
