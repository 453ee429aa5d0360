"""Checks of the package's extras: installed, and needed by this job."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.config.choices import BACKENDS, CLUSTERS
from pipeline.config.schema import Config
from pipeline.core.errors import install_hint
from pipeline.doctor.check import Check, Status, Subject
from pipeline.doctor.versions import NAME, requirements
from pipeline.storage.urls import is_s3

GROUP = "extras"
# Purpose of the extras that neither a backend nor a cluster needs; one that is not listed here is still checked.
USES = {
    "gpu": "images=gpu",
    "jxl": "JPEG XL pictures",
    "nightly": "jobs/nightly.py",
    "metrics": "metrics.textfile, metrics.pushgateway",
    "otel": "metrics.opentelemetry",
    "s3": "s3:// addresses",
    "analytics": "jobs/analytics",
    "maps": "the map of jobs/analytics",
    "search": "search --index, FAISS",
    "lance": "Lance tables",
}


def look(subject: Subject) -> Iterator[Check]:
    """Check every extra of the package."""
    needed = needed_by(subject.job)
    for extra in dict.fromkeys(one.extra for one in requirements()):
        if not extra:
            continue
        # Some include another extra, which has a line of its own.
        parts = [one for one in requirements() if one.extra == extra and one.name != NAME]
        broken = [problem for one in parts if (problem := one.problem())]
        if not broken:
            fact = ", ".join(f"{one.name} {one.version}" for one in parts)
            yield Check(GROUP, extra, Status.OK, fact)
            continue
        missing = [one.name for one in parts if one.version is None]
        fact = f"not installed: {', '.join(missing)}" if len(missing) == len(broken) else "; ".join(broken)
        use = _use(extra)
        if extra in needed:
            status, fact = Status.FAIL, f"{needed[extra]} needs it; {fact}"
        else:
            # A package of a wrong version may be imported by another one.
            status = Status.SKIP if len(missing) == len(broken) else Status.WARN
            fact = f"{fact} (for {use})" if use else fact
        yield Check(GROUP, extra, status, fact, install_hint(extra))


def _use(extra: str) -> str:
    """The settings that need an extra."""
    backends = [name for name, info in BACKENDS.items() if info.extra == extra]
    clusters = [name for name, extras in CLUSTERS.items() if extras[-1:] == (extra,)]
    names = f"backend={', '.join(backends)}" if backends else f"cluster={', '.join(clusters)}" if clusters else ""
    return USES.get(extra, names)


def needed_by(config: Config) -> dict[str, str]:
    """Return the extras that a job needs, each with the setting that needs it."""
    needed = {}
    if extra := config.backend.info.extra:
        needed[extra] = f"backend={config.backend.name}"
    if config.images.decoder == "gpu":
        needed["gpu"] = "images.decoder=gpu"
    for extra in CLUSTERS[config.cluster.name]:
        needed[extra] = f"cluster={config.cluster.name}"
    metrics = config.metrics
    if metrics.textfile is not None or metrics.pushgateway is not None:
        needed["metrics"] = "metrics.textfile" if metrics.textfile is not None else "metrics.pushgateway"
    if metrics.opentelemetry:
        needed["otel"] = "metrics.opentelemetry"
    places = {
        "manifest.path": config.manifest.path,
        "manifest.root": config.manifest.root,
        "output.dir": config.output.dir,
        "prompts.cache": config.prompts.cache,
    }
    for key, place in places.items():
        if place is not None and is_s3(place):
            needed["s3"] = f"{key}={place}"
    return needed
