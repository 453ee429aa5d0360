"""Where what a call makes lies: in a temporary folder that goes with the object, or where the caller says."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from contextlib import suppress
from pathlib import Path

from pipeline.api.inputs import Given
from pipeline.core.errors import ConfigError, PipelineError, PlanMismatch, Problem
from pipeline.dataset import plan
from pipeline.storage.base import sha256
from pipeline.storage.factory import open_storage
from pipeline.storage.urls import explained, is_local


class Scratch:
    """A folder that is removed with this object, at the latest with the process."""

    def __init__(self) -> None:
        with explained("a temporary folder (TMPDIR)"):
            self.path = Path(tempfile.mkdtemp(prefix="clip-pipeline-"))
        self._remove = weakref.finalize(self, _remove, str(self.path), os.getpid())

    def close(self) -> None:
        """Remove it now."""
        self._remove()


class Beside:
    """The manifest that was written for an output, under a name that holds its digest: the same call finds it again.

    It stays, as what the dataset was made of: a repair, and pictures of the rows, read it.
    """

    def __init__(self, given: Given, output: str) -> None:
        parent, name = _parent(output)
        assert given.written is not None
        self._storage, self._output = open_storage(parent), output
        self._name = f"{name}.{sha256(given.written)[:16]}.parquet"
        self.url = f"{parent}{self._name}" if parent.endswith("/") else f"{parent}/{self._name}"
        self._ours = self._storage.size(self._name) is None
        if self._ours:
            with self._storage.staged() as staged:
                shutil.copyfile(given.written, staged.path)
                staged.publish(self._name)

    def failed(self, error: BaseException) -> None:
        """Remove it, if it was not there before and no dataset was made of it."""
        if not self._ours:
            return
        # What went wrong is told; that this cannot be looked at or removed would only hide it.
        with suppress(PipelineError):
            if isinstance(error, PlanMismatch) or open_storage(self._output).size(plan.NAME) is None:
                self._storage.remove(self._name)


def _remove(folder: str, process: int) -> None:
    # A child that was forked has a copy of the object, and the folder is not its own.
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)


def _parent(output: str) -> tuple[str, str]:
    """The folder that an absolute output lies in, and its name there."""
    if is_local(output):
        return os.path.dirname(output), os.path.basename(output)
    scheme, _, rest = output.partition("://")
    parent, _, name = rest.rstrip("/").rpartition("/")
    # Memory has a root; elsewhere what comes first is a bucket or a host, beside which nothing can lie.
    if not parent and scheme.lower() != "memory":
        allowed = "is a whole store, and a manifest of what is no file yet lies beside the output"
        raise ConfigError([Problem("output", output, allowed, f"name a folder in it: {output.rstrip('/')}/dataset")])
    return f"{scheme}://{parent}", name
