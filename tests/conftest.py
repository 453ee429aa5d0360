"""Fixtures that several test files share, and what decides where a test runs."""

from __future__ import annotations

import ctypes
import fcntl
import gc
import hashlib
import os
import shutil
import signal
import sys
import sysconfig
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

# Read when torch is imported. A thread that spins while it waits takes the core of the one that it waits for: with two
# workers of two threads each on two cores, a small model takes fifteen times the core time.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Packages that were installed with --no-compile are compiled at their first import. Where that is not kept, as is usual
# in containers, each of the hundreds of child processes takes ten seconds more; each worker does, for torch alone.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

import torch  # noqa: E402

if TYPE_CHECKING:
    from pipeline.core.records import Sample
    from pipeline.models.checkpoint import Checkpoint

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("PIPELINE_TEST_DATA", ROOT.parent / "shared" / "data"))


def pytest_configure(config: pytest.Config) -> None:
    """Restore what a background job of a shell ignores, and spread the tests so that files stay together."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Each worker begins with half of the files and steals at the end: fixtures of a module are seldom made twice.
    if config.getoption("dist", "no") == "load":
        config.option.dist = "worksteal"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, with the reason, and mark what needs the extra ``compat`` as slow."""
    for item in items:
        if item.get_closest_marker("compat"):
            item.add_marker(pytest.mark.slow)
        for name in (name for kind in ("compat", "needs") for mark in item.iter_markers(kind) for name in mark.args):
            if not _is_installed(name):
                item.add_marker(pytest.mark.skip(reason=f"{name} is not installed"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if item.get_closest_marker("tensorrt") and torch.cuda.is_available() and not _has_tensorrt():
            item.add_marker(pytest.mark.skip(reason="no TensorRT 10 (libnvinfer.so.10)"))
        if item.get_closest_marker("compiler") and not _can_compile():
            item.add_marker(pytest.mark.skip(reason="no C++ compiler, or no Python.h: apt-get install g++ python3-dev"))
        if item.get_closest_marker("hub") and os.environ.get("PIPELINE_TEST_HUB") != "1":
            item.add_marker(pytest.mark.skip(reason="PIPELINE_TEST_HUB=1 allows tests that use the hub"))


def pytest_collection_finish() -> None:
    """Leave the imported modules out of every later garbage collection, which would take a second each time."""
    gc.collect()
    gc.freeze()
    load_the_demo_once()


def load_the_demo_once() -> None:
    """Read the demo's files once a process: no test changes what was opened, and most jobs have this model."""
    form: Any = sys.modules.get("pipeline.models.transformers_form")
    # Without the module, no test of this run opens a model.
    if form is not None:
        for module, name in ((form, "load_model"), (form.dual, "_tokenizer"), (form, "sha256")):
            setattr(module, name, _once(getattr(module, name), form.DEMO_FOLDER))


def _once(read: Callable[..., Any], folder: Path) -> Callable[..., Any]:
    """The function, which remembers what it returns for the folder and for files in it."""
    once = cache(read)
    return lambda place, *more: (once if folder in (place, place.parent) else read)(place, *more)


@pytest.fixture(autouse=True, scope="session")
def _private_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def exported_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Trace each tower to ONNX once for all workers of a run; everything after the trace is done every time."""
    from pipeline.backends.artifacts import onnx_export

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "towers"
    folder.mkdir(exist_ok=True)
    export = onnx_export.export_tower

    def export_once(checkpoint: Checkpoint, tower: str, path: Path) -> None:
        prints = checkpoint.fingerprint
        key = repr((prints["architecture"], prints["weights"], tower, path.name, onnx_export.LARGE))
        made = folder / hashlib.sha256(key.encode()).hexdigest()
        with made.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not made.exists():
                unfinished = made.with_suffix(".unfinished")
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.mkdir()
                export(checkpoint, tower, unfinished / path.name)
                unfinished.rename(made)
        shutil.copytree(made, path.parent, dirs_exist_ok=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_export, "export_tower", export_once)
        yield


def _is_installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _has_tensorrt() -> bool:
    try:
        ctypes.CDLL("libnvinfer.so.10")
    except OSError:
        return False
    return True


def _can_compile() -> bool:
    return shutil.which("g++") is not None and Path(sysconfig.get_path("include"), "Python.h").is_file()


def data_folder(name: str) -> Path:
    """A folder of test data that lives beside the checkout; skips where it is absent."""
    folder = DATA / name
    if not folder.is_dir():
        pytest.skip(f"no test data at {folder}; PIPELINE_TEST_DATA names another place")
    return folder


@pytest.fixture(scope="module")
def demo() -> Checkpoint:
    """The demo's model, opened once for a module of tests."""
    from pipeline.config.schema import ModelConfig
    from pipeline.models.checkpoint import open_checkpoint

    return open_checkpoint(ModelConfig())


@pytest.fixture(scope="module")
def pictures(demo: Checkpoint) -> Sample:
    """64 rendered scenes, as the demo's model takes them."""
    from pipeline.engine.demo.folder import rendered_sample

    return rendered_sample(demo.spec, 64)
