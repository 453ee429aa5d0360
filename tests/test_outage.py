"""Dead hosts are rows, a dead network is an error; who hears an answer waits for nobody."""

from __future__ import annotations

import socket
import threading

import pytest

from pipeline.core.errors import StorageError
from pipeline.core.records import Failure
from pipeline.images.sources import outage as module
from pipeline.images.sources.allowlist import NoConnection, Outcome
from pipeline.images.sources.http import Fetcher
from pipeline.images.sources.outage import OutageDetector
from tests.servers import answer, serve


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SILENT", 3)


@pytest.fixture
def network() -> OutageDetector:
    return OutageDetector(frozenset())


def fail(network: OutageDetector, *hosts: str, outcome: Outcome = "no answer") -> None:
    for host in hosts:
        network.failed(NoConnection((host, 80), f"{host}: text", outcome=outcome))


def test_a_network_where_nobody_answers_ends_the_run(network: OutageDetector) -> None:
    fail(network, "a", "b")
    with pytest.raises(StorageError, match=r"at 3 hosts in a row \(c: text\), and none has answered yet"):
        fail(network, "c")


def test_many_rows_of_one_dead_host_are_one_observation(network: OutageDetector) -> None:
    fail(network, *["a", "A.", "b"] * 50)
    with pytest.raises(StorageError):
        fail(network, "c")


def test_dead_hosts_beside_a_living_one_are_rows() -> None:
    with serve({"/": answer(200)}) as server:
        network = OutageDetector(frozenset({server.place}))
        network.answered("127.0.0.1", server.server_port)
        fail(network, *(f"dead{i}" for i in range(11)))
    with pytest.raises(StorageError, match="nor do those that answered before"):
        fail(network, "dead11")


def test_a_refusal_from_elsewhere_shows_that_the_network_is_there(
    network: OutageDetector, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(5):
        fail(network, f"a{i}", f"b{i}")
        fail(network, f"refuses{i}", outcome="refused")

    def refuse(host: str, port: int, private: frozenset[str]) -> socket.socket:
        raise NoConnection((host, port), "refused", outcome="refused")

    # Those that refused are asked again, and refuse again.
    monkeypatch.setattr(module, "connect", refuse)
    fail(network, *(f"c{i}" for i in range(10)))


def test_a_refusal_of_this_machine_neither_counts_nor_excuses(network: OutageDetector) -> None:
    fail(network, *(f"here{i}" for i in range(10)), outcome="refused locally")
    fail(network, "a", "b")
    fail(network, "localhost", outcome="refused locally")
    with pytest.raises(StorageError):
        fail(network, "c")


def test_a_run_may_begin_with_dead_names_where_the_system_tells_them_from_a_dead_name_server(
    network: OutageDetector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "UNKNOWN_NAMES_ARE_RELIABLE", True)
    fail(network, *(f"gone{i}" for i in range(20)), outcome="unknown name")
    monkeypatch.setattr(module, "UNKNOWN_NAMES_ARE_RELIABLE", False)
    with pytest.raises(StorageError, match="and none has answered yet"):
        fail(network, *(f"gone{i}" for i in range(3)), outcome="unknown name")


def test_dead_names_do_not_excuse_silence_and_are_not_believed_when_the_witnesses_are_gone(
    network: OutageDetector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "UNKNOWN_NAMES_ARE_RELIABLE", True)
    fail(network, "a", "b")
    fail(network, "gone1", "gone2", "gone3", "gone4", outcome="unknown name")
    with pytest.raises(StorageError):
        fail(network, "c")
    with serve({}) as server:
        network = OutageDetector(frozenset({server.place}))
        network.answered("127.0.0.1", server.server_port)
    with pytest.raises(StorageError, match="nor do those that answered before"):
        fail(network, "gone1", "gone2", "gone3", outcome="unknown name")


def test_answers_are_heard_while_witnesses_are_called_and_one_thread_calls(
    network: OutageDetector, monkeypatch: pytest.MonkeyPatch
) -> None:
    called, go_on, calls = threading.Event(), threading.Event(), []

    def connect(host: str, port: int, private: frozenset[str]) -> socket.socket:
        calls.append(host)
        called.set()
        assert go_on.wait(10)
        raise NoConnection((host, port), "gone")

    monkeypatch.setattr(module, "connect", connect)
    network.answered("witness", 80)
    errors: list[BaseException] = []

    def work(host: str) -> None:
        try:
            fail(network, host)
        except StorageError as error:
            errors.append(error)

    fail(network, "a", "b")
    threads = [threading.Thread(target=work, args=(f"c{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    assert called.wait(10)
    heard = threading.Thread(target=network.answered, args=("other", 80), daemon=True)
    heard.start()
    heard.join(5)
    assert not heard.is_alive()
    go_on.set()
    for thread in threads:
        thread.join()
    # The answer came while the witness was silent: the network is there.
    assert (calls, errors) == (["witness"], [])


def test_a_verdict_is_told_to_all_without_calling_again(
    network: OutageDetector, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def connect(host: str, port: int, private: frozenset[str]) -> socket.socket:
        calls.append(host)
        raise NoConnection((host, port), "gone")

    monkeypatch.setattr(module, "connect", connect)
    network.answered("witness", 80)
    fail(network, "a", "b")
    for host in ("c", "d", "e"):
        with pytest.raises(StorageError, match="nor do those that answered before"):
            fail(network, host)
    assert calls == ["witness"]
    network.answered("witness", 80)
    fail(network, "a", "b")


def test_a_manifest_of_one_dead_host_is_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SILENT", 100)
    fetcher = Fetcher(max_bytes=9, seconds=5, schemes=("http",), private_hosts=("127.0.0.1",))
    found = [fetcher.fetch(f"http://127.0.0.1:1/{i}.jpg") for i in range(110)]
    assert {one.status if isinstance(one, Failure) else "ok" for one in found} == {"unreadable"}


def test_silence_until_the_time_of_an_image_is_over_counts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    never = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **named: never.wait(5))
    fetcher = Fetcher(max_bytes=9, seconds=0.02, schemes=("http",), private_hosts=())
    try:
        for host in ("a", "b"):
            found = fetcher.fetch(f"http://{host}.test/")
            assert isinstance(found, Failure)
            assert found.status == "timeout"
        with pytest.raises(StorageError, match="the name server does not answer"):
            fetcher.fetch("http://c.test/")
    finally:
        never.set()
