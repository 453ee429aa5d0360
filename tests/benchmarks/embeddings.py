"""Bytes and recall of stored embeddings: ``python -m tests.benchmarks.embeddings DATASET --out FILE.md``.

DATASET is a finished one in float32, such as that of ``python -m pipeline.run manifest.demo_scenes=10000
output.dir=outputs/scenes``. Its rows are written in every form by the code of a job, and the table compares what is
read from there with float32: the ten nearest rows of 2,000 rows and of every label text, the best label as a
relabelling would give it, and the values of a head of random weights.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.core.machine import machine, versions
from pipeline.core.processes import cores
from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.dataset.parts import part_format, write_part
from pipeline.dataset.vectors import VectorFormat, cut
from pipeline.engine.query import config_of_dataset, labels_of, open_model
from pipeline.models.text import build_bank

FORMS = ("float32", "float16", "int8", "binary")
QUERIES, NEIGHBOURS, TIE = 2000, 10, 1e-6
Rows = NDArray[np.float32]
COLUMNS = (
    *("output.dtype", "output.dims", "bytes of an embedding", "in Parquet", "in Parquet, output.vector=list"),
    *("bytes of a row in Parquet", "recall@10 of rows", "recall@10 of texts", "same best label"),
    "largest error of a head",
)
HEAD = f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}"


def main() -> None:
    """Measure every form, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="a finished dataset in float32")
    parser.add_argument("--out", type=Path, required=True, help="the page, in Markdown")
    options = parser.parse_args()
    dataset = open_dataset(options.dataset)
    config = config_of_dataset(dataset)
    bank = build_bank(open_model(dataset, config.model), labels_of(config), config.prompts, config.labels)
    whole = np.concatenate([dataset.form.load(table["embedding"])[0] for table in dataset.stream(["embedding"])])
    lines = []
    for dims in (dataset.dim, dataset.dim // 2):
        for dtype in FORMS:
            form = VectorFormat(dtype, dims)
            column, rows = _size(dataset, form)
            listed, _ = _size(dataset, replace(form, fixed=False))
            sizes = [str(form.size), *(f"{size:.1f}" for size in (column, listed, rows))]
            figures = _compared(whole, form.decode(form.encode(whole)), bank.features)
            lines.append(f"| {' | '.join([dtype, str(dims), *sizes, *figures])} |")
            print(lines[-1], flush=True)
    options.out.write_text(_page(dataset, lines))
    print(options.out)


def _size(dataset: Dataset, vectors: VectorFormat) -> tuple[float, float]:
    """Bytes of a row in Parquet: of its embedding, and of all columns."""
    output = {"dtype": vectors.dtype, "dim": vectors.dim, "vector": "fixed" if vectors.fixed else "list"}
    form = part_format(
        pa.schema([dataset.schema.field(name) for name in (dataset.id, *dataset.kept)]),
        dim=vectors.dim,
        dtype=vectors.dtype,
        compression=str(dataset.plan.fingerprints["output"]["compression"]),
        fingerprints={**dataset.plan.fingerprints, "output": output},
    )
    place, sizes = form.schema.get_field_index("embedding"), Counter[str]()
    for commit in dataset.commits:
        table = dataset.read(commit, dataset.schema.names)
        found, rows = dataset.form.load(table["embedding"])
        failed, stored = np.ones(commit.rows, bool), np.zeros((commit.rows, vectors.width), vectors.element)
        failed[rows], stored[rows] = False, vectors.encode(found)
        made = table.set_column(place, form.schema.field(place), vectors.column(stored, failed)).cast(form.schema)
        with tempfile.NamedTemporaryFile(suffix=".parquet") as file:
            write_part(made, Path(file.name), form)
            group = pq.ParquetFile(file.name).metadata.row_group(0)
            for chunk in map(group.column, range(group.num_columns)):
                sizes[chunk.path_in_schema.split(".")[0]] += chunk.total_compressed_size
    return sizes["embedding"] / dataset.plan.rows, sizes.total() / dataset.plan.rows


def _compared(whole: Rows, stored: Rows, texts: Rows) -> list[str]:
    queries = np.linspace(0, len(whole) - 1, QUERIES).astype(int)
    head = np.random.default_rng(0).normal(size=whole.shape[1])
    rows = _recall(whole[queries] @ whole.T, stored[queries] @ stored.T, queries)
    words = cut(texts, stored.shape[1])
    found = _recall(texts @ whole.T, words @ stored.T)
    same = np.mean((whole @ texts.T).argmax(axis=1) == (stored @ words.T).argmax(axis=1))
    if stored.shape[1] == whole.shape[1]:
        true, rough = whole @ head, stored @ head
        error = f"{np.abs(true - rough).max() / true.std():.3f}"
    else:
        error = "another head"
    return [f"{rows:.4f}", f"{found:.4f}", f"{same:.4f}", error]


def _recall(true: Rows, rough: Rows, itself: NDArray[np.int_] | None = None) -> float:
    """The share of the nearest rows by ``rough`` that are among those by ``true``, each ``[queries, rows]``."""
    if itself is not None:
        for each in (true, rough):
            each[np.arange(len(itself)), itself] = -2
    least = np.partition(true, -NEIGHBOURS, axis=1)[:, -NEIGHBOURS, None]
    nearest = np.argsort(-rough, axis=1, kind="stable")[:, :NEIGHBOURS]
    return float((np.take_along_axis(true, nearest, axis=1) >= least - TIE).mean())


def _page(dataset: Dataset, lines: list[str]) -> str:
    known, about = versions(), machine("cpu", cores())
    names = ", ".join(f"{name} {known[name]}" for name in ("python", "torch", "pyarrow", "numpy"))
    return f"""\
# Stored embeddings

- {dataset.vectors:,} embeddings of {dataset.dim} numbers, model {dataset.plan.about.get("model")}
- command: python -m tests.benchmarks.embeddings DATASET --out FILE.md
- machine: {about["processor"]}, {about["system"]}, {cores()} cores
- versions: {names}

{HEAD}
{chr(10).join(lines)}

Recall is the share of the ten nearest rows that are among the ten nearest by float32, of 2,000 rows and of the label
texts; rows as near as the tenth count. Of the demo's scenes about a hundred fit each text, nearly equally, and its
model was not trained for fewer numbers. The best label is the one that a relabelling gives; a job labels the model's
float32 embeddings, whatever it stores. The error of a head of random weights is in standard deviations of its value.
"""


if __name__ == "__main__":
    main()
