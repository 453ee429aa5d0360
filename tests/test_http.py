"""Images over http and https: what is asked of whom, within which limits, and how it ends otherwise."""

from __future__ import annotations

import gzip
import os
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from pipeline.core.errors import StorageError
from pipeline.core.records import Failure
from pipeline.images.sources import http, outage
from pipeline.images.sources.http import REDIRECTS, TRIES, Fetcher
from tests.servers import Page, Server, answer, drip, endless, hang_up, in_turn, moved, resolve, self_signed, serve

BYTES = bytes(range(100))
LIMIT = 200_000
PAGES: dict[str, Page] = {
    "/a.jpg": answer(200, BYTES),
    "/empty": answer(200),
    "/none": answer(204),
    "/large": answer(200, bytes(LIMIT + 1)),
    "/fits": answer(200, bytes(LIMIT)),
    "/liar-large": drip(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000000\r\n\r\n", b"x"),
    "/liar-short": drip(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n" + BYTES, b"", seconds=0),
    "/liar-twice": drip(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\nContent-Length: 20\r\n\r\n" + BYTES, b"", seconds=0),
    "/no-length": drip(b"HTTP/1.1 200 OK\r\n\r\n" + BYTES, b"", seconds=0),
    "/endless": endless,
    "/packed": answer(200, gzip.compress(bytes(1 << 20)), Content_Encoding="gzip"),
    "/drip-body": drip(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", b"x"),
    "/drip-status": drip(b"HT", b"T"),
    "/drip-header": drip(b"HTTP/1.1 200 OK\r\nX-Slow: ", b"x"),
    "/drip-chunk": drip(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1;", b"x"),
    "/here": moved("/a.jpg", 301),
    "/there": moved("here", 307),
    "/loop": moved("/loop"),
    "/long/0": moved("/long/1"),
    "/secret": answer(401),
    "/forbidden": answer(403),
    "/gone": answer(410),
    "/broken": answer(500),
    "/part": answer(206, BYTES, Content_Range="bytes 0-99/100"),
    "/a%20b%C3%A9.jpg?x=1": answer(200, BYTES),
}


@pytest.fixture
def server() -> Iterator[Server]:
    with serve(PAGES) as server:
        yield server


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "FIRST_WAIT", 0.01)


def fetcher(
    *private: str, schemes: tuple[str, ...] = ("file", "http", "https"), seconds: float = 5.0, limit: int = LIMIT
) -> Fetcher:
    return Fetcher(max_bytes=limit, seconds=seconds, schemes=schemes, private_hosts=private)


def status(result: bytes | Failure) -> str:
    assert isinstance(result, Failure), f"{len(result)} bytes were read"
    assert result.error
    return result.status


def test_bytes_come_as_the_server_has_them_with_no_more_said_than_needed(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password secret\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert fetcher(server.place).fetch(f"{server.url}/a.jpg") == BYTES
    assert server.headers == [
        {
            "host": server.place,
            "user-agent": "clip-pipeline",
            "accept": "image/*,*/*;q=0.5",
            "accept-encoding": "identity",
        }
    ]


def test_a_connection_is_used_again_whatever_was_answered(server: Server) -> None:
    one = fetcher(server.place)
    for page in ("/a.jpg", "/there", "/nothing", "/secret", "/a.jpg", "/broken", "/empty", "/a.jpg"):
        one.fetch(server.url + page)
    assert server.connections == 1
    assert server.asked.total() == 10


@pytest.mark.parametrize(
    ("page", "wanted"),
    [
        ("/a b\u00e9.jpg?x=1", BYTES),
        ("/a.jpg#anything", BYTES),
        ("/x/../a.jpg", BYTES),
        ("/no-length", BYTES),
        ("/liar-short", BYTES[:10]),
        ("/fits", bytes(LIMIT)),
        ("/here", BYTES),
        ("/there", BYTES),
        ("/empty", "empty"),
        ("/none", "empty"),
        ("/nothing", "not_found"),
        ("/gone", "not_found"),
        ("/secret", "permission"),
        ("/forbidden", "permission"),
        ("/broken", "unreadable"),
        ("/part", "unreadable"),
        ("/large", "too_many_bytes"),
        ("/liar-large", "too_many_bytes"),
        ("/endless", "too_many_bytes"),
        ("/packed", "unreadable"),
        ("/liar-twice", "unreadable"),
        ("/loop", "unreadable"),
    ],
)
def test_every_answer_is_bytes_or_a_status(server: Server, page: str, wanted: bytes | str) -> None:
    result = fetcher(server.place).fetch(server.url + page)
    assert (result.status if isinstance(result, Failure) else result) == wanted


@pytest.mark.parametrize("page", ["/drip-body", "/drip-status", "/drip-header", "/drip-chunk"])
def test_a_server_that_sends_a_byte_now_and_then_is_left_when_the_time_is_over(server: Server, page: str) -> None:
    started = time.monotonic()
    assert status(fetcher(server.place, seconds=0.2).fetch(server.url + page)) == "timeout"
    assert 0.15 < time.monotonic() - started < 1.5
    assert server.asked[page] == 1


def test_redirects_end(server: Server) -> None:
    server.pages = {f"/{i}": moved(f"/{i + 1}") for i in range(20)} | {f"/{REDIRECTS}": answer(200, BYTES)}
    one = fetcher(server.place)
    assert one.fetch(f"{server.url}/0") == BYTES
    server.pages[f"/{REDIRECTS}"] = moved("/0")
    server.asked.clear()
    assert status(one.fetch(f"{server.url}/0")) == "unreadable"
    assert server.asked.total() == REDIRECTS + 1


NUMBERS = ["127.0.0.1", "2130706433", "0x7f000001", "0x7f.1", "0177.0.0.1", "127.1", "127.0.0.1.", "[::ffff:127.0.0.1]",
           "[::ffff:7f00:1]", "[::1]", "0.0.0.0", "0", "[::]", "localhost", "LOCALHOST.", "\uff11\uff12\uff17.0.0.1",
           "127\u30020\u30020\u30021"]  # fmt: skip


@pytest.mark.parametrize("host", NUMBERS)
def test_this_machine_is_not_asked_however_it_is_written(server: Server, host: str) -> None:
    # Whether some of these are names at all is the resolver's choice.
    found = status(fetcher().fetch(f"http://{host}:{server.server_port}/a.jpg"))
    assert found in ("address_not_allowed", "unreadable")
    assert (server.asked.total(), server.connections) == (0, 0)


@pytest.mark.parametrize(
    ("url", "wanted"),
    [
        ("http://me:secret@{place}/a.jpg", "unreadable"),
        ("http://me@{place}/a.jpg", "unreadable"),
        ("http://93.184.216.34@{place}/a.jpg", "unreadable"),
        ("http://{place}\\@93.184.216.34/a.jpg", "unreadable"),
        ("http://{place}\\a.jpg", "unreadable"),
        ("http://{place}/a.jpg\r\nX-Evil: 1", "unreadable"),
        ("http://{place}\r\n/a.jpg", "unreadable"),
        ("http://{place}\t/a.jpg", "unreadable"),
        ("http://{place}\0/a.jpg", "unreadable"),
        ("http://{place} /a.jpg", "unreadable"),
        ("http:// {place}/a.jpg", "unreadable"),
        ("http://{place}:99/a.jpg", "unreadable"),
        ("http:///a.jpg", "unreadable"),
        ("http://", "unreadable"),
        ("http://[::1/a.jpg", "unreadable"),
        ("http://%31%32%37.0.0.1/a.jpg", "unreadable"),
        ("http://127.0.0.1:0/a.jpg", "unreadable"),
        ("http://127.0.0.1:99999/a.jpg", "unreadable"),
        ("http://" + "a" * 300 + "/a.jpg", "unreadable"),
        ("http://" + "a" * 64 + ".test/a.jpg", "unreadable"),
        ("http://a..b/a.jpg", "unreadable"),
        ("ftp://{place}/a.jpg", "scheme_not_allowed"),
        ("file:///etc/hostname", "scheme_not_allowed"),
    ],
)
def test_an_address_that_plays_tricks_is_a_status_and_no_request(server: Server, url: str, wanted: str) -> None:
    assert status(fetcher(server.place, "127.0.0.1").fetch(url.format(place=server.place))) == wanted
    assert server.asked.total() == 0


@pytest.mark.parametrize(
    ("to", "wanted"),
    [
        ("http://169.254.169.254/latest/meta-data/", "address_not_allowed"),
        ("http://[fd00:ec2::254]/latest/", "address_not_allowed"),
        ("http://{other}/a.jpg", "address_not_allowed"),
        ("//{other}/a.jpg", "address_not_allowed"),
        ("http://localhost:{port}/a.jpg", "address_not_allowed"),
        ("http://[::ffff:127.0.0.1]:{port}/a.jpg", "address_not_allowed"),
        ("https://{other}/a.jpg", "address_not_allowed"),
        ("http://me:secret@{other}/a.jpg", "unreadable"),
        ("http://{other}\\@x/", "unreadable"),
        ("file:///etc/hostname", "scheme_not_allowed"),
        ("ftp://{other}/", "scheme_not_allowed"),
        ("gopher://{other}/", "scheme_not_allowed"),
        ("javascript:alert(1)", "scheme_not_allowed"),
    ],
)
def test_a_redirect_is_checked_like_an_address_of_its_own(server: Server, to: str, wanted: str) -> None:
    with serve(PAGES) as other:
        server.pages = {"/go": moved(to.format(other=other.place, port=other.server_port))}
        assert status(fetcher(server.place).fetch(f"{server.url}/go")) == wanted
        assert (server.asked.total(), other.asked.total(), other.connections) == (1, 0, 0)


def test_a_redirect_to_a_listed_host_is_followed(server: Server) -> None:
    with serve(PAGES) as other:
        server.pages = {"/go": moved(f"{other.url}/a.jpg")}
        assert fetcher(server.place, other.place).fetch(f"{server.url}/go") == BYTES


def test_a_name_that_turns_private_between_two_requests_is_refused(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = resolve(monkeypatch, {"rebinds.test": [["127.0.0.1"]]})
    url = f"http://rebinds.test:{server.server_port}/a.jpg"
    assert status(fetcher().fetch(url)) == "address_not_allowed"
    assert (asked, server.connections) == (["rebinds.test"], 0)
    assert fetcher(f"rebinds.test:{server.server_port}").fetch(url) == BYTES
    assert asked == ["rebinds.test"] * 2


@pytest.mark.parametrize(
    ("suffix", "wanted"),
    [((0, 100), BYTES), ((10, 20), BYTES[10:20]), ((90, 200), BYTES[90:]), ((10, 10), "empty"), ((200, 300), "empty")],
)
def test_a_range_is_asked_for_as_one(server: Server, suffix: tuple[int, int], wanted: bytes | str) -> None:
    def page(handler):  # type: ignore[no-untyped-def]
        start, stop = map(int, handler.headers["Range"].removeprefix("bytes=").split("-"))
        part = BYTES[start : stop + 1]
        answer(206 if part else 416, part, Content_Range=f"bytes {start}-{start + len(part) - 1}/100")(handler)

    server.pages = {"/a.jpg": page}
    result = fetcher(server.place).fetch(f"{server.url}/a.jpg", *suffix)
    assert (result.status if isinstance(result, Failure) else result) == wanted


def test_a_server_without_ranges_is_said_unless_the_range_begins_at_the_start(server: Server) -> None:
    one = fetcher(server.place)
    assert one.fetch(f"{server.url}/a.jpg", 0, 10) == BYTES[:10]
    assert status(one.fetch(f"{server.url}/a.jpg", 10, 20)) == "unreadable"
    assert status(one.fetch(f"{server.url}/part", 10, 20)) == "unreadable"
    assert status(one.fetch(f"{server.url}/a.jpg", 0, LIMIT + 1)) == "too_many_bytes"


@pytest.mark.parametrize(
    "bad", [*map(answer, (429, 502, 503, 504)), hang_up], ids=["429", "502", "503", "504", "reset"]
)
def test_what_passes_is_tried_again(server: Server, bad: Page) -> None:
    server.pages = {"/a": in_turn(bad, bad, answer(200, BYTES)), "/never": bad}
    one = fetcher(server.place)
    assert one.fetch(f"{server.url}/a") == BYTES
    assert status(one.fetch(f"{server.url}/never")) == "unreadable"
    assert server.asked == {"/a": 3, "/never": TRIES}


def test_a_body_that_breaks_off_is_tried_again(server: Server) -> None:
    torn = drip(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n" + BYTES[:50], b"", seconds=0)
    server.pages = {"/a": in_turn(torn, answer(200, BYTES)), "/never": torn}
    one = fetcher(server.place)
    assert one.fetch(f"{server.url}/a") == BYTES
    assert status(one.fetch(f"{server.url}/never")) == "unreadable"


@pytest.mark.parametrize(
    "after", ["1", lambda: format(datetime.now(UTC) + timedelta(seconds=1.2), "%a, %d %b %Y %H:%M:%S GMT")]
)
def test_retry_after_counts(server: Server, after: str | Callable[[], str]) -> None:
    server.pages = {
        "/a": in_turn(answer(503, Retry_After=after if isinstance(after, str) else after()), PAGES["/a.jpg"])
    }
    started = time.monotonic()
    assert fetcher(server.place).fetch(f"{server.url}/a") == BYTES
    assert time.monotonic() - started > 0.15


@pytest.mark.parametrize("after", ["1000000", "9" * 400, "soon", "Fri, 31 Dec 9999 23:59:59 GMT", "-5"])
def test_retry_after_is_not_taken_at_its_word(server: Server, after: str) -> None:
    server.pages = {"/a": answer(503, Retry_After=after)}
    started = time.monotonic()
    assert status(fetcher(server.place, seconds=1).fetch(f"{server.url}/a")) == "unreadable"
    assert time.monotonic() - started < 1


def test_a_dead_host_is_a_row_and_a_dead_network_ends_the_run(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outage, "SILENT", 5)
    resolve(monkeypatch, {f"gone{i}.test": [[]] for i in range(20)})
    one = fetcher(server.place)
    assert one.fetch(f"{server.url}/a.jpg") == BYTES
    for i in range(10):
        assert status(one.fetch(f"http://gone{i}.test/a.jpg")) == "unreadable"
    server.shutdown()
    server.server_close()
    for i in range(4):
        assert status(one.fetch(f"http://gone{i}.test/a.jpg")) == "unreadable"
    with pytest.raises(StorageError, match="the network or the name server is at fault"):
        one.fetch("http://gone7.test/a.jpg")


def test_many_threads_share_a_few_connections(server: Server) -> None:
    one, results = fetcher(server.place), []

    def work() -> None:
        results.extend(one.fetch(f"{server.url}/a.jpg") for _ in range(5))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [BYTES] * 40
    assert server.connections <= 8


@pytest.fixture
def certificate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A certificate for images.test, trusted by this process."""
    path = self_signed(tmp_path / "images.pem", "images.test")
    monkeypatch.setenv("SSL_CERT_FILE", str(path))
    return path


def test_https_proves_the_name_although_the_address_was_chosen_before(
    certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve(monkeypatch, {"images.test": [["127.0.0.1"]], "other.test": [["127.0.0.1"]]})
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with serve({**PAGES, "/down": moved("http://images.test/a.jpg")}, tls=context) as server:
        port = server.server_port
        one = fetcher("images.test", "other.test", "127.0.0.1", schemes=("https",), seconds=2)
        assert one.fetch(f"https://images.test:{port}/a.jpg") == BYTES
        assert one.fetch(f"https://images.test.:{port}/a.jpg") == BYTES
        assert "no trusted connection" in str(one.fetch(f"https://other.test:{port}/a.jpg"))
        assert "no trusted connection" in str(one.fetch(f"https://127.0.0.1:{port}/a.jpg"))
        assert status(one.fetch(f"https://images.test:{port}/down")) == "scheme_not_allowed"
        assert status(one.fetch(f"http://images.test:{port}/a.jpg")) == "scheme_not_allowed"
        assert status(fetcher("images.test", seconds=0.3).fetch(f"https://images.test:{port}/drip-header")) == "timeout"
        assert server.asked["/a.jpg"] == 2
        del os.environ["SSL_CERT_FILE"]
        assert "no trusted connection" in str(fetcher("images.test").fetch(f"https://images.test:{port}/a.jpg"))
