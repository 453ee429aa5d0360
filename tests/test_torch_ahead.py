"""Towers that are compiled once, into a shared library of the artefact store."""

from __future__ import annotations

import logging
import re
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.backends import torch_ahead
from pipeline.backends.artifacts.store import Artifact, ArtifactStore
from pipeline.backends.torch_ahead import FILE, Compilation, Library, load_or_compile
from pipeline.backends.torch_module import compiled
from pipeline.config.schema import BackendConfig
from pipeline.core.errors import ArtifactError
from pipeline.models.checkpoint import Checkpoint

SHAPE = (2, 3, 6, 6)
WIDE = 1024


class Tower(torch.nn.Module):
    """A tower of two products; the first one takes long enough to see what goes on beside it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        values = torch.randn(dim, 108, generator=torch.Generator().manual_seed(0))
        self.weight = torch.nn.Parameter(values)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        wide = pixels.flatten().repeat(WIDE * WIDE // 216 + 1)[: WIDE * WIDE].view(WIDE, WIDE)
        product = (torch.nn.functional.linear(pixels.flatten(1), self.weight) + (wide @ wide).mean()).sin()
        return product / (product * product).sum(dim=1, keepdim=True).sqrt()


def compilation(checkpoint: Checkpoint, store: Path, **options: str) -> Compilation:
    config = BackendConfig(device="cpu", compile="default", streams=2, artifacts=str(store))
    with torch.inference_mode():
        return Compilation(checkpoint, config, options, torch.zeros(SHAPE))


def kept(checkpoint: Checkpoint, store: Path, facts: dict[str, Any]) -> Artifact:
    """An artefact with a file that is no library."""

    def build(folder: Path) -> dict[str, Any]:
        (folder / FILE).write_bytes(b"no library")
        return {"facts": facts}

    return ArtifactStore(store).make(compilation(checkpoint, store).recipe, build)


def never() -> torch.nn.Module:
    raise AssertionError("compiled again")


@torch.inference_mode()
def noise(seed: int = 1) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def made(demo: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the library of the tower."""
    store = tmp_path_factory.mktemp("made")
    load_or_compile(compilation(demo, store), lambda: Tower(demo.dim))
    return store


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Path:
    """A copy of the store, to damage."""
    return Path(shutil.copytree(made, tmp_path / "store"))


def run(forward: Callable[[torch.Tensor], torch.Tensor], pixels: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return forward(pixels)


def just_in_time(demo: Checkpoint) -> torch.Tensor:
    return run(compiled(Tower(demo.dim), mode="default", pixels=compilation(demo, Path()).pixels), noise())


def test_the_key_holds_all_that_decides_the_library(
    demo: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = compilation(demo, tmp_path)
    with torch.inference_mode():
        others = [
            replace(first, pixels=torch.zeros(4, *SHAPE[1:])),
            replace(first, pixels=torch.zeros(SHAPE, dtype=torch.bfloat16)),
            replace(first, options={"activations": "int8 by row"}),
            replace(first, config=BackendConfig(name="torch_int8")),
        ]
    keys = {each.recipe.fingerprint for each in (first, *others)}
    assert first.recipe.fingerprint == compilation(demo, tmp_path / "other").recipe.fingerprint
    with monkeypatch.context() as other:
        other.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_vnni": True})
        keys.add(first.recipe.fingerprint)
    with monkeypatch.context() as other:
        other.setattr(torch, "get_num_threads", lambda: 77)
        keys.add(first.recipe.fingerprint)
    with monkeypatch.context() as other:
        other.setenv("TORCHINDUCTOR_CACHE_DIR", "/elsewhere")
        keys.add(first.recipe.fingerprint)
    assert len(keys) == 7
    assert {"torch", "transformers"} <= set(first.recipe.versions)
    assert "torchao" in others[-1].recipe.versions


@pytest.mark.parametrize(("place", "mode"), [(FILE, 0o666), (FILE, 0o664), ("", 0o777)])
def test_code_that_others_may_change_is_not_loaded(place: str, mode: int, demo: Checkpoint, tmp_path: Path) -> None:
    artifact = kept(demo, tmp_path, {"equal": True, "weight_bytes": 1})
    artifact.path.chmod(0o755)
    artifact.file(FILE).chmod(0o644)
    assert torch_ahead._trusted(artifact) == artifact.file(FILE)
    (artifact.path / place).chmod(mode)
    with pytest.raises(ArtifactError, match=r"another user .* may write it.*backend\.artifacts"):
        torch_ahead._trusted(artifact)


def test_code_of_another_user_is_not_loaded(demo: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = kept(demo, tmp_path, {"equal": True, "weight_bytes": 1})
    monkeypatch.setattr("os.geteuid", lambda: 12345)
    own = artifact.path.stat().st_uid
    if own == 0:
        assert torch_ahead._trusted(artifact) == artifact.file(FILE), "root may write it anyway"
        shutil.chown(artifact.file(FILE), 54321)
    with pytest.raises(ArtifactError, match="another user owns it"):
        torch_ahead._trusted(artifact)


@pytest.mark.slow
def test_a_second_start_compiles_nothing_and_gives_the_same_bits(
    demo: Checkpoint, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = just_in_time(demo)
    for name in ("compiled", "_compile"):
        monkeypatch.setattr(torch_ahead, name, lambda *_, **__: never())
    forward, weight_bytes = load_or_compile(compilation(demo, store), never)
    assert isinstance(forward, Library)
    assert weight_bytes == 4 * 108 * demo.dim
    assert torch.equal(run(forward, noise()), expected)
    channels_last = noise().contiguous(memory_format=torch.channels_last)
    assert torch.equal(run(forward, channels_last), expected)
    for wrong in (torch.zeros(3, *SHAPE[1:]), torch.zeros(SHAPE, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match=r"compiled for torch\.float32"):
            forward(wrong)


@pytest.mark.slow
def test_batches_side_by_side_give_the_same_bits(demo: Checkpoint, store: Path) -> None:
    forward, _ = load_or_compile(compilation(demo, store), never)
    expected = [run(forward, noise(seed)) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: run(forward, noise(i % 4)), range(24)))
    assert all(torch.equal(row, expected[i % 4]) for i, row in enumerate(found))


@pytest.mark.slow
def test_a_torn_library_is_made_again(demo: Checkpoint, store: Path, caplog: pytest.LogCaptureFixture) -> None:
    artifact = ArtifactStore(store).find(compilation(demo, store).recipe)
    assert artifact is not None
    whole = artifact.file(FILE).read_bytes()
    # A new file: the old one is mapped into this process.
    artifact.file(FILE).unlink()
    artifact.file(FILE).write_bytes(whole[: len(whole) // 2])
    with caplog.at_level(logging.WARNING):
        forward, _ = load_or_compile(compilation(demo, store), lambda: Tower(demo.dim))
    assert caplog.text.count("is damaged and is removed") == 1
    assert isinstance(forward, Library)
    assert ArtifactStore(store).problems(artifact) == []


@pytest.mark.slow
def test_without_a_store_or_with_other_digits_it_is_compiled_at_each_start(
    demo: Checkpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("no folder")
    kept(demo, tmp_path / "differs", {"equal": False, "weight_bytes": 1})
    kept(demo, tmp_path / "broken", {"equal": True, "weight_bytes": 1})
    expected = just_in_time(demo)
    for place, why in (("file", "file"), ("differs", "last digits"), ("broken", "invalid ELF|too short")):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            forward, weight_bytes = load_or_compile(compilation(demo, tmp_path / place), lambda: Tower(demo.dim))
        lines = [record.getMessage() for record in caplog.records if "at each start" in record.getMessage()]
        assert len(lines) == 1
        assert re.search(why, lines[0]), lines
        assert weight_bytes == 4 * 108 * demo.dim
        assert torch.equal(run(forward, noise()), expected)


@pytest.mark.slow
def test_a_tower_that_cannot_be_exported_is_compiled_at_each_start(
    demo: Checkpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Odd(Tower):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            torch._dynamo.graph_break()
            if torch.compiler.is_exporting():
                raise ValueError("not this way")
            return super().forward(pixels)

    with caplog.at_level(logging.INFO):
        forward, _ = load_or_compile(compilation(demo, tmp_path), lambda: Odd(demo.dim))
    assert "compiling ahead of time failed (ValueError: not this way)" in caplog.text
    assert not isinstance(forward, Library)
    assert run(forward, noise()).shape == (SHAPE[0], demo.dim)
    assert ArtifactStore(tmp_path).artifacts() == []


@pytest.mark.slow
def test_other_threads_go_on_while_a_batch_is_embedded(demo: Checkpoint, store: Path) -> None:
    forward, _ = load_or_compile(compilation(demo, store), never)
    ended, ticks = threading.Event(), list[float]()

    def tick() -> None:
        while not ended.wait(0.001):
            ticks.append(time.perf_counter())

    other = threading.Thread(target=tick)
    other.start()
    began = time.perf_counter()
    for _ in range(5):
        run(forward, noise())
    ended.set()
    other.join()
    # Between two batches it could go on anyway.
    assert len([at for at in ticks if at > began]) > 15, "the lock of Python was held"
