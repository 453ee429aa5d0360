"""What an estimate comes to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a job would still take; seconds, bytes, and memory in MiB.

    ``seconds`` are from the command to the last commit, with ``startup_seconds``, and lie between ``low`` and ``high``
    if the machine has no more and no less to do than while it was measured; ``scenes_seconds`` for rendering the demo's
    scenes come on top. ``cores_busy`` is how many cores the sample had. ``output_bytes`` are still to be written,
    ``done_bytes`` are there; ``free_bytes`` is None for a store, which does not tell. ``memory`` has peaks by kind, as
    the report of a run has, and ``shard_mib`` are in it: what whole shards take beyond those of the sample. ``failed``
    is the expected share of rows, ``failed_low`` to ``failed_high`` its likely range. ``processes`` is None where only
    those of one are known. ``exit_code`` is the one that the run is expected to end with, and ``problems`` say why
    where that is not 0.
    """

    output: str
    rows: int
    shards: int
    done_rows: int
    done_shards: int
    damaged_shards: int
    left_rows: int
    left_shards: int
    startup_seconds: float
    seconds: float
    low: float
    high: float
    images: int = 0
    images_per_second: float = 0.0
    cores_busy: float = 0.0
    batch_size: int = 0
    sample: Mapping[str, float] = field(default_factory=dict)
    scenes_seconds: float = 0.0
    output_bytes: int = 0
    done_bytes: int = 0
    free_bytes: int | None = None
    stored: str = ""
    memory: Mapping[str, float] = field(default_factory=dict)
    shard_mib: float = 0.0
    decoders: int = 0
    failed: float = 0.0
    failed_low: float = 0.0
    failed_high: float = 0.0
    counts: Mapping[str, int] = field(default_factory=dict)
    error_example: str = ""
    repeats: float = 0.0
    bound: str = ""
    advice: str = ""
    pace: str = ""
    processes: int | None = 1
    about_processes: str = ""
    problems: tuple[str, ...] = ()
    exit_code: int = 0
