"""Monitoring of a run: Prometheus' textfile and gateway, spans of OpenTelemetry."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("opentelemetry.sdk", reason="needs the extra otel")
pytest.importorskip("prometheus_client", reason="needs the extra metrics")

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client.parser import text_string_to_metric_families

from pipeline.config.schema import Config
from pipeline.config.validate import check
from pipeline.core.errors import ConfigError, OutputBusy, TooManyFailures
from pipeline.job.main import run_job
from pipeline.telemetry import monitor, prometheus, tracing
from pipeline.telemetry.monitor import monitored
from tests.jobs import config_for, scenes_manifest
from tests.processes import loads, wait_until
from tests.servers import answer, serve

ROWS = 48


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenes_manifest(tmp_path_factory.mktemp("metrics") / "m.parquet", ROWS)


@pytest.fixture
def job(manifest: Path, tmp_path: Path) -> Callable[..., Config]:
    """A config of a small job with two damaged rows; the keywords are of the groups ``metrics`` and ``errors``."""

    def config(errors: dict[str, Any] | None = None, **metrics: Any) -> Config:
        quick = {"batch_size": 8, "workers": 1}
        return config_for(manifest, tmp_path / "out", loader=quick, errors=errors or {}, metrics=metrics)

    return config


def samples(path: Path) -> dict[tuple[str, str], float]:
    """Values of a textfile by the name without the prefix and by the label of the sample."""
    found = {}
    for family in text_string_to_metric_families(path.read_text()):
        assert family.type == "gauge"
        assert family.documentation
        for sample in family.samples:
            assert {"job", "model", "backend"} <= set(sample.labels)
            own = [value for name, value in sample.labels.items() if name not in ("job", "model", "backend", "part")]
            found[sample.name.removeprefix("clip_pipeline_"), "".join(own)] = sample.value
    return found


def slow(handler: BaseHTTPRequestHandler) -> None:
    """A page that comes too late."""
    time.sleep(3)


def test_a_run_writes_a_file_that_prometheus_reads(job: Callable[..., Config], tmp_path: Path) -> None:
    place = tmp_path / "node" / "photos.prom"
    before = time.time()
    report = run_job(job(textfile=str(place), job="photos"))
    found = samples(place)
    assert found["rows", "ok"] == ROWS - 2
    assert found["rows", "empty"] == found["rows", "not_an_image"] == 1
    assert found["manifest_rows", ""] == found["processed_rows", ""] == ROWS
    assert (found["images", ""], found["failed_rows", ""], found["resumed_rows", ""]) == (ROWS - 2, 2, 0)
    assert (found["exit_code", ""], found["running", ""]) == (0, 0)
    assert before - 1 < found["start_timestamp_seconds", ""] < found["last_success_timestamp_seconds", ""]
    assert found["last_success_timestamp_seconds", ""] <= found["last_update_timestamp_seconds", ""]
    assert found["stage_seconds", "encode"] == report.stages["encode"]
    assert found["peak_memory_bytes", "rss"] > 2**26
    assert found["steady_images_per_second", ""] == report.steady_images_per_second
    assert found["dataset_bytes", ""] == sum(part.stat().st_size for part in (tmp_path / "out").glob("part-*"))
    assert report.run
    assert found["run_info", report.run] == 1
    # The collector runs as another user, and reads nothing but names that end in .prom.
    assert oct(place.stat().st_mode)[-3:] == "644"
    assert [path.name for path in place.parent.iterdir()] == [place.name]
    # A run that finds all done tells that too.
    run_job(job(textfile=str(place), job="photos"))
    again = samples(place)
    assert (again["resumed_rows", ""], again["images", ""], again["rows", "ok"]) == (ROWS, 0, ROWS - 2)


def test_promtool_has_nothing_to_say_about_the_file(job: Callable[..., Config], tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("no promtool; Debian has it in the package prometheus")
    place = tmp_path / "photos.prom"
    with monitored(job(textfile=str(place), job='a "quoted"\\ name\nof two lines'), "r", began=0.0) as told:
        told.looping(lambda: {"total": 1, "rows": 1, "failed": 0, "images": 1, "images_per_second": 2.5}, resumed=0)
        told.finished(run_job(job()), dataset_bytes=7)
    checked = subprocess.run(
        [promtool, "check", "metrics"], input=place.read_bytes(), capture_output=True, check=False, timeout=60
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")


def test_a_run_that_fails_tells_its_exit_code_and_keeps_the_last_success(
    job: Callable[..., Config], tmp_path: Path
) -> None:
    place = tmp_path / "photos.prom"
    run_job(job(textfile=str(place)))
    success = samples(place)["last_success_timestamp_seconds", ""]
    with pytest.raises(TooManyFailures):
        run_job(job(errors={"max_fraction": 0.0}, textfile=str(place)))
    found = samples(place)
    assert (found["exit_code", ""], found["running", ""]) == (TooManyFailures.exit_code, 0)
    assert found["rows", "ok"] == ROWS - 2
    assert found["last_success_timestamp_seconds", ""] == success
    # Another job's success is not this one's.
    with pytest.raises(ZeroDivisionError), monitored(job(textfile=str(place), job="other"), "r", began=0.0):
        _ = 1 / 0
    found = samples(place)
    assert found["exit_code", ""] == 1
    assert ("last_success_timestamp_seconds", "") not in found


def test_the_file_follows_a_run_and_tells_that_it_was_interrupted(
    job: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, rows = tmp_path / "photos.prom", [0]
    monkeypatch.setattr(monitor, "REFRESH_SECONDS", 0.01)

    def progress() -> dict[str, float]:
        return {"total": 9, "rows": rows[0], "failed": 0, "images": rows[0], "images_per_second": 1.0}

    def wait_for(value: int) -> None:
        wait_until(lambda: place.exists() and samples(place)["processed_rows", ""] == value)

    def work() -> None:
        with monitored(job(textfile=str(place)), "r", began=time.time()) as told:
            assert not place.exists()
            told.looping(progress, resumed=3)
            wait_for(0)
            rows[0] = 5
            wait_for(5)
            assert samples(place)["running", ""] == 1
            assert ("exit_code", "") not in samples(place)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    found = samples(place)
    assert (found["exit_code", ""], found["running", ""], found["resumed_rows", ""]) == (75, 0, 3)


def test_a_run_that_is_refused_leaves_the_file_to_the_one_at_work(job: Callable[..., Config], tmp_path: Path) -> None:
    place = tmp_path / "photos.prom"
    place.write_text("of the other\n")
    with pytest.raises(OutputBusy), monitored(job(textfile=str(place)), "r", began=0.0):
        raise OutputBusy("held")
    assert place.read_text() == "of the other\n"


def test_a_file_that_cannot_be_written_is_told_of_once_and_changes_nothing(
    job: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taken").write_text("")
    monkeypatch.setattr(monitor, "REFRESH_SECONDS", 0.01)
    run_job(job(textfile=str(tmp_path / "taken" / "photos.prom")))
    assert capsys.readouterr().err.count("metrics.textfile=") == 1


def test_a_pushgateway_is_told_when_a_run_has_ended_however_it_ends(job: Callable[..., Config]) -> None:
    with serve({}, other=answer(200)) as server:
        with monitored(job(pushgateway=server.url, job="photos"), "r", began=0.0):
            pass
        with pytest.raises(ZeroDivisionError), monitored(job(pushgateway=f"{server.url}/", job="a/b"), "r", began=0.0):
            _ = 1 / 0
    (first, body), (second, failed) = server.requests
    assert first == "/metrics/job/photos"
    assert second.startswith("/metrics/job@base64/")
    assert b'clip_pipeline_exit_code{backend="torch",job="photos",model="demo"} 0.0' in body
    assert b"clip_pipeline_exit_code{" in failed
    assert b"} 1.0" in failed
    assert b"last_success" not in failed


def test_a_part_of_a_job_has_a_group_of_its_own_at_the_pushgateway(job: Callable[..., Config]) -> None:
    config = job(job="photos").changed({"cluster.part": "3/16"})
    with (
        serve({}, other=answer(200)) as server,
        monitored(config.changed({"metrics.pushgateway": server.url}), "r", began=0.0),
    ):
        pass
    assert "/part@base64/" in server.requests[0][0]
    assert b'part="3/16"' in server.requests[0][1]


@pytest.mark.parametrize("kind", ["dead", "refuses", "slow"])
def test_a_pushgateway_that_is_not_well_is_a_warning(
    kind: str, job: Callable[..., Config], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitor, "PUSH_SECONDS", 0.2)
    with serve({}, other=slow if kind == "slow" else answer(400)) as server:
        given = "http://127.0.0.1:1" if kind == "dead" else server.url
        began = time.monotonic()
        with monitored(job(pushgateway=given), "r", began=0.0):
            pass
        assert time.monotonic() - began < 2.5
    said = capsys.readouterr().err
    assert said.startswith("warning: metrics.pushgateway: 127.0.0.1:")
    assert said.count("\n") == 1


def test_what_is_not_installed_is_said_before_any_work(
    job: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError) as caught:
        run_job(job(textfile="a.prom", pushgateway="http://gate:9091", opentelemetry=True))
    assert [problem.key for problem in caught.value.problems] == [
        "metrics.textfile",
        "metrics.pushgateway",
        "metrics.opentelemetry",
    ]
    assert "[metrics]'" in str(caught.value)
    assert "[otel]'" in str(caught.value)
    assert not (tmp_path / "out" / "_plan.json").exists()


def test_another_protocol_than_the_one_that_is_spoken_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tracing.missing() is None
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    assert "OTEL_EXPORTER_OTLP_PROTOCOL=grpc" in str(tracing.missing())


@pytest.mark.parametrize(
    ("metrics", "text"),
    [
        ({"textfile": "photos.txt"}, "metrics.textfile = 'photos.txt': must end in .prom"),
        ({"pushgateway": "gate:9091"}, "metrics.pushgateway = 'gate:9091': must be http://HOST:PORT"),
        ({"pushgateway": "http://me:secret@gate"}, "metrics.pushgateway = 'http://...@gate': must be"),
        ({"job": ""}, "metrics.job = ''"),
    ],
)
def test_a_wrong_value_is_said(metrics: dict[str, Any], text: str, job: Callable[..., Config]) -> None:
    (problem,) = check(job(**metrics))
    assert text in str(problem)
    assert "secret" not in str(problem)


def test_nothing_is_imported_for_monitors_that_nobody_wants() -> None:
    code = "import pipeline.telemetry.monitor, pipeline.telemetry.tracing as s\nwith s.span('x'): s.shard(None)"
    assert loads(code, "opentelemetry", "prometheus_client") == []


def test_a_foreign_file_has_no_last_success(tmp_path: Path) -> None:
    place = tmp_path / "x.prom"
    assert prometheus.read_value(place, "a", {}) is None
    place.write_bytes(b"a{b= \xff\n")
    assert prometheus.read_value(place, "a", {}) is None
    place.write_text('a{job="x"} 3\n')
    assert prometheus.read_value(place, "a", {"job": "x"}) == 3
    assert prometheus.read_value(place, "a", {"job": "y"}) is None


def test_the_run_its_start_up_and_every_shard_have_spans(job: Callable[..., Config]) -> None:
    memory = InMemorySpanExporter()
    with tracing.exported("r-1", {"job": "photos"}, exporter=memory):
        run_job(job())
    found = memory.get_finished_spans()
    top = next(span for span in found if span.name == "run")
    names = [span.name for span in found]
    assert {"manifest", "model", "prompts", "prepare", "backend", "gates"} <= set(names)
    assert names.count("shard") == 2
    assert dict(top.attributes or {}) == {
        "clip_pipeline.run": "r-1",
        "clip_pipeline.job": "photos",
        "clip_pipeline.exit_code": 0,
    }
    shards = [span for span in found if span.name == "shard"]
    told = [{key.removeprefix("clip_pipeline."): value for key, value in (s.attributes or {}).items()} for s in shards]
    assert told == [
        {"shard": 0, "rows": 24, "failures": 2, "committed": True},
        {"shard": 1, "rows": 24, "failures": 0, "committed": True},
    ]
    assert all(span.parent is not None and span.parent.span_id == top.context.span_id for span in shards)
    inner = next(span for span in found if span.name == "gates")
    outer = next(span for span in found if span.name == "prepare")
    assert inner.parent is not None
    assert inner.parent.span_id == outer.context.span_id
    for span in found:
        assert top.start_time <= span.start_time <= span.end_time <= top.end_time
    assert {span.resource.attributes["service.name"] for span in found} == {"clip-pipeline"}


def test_the_span_of_a_run_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "photos")
    monkeypatch.setenv("TRACEPARENT", f"00-{'ab' * 16}-{'cd' * 8}-01")
    memory = InMemorySpanExporter()
    with pytest.raises(TooManyFailures), tracing.exported("r", {}, exporter=memory):
        raise TooManyFailures("9 of 9 rows failed")
    (top,) = memory.get_finished_spans()
    assert top.status.description == "9 of 9 rows failed"
    assert (top.attributes or {})["clip_pipeline.exit_code"] == 3
    assert top.events[0].name == "exception"
    assert top.resource.attributes["service.name"] == "photos"
    # The scheduler's own span is the parent.
    assert top.parent is not None
    assert f"{top.parent.trace_id:x}" == "ab" * 16
    with tracing.span("outside"):
        assert len(memory.get_finished_spans()) == 1


def test_spans_go_by_otlp_to_where_the_environment_says(
    job: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve({}, other=answer(200)) as server:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", server.url)
        run_job(job(opentelemetry=True))
    names, services = [], set()
    for path, body in server.requests:
        assert path == "/v1/traces"
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            services |= {each.value.string_value for each in resource.resource.attributes if each.key == "service.name"}
            names += [span.name for scope in resource.scope_spans for span in scope.spans]
    assert names.count("shard") == 2
    assert names.count("run") == 1
    assert services == {"clip-pipeline"}


@pytest.mark.parametrize("kind", ["dead", "refuses", "slow"])
def test_a_collector_that_is_not_well_is_one_warning(
    kind: str, job: Callable[..., Config], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracing, "CLOSE_SECONDS", 0.5)
    with serve({}, other=slow if kind == "slow" else answer(400)) as server:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1" if kind == "dead" else server.url)
        began = time.monotonic()
        with monitored(job(opentelemetry=True), "r", began=0.0), tracing.span("work"):
            pass
        assert time.monotonic() - began < 2.5
    said = capsys.readouterr().err
    assert said.startswith("warning: metrics.opentelemetry: spans are lost: ")
    assert said.count("\n") == 1
