"""Fixtures that several test files share."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("PIPELINE_TEST_DATA", ROOT.parent / "shared" / "data"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, with the reason."""
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if item.get_closest_marker("tensorrt") and torch.cuda.is_available() and not _has_tensorrt():
            item.add_marker(pytest.mark.skip(reason="no TensorRT 10 (libnvinfer.so.10)"))
        if item.get_closest_marker("hub") and os.environ.get("PIPELINE_TEST_HUB") != "1":
            item.add_marker(pytest.mark.skip(reason="PIPELINE_TEST_HUB=1 allows tests that use the hub"))


@pytest.fixture(autouse=True, scope="session")
def _private_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def _has_tensorrt() -> bool:
    try:
        ctypes.CDLL("libnvinfer.so.10")
    except OSError:
        return False
    return True


def data_folder(name: str) -> Path:
    """A folder of test data that lives beside the checkout; skips where it is absent."""
    folder = DATA / name
    if not folder.is_dir():
        pytest.skip(f"no test data at {folder}; PIPELINE_TEST_DATA names another place")
    return folder
