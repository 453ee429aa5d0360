"""Which addresses may be reached, and that a connection goes to the address that was checked."""

from __future__ import annotations

import errno
import socket
import time

import pytest

from pipeline.images.sources.allowlist import (
    AddressNotAllowed,
    NoConnection,
    connect,
    is_internal,
    is_listed,
    is_public,
    set_deadline,
)
from tests.servers import connections_to, resolve, serve

PUBLIC = [
    "8.8.8.8", "1.1.1.1", "193.0.0.1", "2606:4700::1111", "2a00:1450:4001::200e",
    "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::1",
]  # fmt: skip
INTERNAL = ["127.0.0.1", "127.8.8.8", "::1", "10.0.0.1", "172.16.3.4", "192.168.1.1", "100.64.0.1", "fd12:3456::1"]
NEVER = [
    "169.254.169.254", "169.254.0.1", "fe80::1", "fe80::1%eth0", "0.0.0.0", "0.1.2.3", "::", "255.255.255.255",
    "224.0.0.1", "224.0.1.1", "ff02::1", "ff0e::1", "240.0.0.1", "fec0::1", "100.100.100.200", "192.0.0.192",
    "168.63.129.16", "fd00:ec2::254", "2001:db8::1", "3fff::1", "5f00::1", "2001::1", "192.0.2.1", "198.18.0.1",
    "198.51.100.1", "203.0.113.1", "192.88.99.1", "64:ff9b:1::808:808", "100::1", "::ffff:169.254.169.254",
    "64:ff9b::a9fe:a9fe", "2002:a9fe:a9fe::1", "2002:7f00:1::1", "2002:a00:1::1", "::127.0.0.1", "4000::1",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _time() -> None:
    set_deadline(time.monotonic() + 5)


@pytest.mark.parametrize("address", PUBLIC)
def test_addresses_of_the_internet_are_public(address: str) -> None:
    assert is_public(address)
    assert not is_internal(address)


@pytest.mark.parametrize("address", [*INTERNAL, "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1"])
def test_private_and_loopback_addresses_are_for_listed_hosts_alone(address: str) -> None:
    assert not is_public(address)
    assert is_internal(address)


@pytest.mark.parametrize("address", NEVER)
def test_some_addresses_are_for_nobody(address: str) -> None:
    assert not is_public(address)
    assert not is_internal(address)


def test_a_listed_host_is_meant_with_any_port_or_with_its_own() -> None:
    private = frozenset({"images", "10.0.0.5:8080", "[::1]:99"})
    assert is_listed("Images.", 80, private)
    assert is_listed("images", 443, private)
    assert is_listed("10.0.0.5", 8080, private)
    assert is_listed("::1", 99, private)
    assert not is_listed("10.0.0.5", 80, private)
    assert not is_listed("::1", 80, private)
    assert not is_listed("images.example.org", 80, private)


def test_a_name_is_looked_up_once_and_the_checked_address_is_the_one_that_is_reached(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = resolve(monkeypatch, {"rebinds.test": [["93.184.216.34"], ["127.0.0.1"]]})
    with serve({}) as server, connections_to(monkeypatch, server.server_address) as told:
        connect("rebinds.test", 80, frozenset()).close()
        assert (asked, told) == (["rebinds.test"], ["93.184.216.34"])
        with pytest.raises(AddressNotAllowed, match=r"rebinds.test is 127.0.0.1"):
            connect("rebinds.test", 80, frozenset())
        assert told == ["93.184.216.34"]


def test_of_several_addresses_the_public_ones_are_tried_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve(monkeypatch, {"many.test": [["127.0.0.1", "169.254.169.254", "93.184.216.34", "10.0.0.1"]]})
    with serve({}) as server, connections_to(monkeypatch, server.server_address) as told:
        connect("many.test", 80, frozenset()).close()
        assert told == ["93.184.216.34"]


def test_an_unlisted_port_and_a_link_local_answer_of_a_listed_host_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve(monkeypatch, {"images.test": [["169.254.169.254"]]})
    with serve({}) as server, connections_to(monkeypatch, server.server_address) as told:
        with pytest.raises(AddressNotAllowed):
            connect("images.test", 80, frozenset({"images.test"}))
        with pytest.raises(AddressNotAllowed):
            connect("127.0.0.1", server.server_port, frozenset({"127.0.0.1:1"}))
        assert told == []
        connect("127.0.0.1", server.server_port, frozenset({f"127.0.0.1:{server.server_port}"})).close()


def test_a_name_server_that_does_not_answer_costs_no_more_than_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.getaddrinfo", lambda *arguments, **named: time.sleep(2))
    started = time.monotonic()
    set_deadline(started + 0.1)
    with pytest.raises(NoConnection, match="the name server does not answer") as caught:
        connect("slow.test", 80, frozenset())
    assert caught.value.late
    assert time.monotonic() - started < 1
    with pytest.raises(TimeoutError):
        connect("slow.test", 80, frozenset())


def test_a_host_that_is_not_there_is_told_from_one_that_may_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve(monkeypatch, {"gone.test": [[]]})
    with pytest.raises(NoConnection) as caught:
        connect("gone.test", 80, frozenset())
    assert (caught.value.outcome, caught.value.passing) == ("unknown name", False)
    failing = socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
    monkeypatch.setattr("socket.getaddrinfo", lambda *arguments, **named: throw(failing))
    with pytest.raises(NoConnection, match="Temporary") as caught:
        connect("gone.test", 80, frozenset())
    assert (caught.value.outcome, caught.value.passing) == ("no answer", True)


def test_a_refusal_is_told_from_silence_and_one_of_this_machine_from_one_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(NoConnection, match="refused") as caught:
        connect("127.0.0.1", 1, frozenset({"127.0.0.1"}))
    assert caught.value.outcome == "refused locally"
    resolve(monkeypatch, {"both.test": [["93.184.216.34", "93.184.216.35"]]})
    failures = [ConnectionRefusedError(errno.ECONNREFUSED, "no"), OSError(errno.ENETUNREACH, "no way")]
    left = [*failures, failures[1], failures[1]]
    monkeypatch.setattr(
        "pipeline.images.sources.allowlist._Timed.connect", lambda *_: throw(left.pop(0)), raising=False
    )
    for outcome in ("refused", "no answer"):
        with pytest.raises(NoConnection, match="no way") as caught:
            connect("both.test", 80, frozenset())
        assert caught.value.outcome == outcome


def throw(error: OSError) -> None:
    raise error
