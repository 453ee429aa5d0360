"""Small real jobs for the tests: rendered scenes, the demo model, a few shards."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.backends.base import ImageEncoder
from pipeline.config.schema import Config
from pipeline.engine.demo.folder import jpeg
from pipeline.engine.demo.scenes import sample
from tests.conftest import ROOT

DAMAGED = {3: b"no picture at all", 20: b""}


@cache
def scene(number: int, seed: int = 11) -> tuple[bytes, str]:
    """Return a scene as JPEG and its label; a process draws each one once."""
    drawn = sample(seed, number)
    return jpeg(drawn, 64, 64), drawn.label


def scenes_manifest(path: Path, rows: int, *, damaged: dict[int, bytes] | None = None, group: int = 16) -> Path:
    """A manifest with a bytes column, a nested column to keep, and a few damaged cells."""
    spoiled = DAMAGED if damaged is None else damaged
    scenes = [scene(i) for i in range(rows)]
    table = pa.table(
        {
            "id": [f"scene/{i:04d}.jpg" for i in range(rows)],
            "image": [spoiled.get(i, data) for i, (data, _) in enumerate(scenes)],
            "truth": [label for _, label in scenes],
            "meta": [{"n": i, "tags": [str(i), "x"]} for i in range(rows)],
        }
    )
    pq.write_table(table, path, row_group_size=group)
    return path


def config_for(manifest: Path, output: Path, /, **groups: dict[str, Any]) -> Config:
    """A config of small shards and batches; each keyword replaces values of one group.

    Decoding in this process and no page: decoder processes and matplotlib take most of the time of a small job, so the
    tests of either ask for it.
    """
    config = Config()
    defaults: dict[str, dict[str, Any]] = {
        "manifest": {"path": str(manifest), "image": "image", "keep": ["truth", "meta"], "shard_rows": 24},
        "loader": {"batch_size": 8, "workers": 2, "isolation": "none"},
        "output": {"dir": str(output)},
        "errors": {"max_fraction": 0.5},
        "backend": {"device": "cpu"},
        "report": {"progress": "none", "html": False, "examples": 4},
    }
    for name in {*defaults, *groups}:
        values = {**defaults.get(name, {}), **groups.get(name, {})}
        config = replace(config, **{name: replace(getattr(config, name), **values)})
    return config


def overrides_of(config: Config) -> list[str]:
    """Return the command line that gives ``config``'s manifest, output, batches and workers."""
    return [
        f"manifest.path={config.manifest.path}",
        "manifest.image=image",
        "manifest.keep=[truth,meta]",
        f"manifest.shard_rows={config.manifest.shard_rows}",
        f"output.dir={config.output.dir}",
        f"loader.batch_size={config.loader.batch_size}",
        "loader.workers=2",
        "errors.max_fraction=0.5",
        "backend.device=cpu",
    ]


def start(*arguments: str) -> subprocess.Popen[str]:
    """``python -m pipeline.run`` as a process, its standard error in a pipe."""
    command = [sys.executable, "-m", "pipeline.run", *arguments]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def content(output: Path) -> dict[str, bytes]:
    """Every file of a dataset that must not depend on how often the job was interrupted."""
    own = {"_report.json", "_report.html", "_run.log"}
    return {
        str(path.relative_to(output)): path.read_bytes()
        for path in sorted(output.rglob("*"))
        if path.is_file() and path.name not in own
    }


class StubEncoder(ImageEncoder):
    """Embeds a picture as its mean colour, at no cost, in the reference's place; ``spoil`` changes what comes out."""

    name, precision, dim = "torch", "fp32", 4

    def __init__(self, batch_size: int) -> None:
        self.device, self.batch_size = torch.device("cpu"), batch_size

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        vectors = torch.nn.functional.pad(pixels[:, :, ::16, ::16].float().mean(dim=(2, 3)) + 1, (0, 1), value=1.0)
        return self.spoil(torch.nn.functional.normalize(vectors, dim=1))

    def spoil(self, vectors: torch.Tensor) -> torch.Tensor:
        return vectors

    @property
    def fingerprint(self) -> dict[str, str]:
        return {"name": self.name, "precision": self.precision, "device": "cpu", "runtime": "none"}


@contextmanager
def stub_backend(encoder: type[StubEncoder]) -> Iterator[None]:
    """Let ``backend=torch`` open ``encoder`` instead."""
    name = "pipeline.backends.torch"
    # A copy of the module, so that the reference of a comparison stays the real one.
    real, stub = import_module(name), ModuleType(name)
    vars(stub).update(vars(real))
    vars(stub)["open_encoder"] = lambda checkpoint, config, *, batch_size, sample, limits: encoder(batch_size)
    sys.modules[name] = stub
    try:
        yield
    finally:
        sys.modules[name] = real
