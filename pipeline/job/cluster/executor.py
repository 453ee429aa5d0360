"""Who embeds the shards of a job: this process, or a cluster."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

from pipeline.config.schema import Config
from pipeline.core.errors import ClusterUnavailable, install_hint
from pipeline.images.pool.pool import Decoders
from pipeline.job.cluster.inline import Inline
from pipeline.storage.base import Storage

if TYPE_CHECKING:
    from pipeline.job.cluster.dask_executor import Fleet

Crew: TypeAlias = "Inline | Fleet"


def crew_of(config: Config, storage: Storage, check: Callable[[], None], decoders: Decoders | None) -> Crew:
    """The one that ``cluster.name`` asks for; not opened yet.

    Args:
        config: of the job.
        storage: the output.
        check: called often; raises if the job must stop.
        decoders: those of this process, where they have begun already.

    Raises:
        ClusterUnavailable: Dask is not installed.
    """
    name = config.cluster.name
    if name == "inline":
        return Inline(config, storage, decoders)
    try:
        from pipeline.job.cluster.dask_executor import Fleet
    except ImportError as error:
        extra = name if name in ("slurm", "kubernetes") else "dask"
        raise ClusterUnavailable(f"cluster={name} needs Dask ({error}): {install_hint(extra)}") from error
    return Fleet(config, storage, check)
