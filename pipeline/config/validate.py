"""Validation of a config: the constraints of the schema, and rules about several keys; all problems are reported."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, fields
from itertools import chain
from typing import Annotated, get_origin, get_type_hints

from pipeline.config.choices import BACKENDS
from pipeline.config.ranges import AUTO, OneOf, Range, Text
from pipeline.config.schema import FORMATS, OUTPUT_COLUMNS, Config, ParityConfig, nearest, value_of
from pipeline.core.errors import Problem
from pipeline.core.machine import is_loopback

# Drivers of fsspec that read through other drivers, or from the address itself.
WRAPPERS = (
    *("simplecache", "filecache", "blockcache", "cached", "reference", "dir", "generic", "async_wrapper"),
    *("asyncwrapper", "zip", "tar", "libarchive", "data"),
)
CONSTRAINTS: dict[str, OneOf | Range | Text] = {
    f"{group}.{name}": hint.__metadata__[0]
    for group, kind in get_type_hints(Config).items()
    for name, hint in get_type_hints(kind, include_extras=True).items()
    if get_origin(hint) is Annotated
}
CHOICES = {key: rule.words for key, rule in CONSTRAINTS.items() if isinstance(rule, OneOf)}
RANGES = {key: (rule.lowest, rule.highest) for key, rule in CONSTRAINTS.items() if isinstance(rule, Range)}
# Keys of numbers for which the word ``auto`` may be typed.
AUTOMATIC = [key for key, rule in CONSTRAINTS.items() if isinstance(rule, Range) and rule.word == AUTO]


def known_keys() -> list[str]:
    """Every dotted key of the schemas, such as ``loader.batch_size``."""
    groups = get_type_hints(Config)
    return [f"{group}.{field.name}" for group, kind in groups.items() for field in fields(kind)]


def check(config: Config) -> list[Problem]:
    """Return every problem that the types of the schema do not exclude."""
    rules = (
        *(_check_constraints, _check_backend, _check_parity, _check_images, _check_columns, _check_texts),
        *(_check_prompts, _check_part, _check_cluster, _check_run, _check_encoding),
    )
    return list(chain.from_iterable(rule(config) for rule in rules))


def limits(key: str) -> str:
    """Return in words what the value of ``key`` must be."""
    return CONSTRAINTS[key].allowed


def _check_constraints(config: Config) -> Iterator[Problem]:
    for key, rule in CONSTRAINTS.items():
        value = value_of(config, key)
        for item in value if isinstance(value, list) else [value]:
            if item is None or rule.accepts(item):
                continue
            hint = "" if isinstance(rule, Range) else nearest(item, rule.words)
            # A message never shows the password of a URL.
            shown = re.sub(r"//.*@", "//...@", item) if isinstance(rule, Text) else item
            yield Problem(key, shown, rule.allowed, hint)


def _check_backend(config: Config) -> Iterator[Problem]:
    backend = config.backend
    if backend.name == AUTO:
        if backend.precision != AUTO and backend.precision in CHOICES["backend.precision"]:
            allowed = "is chosen by backend=auto, within the limits of parity"
            hint = "leave it out, or name a backend too, such as backend=torch"
            yield Problem("backend.precision", backend.precision, allowed, hint)
        if config.cluster.part is not None:
            allowed = "may be chosen differently by each part; name a backend with cluster.part"
            yield Problem("backend", AUTO, allowed)
    elif backend.name not in BACKENDS:
        return
    able = () if backend.name == AUTO else BACKENDS[backend.name].precisions
    if able and backend.precision in CHOICES["backend.precision"] and backend.precision not in (AUTO, *able):
        others = [name for name, info in BACKENDS.items() if backend.precision in info.precisions]
        allowed = f"backend={backend.name} computes in {', '.join(able)}"
        hint = f"{backend.precision}: backend={' or '.join(others)}"
        yield Problem("backend.precision", backend.precision, allowed, hint)
    if backend.compile != "none" and backend.name != "torch":
        yield Problem("backend.compile", backend.compile, "is an option of backend=torch only", "leave it out")
    if backend.quantization == "static" and backend.name != "onnx_int8":
        allowed = "is an option of backend=onnx_int8 only"
        yield Problem("backend.quantization", backend.quantization, allowed, "leave it out")


def _check_parity(config: Config) -> Iterator[Problem]:
    for name in ("lowest_cosine", "mean_cosine", "top1", "decoder"):
        values, default = getattr(config.parity, name), getattr(ParityConfig(), name)
        for precision in dict.fromkeys([*default, *values]):
            key, value = f"parity.{name}.{precision}", values.get(precision)
            if precision not in default:
                yield Problem(key, value, f"must be one of {', '.join(default)}")
            elif value is None or not 0 <= value <= 1:
                yield Problem(key, value, "must be from 0 to 1")


def _check_images(config: Config) -> Iterator[Problem]:
    images = config.images
    for name in images.formats:
        if name not in FORMATS:
            allowed = f"must be among {', '.join(FORMATS)}"
            yield Problem("images.formats", name, allowed, nearest(name.upper(), FORMATS))
    if not images.formats:
        yield Problem("images.formats", [], f"must name at least one of {', '.join(FORMATS)}")
    for scheme in images.schemes:
        if scheme in WRAPPERS:
            allowed = "would let a row choose what is read through it; use it in manifest.root only"
            yield Problem("images.schemes", scheme, allowed)


def _check_columns(config: Config) -> Iterator[Problem]:
    manifest = config.manifest
    ours = {*OUTPUT_COLUMNS, *manifest.output_columns}
    taken = {manifest.id: "manifest.id", **dict.fromkeys(ours, "the output")}
    for name in manifest.keep:
        if name in taken:
            yield Problem("manifest.keep", name, f"is already a column of {taken[name]}; leave it out")
        taken[name] = "manifest.keep"
    if manifest.path is None and (manifest.keep or manifest.root is not None):
        yield Problem("manifest.path", None, "must be set where manifest.keep or manifest.root is")
    if manifest.id in ours:
        yield Problem("manifest.id", manifest.id, "is the name of an output column; rename it")


def _check_texts(config: Config) -> Iterator[Problem]:
    manifest, way_out = config.manifest, "leave it out"
    if manifest.text is not None and manifest.path is None:
        yield Problem("manifest.path", None, "must be set where manifest.text is")
    if manifest.text is not None and manifest.text == manifest.image:
        yield Problem("manifest.text", manifest.text, "is the column of manifest.image; name a column of texts")
    if manifest.image is not None:
        return
    if manifest.text is None:
        allowed = "leaves nothing to embed: manifest.text is null too"
        yield Problem("manifest.image", None, allowed, "name a column of images, of texts, or both")
    # Of these, all is measured on images, or written of them.
    alone = "is of images, and manifest.image=null embeds texts alone"
    if config.prompts.labels or config.prompts.path is not None:
        key = "prompts.path" if config.prompts.path is not None else "prompts.labels"
        yield Problem(key, config.prompts.path or config.prompts.labels, alone, way_out)
    if config.labels.heads:
        yield Problem("labels.heads", config.labels.heads, alone, way_out)
    if config.backend.name == AUTO:
        yield Problem("backend", AUTO, alone, "name a backend, such as backend=torch")
    if config.loader.batch_size == 0:
        yield Problem("loader.batch_size", AUTO, alone, "give a number, or leave it out")


def _check_prompts(config: Config) -> Iterator[Problem]:
    prompts = config.prompts
    if prompts.labels and prompts.path is not None:
        yield Problem("prompts.path", prompts.path, "cannot be given together with prompts.labels; use one")
    if not prompts.templates:
        yield Problem("prompts.templates", [], 'must hold at least one template, such as "{}"')
    for template in prompts.templates:
        if template.count("{}") != 1:
            yield Problem("prompts.templates", template, "must hold {} exactly once, where the label goes")
    seen: set[str] = set()
    for label in prompts.labels:
        if not label.strip():
            yield Problem("prompts.labels", label, "a label cannot be empty")
        elif label in seen:
            yield Problem("prompts.labels", label, "is given twice", "take one out")
        seen.add(label)


def part_of(text: str) -> tuple[int, int] | None:
    """Return number and count of ``cluster.part``, such as (3, 16), or None for a text of another form."""
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        return None
    return int(match[1]), int(match[2])


def _check_part(config: Config) -> Iterator[Problem]:
    cluster = config.cluster
    if cluster.part is None:
        return
    if cluster.part != AUTO and part_of(cluster.part) is None:
        allowed = f"must be {AUTO}, or NUMBER/COUNT, counted from 1, such as 3/16"
        yield Problem("cluster.part", cluster.part, allowed, "or null for the whole")
    if cluster.name != "inline":
        allowed = f"splits a job without a scheduler; with cluster={cluster.name} leave it out"
        yield Problem("cluster.part", cluster.part, allowed)
    if config.loader.batch_size == 0:
        allowed = "may be measured differently by each part; give a number with cluster.part"
        yield Problem("loader.batch_size", AUTO, allowed)


def _check_cluster(config: Config) -> Iterator[Problem]:
    cluster, device = config.cluster, config.backend.device
    name = cluster.name
    if name == "address" and not cluster.address:
        allowed = "must be the scheduler's address, such as tls://10.0.0.5:8786"
        yield Problem("cluster.address", cluster.address, allowed)
    if name != "address" and cluster.address is not None and name in CHOICES["cluster.name"]:
        yield Problem("cluster.address", cluster.address, "is for cluster=address only", "leave it out")
    files = {f"cluster.{key}": getattr(cluster, key) for key in ("tls_ca", "tls_cert", "tls_key")}
    if any(files.values()):
        for key, value in files.items():
            if not value:
                yield Problem(key, value, "must be given with the two others, or none of them")
    elif (cluster.address or "").startswith("tls://"):
        allowed = "a tls:// address needs cluster.tls_ca, cluster.tls_cert and cluster.tls_key"
        yield Problem("cluster.address", cluster.address, allowed)
    if cluster.max_workers and name in CHOICES["cluster.name"]:
        if name not in ("slurm", "kubernetes"):
            allowed = f"cluster={name} has a fixed number of processes, or takes all workers that join"
            yield Problem("cluster.max_workers", cluster.max_workers, allowed, "leave it out")
        elif 0 < cluster.max_workers < cluster.workers:
            allowed = f"must be at least cluster.workers={cluster.workers}"
            yield Problem("cluster.max_workers", cluster.max_workers, allowed)
    if name == "slurm" and is_loopback(cluster.host):
        allowed = "must be an address of this machine that the nodes of the cluster reach"
        yield Problem("cluster.host", cluster.host, allowed)
    if name == "kubernetes" and not cluster.kubernetes_image:
        yield Problem("cluster.kubernetes_image", cluster.kubernetes_image, "must be an image that holds this package")
    if name == "cuda" and device == "cpu":
        yield Problem("backend.device", device, "cluster=cuda works on GPUs; take cluster=local")
    elif name not in ("inline", "address") and device.startswith("cuda:"):
        allowed = "every worker process sees its own GPU as the first; take cuda or auto with a cluster"
        yield Problem("backend.device", device, allowed)


def _check_run(config: Config) -> Iterator[Problem]:
    if config.run.json and not config.run.dry:
        yield Problem("run.json", True, "prints an estimate; give run.dry=true too")


def _check_encoding(config: Config) -> Iterator[Problem]:
    """Find surrogates, which neither the plan nor the report nor Parquet can encode."""
    for group, values in asdict(config).items():
        for name, value in values.items():
            for text in value if isinstance(value, list) else [value]:
                if isinstance(text, str) and any("\ud800" <= letter <= "\udfff" for letter in text):
                    yield Problem(f"{group}.{name}", text, "holds bytes that are no UTF-8")
