"""Records of a benchmark of backends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pipeline.config.choices import BACKENDS
from pipeline.config.schema import ParityConfig


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the table: a backend and its options; :mod:`pipeline.bench.selection` reads its short form."""

    backend: str
    precision: str = "auto"
    compile: str = "none"
    quantization: str = "dynamic"

    @property
    def file_name(self) -> str:
        """The name of the row's files, unique among all rows."""
        return "-".join([self.backend, self.precision, self.compile, self.quantization])

    def title(self, precision: str) -> str:
        """A title such as ``torch bf16 compiled``; ``precision`` is the one that was opened."""
        words = [self.backend]
        if len(BACKENDS[self.backend].precisions) != 1 and precision != "auto":
            words.append(precision)
        if self.compile != "none":
            words.append("compiled" if self.compile == "default" else self.compile)
        if self.backend == "onnx_int8":
            words.append(self.quantization)
        return " ".join(words)

    def overrides(self, precision: str) -> list[str]:
        """The overrides of ``python -m pipeline.run`` that choose it."""
        words = [f"backend={self.backend}"]
        if len(BACKENDS[self.backend].precisions) != 1:
            words.append(f"backend.precision={precision}")
        if self.compile != "none":
            words.append(f"backend.compile={self.compile}")
        if self.quantization != "dynamic":
            words.append(f"backend.quantization={self.quantization}")
        return words


@dataclass(frozen=True, slots=True)
class Measurement:
    """One row at one batch size.

    ``startup_seconds`` is opening the encoder and its first batch. ``images_per_second`` has one value for each
    round, and ``latencies`` the seconds of every single call (batch 1 only). Memory is in MiB: ``rss`` the peak of
    resident memory while measuring, ``device`` the GPU memory it holds besides the CUDA context (0 on the CPU).
    """

    batch: int
    startup_seconds: float
    images_per_second: tuple[float, ...]
    latencies: tuple[float, ...]
    rss: float
    device: float
    lowest_cosine: float
    mean_cosine: float
    top1: float


@dataclass(frozen=True, slots=True)
class Result:
    """The measurements of one row; ``failure`` is the reason why it could not run, or why it stopped after ``at``."""

    row: Row
    precision: str
    weight_bytes: int = 0
    fingerprint: Mapping[str, str] = field(default_factory=dict)
    at: tuple[Measurement, ...] = ()
    failure: str | None = None

    @property
    def title(self) -> str:
        """The row's title, with the precision that was opened."""
        return self.row.title(self.precision)


@dataclass(frozen=True, slots=True)
class Bench:
    """The whole benchmark, as written to ``backends.json``; ``results`` begin with the reference, torch fp32 eager."""

    started: str
    command: str
    model: str
    sample: str
    images: int
    labels: int
    repeats: int
    seconds: float
    machine: Mapping[str, object]
    versions: Mapping[str, str]
    parity: ParityConfig
    results: tuple[Result, ...]
