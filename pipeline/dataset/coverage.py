"""Samples of a dataset that cover its embeddings, in all or of each label.

``kmeans`` makes as many clusters as rows are wanted and takes the row nearest to each centre (spherical k-means,
Dhillon and Modha 2001): frequent kinds get more rows. ``kcenter`` takes the row that is farthest from all taken so far
(Gonzalez 1985): rare kinds and outliers get as many rows as others. ``random`` takes any.

K-means is trained on a part of the rows; then all are read once. Sums are in float64, cosines that are close are
compared in float64, and equal ones are taken in the order of rows: the number of threads does not change the sample,
nor does another machine, but for rounding. ``random`` is the same everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.core.errors import ConfigError, Problem
from pipeline.core.records import OK
from pipeline.dataset.analysis import writing
from pipeline.dataset.commits import Commit
from pipeline.dataset.dataset import Dataset
from pipeline.dataset.search import closest, normalised, take_rows

# Rows of a sample, at most.
MOST = 100_000
# Rows that k-means is trained on: so many in all, and for each cluster; and its rounds.
TRAINED, TRAINED_EACH, ROUNDS = 131_072, 64, 25
# It ends when fewer rows than this share change their cluster.
MOVED = 0.001
# Limits of kcenter: numbers in memory, and products of rows and taken rows.
NUMBERS, PRODUCTS = 1 << 30, 1_000_000_000
# Products in memory at a time.
AT_ONCE = 1 << 23
Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Choice:
    """The rows to choose: ``rows`` in all or, with ``per_label``, so many of each label, or all that it has."""

    method: str = "kmeans"
    rows: int = 1000
    per_label: int | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Sample:
    """A sample, and the clusters of all rows that have an embedding.

    Attributes:
        table: the rows of an analysis of kind ``sample``, see :mod:`pipeline.dataset.analysis`.
        rows: int64 ``[N]``, the numbers of the rows with an embedding.
        clusters: the cluster of each, int64 ``[N]``, and 1 - cosine with its centre, float32 ``[N]``; None for random.
        parameters: those of the choice.
        counts: ``rows``, ``left_out`` without an embedding, ``embeddings``, ``labels`` and ``sampled``.
    """

    table: pa.Table
    rows: Ints
    clusters: tuple[Ints, Floats] | None
    parameters: dict[str, Any]
    counts: dict[str, int]


@dataclass(frozen=True, slots=True)
class _Groups:
    """Rows with an embedding, int64 ``[N]``, the group of each, and how many are wanted of each group."""

    rows: Ints
    group: Ints
    wanted: Ints
    seed: int

    @property
    def starts(self) -> Ints:
        """The first cluster of each group, and the number of all."""
        return np.concatenate([[0], np.cumsum(self.wanted)])

    def each(self) -> Iterator[tuple[int, Ints, np.random.Generator]]:
        """The number of each group, its positions in ``rows``, and a generator of its own."""
        order = np.argsort(self.group, kind="stable")
        ends = np.cumsum(np.bincount(self.group, minlength=len(self.wanted)))
        for number, members in enumerate(np.split(order, ends[:-1])):
            yield number, members, np.random.default_rng([self.seed, number])

    def drawn(self, times: int) -> Ints:
        """Positions of random rows: of each group ``times`` as many as are wanted, or all; in the order of rows."""
        sizes = np.bincount(self.group, minlength=len(self.wanted))
        picked = [
            chance.choice(members, min(sizes[number], times * self.wanted[number]), replace=False)
            for number, members, chance in self.each()
        ]
        return np.sort(np.concatenate(picked))


def draw_sample(dataset: Dataset, choice: Choice) -> Sample:
    """Choose rows of a dataset.

    Memory: up to 131,072 embeddings with ``kmeans``, all with ``kcenter``, none with ``random``, and about 50 bytes for
    each row.

    Raises:
        ConfigError: there are fewer rows with an embedding than wanted, or too many for the method.
        StorageError: a part cannot be read.
    """
    groups = _groups(dataset, choice)
    clusters = None
    if choice.method == "random":
        picked = [
            chance.choice(members, groups.wanted[number], replace=False) for number, members, chance in groups.each()
        ]
        chosen = np.concatenate(picked)
    elif choice.method == "kcenter":
        chosen, clusters = _k_center(dataset, groups)
    else:
        clusters = _k_means(dataset, groups)
        chosen = _nearest_to_centres(groups, *clusters)
    chosen = np.sort(chosen)
    taken = take_rows(dataset, groups.rows[chosen], [dataset.id, "label"])
    none = [pa.nulls(len(chosen), kind) for kind in (pa.int32(), pa.float32(), pa.int64())]
    if clusters is not None:
        cluster, distance = clusters
        sizes = np.bincount(cluster)[cluster[chosen]]
        none = [pa.array(cluster[chosen], pa.int32()), pa.array(distance[chosen]), pa.array(sizes, pa.int64())]
    fields = [("cluster", pa.int32()), ("distance", pa.float32()), ("size", pa.int64())]
    schema = pa.schema([dataset.schema.field(dataset.id), ("label", pa.string()), *fields])
    counts = {
        "rows": dataset.plan.rows,
        "left_out": dataset.plan.rows - len(groups.rows),
        "embeddings": len(groups.rows),
        "labels": len(groups.wanted) if choice.per_label else 0,
        "sampled": len(chosen),
    }
    number = {"rows": choice.rows} if choice.per_label is None else {"per_label": choice.per_label}
    return Sample(
        table=pa.table([*taken.columns, *none], schema=schema),
        rows=groups.rows,
        clusters=clusters,
        parameters={"method": choice.method, **number, "seed": choice.seed},
        counts=counts,
    )


def write_clusters(dataset: Dataset, sample: Sample, url: str) -> None:
    """Write the analysis of kind ``clusters``, a part of the dataset at a time.

    Raises:
        StorageError: it cannot be written.
    """
    assert sample.clusters is not None
    cluster, distance = sample.clusters
    fields = [("cluster", pa.int32()), ("distance", pa.float32())]
    schema = pa.schema([dataset.schema.field(dataset.id), *fields])

    def rows_of(commit: Commit, table: pa.Table) -> pa.Table:
        first = dataset.starts[commit.shard]
        here = slice(*np.searchsorted(sample.rows, [first, first + commit.rows]))
        ids = table[dataset.id].take(pa.array(sample.rows[here] - first))
        return pa.table([ids, pa.array(cluster[here], pa.int32()), pa.array(distance[here])], schema=schema)

    with (
        writing(url, "clusters", dataset, schema, parameters=sample.parameters, counts=sample.counts) as writer,
        closing(dataset.each(rows_of, [dataset.id])) as tables,
    ):
        for table in tables:
            writer.write_table(table)


def _groups(dataset: Dataset, choice: Choice) -> _Groups:
    """Read statuses and labels, and check how many rows are wanted."""

    def look(commit: Commit, table: pa.Table) -> tuple[Ints, pa.ChunkedArray]:
        there = np.flatnonzero(pc.equal(table["status"], OK).to_numpy())
        return there + dataset.starts[commit.shard], table["label"].take(pa.array(there))

    numbers, labels = zip(*dataset.each(look, ["status", "label"]), strict=True)
    rows = np.concatenate(numbers)
    group, wanted = np.zeros(len(rows), np.int64), np.array([choice.rows])
    if choice.per_label is not None:
        column = pa.chunked_array([chunk for each in labels for chunk in each.chunks], pa.string())
        # Rows without a label are the last group.
        names = pa.array([*sorted(column.unique().drop_null().to_pylist()), None], pa.string())
        group = pc.index_in(column, value_set=names).to_numpy()
        group = np.unique(group, return_inverse=True)[1]
        wanted = np.minimum(np.bincount(group), choice.per_label)
    total, asked = int(wanted.sum()), choice.rows if choice.per_label is None else choice.per_label
    option = "--rows" if choice.per_label is None else "--per-label"
    if asked < 1 or not 1 <= total <= min(len(rows), MOST):
        allowed = f"must give 1 to {min(len(rows), MOST):,} rows; {len(rows):,} have an embedding"
        raise ConfigError([Problem(option, asked, allowed)])
    return _Groups(rows, group, wanted, choice.seed)


def _unit(dataset: Dataset, rows: Ints) -> Floats:
    """The embeddings of some rows, in their order, float32 ``[N, D]`` of length 1."""
    return normalised(dataset.form.load(take_rows(dataset, rows, [dataset.column])[dataset.column])[0])


def _k_center(dataset: Dataset, groups: _Groups) -> tuple[Ints, tuple[Ints, Floats]]:
    sizes = np.bincount(groups.group, minlength=len(groups.wanted))
    numbers, products = len(groups.rows) * dataset.dim, int(sizes @ groups.wanted)
    if numbers > NUMBERS or products > PRODUCTS:
        allowed = (
            f"takes {len(groups.rows):,} embeddings of {dataset.dim} numbers into memory, and compares rows "
            f"{products:,} times; the limits are {NUMBERS:,} numbers and {PRODUCTS:,} times"
        )
        raise ConfigError([Problem("--method", "kcenter", allowed, "take kmeans")])
    vectors = _unit(dataset, groups.rows)
    chosen, cluster, cosines = [], np.zeros(len(vectors), np.int64), np.full(len(vectors), -2, np.float32)
    for number, members, chance in groups.each():
        unit, best = vectors[members], np.full(len(members), -2, np.float32)
        new = int(chance.integers(len(members)))
        for place in range(groups.starts[number], groups.starts[number + 1]):
            if place > groups.starts[number]:
                new = int(np.argmin(best))
            found = unit @ unit[new]
            closer = found > best
            cluster[members[closer]], best[closer] = place, found[closer]
            # It is its own centre, and not taken again.
            cluster[members[new]], best[new] = place, 2
            chosen.append(members[new])
        cosines[members] = np.minimum(best, 1)
    return np.array(chosen), (cluster, 1 - cosines)


def _k_means(dataset: Dataset, groups: _Groups) -> tuple[Ints, Floats]:
    """Train on a part of the rows, then read all of them: the cluster of each, and its distance from the centre."""
    each, starts = max(2, min(TRAINED_EACH, TRAINED // int(groups.wanted.sum()))), groups.starts
    drawn = groups.drawn(each)
    points, group = _unit(dataset, groups.rows[drawn]), groups.group[drawn]
    centres = np.concatenate(
        [_centres(points[group == number], groups.wanted[number], chance) for number, _, chance in groups.each()]
    )
    cluster, cosines = np.zeros(len(groups.rows), np.int64), np.zeros(len(groups.rows), np.float32)

    def assign(commit: Commit, table: pa.Table) -> None:
        vectors, rows = dataset.form.load(table[dataset.column])
        places = np.searchsorted(groups.rows, rows + dataset.starts[commit.shard])
        unit, group = normalised(vectors), groups.group[places]
        for number in np.unique(group).tolist():
            here = np.flatnonzero(group == number)
            found, values = _assigned(unit[here], centres[starts[number] : starts[number + 1]])
            cluster[places[here]], cosines[places[here]] = found + starts[number], values

    with closing(dataset.each(assign, [dataset.column])) as parts:
        for _ in parts:
            continue
    return cluster, 1 - cosines


def _centres(points: Floats, count: int, chance: np.random.Generator) -> Floats:
    """The centres ``[count, D]`` of clusters of points ``[N, D]``, by Lloyd's iteration."""
    centres = points[np.sort(chance.choice(len(points), count, replace=False))]
    before = np.full(len(points), -1)
    for _ in range(ROUNDS):
        cluster, cosines = _assigned(points, centres)
        if np.count_nonzero(cluster != before) <= MOVED * len(points):
            break
        before, order = cluster, np.argsort(cluster, kind="stable")
        filled, first = np.unique(cluster[order], return_index=True)
        centres[filled] = normalised(np.add.reduceat(points[order], first, axis=0, dtype=np.float64))
        # A cluster that lost its points gets one that is far from its own centre.
        empty = np.setdiff1d(np.arange(count), filled)
        centres[empty] = points[np.argsort(cosines, kind="stable")[: len(empty)]]
    return centres


def _assigned(unit: Floats, centres: Floats) -> tuple[Ints, Floats]:
    """The nearest centre of each row, and the cosine with it."""
    step = max(1, AT_ONCE // len(centres))
    found = [closest(unit[start : start + step], centres) for start in range(0, len(unit), step)]
    return np.concatenate([each[0] for each in found]), np.concatenate([each[1] for each in found])


def _nearest_to_centres(groups: _Groups, cluster: Ints, distance: Floats) -> Ints:
    """The row nearest to each centre; for clusters without rows, those farthest from their centres."""
    order = np.lexsort((distance, cluster))
    nearest = order[np.unique(cluster[order], return_index=True)[1]]
    missing = groups.wanted - np.bincount(groups.group[nearest], minlength=len(groups.wanted))
    more = []
    for number in np.flatnonzero(missing).tolist():
        others = np.setdiff1d(np.flatnonzero(groups.group == number), nearest)
        more.append(others[np.argsort(-distance[others], kind="stable")[: missing[number]]])
    return np.concatenate([nearest, *more])
