"""OpenTelemetry spans of a run, its start-up and its shards.

OpenTelemetry is imported only if spans are wanted; the standard ``OTEL_*`` variables configure where they go.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import TimeoutError as LateError
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeAlias

from pipeline.core.concurrency import aside
from pipeline.core.errors import exit_code_of, install_hint
from pipeline.core.log_format import shard_of
from pipeline.core.phases import phase
from pipeline.core.records import OK, ShardReport

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

# Timeout for sending the last spans, in seconds.
CLOSE_SECONDS = 5.0
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
Attributes: TypeAlias = Mapping[str, str | int | float | bool]
log = logging.getLogger(__name__)
# The tracer and the span of the run; None where no spans are wanted.
_current: tuple[Any, Any] | None = None


@contextmanager
def span(name: str, attributes: Attributes | None = None) -> Iterator[None]:
    """Count the body as a phase of the run, see :mod:`pipeline.core.phases`; trace it, if spans are wanted.

    Its span is within the current one of this thread, or else within the run.
    """
    with phase(name):
        if _current is None:
            yield
            return
        from opentelemetry import trace

        tracer, run = _current
        # A new thread has no current span.
        inside = trace.get_current_span().get_span_context().is_valid
        parent = None if inside else trace.set_span_in_context(run)
        with tracer.start_as_current_span(name, context=parent, attributes=_named(attributes or {})):
            yield


def shard(report: ShardReport) -> None:
    """Trace a shard, from the request for its rows until it was durable, if spans are wanted."""
    if _current is None:
        return
    from opentelemetry import trace

    tracer, run = _current
    ended = report.ended or time.time()
    failures = report.rows - report.counts.get(OK, 0)
    attributes = {"shard": report.shard, "rows": report.rows, "failures": failures, "committed": report.committed}
    parent, began = trace.set_span_in_context(run), int((report.began or ended) * 1e9)
    made = tracer.start_span("shard", context=parent, attributes=_named(attributes), start_time=began)
    made.end(int(ended * 1e9))


def missing() -> str | None:
    """Return a hint what to install or to set before spans can be sent; None if all is there."""
    for name in PROTOCOLS:
        protocol = os.environ.get(name, "http/protobuf")
        if protocol != "http/protobuf":
            return f"supports only http/protobuf, and {name}={protocol}"
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
    logged: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Iterator[None]:
    """Trace a whole run; within, :func:`span` and :func:`shard` add their spans to it.

    A collector that does not answer is one warning, costs a few seconds at most, and changes nothing.

    Args:
        run: its name.
        attributes: of its span.
        exporter: for the spans; None is OTLP over HTTP, configured by the environment.
        logged: a context for warnings at the end, when the log of the run is closed.
    """
    global _current
    from opentelemetry.trace import Status, StatusCode
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    lost = _Lost()
    provider = _provider(exporter, lost)
    # The library logs every failure with a traceback; our single warning replaces them.
    library = logging.getLogger("opentelemetry")
    level = library.level
    library.setLevel(logging.CRITICAL + 1)
    # A scheduler that traces its tasks passes its own span by this variable.
    context = TraceContextTextMapPropagator().extract({"traceparent": os.environ.get("TRACEPARENT", "")})
    tracer = provider.get_tracer("clip_pipeline")
    top = tracer.start_span("run", context=context, attributes=_named({"run": run, **attributes}))
    before, _current = _current, (tracer, top)
    code = 0
    try:
        yield
    except BaseException as error:
        code, number = exit_code_of(error), shard_of(error)
        top.set_attributes(_named({} if number is None else {"shard": number}))
        top.record_exception(error)
        top.set_status(Status(StatusCode.ERROR, str(error)))
        raise
    finally:
        _current = before
        top.set_attributes(_named({"exit_code": code}))
        top.end()
        with logged():
            try:
                aside(provider.shutdown, name="spans").result(CLOSE_SECONDS)
                library.setLevel(level)
            except LateError:
                # The thread continues until the process ends, and would log every attempt: the level stays.
                lost.warn(f"the collector did not answer in {CLOSE_SECONDS:g} s")


def _provider(exporter: SpanExporter | None, lost: _Lost) -> TracerProvider:
    """The library's provider, which sends spans in the background and warns when that fails."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    # The environment may override the name of the service.
    named = Resource({"service.name": "clip-pipeline"}).merge(OTELResourceDetector().detect())
    provider = TracerProvider(resource=Resource.create(named.attributes), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(_checked(exporter or OTLPSpanExporter(), lost)))
    return provider


class _Lost:
    """A warning about lost spans, given once."""

    def __init__(self) -> None:
        self._given = threading.Event()

    def warn(self, reason: str) -> None:
        """Log the first reason."""
        if not self._given.is_set():
            self._given.set()
            log.warning("metrics.opentelemetry: spans are lost: %s; see OTEL_EXPORTER_OTLP_ENDPOINT", reason)


def _checked(exporter: SpanExporter, lost: _Lost) -> SpanExporter:
    """The exporter with a warning when it fails."""
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

    class Checked(SpanExporter):
        shutdown = exporter.shutdown

        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            try:
                result = exporter.export(spans)
            except Exception as error:
                lost.warn(f"{type(error).__name__}: {error}")
                return SpanExportResult.FAILURE
            if result is not SpanExportResult.SUCCESS:
                lost.warn("the collector does not answer, or refuses them")
            return result

    return Checked()


def _named(attributes: Attributes) -> dict[str, str | int | float | bool]:
    return {f"clip_pipeline.{name}": value for name, value in attributes.items()}
