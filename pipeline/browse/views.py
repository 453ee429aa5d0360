"""The data of the templates: tiles, rows, labels, failures, groups and nights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.browse.collection import Collection
from pipeline.browse.measures import LabelCounts, Progress, confusion, count_labels
from pipeline.browse.opened import OpenedDataset, shown_columns
from pipeline.browse.selection import SIMILAR, Result, Selection
from pipeline.core.errors import ConfigError, PipelineError, StorageError
from pipeline.core.records import OK
from pipeline.report.load import report_of
from pipeline.report.nights import RUNS, read_nights

# Tiles that load at a time; groups, clusters and labels of a page; tiles of a group, and neighbours of a row.
TILES, GROUPS, LABELS, OF_GROUP, NEAR = 48, 10, 100, 8, 16
# Rows and columns of a table of confusion, and nights that are compared.
CONFUSED, NIGHTS = 15, 14
CHARACTERS = 300


@dataclass(frozen=True, slots=True)
class Tile:
    """A row in a grid; ``value`` is what orders the rows, in words."""

    row: int
    id: str
    label: str = ""
    score: float | None = None
    value: str = ""
    status: str = OK
    error: str = ""


def tiles(opened: OpenedDataset, rows: Sequence[int], values: Sequence[str] = ()) -> list[Tile]:
    """The tiles of some rows, whose thumbnails are begun."""
    dataset = opened.dataset
    found = dataset.rows(rows, shown_columns(dataset))
    opened.pictures.want({row: str(each[dataset.id]) for row, each in zip(rows, found, strict=True)})
    return [
        Tile(
            row=row,
            id=str(each[dataset.id]),
            label=each.get("label") or "",
            score=each.get("score"),
            value=values[place] if values else "",
            status=each["status"],
            error=each["error"] or "",
        )
        for place, (row, each) in enumerate(zip(rows, found, strict=True))
    ]


def listed(opened: OpenedDataset, selection: Selection, result: Result, start: int) -> list[Tile]:
    """The tiles of a result from place ``start`` on."""
    rows = result.rows[start : start + TILES].tolist()
    values: list[str] = []
    if result.values is not None and selection.order in (SIMILAR, "margin", "outlier"):
        name = {SIMILAR: "similarity", "margin": "margin", "outlier": "distance"}[selection.order]
        values = [f"{name} {value:.3f}" for value in result.values[start : start + TILES].tolist()]
    return tiles(opened, rows, values)


def row_of(opened: OpenedDataset, row: int) -> list[tuple[str, str]]:
    """The columns of a row and their values as text, without embeddings."""
    dataset = opened.dataset
    vectors = [name for name in ("embedding", "text_embedding") if name in dataset.schema.names]
    values = dataset.rows([row], [name for name in dataset.schema.names if name not in vectors])[0]
    shown = [(name, cell(value)) for name, value in values.items()]
    return [*shown, *((name, f"{dataset.dim} numbers, {dataset.form.dtype}") for name in vectors)]


def cell(value: Any) -> str:
    """A value as text, of which a long one is cut."""
    if isinstance(value, bytes):
        return f"{len(value):,} bytes"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | dict):
        value = json.dumps(value, ensure_ascii=False, default=str)
    text = "" if value is None else str(value)
    return text if len(text) <= CHARACTERS else f"{text[:CHARACTERS]}… ({len(text):,} characters)"


def best_labels(opened: OpenedDataset, row: int) -> list[tuple[str, float]]:
    """The labels of a row with their scores, best first; empty where there are none."""
    names = opened.dataset.schema.names
    if not {"top_labels", "top_scores"} <= {*names}:
        return []
    values = opened.dataset.rows([row], ["top_labels", "top_scores"])[0]
    return list(zip(values["top_labels"] or (), values["top_scores"] or (), strict=False))


def provenance(opened: OpenedDataset) -> list[tuple[str, str]]:
    """The facts that made a dataset: its address, model, backend, labels, manifest, run and versions."""
    dataset = opened.dataset
    prints = dataset.plan.fingerprints
    found = [("dataset", dataset.url), ("state", dataset.fingerprint["success"][:16])]
    found += [(name, cell(value)) for name, value in prints.items()]
    try:
        report = report_of(dataset.storage)
        found += [("run started", cell(report["started"])), ("versions", cell(report["versions"]))]
    except StorageError as error:
        found.append(("report", str(error)))
    return found


def failures(opened: OpenedDataset) -> dict[str, int]:
    """Failed rows by status, most frequent first."""
    counts: dict[str, int] = {}
    for commit in opened.dataset.commits:
        for status, rows in commit.counts.items():
            if status != OK:
                counts[status] = counts.get(status, 0) + rows
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def confused(opened: OpenedDataset, truth: str, progress: Progress) -> dict[str, Any]:
    """A table of labels by the values of a column, the most frequent of both, and the share of rows with equal ones."""
    found = confusion(opened.dataset, truth, progress)
    trues, labels = (_most(found, place) for place in (0, 1))
    names = [*trues[:CONFUSED]]
    # The diagonal is one, where both have the same names.
    columns = [*(name for name in names if name in labels), *(name for name in labels if name not in names)][:CONFUSED]
    right = sum(count for (true, label), count in found.items() if true is not None and true == label)
    known = sum(count for (true, _), count in found.items() if true is not None)
    return {
        "rows": [(name, [found.get((name, column), 0) for column in columns]) for name in names],
        "columns": columns,
        "most": max(found.values(), default=1),
        "right": right / known if known else None,
        "known": known,
        "left": len(trues) - len(names),
    }


def _most(found: Mapping[tuple[str | None, str | None], int], place: int) -> list[str]:
    sums: dict[str, int] = {}
    for pair, count in found.items():
        name = pair[place]
        if name is not None:
            sums[name] = sums.get(name, 0) + count
    return sorted(sums, key=lambda name: (-sums[name], name))


def groups_of(opened: OpenedDataset, kind: str, page: int) -> dict[str, Any]:
    """Groups of near duplicates, or clusters, ``GROUPS`` of them, each with its first tiles.

    Raises:
        ConfigError: there is no such analysis of the present state.
        StorageError: its file, or a part, cannot be read.
    """
    about, table = opened.analyses().get(kind), opened.analysis(kind)
    column = "group" if kind == "duplicates" else "cluster"
    counted = (
        table.group_by(column)
        .aggregate([([], "count_all")])
        .sort_by([("count_all", "descending"), (column, "ascending")])
    )
    some = counted.slice(page * GROUPS, GROUPS).to_pylist()
    parts, wanted = [], list[pa.Array]()
    for each in some:
        rows = table.filter(pc.equal(table[column], each[column]))
        first = ("similarity", "descending") if kind == "duplicates" else ("distance", "ascending")
        rows = rows.take(pc.sort_indices(rows, [first]))
        rows = rows.slice(0, OF_GROUP)
        parts.append((each, rows))
        wanted += rows[0].chunks
    places = opened.places(pa.concat_arrays(wanted)) if wanted else {}
    groups = []
    for each, rows in parts:
        measure = rows["similarity" if kind == "duplicates" else "distance"].to_pylist()
        there = [(places[id], value) for id, value in zip(rows[0].to_pylist(), measure, strict=True) if id in places]
        words = [f"{'similarity' if kind == 'duplicates' else 'distance'} {value:.3f}" for _, value in there]
        groups.append({
            "number": each[column],
            "count": each["count_all"],
            "tiles": tiles(opened, [row for row, _ in there], words),
            "kept": str(rows["kept_id"][0].as_py()) if kind == "duplicates" else "",
        })  # fmt: skip
    return {
        "groups": groups,
        "all": counted.num_rows,
        "about": about,
        "page": page,
        "pages": -(-counted.num_rows // GROUPS),
    }


def nights_of(collection: Collection, store: int, progress: Progress) -> list[dict[str, Any]]:
    """The nights of a store, newest first, the last ones with their distance from the night before.

    ``drift`` is the Jensen-Shannon distance of the shares of labels (Lin 1991; base 2, so at most 1), ``mean`` the mean
    score. Nights whose dataset cannot be opened have a ``problem``.

    Raises:
        NoDataset, StorageError: there is no table of nights.
    """
    runs = {str(night["date"]): night for night in read_nights(f"{collection.stores[store].rstrip('/')}/{RUNS}")}
    found, before = [], None
    entries = [entry for entry in collection.entries if entry.store == store]
    compared = entries[:NIGHTS]
    for done, entry in enumerate(reversed(entries), 1):
        night: dict[str, Any] = {"entry": entry, **runs.get(entry.name, {}), "drift": None, "mean": None, "problem": ""}
        if entry in compared:
            try:
                dataset = collection.open(entry.number).dataset
                if "label" in dataset.schema.names:
                    counts = count_labels(dataset, lambda done, total: None)
                    night["mean"] = counts.mean
                    night["drift"] = None if before is None else label_distance(before, counts)
                    before = counts
            except PipelineError as error:
                night["problem"] = str(error)
        found.append(night)
        progress(done, len(entries))
    return found[::-1]


def label_distance(one: LabelCounts, other: LabelCounts) -> float:
    """The Jensen-Shannon distance of the labels' shares in two datasets: from 0, equal, to 1, no label in both."""
    names = sorted({*one.counts, *other.counts})
    shares = np.array([[each.counts.get(name, 0) for name in names] for each in (one, other)], np.float64)
    sums = shares.sum(axis=1, keepdims=True)
    if not len(names) or not sums.all():
        return 0.0
    shares /= sums
    middle = shares.mean(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(shares > 0, shares * np.log2(shares / middle), 0)
    return float(np.sqrt(max(0.0, terms.sum(axis=1).mean())))


def message_of(error: Exception) -> str:
    """The message of an error on a page, which has no config that could have a problem."""
    if not isinstance(error, ConfigError):
        return str(error)
    return "; ".join(f"{each.key}: {each.allowed}" + f" ({each.hint})" * bool(each.hint) for each in error.problems)
