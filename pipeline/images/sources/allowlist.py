"""Network addresses that a request may reach, and sockets to exactly those.

A host's name is looked up once for each connection, and the connection goes to an address that was checked:
a name server that gives another answer a moment later changes nothing.
"""

from __future__ import annotations

import ipaddress
import queue
import socket
import ssl
import threading
import time
from collections.abc import Callable
from typing import Any, Literal

from urllib3 import HTTPConnectionPool, HTTPSConnectionPool, PoolManager
from urllib3.connection import HTTPConnection, HTTPSConnection

# All addresses of a host together may take this long to answer.
CONNECT_SECONDS = 10.0
# Hosts, and connections to each, that are kept open between requests.
POOLS, CONNECTIONS = 64, 32
# The only range of IPv6 for the internet, and the range that carries IPv4 addresses.
_UNICAST = ipaddress.IPv6Network("2000::/3")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
# Ranges that are public in Python's tables, or were in some version, and are not.
_NOT_PUBLIC = tuple(
    ipaddress.ip_network(text) for text in ("192.0.0.0/24", "192.88.99.0/24", "2001::/23", "2001:db8::/32", "3fff::/20")
)
# RFC 1918, RFC 6598, RFC 4193, and loopback.
_INTERNAL = tuple(
    ipaddress.ip_network(text)
    for text in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "127.0.0.0/8", "::1/128", "fc00::/7")
)
# Metadata services of clouds, which hold secrets: never opened, whatever is allowed. Link-local ones are never public.
_METADATA = tuple(
    ipaddress.ip_address(text) for text in ("100.100.100.200", "168.63.129.16", "192.0.0.192", "fd00:ec2::254")
)
# No such name, or a name without an address; not every system tells the two apart.
_NO_NAME = (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME))


class AddressNotAllowed(Exception):
    """A host has no address that may be opened."""


# Why there is no connection; "refused locally" is by this machine itself.
Outcome = Literal["no answer", "refused", "refused locally", "unknown name"]


class NoConnection(Exception):
    """A host has no address at all, or takes no connection there.

    Args:
        place: the host and the port.
        text: the sentence of the failure.
        outcome: see :class:`~pipeline.images.sources.outage.OutageDetector`.
        passing: a second try may help.
        late: the deadline of the thread came first.
    """

    def __init__(
        self,
        place: tuple[str, int],
        text: str,
        *,
        outcome: Outcome = "no answer",
        passing: bool = False,
        late: bool = False,
    ) -> None:
        super().__init__(text)
        self.place, self.outcome, self.passing, self.late = place, outcome, passing, late


class _Clock(threading.local):
    """End of the request of this thread, by :func:`time.monotonic`."""

    deadline = float("inf")


_clock = _Clock()


def set_deadline(deadline: float) -> None:
    """Let every wait of this thread's sockets end at ``deadline``, by :func:`time.monotonic`."""
    _clock.deadline = deadline


def seconds_left() -> float:
    """The seconds until the deadline of this thread.

    Raises:
        TimeoutError: it is over.
    """
    left = _clock.deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("the time for this image is over")
    return left


def _is_late() -> bool:
    return time.monotonic() >= _clock.deadline


def is_public(text: str) -> bool:
    """True for a public IP address: not private, link-local, loopback, multicast, reserved, ...

    IPv6 addresses that carry an IPv4 address (mapped, 6to4, NAT64) are as public as that one.
    """
    ip = _parse(text)
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.sixtofour is not None:
            return is_public(str(ip.sixtofour))
        if ip not in _UNICAST:
            return False
    if ip in _METADATA or any(ip.version == net.version and ip in net for net in _NOT_PUBLIC):
        return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


def is_internal(text: str) -> bool:
    """True for an IP address that ``images.private_hosts`` may allow: private or loopback only."""
    ip = _parse(text)
    if ip in _METADATA:
        return False
    return any(ip.version == net.version and ip in net for net in _INTERNAL)


def pools(private: frozenset[str]) -> PoolManager:
    """Connections that are kept and used again; those to ``private`` hosts may reach private addresses.

    Nothing is taken from the environment but the certificates: no proxy, no netrc. Safe to use from many threads.
    """
    manager = PoolManager(num_pools=POOLS, maxsize=CONNECTIONS, retries=False, ssl_context=_tls())
    plain = type("PlainConnection", (_Pinned, HTTPConnection), {"private": private})
    secure = type("SecureConnection", (_Pinned, HTTPSConnection), {"private": private})
    manager.pool_classes_by_scheme = {
        "http": type("PlainPool", (HTTPConnectionPool,), {"ConnectionCls": plain}),
        "https": type("SecurePool", (HTTPSConnectionPool,), {"ConnectionCls": secure}),
    }
    return manager


def connect(host: str, port: int, private: frozenset[str]) -> socket.socket:
    """A socket to the first address of ``host`` that is allowed and answers.

    Raises:
        AddressNotAllowed: none is allowed; nothing was sent.
        NoConnection: there is no such host, or none of its addresses answers, or not before the thread's deadline.
        TimeoutError: that deadline had passed before anything was tried.
    """
    allowed = is_internal_or_public if is_listed(host, port, private) else is_public
    seconds_left()  # raises once the deadline has passed
    ends = min(time.monotonic() + CONNECT_SECONDS, _clock.deadline)
    found = _look_up(host, port, ends)
    good = [one for one in found if allowed(one[4][0])]
    if not good:
        places = ", ".join(sorted({str(one[4][0]) for one in found}))
        raise AddressNotAllowed(f"{host} is {places}, which is not an address of the internet")
    failed: OSError = TimeoutError(f"no answer within {CONNECT_SECONDS:g} s")
    outcome: Outcome = "no answer"
    for family, kind, protocol, _, address in good:
        left = ends - time.monotonic()
        if left <= 0:
            break
        one = _Timed(family, kind, protocol)
        try:
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            one.settimeout(left)
            one.connect(address)
        except OSError as error:
            one.close()
            failed = error
            if isinstance(error, ConnectionRefusedError | ConnectionResetError) and outcome != "refused":
                outcome = "refused locally" if _parse(address[0]).is_loopback else "refused"
        else:
            return one
    text = f"{host}:{port}: {failed.strerror or failed}"
    raise NoConnection((host, port), text, outcome=outcome, late=outcome == "no answer" and _is_late()) from failed


def is_internal_or_public(text: str) -> bool:
    """True for an IP address that a host of ``images.private_hosts`` may have."""
    return is_internal(text) or is_public(text)


def is_listed(host: str, port: int, private: frozenset[str]) -> bool:
    """True if ``private`` names the host, or the host with this port."""
    name = host.rstrip(".").lower()
    return not private.isdisjoint({name, f"{name}:{port}", f"[{name}]", f"[{name}]:{port}"})


class _Timed(socket.socket):
    """Socket that waits until its thread's deadline at most, however often a server sends one more byte."""

    def recv_into(self, *arguments: Any) -> int:
        self.settimeout(seconds_left())
        return super().recv_into(*arguments)


class _TimedTLS(ssl.SSLSocket):
    """The same for an encrypted connection."""

    def recv_into(self, *arguments: Any) -> int:
        self.settimeout(seconds_left())
        return super().recv_into(*arguments)


class _Pinned:
    """The part of a connection that replaces urllib3's: it looks the host up once and checks what it found."""

    private: frozenset[str]
    port: int
    _dns_host: str

    def _new_conn(self) -> socket.socket:
        return connect(self._dns_host.strip("[]"), self.port, self.private)


def _tls() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.sslsocket_class = _TimedTLS
    return context


def _parse(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    ip = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            return ip.ipv4_mapped
        if ip in _NAT64:
            return ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return ip


def _look_up(host: str, port: int, ends: float) -> list[Any]:
    """Addresses from the system's resolver; it has no timeout of its own, so it runs in a thread."""
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_ask, args=(socket.getaddrinfo, host, port, answers.put), daemon=True).start()
    try:
        found: Any = answers.get(timeout=max(0.001, ends - time.monotonic()))
    except queue.Empty:
        text = f"{host}: the name server does not answer"
        raise NoConnection((host, port), text, passing=True, late=_is_late()) from None
    if isinstance(found, Exception):
        passing = isinstance(found, socket.gaierror) and found.errno == socket.EAI_AGAIN
        # An invalid name is refused by this machine, without a request to the name server.
        outcome: Outcome = "refused locally" if isinstance(found, UnicodeError) else "no answer"
        if isinstance(found, socket.gaierror) and found.errno in _NO_NAME:
            outcome = "unknown name"
        raise NoConnection((host, port), f"{host}: {found}", outcome=outcome, passing=passing) from found
    return list(found)


def _ask(resolve: Callable[..., Any], host: str, port: int, answer: Callable[[Any], None]) -> None:
    try:
        answer(resolve(host, port, 0, socket.SOCK_STREAM))
    except (OSError, UnicodeError) as error:
        answer(error)
