"""Detection of a network outage: a failed host costs its rows, a failed network ends the run."""

from __future__ import annotations

import sys
import threading
import time
from collections import OrderedDict

from pipeline.core.errors import StorageError
from pipeline.images.sources.allowlist import AddressNotAllowed, NoConnection, connect, set_deadline

# Hosts in a row without an answer, before the network is tested.
SILENT = 100
# Servers that answered last, to which connections are opened to test the network, and the time that each may take.
KNOWN_SERVERS, TEST_SECONDS = 8, 5.0
# Without a network, glibc reports a temporary failure of the name server (EAI_AGAIN). Other systems, such as macOS,
# report an unknown name, as they do for names that do not exist.
UNKNOWN_NAMES_ARE_RELIABLE = sys.platform.startswith("linux")


class OutageDetector:
    """Tells dead hosts, which cost their rows only, from a dead network, which would fail all rows left.

    Hosts are counted, not requests: a thousand rows of one dead host are one observation.

    - A server that answers, or another machine that refuses the connection, shows that the network works. It becomes
      a known server, with which the network can be tested later.
    - A refusal by this machine itself shows nothing.
    - After ``SILENT`` hosts without an answer, and no other answer in between, the known servers are tried. If one
      answers, the hosts are dead, and the count starts again; otherwise the run ends.
    - Unknown names are counted separately: a name server may answer although nothing else can be reached, so they do
      not reset the other count. ``SILENT`` of them start a test too. Without a known server they are accepted, if the
      system tells them from a dead name server: a run may begin with any number of dead names.

    Safe to use from many threads; a thread with an answer never waits for a test.
    """

    def __init__(self, private: frozenset[str]) -> None:
        self._private = private
        # The first is held for a moment by all threads, the second for the length of a test by one at a time.
        self._lock, self._testing = threading.Lock(), threading.Lock()
        self._silent: set[str] = set()
        self._unknown: set[str] = set()
        self._known: OrderedDict[tuple[str, int], None] = OrderedDict()
        self._is_dead = False

    def answered(self, host: str, port: int) -> None:
        """Note that a server answered."""
        with self._lock:
            self._reset()
            self._known[host, port] = None
            self._known.move_to_end((host, port))
            if len(self._known) > KNOWN_SERVERS:
                self._known.popitem(last=False)

    def failed(self, error: NoConnection) -> None:
        """Note that there was no connection.

        Raises:
            StorageError: no server answers any more, not even those that did.
        """
        host, port = error.place
        if error.outcome == "refused":
            self.answered(host, port)
        elif error.outcome != "refused locally":
            counted = self._unknown if error.outcome == "unknown name" else self._silent
            with self._lock:
                counted.add(host.rstrip(".").lower())
                if len(counted) < SILENT:
                    return
            self._test(counted, str(error))

    def _test(self, counted: set[str], reason: str) -> None:
        with self._testing:
            with self._lock:
                # Another thread may have tested, or got an answer, while this one waited.
                if len(counted) < SILENT:
                    return
                servers = [] if self._is_dead else list(self._known)
            alive = any(self._answers(host, port) for host, port in reversed(servers))
            with self._lock:
                if alive or len(counted) < SILENT:
                    self._reset()
                    return
                if counted is self._unknown and UNKNOWN_NAMES_ARE_RELIABLE and not self._known:
                    counted.clear()
                    return
                self._is_dead = True
                known = "nor do those that answered before" if self._known else "and none has answered yet"
        raise StorageError(
            f"no server answered at {SILENT} hosts in a row ({reason}), {known}: the network or the name server is at "
            "fault, not the images. Run the same command again when they are back, finished shards are kept; rows of "
            "hosts that are gone for good can be left out of the manifest"
        )

    def _reset(self) -> None:
        self._silent.clear()
        self._unknown.clear()
        self._is_dead = False

    def _answers(self, host: str, port: int) -> bool:
        set_deadline(time.monotonic() + TEST_SECONDS)
        try:
            connect(host, port, self._private).close()
        except NoConnection as error:
            return error.outcome == "refused"
        except (AddressNotAllowed, OSError):
            return False
        return True
