"""A collection of images that grows, changes and shrinks, nights made from it, and what each must be equal to."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config.schema import Config
from pipeline.core.errors import PipelineError, TooManyFailures
from pipeline.dataset import lease
from pipeline.dataset.verify import verify
from pipeline.engine.demo.folder import jpeg
from pipeline.engine.demo.scenes import sample
from pipeline.nightly.records import Night, NightOptions
from pipeline.nightly.run import run_night
from pipeline.storage.factory import open_storage
from tests.jobs import config_for


@dataclass
class Collection:
    """Images in a folder and their current manifest; ``content`` counts how often an image was drawn again."""

    folder: Path
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    content: dict[str, int] = field(default_factory=dict)

    @property
    def manifest(self) -> Path:
        return self.folder / "manifest.parquet"

    def draw(self, number: int, *, version: int = 0, missing: bool = False, damaged: bool = False) -> None:
        """Add an image, or draw it anew; a missing one is in the manifest only."""
        name = f"{number:04d}"
        path = self.folder / f"{name}.jpg"
        self.content[name] = version
        drawn = sample(7, number + 1000 * version)
        path.unlink(missing_ok=True)
        data = b"no picture at all" if damaged else jpeg(drawn, 64, 64)
        if not missing:
            path.write_bytes(data)
        self.rows[name] = {
            "id": name,
            "path": path.name,
            "size": len(data),
            # Stands in for a modification time; it differs for files written within the same microsecond.
            "modified": number * 10_000 + version,
            "truth": drawn.label,
        }

    def restore(self, number: int) -> None:
        """Write the file of a missing image."""
        drawn = sample(7, number + 1000 * self.content[f"{number:04d}"])
        (self.folder / f"{number:04d}.jpg").write_bytes(jpeg(drawn, 64, 64))

    def drop(self, number: int) -> None:
        del self.rows[f"{number:04d}"]
        (self.folder / f"{number:04d}.jpg").unlink(missing_ok=True)

    def write(self, columns: dict[str, list[Any]] | None = None) -> Path:
        rows = [self.rows[name] for name in sorted(self.rows)]
        table = pa.Table.from_pylist(rows)
        for name, values in (columns or {}).items():
            table = table.append_column(name, pa.array(values))
        pq.write_table(table, self.manifest, row_group_size=10)
        return self.manifest

    def config(self, **groups: dict[str, Any]) -> Config:
        defaults: dict[str, dict[str, Any]] = {
            "manifest": {"image": "path", "keep": ["truth"], "shard_rows": 8, "root": str(self.folder)}
        }
        for name, values in groups.items():
            defaults[name] = {**defaults.get(name, {}), **values}
        return config_for(self.manifest, self.folder.parent / "unused", **defaults)


def night(config: Config, store: Path | str, day: str, **wanted: Any) -> Night:
    """One night in this process."""
    storage = open_storage(str(store))
    with lease.take(storage, seconds=60) as held:
        return run_night(config, NightOptions(store=str(store), **wanted), storage, day, held)


def night_in_fork(groups: dict[str, dict[str, Any]], store: str, day: str, layout: str) -> int:
    """One night, as :func:`tests.forks.Forks.start` calls it."""
    from tests.forks import config_from

    try:
        return night(config_from(groups), Path(store), day, layout=layout).exit_code
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def from_scratch(config: Config, output: Path) -> pa.Table:
    """Rows of the main job over the same manifest."""
    from pipeline.job.main import run_job

    shutil.rmtree(output, ignore_errors=True)
    try:
        run_job(config.changed({"output.dir": str(output)}))
    except TooManyFailures:
        print("too many failures", file=sys.stderr)
    return read(output)


def read(output: Path) -> pa.Table:
    """Every row of a dataset, in order."""
    parts = [pq.ParquetFile(path).read().replace_schema_metadata(None) for path in sorted(output.glob("part-*"))]
    return pa.concat_tables(parts)


def differences(made: pa.Table, scratch: pa.Table) -> Iterator[str]:
    """Columns that differ between two datasets of the same manifest, beyond rounding of embeddings and scores."""
    if made.schema != scratch.schema:
        yield f"the schema: {made.schema} and {scratch.schema}"
        return
    for name in made.schema.names:
        ours, theirs = made.column(name), scratch.column(name)
        if name == "embedding":
            ours, theirs = ours.combine_chunks(), theirs.combine_chunks()
            close = np.allclose(ours.flatten(), theirs.flatten(), atol=2e-6)
            same = ours.is_valid().equals(theirs.is_valid()) and close
        elif name == "score":
            same = np.allclose(ours.to_numpy(), theirs.to_numpy(), atol=1e-4, equal_nan=True)
        elif name == "top_scores":
            same = np.allclose(ours.combine_chunks().flatten(), theirs.combine_chunks().flatten(), atol=1e-4)
        else:
            same = ours.to_pylist() == theirs.to_pylist()
        if not same:
            yield name


def healthy(output: Path) -> bool:
    health = verify(open_storage(str(output)))
    return health.state == "healthy" and not health.findings
