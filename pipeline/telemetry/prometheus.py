"""Figures as Prometheus reads them: gauges, since a job that runs once and ends has no counters to go on with."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.core.errors import install_hint

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry


@dataclass(frozen=True, slots=True)
class Metric:
    """A gauge: its name without the prefix, what it is, and its value for each set of labels of its own."""

    name: str
    help: str
    values: tuple[tuple[Mapping[str, str], float], ...]


def one(name: str, help: str, value: float) -> Metric:
    """A gauge with a single value."""
    return Metric(name, help, (({}, value),))


def by(label: str, name: str, help: str, values: Mapping[str, float]) -> Metric:
    """A gauge with a value for each value of ``label``."""
    return Metric(name, help, tuple(({label: each}, value) for each, value in values.items()))


def missing() -> str | None:
    """What to install before anything can be told; None if all is there."""
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
        names = [*labels, *metric.values[0][0]]
        gauge = Gauge(f"{prefix}_{metric.name}", metric.help, names, registry=registry)
        for own, value in metric.values:
            # A path may hold bytes that are no UTF-8, which no label can.
            texts = (text.encode("utf-8", "replace").decode() for text in (*labels.values(), *own.values()))
            gauge.labels(*texts).set(value)
    return registry


def write_file(path: Path, registry: CollectorRegistry) -> None:
    """Write what node_exporter's textfile collector reads, under a temporary name, and rename it.

    Raises:
        OSError: it cannot be written.
    """
    from prometheus_client import generate_latest

    path.parent.mkdir(parents=True, exist_ok=True)
    # Names that do not end in .prom are not collected.
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(generate_latest(registry))
        # The collector runs as another user.
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_value(path: Path, name: str, labels: Mapping[str, str]) -> float | None:
    """The value of a metric in such a file where all ``labels`` agree; None where there is none, or no such file."""
    from prometheus_client.parser import text_string_to_metric_families

    try:
        families = list(text_string_to_metric_families(path.read_text()))
    except (OSError, ValueError, KeyError, IndexError):
        # A file of somebody else's; it is written over.
        return None
    for family in families:
        for sample in family.samples:
            if sample.name == name and all(sample.labels.get(key) == value for key, value in labels.items()):
                return float(sample.value)
    return None


def push(url: str, registry: CollectorRegistry, *, job: str, group: Mapping[str, str], seconds: float) -> None:
    """Tell a Pushgateway; metrics of the same names in the group are replaced, others stay.

    Raises:
        OSError: it does not answer within ``seconds``, or refuses.
    """
    from prometheus_client import pushadd_to_gateway

    pushadd_to_gateway(
        url.rstrip("/"), job=job, registry=registry, grouping_key=dict(group), timeout=seconds, handler=_send
    )


def _send(
    url: str, method: str, timeout: float | None, headers: list[tuple[str, str]], data: bytes
) -> Callable[[], None]:
    """How prometheus_client sends; its own way leaves the connection open where no answer comes."""
    import urllib3

    def send() -> None:
        try:
            with urllib3.PoolManager(timeout=urllib3.Timeout(total=timeout), retries=False) as pool:
                response = pool.request(method, url, headers=dict(headers), body=data)
        except urllib3.exceptions.HTTPError as error:
            raise OSError(f"{type(error).__name__}: it does not answer") from error
        if response.status >= 300:
            raise OSError(f"answered with {response.status} {response.data[:200].decode(errors='replace')}".strip())

    return send
