"""Schemas of the config groups under ``conf/``.

An annotation holds the type of a key and the constraint on its value; OmegaConf reads the type, and
:mod:`pipeline.config.validate` checks the constraint. Outside of :mod:`pipeline.config` a config is always an instance
of these frozen dataclasses, never a ``DictConfig``.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from pipeline.config.choices import BACKENDS, CLUSTERS, BackendInfo
from pipeline.config.ranges import AUTO, DefaultNumber, OneOf, Range, Text, filled

DEMO_MODEL = "demo"
OUTPUT_COLUMNS = ("embedding", "label", "score", "top_labels", "top_scores", "status", "error")

# Formats that Pillow decodes from bytes alone. Formats that start another program or read other files (EPS, PDF, WMF,
# ...) and scientific stubs (FITS, HDF5, GRIB, BUFR) are left out on purpose. MPO, the format of 3-D cameras and gain
# maps, opens as the JPEG that it begins with.
PILLOW_FORMATS = (
    "AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "QOI", "SGI",
    "TGA", "TIFF", "WEBP",
)  # fmt: skip
# HEIF, of which HEIC is the usual kind, is decoded by pi-heif, and JXL (JPEG XL) by the extra jxl.
FORMATS = (*PILLOW_FORMATS, "HEIF", "JXL")

DEVICE = Text(
    re.compile(r"auto|cpu|cuda(:[0-9]+)?").fullmatch, "must be auto, cpu, cuda, or cuda:N", ("auto", "cpu", "cuda")
)
SCHEME = Text(re.compile(r"[a-z][a-z0-9+.-]*").fullmatch, "must be a scheme in lower-case letters, such as https or s3")
TEXTFILE = Text(lambda text: text.endswith(".prom"), "must end in .prom, as node_exporter reads no other files")
PUSHGATEWAY = Text(
    re.compile(r"https?://[^/?#@]+(/[^?#]*)?").fullmatch,
    "must be http://HOST:PORT or https://HOST, without a password, which every report would show",
)


def _is_host(text: str) -> bool:
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[0-9A-Za-z._-]+)(?::(\d{1,5}))?", text)
    return match is not None and 0 < int(match[2] or 1) < 65536


HOST = Text(_is_host, "must be a name or name:port, such as images.internal:8080 or 10.0.0.5; [::1]:8080 for IPv6")


@dataclass(frozen=True)
class ModelConfig:
    """Group ``model``: checkpoint and revision."""

    name: Annotated[str, filled("must name a checkpoint")] = DEMO_MODEL
    revision: str | None = None
    weights: Annotated[str, OneOf("pretrained", "random")] = "pretrained"
    seed: int = 0


@dataclass(frozen=True)
class BackendConfig:
    """Group ``backend``: runtime, precision and device."""

    name: Annotated[str, OneOf(*BACKENDS, AUTO)] = "torch"
    precision: Annotated[str, OneOf("auto", "fp32", "bf16", "fp16", "int8", "fp8")] = "auto"
    device: Annotated[str, DEVICE] = "auto"
    compile: Annotated[str, OneOf("none", "default", "reduce-overhead", "max-autotune")] = "none"
    quantization: Annotated[str, OneOf("dynamic", "static")] = "dynamic"
    streams: Annotated[int, Range(0, 1_024)] = 0
    cuda_graph: bool = True
    artifacts: str | None = None

    @property
    def info(self) -> BackendInfo:
        """Facts of the backend; ``auto`` takes what is installed, and needs nothing."""
        return BACKENDS.get(self.name, BackendInfo(()))

    @property
    def compiles(self) -> bool:
        """True if torch compiles it, for one batch size."""
        return self.compile != "none" or self.info.torch_compile


def _by_precision(fp32: float, fp16: float, bf16: float, int8: float, fp8: float) -> dict[str, float]:
    return {"fp32": fp32, "fp16": fp16, "bf16": bf16, "int8": int8, "fp8": fp8}


@dataclass(frozen=True)
class ParityConfig:
    """Group ``parity``: limits of a backend's deviation from fp32, by precision, which a job checks at its start.

    ``decoder`` has the lowest cosine of a decoder's embeddings to those of ``images.decoder=exact``.
    """

    images: Annotated[int, Range(1, 4_096)] = 64
    fewest: Annotated[int, Range(1, 4_096)] = 16
    lowest_cosine: dict[str, float] = field(default_factory=lambda: _by_precision(0.9999, 0.999, 0.995, 0.98, 0.98))
    mean_cosine: dict[str, float] = field(default_factory=lambda: _by_precision(0.99999, 0.9995, 0.998, 0.99, 0.99))
    top1: dict[str, float] = field(default_factory=lambda: _by_precision(0.98, 0.95, 0.95, 0.9, 0.9))
    decoder: dict[str, float] = field(default_factory=lambda: {"fast": 0.999, "scaled": 0.995, "gpu": 0.999})


@dataclass(frozen=True)
class ManifestConfig:
    """Group ``manifest``: location of the rows, and names of their columns."""

    path: Annotated[str | None, filled("must name a file, a folder or a glob, or be null for demo scenes")] = None
    id: Annotated[str, filled("must name a column")] = "id"
    image: Annotated[str | None, filled("must name a column, or be null for a job of texts alone")] = "path"
    text: Annotated[str | None, filled("must name a column, or be null")] = None
    keep: list[str] = field(default_factory=list)
    root: str | None = None
    shard_rows: Annotated[int, Range(0, 1_000_000, AUTO)] = 0
    demo_scenes: Annotated[int, Range(1)] = 1000

    @property
    def columns(self) -> list[str]:
        """The columns that are read: id, image and text where they are named, then the kept ones."""
        return [self.id, *(name for name in (self.image, self.text) if name is not None), *self.keep]

    @property
    def output_columns(self) -> tuple[str, ...]:
        """The columns of the dataset that are not of the manifest."""
        images, texts = self.image is not None, self.text is not None
        there = {"embedding": images, "text_embedding": texts, "similarity": images and texts}
        return (*(name for name, is_there in there.items() if is_there), *OUTPUT_COLUMNS[1:])


@dataclass(frozen=True)
class ImagesConfig:
    """Group ``images``: decoding of images, and limits of what is decoded."""

    decoder: Annotated[str, OneOf("exact", "fast", "scaled", "gpu")] = "exact"
    exif: Annotated[str, OneOf("apply", "ignore")] = "apply"
    transparency: Annotated[str, OneOf("white", "black", "drop")] = "white"
    crop_corner: Annotated[str, OneOf("floor", "round")] = "floor"
    repeats: Annotated[str, OneOf("once", "each")] = "once"
    gpu_share: Annotated[float, Range(0.0, 1.0)] = 1.0
    max_pixels: Annotated[int, Range(1, 2_000_000_000)] = 100_000_000
    max_bytes: Annotated[int, Range(1, 2_147_483_647)] = 268_435_456
    formats: list[str] = field(default_factory=lambda: list(FORMATS))
    schemes: Annotated[list[str], SCHEME] = field(default_factory=lambda: ["file"])
    private_hosts: Annotated[list[str], HOST] = field(default_factory=list)


@dataclass(frozen=True)
class LoaderConfig:
    """Group ``loader``: batches, the threads that fill them, and limits for a single image.

    A ``batch_size`` of 0 stands for ``auto``, and CUDA takes another than the default: see
    :mod:`pipeline.engine.batch_size`.
    """

    batch_size: Annotated[int, Range(0, 65_536, AUTO)] = DefaultNumber(64)
    workers: Annotated[int, Range(0, 1_024)] = 0
    prefetch: Annotated[int, Range(1, 64)] = 3
    feeders: Annotated[int | None, Range(0, 256, "null for automatic")] = None
    isolation: Annotated[str, OneOf("process", "none")] = "process"
    decode_seconds: Annotated[float, Range(0.1)] = 60.0
    decode_memory: Annotated[int, Range(67_108_864)] = 2_147_483_648
    read_seconds: Annotated[float, Range(0.1)] = 30.0


@dataclass(frozen=True)
class PromptsConfig:
    """Group ``prompts``: labels and templates."""

    labels: list[str] = field(default_factory=list)
    path: str | None = None
    templates: list[str] = field(default_factory=lambda: ["a photo of a {}"])
    cache: str | None = None


@dataclass(frozen=True)
class LabelsConfig:
    """Group ``labels``: scoring of embeddings against the prompts."""

    top_k: Annotated[int, Range(1, 1_000)] = 5
    threshold: Annotated[float | None, Range(0, 1, "null for none")] = None
    scoring: Annotated[str, OneOf("auto", "softmax", "sigmoid")] = "auto"
    heads: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class OutputConfig:
    """Group ``output``: location of the dataset, and storage of its vectors."""

    dir: Annotated[str, filled("must name a folder or an fsspec address")] = "outputs/demo"
    dtype: Annotated[str, OneOf("float32", "float16", "int8", "binary")] = "float32"
    dims: Annotated[int | None, Range(1, 65_536, "null for all")] = None
    vector: Annotated[str, OneOf("fixed", "list")] = "fixed"
    compression: Annotated[str, OneOf("zstd", "snappy", "none")] = "zstd"
    lease_seconds: Annotated[float, Range(1)] = 60.0


@dataclass(frozen=True)
class ErrorsConfig:
    """Group ``errors``: limits of failed images, and of the time that an interrupted run takes to end."""

    max_fraction: Annotated[float, Range(0, 1)] = 0.05
    grace_seconds: Annotated[float, Range(0)] = 20.0


@dataclass(frozen=True)
class ClusterConfig:
    """Group ``cluster``: executor of the shards; the YAML files say which keys each kind uses."""

    name: Annotated[str, OneOf(*CLUSTERS)] = "inline"
    part: str | None = None
    workers: Annotated[int, Range(0, 100_000)] = 0
    max_workers: Annotated[int, Range(0, 100_000)] = 0
    cores: Annotated[int, Range(0, 4_096)] = 0
    tries: Annotated[int, Range(1, 100)] = 3
    wait_seconds: Annotated[float, Range(1)] = 600.0
    host: Annotated[str, filled("must be an address of this machine")] = "127.0.0.1"
    port: Annotated[int, Range(0, 65_535)] = 0
    dashboard: bool = False
    dashboard_host: str = "127.0.0.1"
    dashboard_port: Annotated[int, Range(0, 65_535)] = 8787
    address: str | None = None
    tls_ca: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    slurm_partition: str | None = None
    slurm_account: str | None = None
    slurm_time: str = "04:00:00"
    slurm_memory: str = "32GiB"
    slurm_gpus: Annotated[int, Range(0, 64)] = 0
    slurm_directives: list[str] = field(default_factory=list)
    slurm_prologue: list[str] = field(default_factory=list)
    slurm_python: str | None = None
    kubernetes_image: str | None = None
    kubernetes_namespace: str = "default"
    kubernetes_memory: str = "32Gi"
    kubernetes_gpus: Annotated[int, Range(0, 64)] = 0
    kubernetes_env: Annotated[list[str], Text(re.compile(r"[A-Za-z_]\w*=.*").fullmatch, "must be NAME=VALUE")] = field(
        default_factory=list
    )


@dataclass(frozen=True)
class ReportConfig:
    """Group ``report``: progress display and report page."""

    html: bool = True
    examples: Annotated[int, Range(0, 1_000)] = 24
    progress: Annotated[str, OneOf("auto", "bar", "plain", "none")] = "auto"


@dataclass(frozen=True)
class LogConfig:
    """Group ``log``: format of log lines, and level of those on the terminal."""

    format: Annotated[str, OneOf("text", "json")] = "text"
    level: Annotated[str, OneOf("info", "warning", "error")] = "info"


@dataclass(frozen=True)
class MetricsConfig:
    """Group ``metrics``: exports of metrics and traces."""

    textfile: Annotated[str | None, TEXTFILE] = None
    pushgateway: Annotated[str | None, PUSHGATEWAY] = None
    job: Annotated[str, filled("must name the job")] = "clip_pipeline"
    opentelemetry: bool = False


@dataclass(frozen=True)
class RunConfig:
    """Group ``run``: the job itself, or only an estimate of it; ``json`` writes the estimate to standard output."""

    dry: bool = False
    json: bool = False


@dataclass(frozen=True)
class ServeConfig:
    """Group ``serve``: address of the service, batching of requests, and their limits."""

    host: Annotated[str, filled("must be an address of this machine, such as 127.0.0.1")] = "127.0.0.1"
    port: Annotated[int, Range(0, 65_535)] = 8000
    wait_ms: Annotated[float, Range(0, 1_000)] = 3.0
    shapes: Annotated[int, Range(1, 8)] = 4
    queue: Annotated[int, Range(1, 1_000_000)] = 1024
    requests: Annotated[int, Range(1, 1_000_000)] = 1024
    client_requests: Annotated[int, Range(0, 1_000_000)] = 256
    max_images: Annotated[int, Range(1, 65_536)] = 64
    max_texts: Annotated[int, Range(1, 100_000)] = 1000
    max_text_chars: Annotated[int, Range(1, 1_000_000)] = 2000
    max_body_bytes: Annotated[int, Range(1, 2_147_483_647)] = 67_108_864
    held_bytes: Annotated[int, Range(1)] = 536_870_912
    text_cache_bytes: Annotated[int, Range(0)] = 67_108_864
    header_seconds: Annotated[float, Range(0.1)] = 10.0
    timeout_seconds: Annotated[float, Range(0.1)] = 30.0
    grace_seconds: Annotated[float, Range(0)] = 30.0


@dataclass(frozen=True)
class Config:
    """The whole config, with a field for each group."""

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

    def changed(self, values: Mapping[str, Any]) -> Config:
        """Return a config with other values of some keys, such as ``loader.batch_size``, or of whole groups."""
        config = self
        for key, value in values.items():
            group, _, name = key.partition(".")
            config = replace(config, **{group: replace(getattr(config, group), **{name: value}) if name else value})
        return config


def conf_dir() -> Path:
    """Return the folder of YAML files: in a wheel within this package, in a checkout beside it."""
    package = Path(__file__).resolve().parents[1]
    return package / "conf" if (package / "conf").is_dir() else package.parent / "conf"


def nearest(word: str, known: Iterable[str]) -> str:
    """Return a hint for a typo, or an empty string when no known word is near."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"did you mean {match[0]}?" if match else ""


def value_of(config: Config, key: str) -> Any:
    """Return the value at a dotted key such as ``loader.batch_size``."""
    group, name = key.split(".", 1)
    return getattr(getattr(config, group), name)


def from_dict(values: Mapping[str, Mapping[str, Any]]) -> Config:
    """Return the config of groups as ``dataclasses.asdict`` makes them; what is missing has its default."""
    return replace(Config(), **{group: replace(getattr(Config(), group), **keys) for group, keys in values.items()})
