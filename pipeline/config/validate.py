"""What types cannot say of a config; every check reports a problem, and all of them come at once."""

from __future__ import annotations

import re
from dataclasses import asdict

from pipeline.config.ranges import AUTO, AUTOMATIC, CHOICES, PRECISIONS, RANGES
from pipeline.config.schema import FORMATS, OUTPUT_COLUMNS, Config, ParityConfig, nearest, value_of
from pipeline.core.errors import Problem

# Drivers of fsspec that read through other drivers, or from what an address itself says.
WRAPPERS = (
    *("simplecache", "filecache", "blockcache", "cached", "reference", "dir", "generic", "async_wrapper"),
    *("asyncwrapper", "zip", "tar", "libarchive", "data"),
)


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
            problems.append(Problem(key, value, limits(key)))
    groups = (
        *(_check_backend, _check_parity, _check_lists, _check_doors, _check_columns, _check_prompts),
        *(_check_part, _check_cluster, _check_run, _check_metrics, _check_serve, _check_texts),
    )
    for checks in groups:
        problems += checks(config)
    return problems


def limits(key: str) -> str:
    """What the number ``key`` must be, in words."""
    lowest, highest = RANGES[key]
    if key in AUTOMATIC:
        return f"must be a whole number from 1 to {highest}, or {AUTO}"
    return f"must be at least {lowest}" if highest is None else f"must be from {lowest} to {highest}"


def _check_backend(config: Config) -> list[Problem]:
    backend, problems = config.backend, []
    kind, _, index = backend.device.partition(":")
    plain = kind in ("auto", "cpu") and not index and not backend.device.endswith(":")
    numbered = kind == "cuda" and (not index or index.isdigit()) and not backend.device.endswith(":")
    if not plain and not numbered:
        hint = nearest(kind, ("auto", "cpu", "cuda"))
        problems.append(Problem("backend.device", backend.device, "must be auto, cpu, cuda, or cuda:N", hint))
    able = PRECISIONS.get(backend.name, ())
    if able and backend.precision in CHOICES["backend.precision"][1:] and backend.precision not in able:
        others = [name for name, precisions in PRECISIONS.items() if backend.precision in precisions]
        allowed = f"backend={backend.name} computes in {', '.join(able)}"
        hint = f"{backend.precision}: backend={' or '.join(others)}"
        problems.append(Problem("backend.precision", backend.precision, allowed, hint))
    if backend.compile != "none" and backend.name != "torch" and backend.name in PRECISIONS:
        allowed = "is a choice of backend=torch alone"
        problems.append(Problem("backend.compile", backend.compile, allowed, "leave it out"))
    if backend.quantization == "static" and backend.name != "onnx_int8" and backend.name in PRECISIONS:
        allowed = "is a choice of backend=onnx_int8 alone"
        problems.append(Problem("backend.quantization", backend.quantization, allowed, "leave it out"))
    return problems


def _check_parity(config: Config) -> list[Problem]:
    problems = []
    for name in ("lowest_cosine", "mean_cosine", "top1", "decoder"):
        values, default = getattr(config.parity, name), getattr(ParityConfig(), name)
        for precision in dict.fromkeys([*default, *values]):
            key, value = f"parity.{name}.{precision}", values.get(precision)
            if precision not in default:
                problems.append(Problem(key, value, f"must be one of {', '.join(default)}"))
            elif value is None or not 0 <= value <= 1:
                problems.append(Problem(key, value, "must be from 0 to 1"))
    return problems


def _check_lists(config: Config) -> list[Problem]:
    problems = [
        Problem("images.formats", name, f"must be among {', '.join(FORMATS)}", nearest(name.upper(), FORMATS))
        for name in config.images.formats
        if name not in FORMATS
    ]
    if not config.images.formats:
        problems.append(Problem("images.formats", [], f"must name at least one of {', '.join(FORMATS)}"))
    return problems


def _check_doors(config: Config) -> list[Problem]:
    problems = []
    for scheme in config.images.schemes:
        if scheme in WRAPPERS:
            allowed = "would let a row choose what is read through it; use it in manifest.root alone"
            problems.append(Problem("images.schemes", scheme, allowed))
        elif not re.fullmatch(r"[a-z][a-z0-9+.-]*", scheme):
            problems.append(Problem("images.schemes", scheme, "must be a scheme in small letters, such as https or s3"))
    for host in config.images.private_hosts:
        match = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[0-9A-Za-z._-]+)(?::(\d{1,5}))?", host)
        if match is None or not 0 < int(match[2] or 1) < 65536:
            allowed = "must be a name or name:port, such as images.internal:8080 or 10.0.0.5; [::1]:8080 for IPv6"
            problems.append(Problem("images.private_hosts", host, allowed))
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
            problems.append(Problem("prompts.labels", label, "stands there twice", "take one out"))
        seen.add(label)
    threshold = config.labels.threshold
    if threshold is not None and not 0 <= threshold <= 1:
        problems.append(Problem("labels.threshold", threshold, "must be from 0 to 1, or null for none"))
    return problems


def part_of(text: str) -> tuple[int, int] | None:
    """The number and the count of ``cluster.part``, such as (3, 16); None where it does not read so."""
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        return None
    return int(match[1]), int(match[2])


def _check_part(config: Config) -> list[Problem]:
    cluster, problems = config.cluster, []
    if cluster.part is None:
        return []
    if part_of(cluster.part) is None:
        allowed = "must be NUMBER/COUNT, counted from 1, such as 3/16"
        problems.append(Problem("cluster.part", cluster.part, allowed, "or null for the whole"))
    if cluster.name != "inline":
        allowed = f"splits a job without a scheduler; with cluster={cluster.name} leave it out"
        problems.append(Problem("cluster.part", cluster.part, allowed))
    if config.loader.batch_size == 0:
        allowed = "may be measured differently by each part; give a number with cluster.part"
        problems.append(Problem("loader.batch_size", AUTO, allowed))
    return problems


def _check_cluster(config: Config) -> list[Problem]:
    cluster, problems = config.cluster, []
    name = cluster.name
    if name == "address" and not cluster.address:
        allowed = "must be the scheduler's address, such as tls://10.0.0.5:8786"
        problems.append(Problem("cluster.address", cluster.address, allowed))
    if name != "address" and cluster.address is not None and name in CHOICES["cluster.name"]:
        problems.append(Problem("cluster.address", cluster.address, "is for cluster=address alone", "leave it out"))
    files = {key: getattr(cluster, key) for key in ("tls_ca", "tls_cert", "tls_key")}
    if any(files.values()) and not all(files.values()):
        problems += [
            Problem(f"cluster.{key}", value, "must be given with the two others, or none of them")
            for key, value in files.items()
            if not value
        ]
    elif (cluster.address or "").startswith("tls://") and not all(files.values()):
        allowed = "a tls:// address needs cluster.tls_ca, cluster.tls_cert and cluster.tls_key"
        problems.append(Problem("cluster.address", cluster.address, allowed))
    if not cluster.host:
        problems.append(Problem("cluster.host", "", "must be an address of this machine"))
    if name == "slurm" and cluster.host in ("127.0.0.1", "localhost"):
        allowed = "must be an address of this machine that the nodes of the cluster reach"
        problems.append(Problem("cluster.host", cluster.host, allowed))
    if name == "kubernetes" and not cluster.kubernetes_image:
        allowed = "must be an image that holds this package"
        problems.append(Problem("cluster.kubernetes_image", cluster.kubernetes_image, allowed))
    if name == "cuda" and config.backend.device == "cpu":
        problems.append(Problem("backend.device", "cpu", "cluster=cuda works on GPUs; take cluster=local"))
    elif name not in ("inline", "address") and config.backend.device.startswith("cuda:"):
        allowed = "every worker process sees its own GPU as the first; take cuda or auto with a cluster"
        problems.append(Problem("backend.device", config.backend.device, allowed))
    problems += [
        Problem("cluster.kubernetes_env", entry, "must be NAME=VALUE")
        for entry in cluster.kubernetes_env
        if not re.fullmatch(r"[A-Za-z_]\w*=.*", entry)
    ]
    return problems


def _check_run(config: Config) -> list[Problem]:
    if config.run.json and not config.run.dry:
        return [Problem("run.json", True, "tells an estimate; give run.dry=true too")]
    return []


def _check_metrics(config: Config) -> list[Problem]:
    metrics, problems = config.metrics, []
    if not metrics.job:
        problems.append(Problem("metrics.job", "", "must name the job"))
    if metrics.textfile is not None and not metrics.textfile.endswith(".prom"):
        allowed = "must end in .prom, as node_exporter reads no other files"
        problems.append(Problem("metrics.textfile", metrics.textfile, allowed))
    if metrics.pushgateway is not None and not re.fullmatch(r"https?://[^/?#@]+(/[^?#]*)?", metrics.pushgateway):
        shown = re.sub(r"//.*@", "//...@", metrics.pushgateway)
        allowed = "must be http://HOST:PORT or https://HOST, without a password, which every report would show"
        problems.append(Problem("metrics.pushgateway", shown, allowed))
    return problems


def _check_texts(config: Config) -> list[Problem]:
    """Neither the plan nor the report nor Parquet can hold half a character, wherever in the config it stands."""
    return [
        Problem(f"{group}.{name}", text, "holds bytes that are no UTF-8")
        for group, values in asdict(config).items()
        for name, value in values.items()
        for text in (value if isinstance(value, list) else [value])
        if isinstance(text, str) and any("\ud800" <= letter <= "\udfff" for letter in text)
    ]


def _check_serve(config: Config) -> list[Problem]:
    if not config.serve.host:
        return [Problem("serve.host", "", "must be an address of this machine, such as 127.0.0.1")]
    return []
