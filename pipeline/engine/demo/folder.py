"""Rendered scenes as image files with a manifest: the default input of the job."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config.schema import DEMO_MODEL, Config, PromptsConfig
from pipeline.core.records import PreprocessSpec, Sample
from pipeline.engine.demo import scenes
from pipeline.engine.sample import stack
from pipeline.images.preprocess import preprocess
from pipeline.manifest.manifest import ROOT_KEY
from pipeline.storage.local import LocalStorage
from pipeline.storage.urls import is_local, local_path, open_arrow

# Different from the seeds of the training.
SEED = 20_000_003
TRUTH = "truth"


def scenes_folder(output: str) -> Path:
    """The folder of the scenes of a job without a manifest: beside its output, if that is local."""
    return Path(local_path(output)).parent / "scenes" if is_local(output) else Path("outputs/scenes")


def manifest_in(folder: Path, count: int, *, width: int = 256, height: int = 256) -> Path:
    """The path of the manifest of ``count`` scenes in ``folder``; it need not exist yet."""
    return folder / f"scenes-{count}-{width}x{height}-{SEED}.parquet"


def render_folder(
    folder: Path,
    count: int,
    *,
    width: int = 256,
    height: int = 256,
    rows: Sequence[int] | None = None,
) -> Path:
    """Render ``count`` scenes as JPEG files into ``folder``; return the path of the manifest.

    A folder that already holds the same scenes is left unchanged. The manifest has the columns ``id``,
    ``path`` and ``truth`` (colour and shape). For a trial, only the images of ``rows`` are rendered.
    """
    manifest = manifest_in(folder, count, width=width, height=height)
    if manifest.exists() and rows is None:
        return manifest
    store = LocalStorage(str(folder))
    chosen = list(scenes.scenes(SEED, count))
    names = [f"{count}-{width}x{height}-{SEED}/{i:06d}.jpg" for i in range(count)]

    def save(row: int) -> None:
        path = folder / names[row]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(chosen[row], width, height))

    with ThreadPoolExecutor() as pool:
        list(pool.map(save, range(count) if rows is None else rows))
    columns = {"id": [f"scene-{i:06d}" for i in range(count)], "path": names, TRUTH: [s.label for s in chosen]}
    table = pa.table(columns).replace_schema_metadata({ROOT_KEY: str(folder.resolve()).encode()})
    with store.staged() as staged:
        pq.write_table(table, staged.path)
        staged.publish(manifest.name, replace=True)
    return manifest


def jpeg(scene: scenes.Scene, width: int, height: int) -> bytes:
    """The scene as JPEG bytes at quality 90."""
    buffer = io.BytesIO()
    scenes.render(scene, width, height).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def rendered_sample(spec: PreprocessSpec, count: int) -> Sample:
    """``count`` scenes as pixels of a model's size, for use without a manifest."""
    height, width = (side * 5 // 4 for side in spec.size)
    pictures = [preprocess(scenes.render(scene, width, height), spec) for scene in scenes.scenes(SEED, count)]
    return stack([f"scene-{i:06d}" for i in range(count)], pictures)


def label_names() -> list[str]:
    """The label set of the demo: every colour with every shape."""
    return [f"{colour} {shape}" for colour in scenes.COLOURS for shape in scenes.SHAPES]


def with_scenes(config: Config, manifest: Path) -> Config:
    """Return the config with a manifest that :func:`render_folder` wrote."""
    values = {"path": str(manifest), "id": "id", "image": "path", "keep": [TRUTH], "root": None}
    return config.changed({f"manifest.{name}": value for name, value in values.items()})


def prompts_of(config: Config) -> PromptsConfig:
    """The prompts of a config; for the demo model with the demo's labels, if the config has none."""
    prompts = config.prompts
    if not prompts.labels and prompts.path is None and config.model.name == DEMO_MODEL:
        return dataclasses.replace(prompts, labels=label_names())
    return prompts


def accuracy(folder: str, parts: Sequence[str]) -> float:
    """Share of the rows whose label is the scene's true one."""
    hits = total = 0
    for label, truth in _pairs(folder, parts):
        hits += label == truth
        total += 1
    return hits / total if total else 0.0


def _pairs(folder: str, parts: Sequence[str]) -> Iterator[tuple[str | None, str]]:
    for part in parts:
        with open_arrow(f"{folder}/{part}") as file:
            table = pq.ParquetFile(file).read(columns=["label", TRUTH])
        yield from zip(table["label"].to_pylist(), table[TRUTH].to_pylist(), strict=True)
