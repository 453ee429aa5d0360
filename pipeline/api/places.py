"""Where what a call makes lies: in a temporary folder that goes with the object, or where the caller says."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from pathlib import Path

from pipeline.addresses import explained, is_local, local_path
from pipeline.api.given import Given
from pipeline.storage.base import sha256
from pipeline.storage.opening import open_storage


class Scratch:
    """A folder that is removed with this object, at the latest with the process."""

    def __init__(self) -> None:
        with explained("a temporary folder (TMPDIR)"):
            self.path = Path(tempfile.mkdtemp(prefix="clip-pipeline-"))
        self._remove = weakref.finalize(self, shutil.rmtree, str(self.path), ignore_errors=True)

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
        self._storage = open_storage(parent)
        self._name = f"{name}.{sha256(given.written)[:16]}.parquet"
        self._ours = self._storage.size(self._name) is None
        if self._ours:
            with self._storage.staged() as staged:
                shutil.copyfile(given.written, staged.path)
                staged.publish(self._name)
        self.url = f"{self._storage.url.rstrip('/')}/{self._name}"

    def take_back(self) -> None:
        """Remove it, if it was not there before."""
        if self._ours:
            self._storage.remove(self._name)


def _parent(output: str) -> tuple[str, str]:
    if is_local(output):
        place = Path(local_path(output)).expanduser().absolute()
        return str(place.parent), place.name
    parent, _, name = output.rstrip("/").rpartition("/")
    return parent, name
