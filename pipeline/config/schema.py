"""The schemas of everything under ``conf/``; what their values may be is in :mod:`pipeline.config.ranges`.

A ``DictConfig`` enters :func:`~pipeline.config.compose.to_config` and goes no further: the rest of the package
sees frozen dataclasses.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DEMO_MODEL = "demo"
OUTPUT_COLUMNS = ("embedding", "label", "score", "top_labels", "top_scores", "status", "error")

# Formats that Pillow decodes by itself, from bytes alone. Absent on purpose: those that start another
# program or read other files (EPS, PDF, WMF, ...), and scientific stubs (FITS, HDF5, GRIB, BUFR). MPO, the
# format of 3-D cameras and gain maps, opens as the JPEG that it begins with.
FORMATS = (
    "AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "QOI", "SGI",
    "TGA", "TIFF", "WEBP",
)  # fmt: skip


@dataclass(frozen=True)
class ModelConfig:
    """Group ``model``: which checkpoint, and which version of it."""

    name: str = DEMO_MODEL
    revision: str | None = None
    weights: str = "pretrained"
    seed: int = 0


@dataclass(frozen=True)
class BackendConfig:
    """Group ``backend``: which runtime, in which precision, on which device."""

    name: str = "torch"
    precision: str = "auto"
    device: str = "auto"
    compile: str = "none"
    quantization: str = "dynamic"
    streams: int = 0
    artifacts: str | None = None


def _by_precision(fp32: float, fp16: float, bf16: float, int8: float, fp8: float) -> dict[str, float]:
    return {"fp32": fp32, "fp16": fp16, "bf16": bf16, "int8": int8, "fp8": fp8}


@dataclass(frozen=True)
class ParityConfig:
    """Group ``parity``: how near to fp32 a backend must be before a job uses it, by its precision.

    ``decoder`` is the lowest cosine by ``images.decoder``: how near its embeddings must be to those of ``exact``.
    """

    images: int = 64
    lowest_cosine: dict[str, float] = field(default_factory=lambda: _by_precision(0.9999, 0.999, 0.995, 0.98, 0.98))
    mean_cosine: dict[str, float] = field(default_factory=lambda: _by_precision(0.99999, 0.9995, 0.998, 0.99, 0.99))
    top1: dict[str, float] = field(default_factory=lambda: _by_precision(0.98, 0.95, 0.95, 0.9, 0.9))
    decoder: dict[str, float] = field(default_factory=lambda: {"fast": 0.999, "scaled": 0.995, "gpu": 0.999})


@dataclass(frozen=True)
class ManifestConfig:
    """Group ``manifest``: where the rows are, and what their columns mean."""

    path: str | None = None
    id: str = "id"
    image: str = "path"
    keep: list[str] = field(default_factory=list)
    root: str | None = None
    shard_rows: int = 4096
    demo_scenes: int = 1000


@dataclass(frozen=True)
class ImagesConfig:
    """Group ``images``: how encoded bytes become pixels, and what is refused."""

    decoder: str = "exact"
    exif: str = "apply"
    transparency: str = "white"
    crop_corner: str = "floor"
    repeats: str = "once"
    max_pixels: int = 100_000_000
    max_bytes: int = 268_435_456
    formats: list[str] = field(default_factory=lambda: list(FORMATS))
    schemes: list[str] = field(default_factory=lambda: ["file"])
    private_hosts: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class LoaderConfig:
    """Group ``loader``: the batches, the threads that fill them, and what a single image may cost.

    A ``batch_size`` of 0 is what ``auto`` is kept as: see :mod:`pipeline.engine.batch_size`.
    """

    batch_size: int = 64
    workers: int = 0
    prefetch: int = 3
    isolation: str = "process"
    decode_seconds: float = 60.0
    decode_memory: int = 2_147_483_648
    read_seconds: float = 30.0


@dataclass(frozen=True)
class PromptsConfig:
    """Group ``prompts``: the label set and its templates."""

    labels: list[str] = field(default_factory=list)
    path: str | None = None
    templates: list[str] = field(default_factory=lambda: ["a photo of a {}"])
    cache: str | None = None


@dataclass(frozen=True)
class LabelsConfig:
    """Group ``labels``: how embeddings are scored against the prompts."""

    top_k: int = 5
    threshold: float | None = None
    scoring: str = "auto"


@dataclass(frozen=True)
class OutputConfig:
    """Group ``output``: where the dataset goes and how vectors are stored."""

    dir: str = "outputs/demo"
    dtype: str = "float32"
    compression: str = "zstd"
    lease_seconds: float = 60.0


@dataclass(frozen=True)
class ErrorsConfig:
    """Group ``errors``: how many failed images a good run may have, and how long an interrupted one may take."""

    max_fraction: float = 0.05
    grace_seconds: float = 20.0


@dataclass(frozen=True)
class ClusterConfig:
    """Group ``cluster``: where the shards run; see the YAML files for what each kind takes."""

    name: str = "inline"
    part: str | None = None
    workers: int = 0
    cores: int = 0
    tries: int = 3
    wait_seconds: float = 600.0
    host: str = "127.0.0.1"
    port: int = 0
    dashboard: bool = False
    dashboard_host: str = "127.0.0.1"
    dashboard_port: int = 8787
    address: str | None = None
    tls_ca: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    slurm_partition: str | None = None
    slurm_account: str | None = None
    slurm_time: str = "04:00:00"
    slurm_memory: str = "32GiB"
    slurm_gpus: int = 0
    slurm_directives: list[str] = field(default_factory=list)
    slurm_prologue: list[str] = field(default_factory=list)
    slurm_python: str | None = None
    kubernetes_image: str | None = None
    kubernetes_namespace: str = "default"
    kubernetes_memory: str = "32Gi"
    kubernetes_gpus: int = 0
    kubernetes_env: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ReportConfig:
    """Group ``report``: what a person sees during and after the run."""

    html: bool = True
    examples: int = 24
    progress: str = "auto"


@dataclass(frozen=True)
class LogConfig:
    """Group ``log``: what lines of the log look like, and which of them the terminal shows."""

    format: str = "text"
    level: str = "info"


@dataclass(frozen=True)
class MetricsConfig:
    """Group ``metrics``: who is told of the run besides people."""

    textfile: str | None = None
    pushgateway: str | None = None
    job: str = "clip_pipeline"
    opentelemetry: bool = False


@dataclass(frozen=True)
class RunConfig:
    """Group ``run``: whether the job is done or only estimated; ``json`` writes the estimate to standard output."""

    dry: bool = False
    json: bool = False


@dataclass(frozen=True)
class ServeConfig:
    """Group ``serve``: where the service listens, how long requests wait for one another, and what they may cost."""

    host: str = "127.0.0.1"
    port: int = 8000
    wait_ms: float = 3.0
    shapes: int = 4
    queue: int = 1024
    requests: int = 1024
    client_requests: int = 256
    max_images: int = 64
    max_texts: int = 1000
    max_text_chars: int = 2000
    max_body_bytes: int = 67_108_864
    held_bytes: int = 536_870_912
    text_cache_bytes: int = 67_108_864
    header_seconds: float = 10.0
    timeout_seconds: float = 30.0
    grace_seconds: float = 30.0


@dataclass(frozen=True)
class Config:
    """The whole config, one field for each group."""

    model: ModelConfig = field(default_factory=ModelConfig)
    backend: BackendConfig = field(default_factory=BackendConfig)
    parity: ParityConfig = field(default_factory=ParityConfig)
    manifest: ManifestConfig = field(default_factory=ManifestConfig)
    images: ImagesConfig = field(default_factory=ImagesConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    labels: LabelsConfig = field(default_factory=LabelsConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    errors: ErrorsConfig = field(default_factory=ErrorsConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    run: RunConfig = field(default_factory=RunConfig)
    log: LogConfig = field(default_factory=LogConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)


def conf_dir() -> Path:
    """The folder of YAML files that belongs to this package: within it in a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    return package / "conf" if (package / "conf").is_dir() else package.parent / "conf"


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint for a typo, or an empty string when nothing is near."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"did you mean {match[0]}?" if match else ""


def value_of(config: Config, key: str) -> Any:
    """The value at a dotted key such as ``loader.batch_size``."""
    group, name = key.split(".", 1)
    return getattr(getattr(config, group), name)
