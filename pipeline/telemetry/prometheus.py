"""Gauges for Prometheus. A run ends, so it has no counters that continue."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pipeline.core.errors import install_hint

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry


class Metric(NamedTuple):
    """A gauge: its name without the prefix, its help text, and its value for each value of ``label`` (None: one)."""

    name: str
    help: str
    label: str | None
    values: Mapping[str, float]


def one(name: str, help: str, value: float) -> Metric:
    """A gauge with a single value."""
    return Metric(name, help, None, {"": value})


def by(label: str, name: str, help: str, values: Mapping[str, float]) -> Metric:
    """A gauge with a value for each value of ``label``."""
    return Metric(name, help, label, values)


def missing() -> str | None:
    """Return a hint how to install prometheus_client; None if it is installed."""
    try:
        import prometheus_client  # noqa: F401
    except ImportError as error:
        return f"needs prometheus_client ({error}): {install_hint('metrics')}"
    return None


def to_registry(prefix: str, labels: Mapping[str, str], metrics: Iterable[Metric]) -> CollectorRegistry:
    """The metrics under ``prefix``, each value with ``labels`` besides its own; one without values is left out."""
    from prometheus_client import CollectorRegistry, Gauge

    registry = CollectorRegistry()
    for metric in metrics:
        if not metric.values:
            continue
        own = [] if metric.label is None else [metric.label]
        gauge = Gauge(f"{prefix}_{metric.name}", metric.help, [*labels, *own], registry=registry)
        for name, value in metric.values.items():
            # A path may hold bytes that are not UTF-8, which a label cannot.
            texts = [text.encode("utf-8", "replace").decode() for text in (*labels.values(), name)]
            gauge.labels(*texts[: len(labels) + len(own)]).set(value)
    return registry


def write_file(path: Path, registry: CollectorRegistry) -> None:
    """Replace the file ``path`` for node_exporter's textfile collector.

    Raises:
        OSError: it cannot be written.
    """
    from prometheus_client import write_to_textfile

    path.parent.mkdir(parents=True, exist_ok=True)
    write_to_textfile(str(path), registry)
    # The collector runs as another user.
    path.chmod(0o644)


def read_value(path: Path, name: str, labels: Mapping[str, str]) -> float | None:
    """The value of a metric in such a file with all of ``labels``; None if there is none, or no such file."""
    from prometheus_client.parser import text_string_to_metric_families

    try:
        families = list(text_string_to_metric_families(path.read_text()))
    except (OSError, ValueError, KeyError, IndexError):
        # The file is of another program, and will be replaced.
        return None
    for sample in (sample for family in families for sample in family.samples):
        if sample.name == name and labels.items() <= sample.labels.items():
            return float(sample.value)
    return None


def push(url: str, job: str, registry: CollectorRegistry, *, group: Mapping[str, str], seconds: float) -> None:
    """Send the metrics to a Pushgateway; those of the same names in the group are replaced, others stay.

    Raises:
        OSError: it does not answer within ``seconds``, or refuses.
    """
    from urllib.error import HTTPError

    from prometheus_client import pushadd_to_gateway

    try:
        pushadd_to_gateway(url, job, registry, grouping_key=dict(group), timeout=seconds)
    except HTTPError as error:
        # It holds the connection open.
        error.close()
        raise
