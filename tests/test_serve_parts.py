"""Parts of the service: batching, the forward, request bodies, limits, caches, settings, the app without a server."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
import socket
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

pytest.importorskip("uvicorn", reason="needs the extra serve")
pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("prometheus_client", reason="needs the extra serve")
pytest.importorskip("python_multipart", reason="needs the extra serve")

import uvicorn

from pipeline.config.schema import Config, LoaderConfig, ServeConfig
from pipeline.core.errors import ConfigError, NumericalError
from pipeline.core.records import TextBank
from pipeline.engine.forward import Labelling
from pipeline.serve import __main__ as serve
from pipeline.serve.app import build
from pipeline.serve.batching import Batcher, BatchLimits, next_batch_size
from pipeline.serve.engine import open_engine, shapes
from pipeline.serve.errors import Refused
from pipeline.serve.forward import Forward, Picture
from pipeline.serve.limits import Admission
from pipeline.serve.metrics import Metrics
from pipeline.serve.middleware import RequestMiddleware
from pipeline.serve.requests import EmbedRequest, PredictRequest, body_of, read_request, request_schemas
from pipeline.serve.service import Service
from pipeline.serve.settings import VARIABLE, config_of_environment, service_config
from pipeline.serve.text_cache import Recent
from pipeline.serve.uvicorn_server import Server, TimeoutProtocol
from tests.forks import forks
from tests.jobs import StubEncoder
from tests.processes import loads
from tests.service import BOUNDARY, form

# Batching.


class Squares:
    """Work that squares numbers in threads and records its batches."""

    def __init__(self, pool: ThreadPoolExecutor, work: Callable[[Sequence[int]], list[int]] | None = None) -> None:
        self.pool, self.batches = pool, list[list[int]]()
        self.work = work or (lambda given: [each * each for each in given])

    def __call__(self, given: Sequence[int]) -> Future[Sequence[int]]:
        self.batches.append(list(given))
        return self.pool.submit(self.work, given)


def test_answers_of_shared_batches_never_go_to_another() -> None:
    def work(given: Sequence[int]) -> list[int]:
        # Batches finish out of order.
        pause.wait(random.random() / 200)
        return [each * each for each in given]

    async def main() -> None:
        batcher = Batcher(squares, BatchLimits([8], streams=3, wait=0.001))

        async def ask(number: int) -> None:
            await asyncio.sleep(random.random() / 20)
            assert await batcher.submit(number) == number * number

        await asyncio.gather(*(ask(number) for number in range(500)))
        assert batcher.waiting == 0

    pause = threading.Event()
    with ThreadPoolExecutor(3) as pool:
        squares = Squares(pool, work)
        asyncio.run(main())
    assert sorted(each for batch in squares.batches for each in batch) == list(range(500))
    assert max(map(len, squares.batches)) <= 8
    assert len(squares.batches) < 500


def test_a_full_batch_does_not_wait_and_another_one_waits_its_time() -> None:
    async def main() -> list[list[float]]:
        waited: list[list[float]] = []
        batcher = Batcher(
            squares, BatchLimits([4], streams=1, wait=0.2), on_start=lambda seconds: waited.append(list(seconds))
        )
        await asyncio.gather(*(batcher.submit(number) for number in range(6)))
        return waited

    with ThreadPoolExecutor(1) as pool:
        squares = Squares(pool)
        first, second = asyncio.run(main())
    assert squares.batches == [[0, 1, 2, 3], [4, 5]]
    assert max(first) < 0.15
    assert min(second) >= 0.19


def test_what_waits_while_every_lane_works_goes_together() -> None:
    async def main() -> None:
        batcher = Batcher(squares, BatchLimits([100], streams=1, wait=0))
        await asyncio.gather(*(batcher.submit(number) for number in range(50)))

    with ThreadPoolExecutor(1) as pool:
        squares = Squares(pool)
        asyncio.run(main())
    assert [len(batch) for batch in squares.batches] == [1, 49]


def test_a_cancelled_request_drops_out_of_the_queue() -> None:
    async def main() -> None:
        batcher = Batcher(squares, BatchLimits([4], streams=1, wait=0.05))
        answers = [batcher.submit(number) for number in range(3)]
        answers[0].cancel()
        answers[2].cancel()
        assert await answers[1] == 1

    with ThreadPoolExecutor(1) as pool:
        squares = Squares(pool)
        asyncio.run(main())
    assert squares.batches == [[1]]


def test_an_error_of_a_batch_goes_to_all_of_it_and_ends_there() -> None:
    def work(given: Sequence[int]) -> list[int]:
        if 0 in given:
            raise ValueError("zero")
        return list(given)

    async def main() -> list[Any]:
        batcher = Batcher(squares, BatchLimits([2], streams=1, wait=0))
        return await asyncio.gather(*(batcher.submit(number) for number in (0, 1, 2, 3)), return_exceptions=True)

    with ThreadPoolExecutor(1) as pool:
        squares = Squares(pool, work)
        found = asyncio.run(main())
    assert [isinstance(each, ValueError) for each in found[:1]] == [True]
    assert found[-1] == 3


@pytest.mark.parametrize(
    ("count", "taken"), [(1, 1), (2, 1), (3, 3), (4, 4), (7, 4), (9, 9), (16, 16), (17, 16), (40, 40), (99, 64)]
)
def test_a_batch_takes_what_fills_more_than_half_of_its_shape(count: int, taken: int) -> None:
    assert next_batch_size(count, [1, 4, 16, 64]) == taken
    assert next_batch_size(count, [64]) == min(count, 64)


# The forward.


class Swapping(StubEncoder):
    def spoil(self, vectors: torch.Tensor) -> torch.Tensor:
        return vectors.flip(0)


class Broken(StubEncoder):
    def spoil(self, vectors: torch.Tensor) -> torch.Tensor:
        return vectors * float("nan")


def pictures(count: int, labelling: Labelling | None = None) -> list[Picture]:
    draw = np.random.default_rng(1)
    return [
        Picture(rgb=np.full((32, 32, 3), draw.integers(0, 255, 3), dtype=np.uint8), labelling=labelling)
        for _ in range(count)
    ]


def forward(*encoders: StubEncoder) -> Forward:
    return Forward(encoders, (32, 32), lambda stage, seconds: None)


def test_a_batch_s_rows_are_those_of_its_pictures_at_every_shape() -> None:
    some = pictures(8)
    whole = [row.vector for row in forward(StubEncoder(8))(some)]
    ladder = forward(StubEncoder(8), StubEncoder(2))
    for count in range(1, 9):
        for row, vector in zip(ladder(some[:count]), whole, strict=False):
            assert np.array_equal(row.vector, vector)


@pytest.mark.parametrize("count", [3, 8])
@pytest.mark.parametrize("encoder", [Swapping, Broken])
def test_an_encoder_that_mixes_its_rows_up_or_returns_nan_is_found_out(encoder: type[StubEncoder], count: int) -> None:
    with pytest.raises(NumericalError):
        forward(encoder(8))(pictures(count))


def bank(count: int) -> TextBank:
    features = np.eye(count, 4, dtype=np.float32)
    return TextBank(tuple("abcd"[:count]), features, "softmax", 10.0, 0.0, fingerprint=str(count))


def test_requests_with_labels_of_their_own_share_a_batch() -> None:
    first, second = (
        Labelling(bank=one, features=torch.from_numpy(one.features), top_k=1) for one in (bank(4), bank(2))
    )
    more = dataclasses.replace(first, top_k=3)
    choices = [first, None, second, more, second]
    mixed = [Picture(rgb=each.rgb, labelling=one) for each, one in zip(pictures(5), choices, strict=True)]
    together = forward(StubEncoder(8))(mixed)
    assert [len(row.top) for row in together] == [1, 0, 1, 3, 1]
    for picture, row in zip(mixed, together, strict=True):
        [alone] = forward(StubEncoder(8))([picture])
        assert alone.top.tolist() == row.top.tolist()
        assert np.array_equal(alone.scores, row.scores)


# Bodies.


@pytest.mark.parametrize("value", [b"000000001" + b"0" * 5000, b"00000000199999", b"1001", b"0", b"+1", b""])
def test_a_form_s_top_k_is_one_number_of_few_digits(value: bytes) -> None:
    body = form([("images", None, b"x"), ("top_k", None, value)])
    with pytest.raises(Refused, match="top_k"):
        read_request(PredictRequest, f"multipart/form-data; boundary={BOUNDARY}", body, ServeConfig())


LABELS = ["a cat", "a dog"]
FORMS: list[tuple[list[tuple[str, str | None, bytes]], list[str] | None]] = [
    ([("image", "cat.jpg", b"x")], None),
    ([("image", "cat.jpg", b"x"), ("texts", None, b"a cat,a dog")], LABELS),
    ([("image", "cat.jpg", b"x"), ("texts", None, b" a cat ,\ta dog\n")], LABELS),
    ([("image", "cat.jpg", b"x"), ("texts", None, b"a cat"), ("texts", None, b"a dog")], LABELS),
    ([("image", "cat.jpg", b"x"), ("texts", None, b'["a cat", "a dog"]')], LABELS),
    ([("image", "cat.jpg", b"x"), ("texts", None, b' ["a cat, asleep"]')], ["a cat, asleep"]),
    ([("image", "cat.jpg", b"x"), ("texts", None, b"a cat, asleep"), ("texts", None, b"b")], ["a cat, asleep", "b"]),
    ([("image", "cat.jpg", b"x"), ("texts", None, "\u732b,\u72ac".encode())], ["\u732b", "\u72ac"]),
    ([("image", "cat.jpg", b"x"), ("labels", None, b"a cat"), ("labels", None, b"a dog")], LABELS),
    ([("images", "cat.jpg", b"x"), ("texts", None, b"a cat,a dog")], LABELS),
    # As before: one label with a comma.
    ([("images", "cat.jpg", b"x"), ("labels", None, b"a cat,a dog")], ["a cat,a dog"]),
]


@pytest.mark.parametrize(("parts", "labels"), FORMS)
def test_a_form_gives_one_image_and_labels_as_people_write_them(
    parts: list[tuple[str, str | None, bytes]], labels: list[str] | None
) -> None:
    found = read_request(PredictRequest, f"multipart/form-data; boundary={BOUNDARY}", form(parts), ServeConfig())
    assert ([image.id for image in found.images], found.images[0].data, found.labels) == (["cat.jpg"], b"x", labels)
    assert found.image is found.texts is None


@pytest.mark.parametrize(
    ("asked", "labels"),
    [
        ({"image": "eA==", "texts": LABELS}, LABELS),
        ({"image": {"data": "eA=="}, "texts": "a cat, a dog"}, LABELS),
        ({"image": [{"data": "eA=="}], "texts": '["a cat", "a dog"]'}, LABELS),
        ({"images": [{"data": "eA=="}], "image": None, "texts": ["a cat, asleep"]}, ["a cat, asleep"]),
        ({"image": "eA==", "labels": LABELS, "texts": None}, LABELS),
    ],
)
def test_json_gives_one_image_and_labels_as_people_write_them(asked: dict[str, Any], labels: list[str]) -> None:
    found = read_request(PredictRequest, "application/json", json.dumps(asked).encode(), ServeConfig())
    assert ([image.data for image in found.images], found.labels) == ([b"x"], labels)


IMAGE = ("image", "cat.jpg", b"x")


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([IMAGE, IMAGE], "image: 2 images; give several as images"),
        ([IMAGE, ("images", "b", b"x")], "image and images; give one of them"),
        ([IMAGE, ("texts", None, b"a"), ("labels", None, b"b")], "texts and labels; give one of them"),
        ([IMAGE, ("texts", None, b"[a cat]")], "texts: begins like a JSON list, and is none"),
        ([IMAGE, ("texts", None, b"[" * 100_000)], "texts: begins like a JSON list, and is none"),
        ([IMAGE, ("texts", None, b"[[1],2]")], "texts.0"),
        ([IMAGE, ("texts", None, b"[" + b"1," * 10**6 + b"1]")], "more values"),
        ([IMAGE, ("texts", None, b"," * 10**6)], "over serve.max_texts"),
        ([IMAGE, ("texts", None, b"a,,b")], "texts.1: is empty"),
        ([IMAGE, ("texts", None, b"a,a")], "'a' is a duplicate"),
        ([IMAGE, ("texts", None, b"x" * 5000)], "over serve.max_text_chars"),
        ([IMAGE, ("templates", None, b"a {}")], "templates without labels"),
        ([("texts", None, b"a")], "images is empty"),
    ],
)
def test_a_form_that_says_two_things_or_nothing_is_refused_in_words(
    parts: list[tuple[str, str | None, bytes]], message: str
) -> None:
    with pytest.raises(Refused) as refused:
        read_request(PredictRequest, f"multipart/form-data; boundary={BOUNDARY}", form(parts), ServeConfig())
    assert message in refused.value.message
    assert len(refused.value.message) < 600


def test_an_embedding_takes_no_second_names() -> None:
    with pytest.raises(Refused, match="image: is not known; there are images, texts"):
        read_request(EmbedRequest, f"multipart/form-data; boundary={BOUNDARY}", form([IMAGE]), ServeConfig())


def test_the_schema_has_both_ways_to_write_a_request() -> None:
    fields = request_schemas()["PredictRequest"]["properties"]
    written = body_of(PredictRequest)["requestBody"]["content"]["multipart/form-data"]["schema"]["properties"]
    wanted = {"images", "image", "labels", "texts", "templates", "top_k"}
    assert set(fields) == set(written) == wanted


def test_a_json_body_at_its_limits_is_read_and_one_of_a_million_values_is_not() -> None:
    limits = ServeConfig(max_images=4, max_texts=100)
    texts, images = ['a, "b", c \\'] * 100, [{"data": "", "id": 'x, "y"'}] * 4
    body = json.dumps({"texts": texts, "images": images}).encode()
    assert len(read_request(EmbedRequest, "application/json", body, limits).texts) == 100
    for crowd in (b'{"texts": [' + b"[]," * 10**6, b"{" + b'"a": 0,' * 10**6, b'"' * 10**6):
        with pytest.raises(Refused, match="more values"):
            read_request(EmbedRequest, "application/json", crowd, limits)


def test_few_labels_do_not_make_an_answer_of_a_gigabyte() -> None:
    asked = {"images": [{"data": ""}] * 64, "labels": [f"{place:04}" + "\U0001f600" * 1996 for place in range(1000)]}
    assert read_request(PredictRequest, "application/json", json.dumps(asked).encode(), ServeConfig()).labels
    with pytest.raises(Refused, match="top_k"):
        read_request(PredictRequest, "application/json", json.dumps({**asked, "top_k": 1000}).encode(), ServeConfig())


# Limits and caches.


def test_what_is_too_much_is_refused_and_given_back() -> None:
    admission = Admission(ServeConfig(queue=10, requests=3, client_requests=2, held_bytes=100), Metrics())
    with admission.request("a"), admission.request("a"):
        with pytest.raises(Refused) as refused, admission.request("a"):
            pass
        assert (refused.value.status, refused.value.headers) == (429, {"retry-after": "1"})
        with admission.request("b"), pytest.raises(Refused) as refused, admission.request("c"):
            pass
        assert refused.value.status == 503
    with admission.request("a"), admission.images(10):
        admission.seconds_ahead = 7.2
        with pytest.raises(Refused) as refused, admission.images(1):
            pass
        assert refused.value.headers == {"retry-after": "7"}
    admission.hold(100)
    with pytest.raises(Refused):
        admission.hold(1)
    admission.release(100)
    assert (admission.request_count, admission.image_count, admission.held) == (0, 0, 0)


def test_the_features_in_memory_keep_to_their_bytes() -> None:
    recent: Recent[str] = Recent(100)
    for key in "abcd":
        recent.put(key, key, 30)
        recent.get("a")
    assert [recent.get(key) for key in "abcd"] == ["a", None, "c", "d"]
    recent.put("large", "large", 101)
    assert recent.get("large") is None
    assert recent.used == 90


def test_shapes_are_quarters_of_the_batch_down_to_one_picture() -> None:
    def of(size: int, count: int) -> list[int]:
        return shapes(Config(loader=LoaderConfig(batch_size=size), serve=ServeConfig(shapes=count)))

    assert of(64, 1) == [64]
    assert of(64, 4) == [64, 16, 4, 1]
    assert of(6, 8) == [6, 2, 1]


def test_connections_on_top_of_those_that_files_suffice_for_are_closed_at_once() -> None:
    async def main() -> None:
        async def app(scope: Any, receive: Any, send: Any) -> None: ...

        server = Server(uvicorn.Config(app, log_config=None, ws="none", lifespan="off"), Service(Config()))
        server.config.load()
        opened = [Mock(asyncio.Transport, get_extra_info=lambda name: None) for _ in range(2)]
        for transport in opened:
            protocol = TimeoutProtocol(server.config, server.server_state, {})
            protocol.max_connections = 1
            protocol.connection_made(transport)
        assert [transport.abort.called for transport in opened] == [False, True]

    asyncio.run(main())


# Settings and the command line.


def test_what_a_service_cannot_do_is_told_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    wrong = ["loader.batch_size=auto", "loader.isolation=none", "images=gpu", "metrics.textfile=a.prom"]
    with pytest.raises(ConfigError) as error:
        service_config(wrong)
    assert {problem.key for problem in error.value.problems} == {
        "loader.batch_size",
        "loader.isolation",
        "images.decoder",
        "metrics.textfile",
    }
    with pytest.raises(ConfigError, match="cluster"):
        service_config(["cluster=local"])
    assert serve.main(["serve.port=99999", "serve.wait_ms=-1", "serve.max_images=0", "serve.host="]) == 2
    said = capsys.readouterr().err
    assert all(key in said for key in ("serve.port", "serve.wait_ms", "serve.max_images", "serve.host"))


def test_a_port_that_is_taken_is_told_before_any_work(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert serve.main([f"serve.port={port}"]) == 2
    assert f"serve.port = {port}" in capsys.readouterr().err


def test_the_environment_gives_the_config_of_the_factory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "loader.batch_size=4 'prompts.labels=[a cat,a dog]'")
    config = config_of_environment()
    assert (config.loader.batch_size, config.prompts.labels) == (4, ["a cat", "a dog"])
    monkeypatch.setenv(VARIABLE, "loader.batch_sise=4")
    with pytest.raises(ConfigError, match="did you mean"):
        config_of_environment()
    monkeypatch.setenv(VARIABLE, "'")
    with pytest.raises(ConfigError, match=VARIABLE):
        config_of_environment()


def test_a_missed_parity_ends_it_with_4() -> None:
    child = forks().start(
        "pipeline.serve.__main__:main",
        [
            "serve.port=0",
            "backend.device=cpu",
            "backend.precision=bf16",
            "parity.lowest_cosine.bf16=1",
            "parity.images=4",
        ],
    )
    assert child.wait(60) == 4, child.said()
    assert "parity.lowest_cosine.bf16 wants 1" in child.said()


def test_the_main_job_s_help_imports_no_server() -> None:
    assert loads("import pipeline.run, pipeline.serve.__main__", "fastapi", "uvicorn", "torch") == []


# The app without a server.


def call(service: Service, method: str, path: str, body: bytes = b"") -> tuple[int, Any, dict[str, str]]:
    """Send one request to an app whose lifespan has not started."""
    app, sent = build(service, failed=lambda error: None), list[Any]()

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path, "headers": [], "query_string": b"", "root_path": ""}
    asyncio.run(app(scope, receive, send))
    headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], json.loads(sent[1]["body"]), headers


def test_a_service_that_is_not_ready_says_so_everywhere() -> None:
    service = Service(Config())
    assert call(service, "GET", "/healthz")[0] == 200
    assert call(service, "GET", "/readyz")[:2] == (503, {"status": "the model is being opened"})
    status, told, headers = call(service, "POST", "/embed", b"{}")
    assert (status, told["error"]["name"], headers["retry-after"]) == (503, "not_ready", "5")
    assert call(service, "GET", "/version")[1]["fingerprint"] is None
    service.drain()
    status, told, headers = call(service, "GET", "/readyz")
    assert (status, told, headers["connection"]) == (503, {"status": "draining"}, "close")


def test_a_service_whose_engine_broke_asks_to_be_started_again() -> None:
    service = Service(Config())
    service.fault = NumericalError("NaN")
    for path in ("/healthz", "/readyz"):
        assert call(service, "GET", path)[:2] == (503, {"status": "failed: NaN"})
    assert call(service, "POST", "/predict", b"{}")[0] == 503


def test_an_error_that_nobody_foresaw_is_answered_and_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    service = Service(Config())
    monkeypatch.setattr(Metrics, "page", lambda self: 1 / 0)
    status, told, headers = call(service, "GET", "/metrics")
    assert (status, told["error"]["name"]) == (500, "internal")
    assert "ZeroDivisionError" in caplog.text
    assert "ZeroDivisionError" in told["error"]["message"]
    assert headers["x-request-id"] == told["error"]["request"]


async def forever(scope: Any, receive: Any, send: Any) -> None:
    await asyncio.sleep(60)


@pytest.mark.parametrize(("ends", "status", "name"), [(False, 504, "timeout"), (True, 503, "ending")])
def test_what_takes_too_long_is_answered_all_the_same(ends: bool, status: int, name: str) -> None:
    service = Service(Config(serve=ServeConfig(timeout_seconds=30 if ends else 0.1)))
    envelope, sent = RequestMiddleware(forever, service, frozenset()), list[Any]()

    async def send(message: Any) -> None:
        sent.append(message)

    async def main() -> None:
        scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
        task = asyncio.create_task(envelope(scope, lambda: asyncio.sleep(60), send))  # type: ignore[arg-type]
        await asyncio.sleep(0.05)
        if ends:
            # As uvicorn does after the grace period.
            task.cancel()
        await asyncio.wait([task])

    asyncio.run(main())
    assert (sent[0]["status"], json.loads(sent[1]["body"])["error"]["name"]) == (status, name)
    assert service.unanswered == ends


@pytest.mark.parametrize(
    ("backend", "batches"), [("torch", [1]), pytest.param("torchscript", [1, 4], marks=pytest.mark.slow)]
)
def test_before_it_is_ready_only_shapes_that_are_compiled_are_run(
    backend: str, batches: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[int] = []
    call = Forward.__call__

    def counted(forward: Forward, pictures: Sequence[Picture]) -> Any:
        ran.append(len(pictures))
        return call(forward, pictures)

    monkeypatch.setattr(Forward, "__call__", counted)
    config = service_config(
        [f"backend={backend}", "loader.batch_size=4", "serve.shapes=2", f"prompts.cache={tmp_path / 'cache'}"]
    ).changed({"backend.device": "cpu"})
    with ExitStack() as opened:
        open_engine(config, opened, timer=lambda stage, seconds: None, texts=lambda source: None)
    assert sorted(ran) == batches
