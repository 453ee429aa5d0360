"""A scheduler that runs already."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from distributed import Client

from pipeline.config.schema import Config
from pipeline.core.errors import ClusterUnavailable
from pipeline.job.cluster.dask_cluster import security

# How long a scheduler may take to answer, in seconds.
TIMEOUT = 30


@contextmanager
def open_client(config: Config) -> Iterator[Client]:
    """See :func:`pipeline.job.cluster.dask_cluster.open_cluster`; the cluster itself goes on afterwards."""
    address = config.cluster.address
    try:
        client = Client(address, security=security(config.cluster), set_as_default=False, timeout=TIMEOUT)
    except (OSError, ValueError, TypeError) as error:
        reason = str(error) or type(error).__name__
        raise ClusterUnavailable(
            f"cluster.address={address}: no scheduler answers there ({reason}); see that it runs, and that its port "
            "can be reached from here"
        ) from error
    with client:
        yield client
