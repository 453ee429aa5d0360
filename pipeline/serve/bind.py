"""The socket of a server, bound before anything that takes long."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.core.errors import ConfigError, Problem

# Length of the queue of connections that are not accepted yet.
BACKLOG = 2048


@contextmanager
def bind_to(host: str, port: int, *, names: tuple[str, str] = ("serve.host", "serve.port")) -> Iterator[socket.socket]:
    """Bind a socket before any other work, so that a wrong address fails at once; ``names`` are those of the settings.

    Raises:
        ConfigError: it cannot be bound.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError([Problem(names[0], host, f"is not an address of this machine: {error}")]) from error
    with found:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind(address)
            # Clients can connect from now on; they are answered once the server runs.
            found.listen(BACKLOG)
        except (OSError, OverflowError) as error:
            allowed = f"cannot be bound on {host}: {error}"
            raise ConfigError([Problem(names[1], port, allowed, "0 takes a free one")]) from error
        yield found
