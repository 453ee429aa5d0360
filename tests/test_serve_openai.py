"""The service for OpenAI's clients: the embeddings of ``/embed``, in their forms, and errors that they raise."""

from __future__ import annotations

import base64
import signal
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any

import numpy as np
import pytest

pytest.importorskip("uvicorn", reason="needs the extra serve")
pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("prometheus_client", reason="needs the extra serve")
pytest.importorskip("python_multipart", reason="needs the extra serve")

from pipeline.config.schema import ModelConfig
from pipeline.dataset.vectors import cut
from pipeline.models.checkpoint import open_checkpoint
from tests.jobs import scene
from tests.servers import Page, answer, endless, moved, serve
from tests.service import BOUNDARY, Answer, Served, form, start

LATE = 0.5


def late(handler: BaseHTTPRequestHandler) -> None:
    time.sleep(LATE)
    answer(200, scene(1)[0])(handler)


PAGES: dict[str, Page] = {
    "/late.jpg": late,
    "/a.jpg": answer(200, scene(1)[0]),
    "/page": answer(200, b"<html>"),
    "/endless": endless,
    "/away": moved("http://169.254.169.254/latest/meta-data/"),
}
LIMITS = ("loader.batch_size=8", "loader.workers=2", "serve.shapes=1", "serve.max_images=20", "serve.max_texts=40")


@pytest.fixture(scope="module")
def web() -> Iterator[str]:
    with serve(PAGES) as server:
        yield f"http://127.0.0.1:{server.server_port}"


@pytest.fixture(scope="module")
def service(web: str) -> Iterator[Served]:
    host = web.removeprefix("http://")
    more = ("serve.max_body_bytes=300000", "images.schemes=[file,http]", f"images.private_hosts=['{host}']")
    served = start(*LIMITS, *more)
    try:
        served.wait_ready()
        yield served
    finally:
        served.child.send(signal.SIGTERM)
        code = served.child.wait(30)
    assert code == 0, served.child.said()
    assert "Traceback" not in served.child.said()


def uri(place: int) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(scene(place)[0]).decode()}"


def ask(service: Served, input: Any, **more: Any) -> Answer:
    return service.post("/v1/embeddings", {"input": input, "model": "any", **more})


def vectors(answer: Answer) -> list[list[float]]:
    assert answer.status == 200, answer.body
    assert [each["index"] for each in answer.json["data"]] == list(range(len(answer.json["data"])))
    return [each["embedding"] for each in answer.json["data"]]


def image(service: Served, place: int) -> list[float]:
    data = base64.b64encode(scene(place)[0]).decode()
    found: list[float] = service.post("/embed", {"images": [{"data": data}]}).json["images"][0]["embedding"]
    return found


def text(service: Served, *texts: str) -> list[list[float]]:
    return [each["embedding"] for each in service.post("/embed", {"texts": texts}).json["texts"]]


def refused(answer: Answer, code: str = "invalid", status: int = 400) -> dict[str, Any]:
    told: dict[str, Any] = answer.json["error"]
    assert (answer.status, told["code"], set(told)) == (status, code, {"message", "type", "param", "code"}), told
    return told


def test_embeddings_are_those_of_the_other_route_in_the_order_of_the_input(service: Served, web: str) -> None:
    assert vectors(ask(service, "a red circle")) == text(service, "a red circle")
    items = ["blue", uri(2), {"text": "green"}, {"image": f"{web}/a.jpg"}, {"image": uri(3).partition(",")[2]}, "blue"]
    blue, green = text(service, "blue", "green")
    expected = [blue, image(service, 2), green, image(service, 1), image(service, 3), blue]
    found = ask(service, items)
    assert vectors(found) == expected
    assert (found.json["object"], found.json["model"]) == ("list", "any")
    assert vectors(ask(service, {"image": uri(2)})) == [expected[1]]


def test_base64_is_little_endian_float32_of_the_same_numbers(service: Served) -> None:
    [encoded] = vectors(ask(service, uri(4), encoding_format="base64"))
    decoded = np.frombuffer(base64.b64decode(encoded), "<f4")  # type: ignore[arg-type]
    assert decoded.tolist() == image(service, 4)


def test_fewer_dimensions_are_the_first_numbers_of_length_1_again(service: Served) -> None:
    [whole] = text(service, "a star")
    [found] = vectors(ask(service, "a star", dimensions=16))
    assert np.array_equal(np.float32(found), cut(np.float32([whole]), 16)[0])
    assert vectors(ask(service, "a star", dimensions=len(whole))) == [whole]
    told = refused(ask(service, "a star", dimensions=len(whole) + 1))
    assert (told["param"], str(len(whole)) in told["message"]) == ("dimensions", True)
    assert refused(ask(service, "a star", dimensions=0))["param"] == "dimensions"


def test_usage_counts_the_tokens_of_the_texts(service: Served) -> None:
    count = open_checkpoint(ModelConfig()).texts()[1].count
    long = "a red circle " * 20
    usage = ask(service, ["a red circle", uri(1), long]).json["usage"]
    assert usage == {"prompt_tokens": count("a red circle") + count(long), "total_tokens": usage["prompt_tokens"]}
    assert ask(service, uri(1)).json["usage"]["total_tokens"] == 0


def test_a_text_that_begins_like_an_address_is_not_fetched(service: Served, web: str) -> None:
    before = service.figure("clip_service_images_total")
    assert vectors(ask(service, f"{web}/a.jpg")) == text(service, f"{web}/a.jpg")
    assert service.figure("clip_service_images_total") == before


@pytest.mark.parametrize(
    ("input", "named"),
    [
        ([], "input is empty"),
        ("", "input.0: is empty"),
        ([" "], "input.0: is empty"),
        (None, "must be a text"),
        (7, "token ids"),
        ([1, 2, 3], "token ids"),
        ([[1, 2], [3]], "token ids"),
        (list(range(5000)), "token ids are not taken"),
        (["a", 1], "input.1: must be a text"),
        ([{"url": "a"}], "input.0: must be a text"),
        (["data:image/jpeg;base64,***"], "input.0: not base64"),
        (["data:image/svg+xml,<svg/>"], "input.0: a data URI of an image begins like"),
        ([{"image": "file:///etc/passwd"}], "input.0: file addresses are not fetched"),
        ([{"image": "/etc/passwd"}], "input.0: not base64"),
        ([{"image": "s3://bucket/a.jpg"}], "input.0: s3 addresses"),
        (["a", "data:image/png;base64,AAAA"], "input.1: "),
        (["a"] * 41, "serve.max_texts=40"),
        ([uri(1)] * 21, "serve.max_images=20"),
    ],
)
def test_an_input_that_cannot_be_embedded_is_refused_with_its_place(service: Served, input: Any, named: str) -> None:
    answer = ask(service, input)
    told = answer.json["error"]
    assert (answer.status, told["type"]) == (400, "invalid_request_error"), told
    assert named in told["message"]


def test_a_body_of_white_space_is_read_once(service: Served) -> None:
    body, started = b'{"input":' + b" " * 290_000 + b"x}", time.monotonic()
    refused(service.ask("POST", "/v1/embeddings", body, {"content-type": "application/json"}))
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("path", "code", "status"),
    [
        ("{web}/page", "not_an_image", 400),
        ("{web}/nothing", "not_found", 400),
        ("{web}/away", "address_not_allowed", 400),
        ("{web}/endless", "too_large", 413),
        ("http://169.254.169.254/latest/", "address_not_allowed", 400),
        ("https://127.0.0.1/a.jpg", "scheme_not_allowed", 400),
    ],
)
def test_addresses_obey_the_limits_of_a_job(service: Served, web: str, path: str, code: str, status: int) -> None:
    refused(ask(service, ["a", {"image": path.format(web=web)}]), code, status)
    assert service.figure("clip_service_held_bytes") == 0


def test_what_is_fetched_after_another_image_was_refused_is_released(service: Served, web: str) -> None:
    refused(ask(service, [{"image": f"{web}/endless"}, {"image": f"{web}/late.jpg"}]), "too_large", 413)
    time.sleep(LATE)
    assert service.figure("clip_service_held_bytes") == 0


def test_fetched_images_count_as_bytes_of_the_body(service: Served, web: str) -> None:
    links = [{"image": f"{web}/a.jpg"}] * (300_000 // len(scene(1)[0]) + 1)
    assert len(links) > 20 or "max_body_bytes" in refused(ask(service, links), "too_large", 413)["message"]
    assert service.figure("clip_service_held_bytes") == 0


def test_other_refusals_have_openai_s_form_too(service: Served) -> None:
    assert "dimension" in refused(ask(service, "a", dimension=3))["message"]
    assert refused(ask(service, "a", encoding_format="hex"))["param"] == "encoding_format"
    body, kind = form([("input", None, b"a")]), {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}
    refused(service.ask("POST", "/v1/embeddings", body, kind), "media_type", 415)
    refused(service.ask("POST", "/v1/embeddings", b"{", {"content-type": "application/json"}))
    refused(service.ask("GET", "/v1/embeddings"), "method_not_allowed", 405)
    refused(service.ask("GET", "/v1/models"), "not_found", 404)
    refused(ask(service, "x" * 310_000), "too_large", 413)


def test_it_is_counted_as_the_other_routes_are(service: Served) -> None:
    def count(code: str) -> float:
        return service.figure("clip_service_requests_total", route="/v1/embeddings", code=code)

    before = count("200"), count("400")
    ask(service, "a"), ask(service, [])
    assert (count("200"), count("400")) == (before[0] + 1, before[1] + 1)
    assert service.figure("clip_service_request_seconds_count", route="/v1/embeddings") >= 2


@pytest.mark.compat("openai")
def test_the_package_of_openai_gets_embeddings_and_raises_the_errors(service: Served, web: str) -> None:
    import openai

    client = openai.OpenAI(base_url=f"http://127.0.0.1:{service.port}/v1", api_key="none", max_retries=0)
    create = client.embeddings.create
    [red], [blue] = text(service, "red"), text(service, "blue")
    # The package asks for base64 unless it is told otherwise.
    assert create(model="m", input="red").data[0].embedding == red
    found = create(model="m", input=["red", "blue", uri(2)], user="me")
    assert [each.embedding for each in found.data] == [red, blue, image(service, 2)]
    assert (found.model, found.usage.total_tokens > 2) == ("m", True)
    assert create(model="m", input=["red"], encoding_format="float").data[0].embedding == red
    encoded: Any = create(model="m", input="red", encoding_format="base64").data[0].embedding
    assert np.frombuffer(base64.b64decode(encoded), "<f4").tolist() == red
    cut_down = create(model="m", input="red", dimensions=8).data[0].embedding
    assert len(cut_down) == 8
    assert np.linalg.norm(cut_down) == pytest.approx(1, abs=1e-6)
    linked: Any = [{"image": f"{web}/a.jpg"}, {"text": "red"}]
    assert [each.embedding for each in create(model="m", input=linked).data] == [image(service, 1), red]
    for bad, param in (([], "input"), ([1, 2], "input"), ("", "input"), (uri(1)[:200], "input")):
        with pytest.raises(openai.BadRequestError, match="input") as raised:
            create(model="m", input=bad)
        assert (raised.value.param or "input") == param
        assert raised.value.request_id
    with pytest.raises(openai.BadRequestError, match="dimensions: 4,096, and the embeddings"):
        create(model="m", input="red", dimensions=4096)
    with pytest.raises(openai.APIStatusError, match=r"serve\.max_body_bytes") as large:
        create(model="m", input="x" * 310_000)
    assert large.value.status_code == 413
