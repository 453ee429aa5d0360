"""What it means that the scheduler of a cluster cannot be reached any more."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from distributed.client import ClosedClientError, FutureCancelledError
from distributed.comm.core import CommClosedError

from pipeline.core.errors import ClusterLost

LOST = "the scheduler of the cluster is gone; what was committed stays, and the same command goes on"


@contextmanager
def reached(*more: type[Exception]) -> Iterator[None]:
    """Around what needs the scheduler.

    Args:
        more: what else can mean nothing but that it cannot be reached.

    Raises:
        ClusterLost: it is gone.
    """
    gone: tuple[type[Exception], ...] = (CommClosedError, ClosedClientError, FutureCancelledError, *more)
    try:
        yield
    except gone as error:
        raise ClusterLost(LOST) from error
