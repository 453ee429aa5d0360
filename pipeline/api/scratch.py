"""Files of a call: a temporary folder that is removed with its dataset, and a manifest kept beside an output."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from pipeline.core.errors import ConfigError, PipelineError, PlanMismatch, Problem
from pipeline.dataset import plan
from pipeline.storage.base import sha256
from pipeline.storage.factory import open_storage
from pipeline.storage.local import temporary_folder
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


@contextmanager
def written_prompts(prompts: Mapping[str, list[str] | None], scratch: Scratch | None, output: str) -> Iterator[str]:
    """Write a label file with prompts into ``scratch``, or without one beside a local output; yield its path.

    Raises:
        ConfigError: the output is not local, and label files are.
    """
    import yaml

    if scratch is None and not is_local(output):
        allowed = "with prompts are written beside the output, which must be local for that"
        raise ConfigError([Problem("labels", [*prompts][:3], allowed, "give the path of a label file")])
    text = yaml.safe_dump(dict(prompts), allow_unicode=True, sort_keys=False)
    with ExitStack() as opened:
        folder = scratch.path if scratch is not None else opened.enter_context(temporary_folder())
        path = folder / "labels.yaml"
        path.write_text(text, encoding="utf-8")
        yield str(path) if scratch is not None else opened.enter_context(manifest_beside(path, output))


@contextmanager
def manifest_beside(written: Path, output: str) -> Iterator[str]:
    """Copy a file beside an output and yield its address; its name holds its digest, so the same call finds it.

    It stays with the dataset, for repairs and thumbnails. After an error it is removed if this call wrote it and no
    dataset was begun with it.
    """
    parent, name = _parent(output)
    storage, name = open_storage(parent), f"{name}.{sha256(written)[:16]}{written.suffix}"
    new = storage.size(name) is None
    if new:
        with storage.staged() as staged:
            shutil.copyfile(written, staged.path)
            staged.publish(name)
    try:
        yield f"{parent}{name}" if parent.endswith("/") else f"{parent}/{name}"
    except BaseException as error:
        # An error of the storage here would hide the first one.
        with suppress(PipelineError):
            if new and (isinstance(error, PlanMismatch) or open_storage(output).size(plan.NAME) is None):
                storage.remove(name)
        raise


def _remove(folder: str, process: int) -> None:
    # A forked child has a copy of the object, and must not remove the parent's folder.
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)


def _parent(output: str) -> tuple[str, str]:
    """The folder of an absolute output, and its name there."""
    if is_local(output):
        return os.path.dirname(output), os.path.basename(output)
    scheme, _, rest = output.partition("://")
    parent, _, name = rest.rstrip("/").rpartition("/")
    # The memory file system has a root; elsewhere the first part is a bucket or a host, which has no siblings.
    if not parent and scheme.lower() != "memory":
        allowed = "is a whole store, but the manifest of these images is written beside the output"
        raise ConfigError([Problem("output", output, allowed, f"name a folder in it: {output.rstrip('/')}/dataset")])
    return f"{scheme}://{parent}", name
