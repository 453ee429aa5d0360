"""Spans of a run by OpenTelemetry: the run, the pieces of its start-up, and every shard.

Nothing of OpenTelemetry is imported unless spans are wanted; where they go, the standard ``OTEL_*`` variables say.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import TimeoutError as LateError
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeAlias

from pipeline.core.concurrency import aside
from pipeline.core.errors import exit_code_of, install_hint
from pipeline.core.log_format import shard_of
from pipeline.core.records import OK, ShardReport

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

# How long the last spans may take on their way, in seconds.
CLOSE_SECONDS = 5.0
NAMESPACE = "clip_pipeline"
Attributes: TypeAlias = Mapping[str, str | int | float | bool]
log = logging.getLogger(__name__)


class Tracing:
    """The spans of one run."""

    def __init__(self, tracer: Any, run: Any) -> None:
        self._tracer, self._run = tracer, run

    @contextmanager
    def span(self, name: str, attributes: Attributes) -> Iterator[None]:
        """A span around the body, within the one that is open in this thread, or else the run's."""
        from opentelemetry import trace

        # A new thread knows of no span.
        inside = trace.get_current_span().get_span_context().is_valid
        parent = None if inside else trace.set_span_in_context(self._run)
        with self._tracer.start_as_current_span(name, context=parent, attributes=_named(attributes)):
            yield

    def shard(self, report: ShardReport) -> None:
        """The span of a shard, from when its rows were asked for until it was durable."""
        from opentelemetry import trace

        ended = report.ended or time.time()
        failures = report.rows - report.counts.get(OK, 0)
        attributes = {"shard": report.shard, "rows": report.rows, "failures": failures, "committed": report.committed}
        self._tracer.start_span(
            "shard",
            context=trace.set_span_in_context(self._run),
            attributes=_named(attributes),
            start_time=_nanoseconds(report.began or ended),
        ).end(_nanoseconds(ended))


_current: Tracing | None = None


def span(name: str, attributes: Attributes | None = None) -> AbstractContextManager[None]:
    """A span around the body of ``with``, if spans are wanted; else nothing."""
    return nullcontext() if _current is None else _current.span(name, attributes or {})


def shard(report: ShardReport) -> None:
    """The span of a shard, if spans are wanted."""
    if _current is not None:
        _current.shard(report)


def missing() -> str | None:
    """What to install or to set before spans can be sent; None if all is there."""
    for name in ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        protocol = os.environ.get(name, "http/protobuf")
        if protocol != "http/protobuf":
            return f"sends http/protobuf alone, and {name}={protocol}"
    try:
        import opentelemetry.exporter.otlp.proto.http.trace_exporter
        import opentelemetry.sdk.trace  # noqa: F401
    except ImportError as error:
        return f"needs OpenTelemetry ({error}): {install_hint('otel')}"
    return None


@contextmanager
def exported(
    run: str,
    attributes: Attributes,
    *,
    exporter: SpanExporter | None = None,
    told: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Iterator[None]:
    """A span around a whole run; within, :func:`span` and :func:`shard` add theirs to it.

    A collector that does not answer is told of once, takes no more than a few seconds, and changes nothing.

    Args:
        run: its name.
        attributes: of the span.
        exporter: where spans go; without one, by OTLP to where the environment says.
        told: what is open while the last spans are sent, when the run's own log is closed.
    """
    global _current
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.trace import Status, StatusCode
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    named = "OTEL_SERVICE_NAME" in os.environ or "service.name" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    resource = Resource.create({} if named else {"service.name": "clip-pipeline"})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    # It tells of every failure with a traceback; once is enough, and that is ours.
    logger, level = logging.getLogger("opentelemetry"), logging.getLogger("opentelemetry").level
    logger.setLevel(logging.CRITICAL + 1)
    teller = _Teller()
    provider.add_span_processor(BatchSpanProcessor(_telling(exporter or OTLPSpanExporter(), teller)))
    tracer = provider.get_tracer("clip_pipeline")
    # A scheduler that traces its tasks hands its own span on by this variable.
    given = TraceContextTextMapPropagator().extract({"traceparent": os.environ.get("TRACEPARENT", "")})
    top = tracer.start_span("run", context=given, attributes=_named({"run": run, **attributes}))
    before, _current = _current, Tracing(tracer, top)
    code = 0
    try:
        yield
    except BaseException as error:
        code = exit_code_of(error)
        number = shard_of(error)
        if number is not None:
            top.set_attributes(_named({"shard": number}))
        top.record_exception(error)
        top.set_status(Status(StatusCode.ERROR, str(error)))
        raise
    finally:
        _current = before
        top.set_attributes(_named({"exit_code": code}))
        top.end()
        with told():
            try:
                aside(provider.shutdown, name="spans").result(CLOSE_SECONDS)
                logger.setLevel(level)
            except LateError:
                # Its thread goes on trying until the process ends, and would tell of every try.
                teller.tell(f"the collector did not answer in {CLOSE_SECONDS:g} s")


class _Teller:
    """Tells of a collector that is not well, once."""

    def __init__(self) -> None:
        self._told = False

    def tell(self, reason: str) -> None:
        """Say why spans are lost."""
        if not self._told:
            self._told = True
            log.warning("metrics.opentelemetry: spans are lost: %s; see OTEL_EXPORTER_OTLP_ENDPOINT", reason)


def _telling(exporter: SpanExporter, teller: _Teller) -> SpanExporter:
    """The exporter, whose failures are told of."""
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

    class Telling(SpanExporter):
        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            reason = "the collector does not answer, or refuses them"
            try:
                result = exporter.export(spans)
            except Exception as error:
                result, reason = SpanExportResult.FAILURE, f"{type(error).__name__}: {error}"
            if result is not SpanExportResult.SUCCESS:
                teller.tell(reason)
            return result

        def shutdown(self) -> None:
            exporter.shutdown()

        def force_flush(self, timeout_millis: int = 30000) -> bool:
            return exporter.force_flush(timeout_millis)

    return Telling()


def _named(attributes: Attributes) -> dict[str, str | int | float | bool]:
    return {f"{NAMESPACE}.{name}": value for name, value in attributes.items()}


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
