"""The schemas of everything under ``conf/``, and the checks that need more than a type.

A ``DictConfig`` enters :func:`~pipeline.overrides.to_config` and goes no further: the rest of the package
sees frozen dataclasses. Every check reports a :class:`~pipeline.errors.Problem`, and all of them come at once.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import Problem

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
    max_pixels: int = 100_000_000
    max_bytes: int = 268_435_456
    formats: list[str] = field(default_factory=lambda: list(FORMATS))
    schemes: list[str] = field(default_factory=lambda: ["file"])


@dataclass(frozen=True)
class LoaderConfig:
    """Group ``loader``: the batches and the threads that fill them."""

    batch_size: int = 64
    workers: int = 0
    prefetch: int = 3


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


@dataclass(frozen=True)
class ErrorsConfig:
    """Group ``errors``: how many failed images a good run may have."""

    max_fraction: float = 0.05


@dataclass(frozen=True)
class ClusterConfig:
    """Group ``cluster``: where the shards run."""

    name: str = "inline"


@dataclass(frozen=True)
class ReportConfig:
    """Group ``report``: what a person sees during and after the run."""

    html: bool = True
    examples: int = 24
    progress: str = "auto"


@dataclass(frozen=True)
class Config:
    """The whole config, one field for each group."""

    model: ModelConfig = field(default_factory=ModelConfig)
    backend: BackendConfig = field(default_factory=BackendConfig)
    manifest: ManifestConfig = field(default_factory=ManifestConfig)
    images: ImagesConfig = field(default_factory=ImagesConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    labels: LabelsConfig = field(default_factory=LabelsConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    errors: ErrorsConfig = field(default_factory=ErrorsConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    report: ReportConfig = field(default_factory=ReportConfig)


CHOICES: dict[str, tuple[str, ...]] = {
    "model.weights": ("pretrained", "random"),
    "backend.name": ("torch",),
    "backend.precision": ("auto", "fp32", "bf16", "fp16"),
    "images.decoder": ("exact",),
    "images.exif": ("apply", "ignore"),
    "images.transparency": ("white", "black", "drop"),
    "images.crop_corner": ("floor", "round"),
    "labels.scoring": ("auto", "softmax", "sigmoid"),
    "output.dtype": ("float32", "float16"),
    "output.compression": ("zstd", "snappy", "none"),
    "cluster.name": ("inline",),
    "report.progress": ("auto", "bar", "plain", "none"),
}
# Key: (lowest, highest or None).
RANGES: dict[str, tuple[float, float | None]] = {
    "manifest.shard_rows": (1, 1_000_000),
    "manifest.demo_scenes": (1, None),
    "images.max_pixels": (1, 2_000_000_000),
    "images.max_bytes": (1, 2_147_483_647),
    "loader.batch_size": (1, 65_536),
    "loader.workers": (0, 1024),
    "loader.prefetch": (1, 64),
    "labels.top_k": (1, 1000),
    "errors.max_fraction": (0, 1),
    "report.examples": (0, 1000),
}


def conf_dir() -> Path:
    """The folder of YAML files that belongs to this package: within it in a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    return package / "conf" if (package / "conf").is_dir() else package.parent / "conf"


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint for a typo, or an empty string when nothing is near."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"did you mean {match[0]}?" if match else ""


def value_of(config: Config, key: str) -> Any:
    """The value at a dotted key such as ``loader.batch_size``."""
    group, name = key.split(".", 1)
    return getattr(getattr(config, group), name)


def check(config: Config) -> list[Problem]:
    """Everything about the values that types cannot say."""
    problems = []
    for key, allowed in CHOICES.items():
        value = value_of(config, key)
        if value not in allowed:
            problems.append(Problem(key, value, f"must be one of {', '.join(allowed)}", nearest(value, allowed)))
    for key, (lowest, highest) in RANGES.items():
        value = value_of(config, key)
        # Written so that NaN, which is neither more nor less, does not pass.
        if not (value >= lowest and (highest is None or value <= highest)):
            limits = f"at least {lowest}" if highest is None else f"from {lowest} to {highest}"
            problems.append(Problem(key, value, f"must be {limits}"))
    return problems + _check_device(config) + _check_lists(config) + _check_columns(config) + _check_prompts(config)


def _check_device(config: Config) -> list[Problem]:
    kind, _, index = config.backend.device.partition(":")
    if kind in ("auto", "cpu") and not index:
        return []
    if kind == "cuda" and (not index or index.isdigit()) and not config.backend.device.endswith(":"):
        return []
    allowed = "must be auto, cpu, cuda, or cuda:N"
    return [Problem("backend.device", config.backend.device, allowed, nearest(kind, ("auto", "cpu", "cuda")))]


def _check_lists(config: Config) -> list[Problem]:
    problems = [
        Problem("images.formats", name, f"must be among {', '.join(FORMATS)}", nearest(name.upper(), FORMATS))
        for name in config.images.formats
        if name not in FORMATS
    ]
    if not config.images.formats:
        problems.append(Problem("images.formats", [], f"must name at least one of {', '.join(FORMATS)}"))
    return problems


def _check_columns(config: Config) -> list[Problem]:
    manifest, problems = config.manifest, []
    taken = {manifest.id: "manifest.id", **dict.fromkeys(OUTPUT_COLUMNS, "the output")}
    for name in manifest.keep:
        if name in taken:
            problems.append(Problem("manifest.keep", name, f"is already a column of {taken[name]}; leave it out"))
        taken[name] = "manifest.keep"
    for key, name in (("manifest.id", manifest.id), ("manifest.image", manifest.image)):
        if not name:
            problems.append(Problem(key, name, "must name a column"))
    if manifest.path is not None and not manifest.path:
        problems.append(
            Problem("manifest.path", "", "must name a file, a folder or a glob, or be null for demo scenes")
        )
    if manifest.path is None and (manifest.keep or manifest.root is not None):
        problems.append(Problem("manifest.path", None, "must be set where manifest.keep or manifest.root is"))
    if not config.model.name:
        problems.append(Problem("model.name", "", "must name a checkpoint"))
    if manifest.id in OUTPUT_COLUMNS:
        problems.append(Problem("manifest.id", manifest.id, "is the name of an output column; rename it"))
    if not config.output.dir:
        problems.append(Problem("output.dir", config.output.dir, "must name a folder or an fsspec address"))
    return problems


def _check_prompts(config: Config) -> list[Problem]:
    prompts, problems = config.prompts, []
    if prompts.labels and prompts.path is not None:
        problems.append(Problem("prompts.path", prompts.path, "cannot stand beside prompts.labels; use one"))
    if not prompts.templates:
        problems.append(Problem("prompts.templates", [], 'must hold at least one template, such as "{}"'))
    problems += [
        Problem("prompts.templates", template, "must hold {} exactly once, where the label goes")
        for template in prompts.templates
        if template.count("{}") != 1
    ]
    seen: set[str] = set()
    for label in prompts.labels:
        if not label.strip():
            problems.append(Problem("prompts.labels", label, "a label cannot be empty"))
        elif label in seen:
            problems.append(Problem("prompts.labels", label, "stands there twice"))
        seen.add(label)
    threshold = config.labels.threshold
    if threshold is not None and not 0 <= threshold <= 1:
        problems.append(Problem("labels.threshold", threshold, "must be from 0 to 1, or null for none"))
    return problems
