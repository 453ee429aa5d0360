"""The service over HTTP: its results are the rows of a dataset, and no request makes it fail."""

from __future__ import annotations

import base64
import http.client
import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

pytest.importorskip("uvicorn", reason="needs the extra serve")
pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("prometheus_client", reason="needs the extra serve")
pytest.importorskip("python_multipart", reason="needs the extra serve")

from prometheus_client.parser import text_string_to_metric_families

from pipeline.config.schema import ModelConfig
from pipeline.engine.query import embed_text
from pipeline.job.main import run_job
from pipeline.models.checkpoint import open_checkpoint
from tests.jobs import config_for, scene, scenes_manifest
from tests.processes import wait_until
from tests.service import BOUNDARY, Answer, Served, form, send, start

ROWS = 70
FORM = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}
DAMAGED = {3: b"no picture at all", 20: b"", 33: scene(33)[0][:400]}
COMMON = ("loader.batch_size=8", "loader.workers=2", "serve.max_body_bytes=3000000", "serve.max_images=70")


@pytest.fixture(scope="module")
def service() -> Iterator[Served]:
    yield from running(*COMMON, "serve.shapes=1", "serve.max_texts=200", "serve.max_text_chars=300", "log.format=json")


@pytest.fixture(scope="module")
def strict() -> Iterator[Served]:
    """Service with short timeouts."""
    limits = ("serve.header_seconds=0.5", "serve.timeout_seconds=3", "serve.client_requests=24")
    yield from running(*COMMON, *limits, "labels.top_k=2")


def running(*overrides: str) -> Iterator[Served]:
    served = start(*overrides)
    try:
        served.wait_ready()
        yield served
    finally:
        served.child.send(signal.SIGTERM)
        code = served.child.wait(30)
    assert code == 0, served.child.said()
    assert "Traceback" not in served.child.said()


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Rows of a dataset, each with the bytes of its image."""
    folder = tmp_path_factory.mktemp("job")
    manifest = scenes_manifest(folder / "manifest.parquet", ROWS, damaged=DAMAGED)
    run_job(config_for(manifest, folder / "output"))
    encoded = pq.read_table(manifest, columns=["image"])["image"].to_pylist()
    found = pq.read_table(folder / "output").to_pylist()
    return [{**row, "image": data} for row, data in zip(found, encoded, strict=True)]


def picture(place: int) -> bytes:
    return scene(place)[0]


def is_error(answer: Answer, status: int, name: str) -> bool:
    told = answer.json["error"]
    return (answer.status, told["name"], told["request"]) == (status, name, answer.headers["x-request-id"])


# Results.


def test_an_answer_is_the_row_that_the_job_writes(service: Served, rows: list[dict[str, Any]]) -> None:
    parts = [("images", row["id"], row["image"]) for row in rows]
    embedded, predicted = service.send_files("/embed", parts), service.send_files("/predict", parts)
    assert (embedded.status, predicted.status) == (200, 200)
    for row, vector, labels in zip(rows, embedded.json["images"], predicted.json["images"], strict=True):
        for answer in (vector, labels):
            assert {key: answer[key] for key in ("id", "status")} == {key: row[key] for key in ("id", "status")}
            assert answer["error"] == row["error"]
        if row["embedding"] is None:
            assert vector["embedding"] is labels["label"] is labels["top_scores"] is None
            continue
        assert np.array_equal(np.float32(vector["embedding"]), np.float32(row["embedding"]))
        assert (labels["label"], labels["top_labels"]) == (row["label"], row["top_labels"])
        # The job scores the rows of a shard's last batch at another shape, where the last digit may differ.
        assert labels["top_scores"] == pytest.approx(row["top_scores"], abs=1e-6)
        assert labels["score"] == labels["top_scores"][0]
    assert {row["status"] for row in rows} > {"ok", "empty", "not_an_image"}


def test_sixty_four_clients_at_once_each_get_their_own_picture(service: Served, rows: list[dict[str, Any]]) -> None:
    good = [row for row in rows if row["status"] == "ok"][:64]

    def ask(row: dict[str, Any]) -> bool:
        answer = service.send_files("/embed", [("images", row["id"], row["image"])])
        [image] = answer.json["images"]
        return image["id"] == row["id"] and np.array_equal(np.float32(image["embedding"]), np.float32(row["embedding"]))

    before = service.figure("clip_service_batch_images_count")
    with ThreadPoolExecutor(64) as threads:
        assert all(threads.map(ask, good))
    # The requests shared batches.
    assert service.figure("clip_service_batch_images_count") - before < 64


def test_json_and_forms_ask_the_same(service: Served) -> None:
    encoded = base64.b64encode(picture(1)).decode()
    by_json = service.post("/embed", {"images": [{"data": encoded, "id": "a"}, {"data": ""}], "texts": ["a cat"]})
    by_form = service.send_files(
        "/embed", [("images", "a", picture(1)), ("images", None, b""), ("texts", None, b"a cat")]
    )
    assert by_json.json == by_form.json
    assert [image["status"] for image in by_json.json["images"]] == ["ok", "empty"]
    assert by_json.json["images"][1]["id"] is None


def test_texts_are_those_of_a_search_and_come_from_memory_the_second_time(service: Served) -> None:
    texts = ["a red circle", "something blue", "a red circle"]
    answer = service.post("/embed", {"texts": texts}).json
    wanted = embed_text(open_checkpoint(ModelConfig()), texts)
    assert np.allclose([each["embedding"] for each in answer["texts"]], wanted, atol=1e-6)
    before = {
        source: service.figure("clip_service_text_features_total", source=source) for source in ("memory", "model")
    }
    assert service.post("/embed", {"texts": texts}).json == answer
    assert service.figure("clip_service_text_features_total", source="memory") == before["memory"] + 3
    assert service.figure("clip_service_text_features_total", source="model") == before["model"]


def test_labels_of_a_request_are_scored_as_a_job_s_are(
    service: Served, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    labels, templates = ["red circle", "blue square", "green star"], ["a {}", "a picture of a {}"]
    manifest = scenes_manifest(tmp_path / "manifest.parquet", 8, damaged={})
    run_job(
        config_for(manifest, tmp_path / "out", prompts={"labels": labels, "templates": templates}, labels={"top_k": 2})
    )
    wanted = pq.read_table(tmp_path / "out").to_pylist()
    images = [{"data": base64.b64encode(picture(place)).decode()} for place in range(8)]
    asked = {"images": images, "labels": labels, "templates": templates, "top_k": 2}
    before = service.figure("clip_service_text_features_total", source="disk")
    for _ in range(2):
        answer = service.post("/predict", asked)
        for found, row in zip(answer.json["images"], wanted, strict=True):
            assert (found["label"], found["top_labels"]) == (row["label"], row["top_labels"])
            assert found["top_scores"] == row["top_scores"]
    # The job wrote the features to the disk, and the service read them once.
    assert service.figure("clip_service_text_features_total", source="disk") == before + 1


# Probes.


def test_the_probes_and_the_version_answer(service: Served) -> None:
    assert service.ask("GET", "/healthz").json == {"status": "alive"}
    assert service.ask("GET", "/readyz").json == {"status": "ready"}
    version = service.ask("GET", "/version").json
    assert version["fingerprint"] == service.post("/embed", {"texts": ["a"]}).json["fingerprint"]
    assert version["fingerprints"]["model"] == open_checkpoint(ModelConfig()).fingerprint | {
        "preprocess": version["fingerprints"]["model"]["preprocess"]
    }
    assert version["config"]["loader"]["batch_size"] == 8
    assert "dir" not in version["config"]["output"]


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics", "/version", "/openapi.json"])
def test_head_answers_as_get_does_without_a_body(service: Served, path: str) -> None:
    asked, told = service.ask("HEAD", path), service.ask("GET", path)
    assert (asked.status, asked.body, told.status) == (200, b"", 200)
    assert asked.headers["content-type"] == told.headers["content-type"]
    assert int(asked.headers["content-length"]) > 0
    raw_answer = raw(service, f"HEAD {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n".encode())
    assert raw_answer.endswith(b"\r\n\r\n")
    assert is_error(service.ask("GET", "/nothing"), 404, "not_found")
    assert service.ask("HEAD", "/predict").status == 405


def test_one_image_and_labels_with_commas_are_answered_as_the_long_form_is(service: Served) -> None:
    short = service.send_files("/predict", [("image", "a.jpg", picture(2)), ("texts", None, b"red circle, blue star")])
    labels = [("labels", None, b"red circle"), ("labels", None, b"blue star")]
    assert short.json == service.send_files("/predict", [("images", "a.jpg", picture(2)), *labels]).json
    assert short.json["images"][0]["id"] == "a.jpg"


def test_the_log_says_that_the_demo_model_knows_shapes_only(service: Served) -> None:
    assert "model=demo, the default, knows rendered shapes only" in service.child.said()
    assert "model=clip_vit_b32" in service.child.said()


def test_metrics_are_what_prometheus_reads(service: Served) -> None:
    service.send_files("/predict", [("images", "a", picture(2))])
    answer = service.ask("GET", "/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    families = {family.name: family for family in text_string_to_metric_families(answer.body.decode())}
    stages = {each.labels["stage"] for each in families["clip_service_stage_seconds"].samples if each.value}
    assert stages >= {"read", "decode", "wait", "encode", "label"}
    assert families["clip_service_ready"].samples[0].value == 1
    assert service.figure("clip_service_requests_total", route="/predict", code="200") >= 1
    assert service.figure("clip_service_images_total", status="ok") >= 1


def test_a_request_keeps_its_id_if_it_is_a_sane_one(service: Served) -> None:
    asked = {"texts": ["a"]}
    assert service.post("/embed", asked, **{"X-Request-ID": "shop-17.a_b"}).headers["x-request-id"] == "shop-17.a_b"
    for bad in ("a b", "x" * 65, "{}", 'a"b'):
        assert service.post("/embed", asked, **{"X-Request-ID": bad}).headers["x-request-id"] != bad
    assert '"request": "shop-17.a_b"' in service.child.said()


# Invalid requests.

RUBBISH: list[tuple[bytes, str, int, str]] = [
    (b"", "application/json", 422, "invalid"),
    (b"{", "application/json", 422, "invalid"),
    (b"[]", "application/json", 422, "invalid"),
    (b"{}", "application/json", 422, "invalid"),
    (b'{"images": [{"data": "***"}]}', "application/json", 422, "invalid"),
    (b'{"images": [{"path": "/etc/passwd"}]}', "application/json", 422, "invalid"),
    (b'{"images": [{"url": "http://169.254.169.254/"}]}', "application/json", 422, "invalid"),
    (b'{"texts": [1]}', "application/json", 422, "invalid"),
    (b'{"texts": [" "]}', "application/json", 422, "invalid"),
    (b'{"texts": ["\\ud800"]}', "application/json", 422, "invalid"),
    (b'{"texts": ["' + b"x" * 301 + b'"]}', "application/json", 422, "invalid"),
    (b'{"texts": [' + b'"x",' * 200 + b'"x"]}', "application/json", 422, "invalid"),
    (b"[" * 100_000, "application/json", 422, "invalid"),
    (b"\xff\x00" * 1000, "application/json", 422, "invalid"),
    # Without a limit, each of these would create thousands of errors, or an answer as long as the request.
    (b'{"texts":[' + b"0," * 1_000_000 + b"0]}", "application/json", 422, "invalid"),
    (b'{"' + b"k" * 100_000 + b'":0}', "application/json", 422, "invalid"),
    (b'{"images":[{"data":"","id":"' + b"x" * 100_000 + b'"}]}', "application/json", 422, "invalid"),
    (b"texts=a", "application/x-www-form-urlencoded", 415, "media_type"),
    (b"", "", 415, "media_type"),
    (b"\xff" * 1000, "multipart/form-data", 422, "invalid"),
    (b"\xff" * 1000, FORM["content-type"], 422, "invalid"),
    (form([("texts", None, b"\xff")]), FORM["content-type"], 422, "invalid"),
    (form([("path", None, b"/etc/passwd")]), FORM["content-type"], 422, "invalid"),
    (form([("texts", None, b"a")])[:-8], FORM["content-type"], 422, "invalid"),
    (form([("images", None, b"")] * 71), FORM["content-type"], 422, "invalid"),
    (form([("texts", None, b"")] * 400), FORM["content-type"], 422, "invalid"),
]


@pytest.mark.parametrize(("body", "kind", "status", "name"), RUBBISH)
def test_a_rubbish_body_is_refused_in_words(service: Served, body: bytes, kind: str, status: int, name: str) -> None:
    answer = service.ask("POST", "/embed", body, {"content-type": kind})
    assert is_error(answer, status, name), answer
    assert len(answer.body) < 2000


def test_what_a_client_is_told_stands_in_the_log_on_one_line(service: Served) -> None:
    asked = {"text": ["a"], "a\nb": 0}
    answer = service.post("/embed", asked, **{"X-Request-ID": "told-why"})
    assert "text: is not known; there are images, texts" in answer.json["error"]["message"]
    wait_until(lambda: '"request": "told-why"' in service.child.said())
    [line] = [line for line in service.child.said().splitlines() if '"request": "told-why"' in line]
    logged = json.loads(line)
    assert (logged["why"], logged["client"]) == (answer.json["error"]["message"], "127.0.0.1")
    assert "a\\nb" in logged["message"]


@pytest.mark.parametrize(
    "asked",
    [
        {"labels": ["a", "a"]},
        {"labels": []},
        {"labels": ["a"], "templates": ["no place"]},
        {"templates": ["a {}"]},
        {"top_k": 0},
        {"labels": ["a"] * 1, "templates": ["{} " + str(i) for i in range(201)]},
    ],
)
def test_labels_that_a_config_could_not_have_are_refused(service: Served, asked: dict[str, Any]) -> None:
    images = [{"data": base64.b64encode(picture(0)).decode()}]
    assert is_error(service.post("/predict", {"images": images, **asked}), 422, "invalid")


def test_what_is_not_there_is_told_as_json(service: Served) -> None:
    nothing = service.ask("GET", "/../etc/passwd")
    assert is_error(nothing, 404, "not_found")
    assert "/openapi.json" in nothing.json["error"]["message"]
    answer = service.ask("GET", "/embed")
    assert is_error(answer, 405, "method_not_allowed")
    assert answer.headers["allow"] == "POST"
    # No redirect to the host in the header.
    assert is_error(service.ask("GET", "/healthz/", headers={"host": "evil.example"}), 404, "not_found")
    packed = {"content-type": "application/json", "content-encoding": "gzip"}
    assert is_error(service.ask("POST", "/embed", b"x", packed), 415, "content_encoding")


def raw(served: Served, head: bytes, *chunks: bytes, pause: float = 0, seconds: float = 20) -> bytes:
    """Send raw bytes and return the answer."""
    with socket.create_connection(("127.0.0.1", served.port), timeout=seconds) as connection:
        try:
            for data in (head, *chunks):
                connection.sendall(data)
                time.sleep(pause)
        except (BrokenPipeError, ConnectionResetError):
            pass
        answer = b""
        try:
            while data := connection.recv(65536):
                answer += data
        except ConnectionResetError:
            pass
        return answer


HEAD = b"POST /embed HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"


def test_a_huge_body_is_refused_by_its_word_and_by_its_bytes(service: Served) -> None:
    declared = raw(service, HEAD + b"content-length: 99999999999\r\nconnection: close\r\n\r\n", b"x" * 1000)
    assert declared.startswith(b"HTTP/1.1 413 ")
    piece = b"%x\r\n%s\r\n" % (100_000, b"x" * 100_000)
    chunked = raw(service, HEAD + b"transfer-encoding: chunked\r\nconnection: close\r\n\r\n", *[piece] * 60)
    assert chunked.startswith(b"HTTP/1.1 413 ")
    assert b"serve.max_body_bytes=3,000,000" in chunked
    # The answer arrives while the body is still being sent; then the connection closes.
    assert raw(service, HEAD + b"content-length: 4000000\r\n\r\n", b"x" * 10).startswith(b"HTTP/1.1 413 ")
    assert service.figure("clip_service_held_bytes") == 0


def test_nobody_gets_a_web_socket_or_fills_the_log_by_asking_for_one(service: Served) -> None:
    upgrade = {"connection": "upgrade", "upgrade": "websocket", "sec-websocket-version": "13"}
    assert service.ask("GET", "/healthz", headers=upgrade).status == 200
    assert "pgrade" not in service.child.said()


def test_rubbish_that_is_no_http_hurts_nobody(service: Served) -> None:
    for data in (b"\x16\x03\x01\x02\x00" * 100, b"GET\r\n\r\n", b"A" * 100_000 + b"\r\n\r\n", b"\x00" * 5000):
        assert b" 200 " not in raw(service, data)
    assert service.ask("GET", "/healthz").status == 200


def test_slow_clients_are_let_go(strict: Served) -> None:
    started = time.monotonic()
    assert raw(strict, b"POST /embed HTTP/1.1\r\nhost", b": a", pause=0.1) == b""
    assert time.monotonic() - started < 3
    answer = raw(strict, HEAD + b"content-length: 1000\r\nconnection: close\r\n\r\n", b"{")
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"slow_body" in answer
    assert strict.figure("clip_service_held_bytes") == 0


@pytest.mark.slow
def test_who_does_not_read_its_answers_loses_them(strict: Served) -> None:
    texts = [f"a {place}" for place in range(1000)]
    asked = json.dumps({"texts": texts}).encode()
    whole = len(strict.post("/embed", {"texts": texts}).body)
    with socket.create_connection(("127.0.0.1", strict.port), timeout=20) as connection:
        # More than the socket buffers hold.
        connection.sendall((HEAD + b"content-length: %d\r\n\r\n" % len(asked) + asked) * 8)
        time.sleep(1.5)
        # A request is in progress until its answer is read.
        assert strict.figure("clip_service_requests_in_flight") == 1
        wait_until(lambda: strict.figure("clip_service_requests_in_flight") == 0)
        got = 0
        with suppress(ConnectionResetError):
            while data := connection.recv(2**20):
                got += len(data)
    assert got < 8 * whole


def test_bytes_that_are_no_chunk_after_the_answer_end_the_connection_alone(service: Served) -> None:
    chunked = HEAD + b"content-encoding: gzip\r\ntransfer-encoding: chunked\r\n\r\n"
    assert raw(service, chunked, b"1\r\n.\r\nzz\r\n", pause=0.1).startswith(b"HTTP/1.1 415 ")
    assert "LocalProtocolError" not in service.child.said()


def test_closed_connections_drop_out(service: Served) -> None:
    body = form([("images", "a", picture(4))] * 30)
    head = f"POST /embed HTTP/1.1\r\nhost: a\r\ncontent-type: {FORM['content-type']}\r\n"
    before = service.figure("clip_service_requests_total", code="499")
    for place in range(12):
        with socket.create_connection(("127.0.0.1", service.port), timeout=20) as connection:
            connection.sendall(
                f"{head}content-length: {len(body)}\r\n\r\n".encode() + body[: None if place % 2 else -10]
            )
    wait_until(lambda: service.figure("clip_service_requests_in_flight") == 0)
    for name in ("requests_in_flight", "queue_images", "held_bytes"):
        assert service.figure(f"clip_service_{name}") == 0
    assert service.figure("clip_service_requests_total", code="499") >= before + 6


def test_one_client_cannot_have_everything(strict: Served) -> None:
    opened = []
    try:
        for _ in range(24):
            connection = socket.create_connection(("127.0.0.1", strict.port), timeout=20)
            opened.append(connection)
            connection.sendall(HEAD + b"content-length: 10\r\n\r\n{")
        wait_until(lambda: strict.figure("clip_service_requests_in_flight") >= 24, 3)
        answer = strict.post("/embed", {"texts": ["a"]})
        assert is_error(answer, 429, "too_many_requests")
        assert int(answer.headers["retry-after"]) >= 1
    finally:
        for connection in opened:
            connection.close()


# The schema.


@pytest.mark.compat("schemathesis")
def test_requests_made_up_from_the_schema_meet_no_error_of_the_server(service: Served) -> None:
    import hypothesis
    import schemathesis
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi import checks

    wanted = [
        not_a_server_error,
        checks.status_code_conformance,
        checks.content_type_conformance,
        checks.response_schema_conformance,
    ]
    base = f"http://127.0.0.1:{service.port}"
    schema = schemathesis.openapi.from_url(f"{base}/openapi.json")
    paths = []
    for operation in (each.ok() for each in schema.get_all_operations()):
        paths.append(operation.path)

        @hypothesis.settings(max_examples=12, deadline=None, database=None, derandomize=True,
                             suppress_health_check=list(hypothesis.HealthCheck))  # fmt: skip
        @hypothesis.given(case=operation.as_strategy())
        def run(case: schemathesis.Case) -> None:
            response = case.call(base_url=base, timeout=30)
            case.validate_response(response, checks=wanted)

        run()
    assert sorted(paths) == ["/embed", "/healthz", "/metrics", "/predict", "/readyz", "/v1/embeddings", "/version"]


# Shutdown. It ends the strict service, so it is the last test.


def test_the_end_answers_every_request_that_was_accepted(strict: Served) -> None:
    body, stop = form([("images", "a", picture(6))]), threading.Event()
    answered, lost = [], []

    def ask() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", strict.port, timeout=30)
        while not stop.is_set():
            try:
                if connection.sock is None:
                    connection.connect()
            except OSError:
                # Not accepted.
                return
            try:
                answered.append(send(connection, "POST", "/embed", body, FORM).status)
            except (OSError, http.client.HTTPException) as error:
                lost.append(repr(error))
                return

    clients = [threading.Thread(target=ask) for _ in range(16)]
    for client in clients:
        client.start()
    wait_until(lambda: len(answered) >= 32)
    strict.child.send(signal.SIGTERM)
    code = strict.child.wait(30)
    stop.set()
    for client in clients:
        client.join()
    assert (code, lost, set(answered)) == (0, [], {200})
