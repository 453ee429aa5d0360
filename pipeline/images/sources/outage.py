"""Detection of a network outage: a failed host costs its rows, a failed network ends the run."""

from __future__ import annotations

import sys
import threading
import time
from collections import OrderedDict

from pipeline.core.errors import StorageError
from pipeline.images.sources.allowlist import AddressNotAllowed, NoConnection, connect, set_deadline

# Hosts one after the other where nobody was there, before the network is suspected.
SILENT = 100
# Servers that answered lately, to be asked whether it is the network, and how long each may take.
WITNESSES, WITNESS_SECONDS = 8, 5.0
# Without a network, glibc says that the name server has a bad moment (EAI_AGAIN). Others, such as macOS, say that
# there is no such name, as they do of names that are really gone.
NAMES_ARE_TOLD_APART = sys.platform.startswith("linux")


class Network:
    """Tells dead hosts, which are a matter of their rows, from a dead network, which would fail all rows left.

    What counts are hosts, not requests: a thousand rows of one dead host are one observation.

    - A server that speaks, or one elsewhere that refuses the connection, shows that the network is there, and may
      be called as a witness later.
    - A refusal of this machine itself says nothing about the network.
    - After ``SILENT`` hosts without a word, and nobody else in between, the witnesses are called. If one is there,
      the hosts are dead, and the count begins anew; otherwise the run ends.
    - Names that do not exist are counted by themselves: a name server may answer although nothing else can be
      reached, so they do not excuse silence. ``SILENT`` of them call the witnesses too. Where there is none yet,
      they are believed, if the system tells them from a dead name server: a run, or a resumed one, may begin with
      as many dead names as there are.

    Safe to use from many threads: who hears an answer never waits for those who call witnesses.
    """

    def __init__(self, private: frozenset[str]) -> None:
        self._private = private
        # Held for a moment by everybody, and for the length of the calls by one at a time.
        self._lock, self._calling = threading.Lock(), threading.Lock()
        self._silent: set[str] = set()
        self._nameless: set[str] = set()
        self._witnesses: OrderedDict[tuple[str, int], None] = OrderedDict()
        self._is_dead = False

    def answered(self, host: str, port: int) -> None:
        """A server spoke."""
        with self._lock:
            self._begin_anew()
            self._witnesses[host, port] = None
            self._witnesses.move_to_end((host, port))
            if len(self._witnesses) > WITNESSES:
                self._witnesses.popitem(last=False)

    def failed(self, error: NoConnection) -> None:
        """There was no connection.

        Raises:
            StorageError: nobody is there any more, also not the servers that were.
        """
        host, port = error.place
        if error.said == "refused":
            self.answered(host, port)
        elif error.said != "refused here":
            counted = self._nameless if error.said == "no such name" else self._silent
            with self._lock:
                counted.add(host.rstrip(".").lower())
                if len(counted) < SILENT:
                    return
            self._judge(counted, str(error))

    def _judge(self, counted: set[str], reason: str) -> None:
        with self._calling:
            with self._lock:
                # Somebody else may have called, or have been answered, while this thread waited for its turn.
                if len(counted) < SILENT:
                    return
                witnesses = [] if self._is_dead else list(self._witnesses)
            there = any(self._is_there(host, port) for host, port in reversed(witnesses))
            with self._lock:
                if there or len(counted) < SILENT:
                    self._begin_anew()
                    return
                if counted is self._nameless and NAMES_ARE_TOLD_APART and not self._witnesses:
                    counted.clear()
                    return
                self._is_dead = True
                known = "nor do those that answered before" if self._witnesses else "and none has answered yet"
        raise StorageError(
            f"no server answered at {SILENT} hosts in a row ({reason}), {known}: the network or the name server is at "
            "fault, not the images. Run the same command again when they are back, finished shards are kept; rows of "
            "hosts that are gone for good can be left out of the manifest"
        )

    def _begin_anew(self) -> None:
        self._silent.clear()
        self._nameless.clear()
        self._is_dead = False

    def _is_there(self, host: str, port: int) -> bool:
        set_deadline(time.monotonic() + WITNESS_SECONDS)
        try:
            connect(host, port, self._private).close()
        except NoConnection as error:
            return error.said == "refused"
        except (AddressNotAllowed, OSError):
            return False
        return True
