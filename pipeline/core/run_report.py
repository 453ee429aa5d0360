"""The frozen types of the report of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline.core.records import Parity, Timeline


@dataclass(frozen=True, slots=True)
class StagePace:
    """One stage of a run: ``images_per_second`` with its parallel threads (None where it has no clock), its core
    seconds, including those of decoder processes, and their ``share`` of all."""

    images_per_second: float | None
    core_seconds: float
    share: float


@dataclass(frozen=True, slots=True)
class Pace:
    """The throughput of a run compared with the limit that its stages set.

    ``bound`` is the limit in images/s: on a CPU the cores divided by the core seconds of an image, with a GPU the
    slowest of GPU, cores and disks. ``ratio`` is the steady throughput of the run divided by the bound; above 1 the run
    was too short. ``verdict`` is the comparison in words.
    """

    stages: Mapping[str, StagePace]
    cores_busy: float
    bound: float
    ratio: float
    verdict: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """The throughput report of one run, as written to ``_report.json``; times are seconds.

    ``rows`` counts what this run committed and ``images`` those it embedded, ``resumed_rows`` what earlier runs had
    committed. ``steady`` throughput leaves out the start-up and the first batch. ``parity`` is None for eager fp32,
    with which the others are compared, and ``decoder_parity`` for the decoder ``exact``. ``batch_sizes`` has more than
    one where the device had no memory for the first. ``pace`` is None where nothing was embedded. ``workers`` are the
    processes that embedded (:mod:`pipeline.telemetry.run_stats`), ``given_up`` the shards that are not in the dataset,
    ``repeats`` counts the rows that share the embedding of an earlier row of their shard with the same bytes.
    ``timeline`` adds up all processes, ``scores`` counts rows by their best score in equal steps from 0 to 1,
    ``history`` are earlier runs in short, oldest first. ``run`` is the name of the run in its log and its metrics.
    ``notes`` are sentences about the whole dataset that its readers must know. ``gpu_busy`` is the share of the time of
    the loop in which the GPUs computed, by their own clocks; None without one. ``peak_gpu_mib`` of ``memory`` is what
    was in use on the GPU, also by other programs. ``startup`` are seconds by phase, which add up to
    ``startup_seconds``, and ``ending`` those from the last batch to the report; a run of other processes than this one
    has their start-up in ``workers``. ``texts`` counts the rows that this run committed of a job with texts: with a
    text (``rows``), without one (``missing``), with one that a row before has too (``repeats``), with one that was cut
    to the tokens of the text tower (``truncated``). ``similarity`` counts rows by it, in equal steps from -1 to 1;
    ``text_parity`` compares the text tower with fp32, and is None where it is fp32. ``stored`` is how embeddings are
    stored, where less than the model's floats is: ``dtype``, ``dim``, ``bytes`` of an embedding, and ``recall_at_10``
    against float32 among ``sample`` rows of this run.
    """

    started: str
    rows: int
    images: int
    resumed_rows: int
    total_rows: int
    wall_seconds: float
    startup_seconds: float
    images_per_second: float
    steady_images_per_second: float = 0.0
    stages: Mapping[str, float]
    bound: str
    advice: str
    counts: Mapping[str, int]
    failures: tuple[Mapping[str, object], ...] = ()
    labels: Mapping[str, int] = field(default_factory=dict)
    prompts: Mapping[str, object]
    parity: Parity | None = None
    decoder_parity: Parity | None = None
    text_parity: Parity | None = None
    batch_sizes: tuple[int, ...] = ()
    memory: Mapping[str, float]
    machine: Mapping[str, object]
    versions: Mapping[str, str]
    fingerprints: Mapping[str, object]
    config: Mapping[str, object]
    exit_code: int = 0
    pace: Pace | None = None
    workers: tuple[object, ...] = ()
    given_up: tuple[int, ...] = ()
    repeats: int = 0
    timeline: Timeline | None = None
    scores: tuple[int, ...] = ()
    texts: Mapping[str, int] = field(default_factory=dict)
    similarity: tuple[int, ...] = ()
    history: tuple[Mapping[str, object], ...] = ()
    run: str = ""
    notes: tuple[str, ...] = ()
    gpu_busy: float | None = None
    startup: Mapping[str, float] = field(default_factory=dict)
    ending: Mapping[str, float] = field(default_factory=dict)
    stored: Mapping[str, object] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the content of ``_report.json`` as types that JSON has."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self), ensure_ascii=False, default=str))
        return plain

    def to_json(self) -> bytes:
        """Return the bytes of ``_report.json``."""
        return (json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n").encode()
