"""A selection of rows: a query, conditions on columns, and an order; read from the parameters of an address."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from urllib.parse import urlencode

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.browse.cached import CachedDataset
from pipeline.browse.conditions import Condition, blank, matches, problems_of
from pipeline.browse.measures import BINS, Progress, floats, label_means, margins, to_means
from pipeline.core.errors import ConfigError, Problem
from pipeline.dataset.commits import Commit
from pipeline.dataset.dataset import Dataset
from pipeline.dataset.search import Found, best, merge, products
from pipeline.dataset.vectors import vectors_of

ROW, SIMILAR, OUTLIER = "row", "similar", "outlier"
ORDERS = {
    ROW: "as in the dataset",
    SIMILAR: "most similar first",
    "score": "most certain first",
    "-score": "least certain first",
    "margin": "closest two labels first",
    OUTLIER: "least like its label first",
}
# Rows of a selection that are listed, in an order other than the dataset's, and in that one.
MOST, MOST_IN_ORDER = 5_000, 200_000


@dataclass(frozen=True, slots=True)
class Selection:
    """Rows of a dataset.

    Attributes:
        text: what the images should show; empty for none.
        minus: what they should not show.
        like: the number of a row that they should look like.
        image: the key of an uploaded picture that they should look like.
        group: ``KIND:NUMBER`` of an analysis beside the dataset, such as ``clusters:7``.
        exact: search without the index.
    """

    text: str = ""
    minus: str = ""
    like: int | None = None
    image: str = ""
    group: str = ""
    conditions: tuple[Condition, ...] = ()
    order: str = ROW
    exact: bool = False

    @classmethod
    def parse(cls, pairs: Iterable[tuple[str, str]], dataset: Dataset) -> Selection:
        """The selection that the parameters of an address name.

        Raises:
            ConfigError: a column, an operator, a value or an order that there is not.
        """
        given: dict[str, list[str]] = {}
        for name, value in pairs:
            given.setdefault(name, []).append(value)
        first = {name: values[0].strip() for name, values in given.items()}
        columns, operators, values = (given.get(name, []) for name in ("column", "op", "value"))
        values += [""] * (len(columns) - len(values))
        operators += ["is"] * (len(columns) - len(operators))
        lines = (Condition(*each) for each in zip(columns, operators, values, strict=False))
        conditions = tuple(each for each in lines if not blank(each, dataset))
        problems = [problem for each in conditions for problem in problems_of(each, dataset)]
        like = first.get("like", "")
        if like and not (like.isdecimal() and len(like) < 19 and int(like) < dataset.plan.rows):
            problems.append(Problem("like", like, f"must be a row from 0 to {dataset.plan.rows - 1:,}"))
        made = cls(
            text=first.get("q", ""),
            minus=first.get("minus", ""),
            like=int(like) if like and not problems else None,
            image=first.get("image", ""),
            group=first.get("group", ""),
            conditions=conditions,
            order=first.get("sort", ""),
            exact=bool(first.get("exact")),
        )
        if made.order not in ORDERS or (made.order == SIMILAR and not made.asks):
            if made.order not in ("", *ORDERS):
                problems.append(Problem("sort", made.order, f"must be one of {', '.join(ORDERS)}"))
            made = replace(made, order=SIMILAR if made.asks else ROW)
        if made.order not in orders_of(dataset):
            problems.append(Problem("sort", made.order, "needs labels, which this dataset has not"))
        if problems:
            raise ConfigError(problems)
        return made

    @property
    def asks(self) -> bool:
        """True if it has a query, to which rows are similar."""
        return bool(self.text or self.minus or self.image or self.like is not None)

    @property
    def plain(self) -> bool:
        """True for all rows in their order."""
        return self == Selection()

    def pairs(self) -> list[tuple[str, str]]:
        """The parameters that make it; see :meth:`parse`."""
        given = {
            "q": self.text, "minus": self.minus, "like": "" if self.like is None else str(self.like),
            "image": self.image, "group": self.group, "exact": "1" if self.exact else "",
            "sort": "" if self.order == (SIMILAR if self.asks else ROW) else self.order,
        }  # fmt: skip
        found = [(name, value) for name, value in given.items() if value]
        for each in self.conditions:
            found += [("column", each.column), ("op", each.operator), ("value", each.value)]
        return found

    def address(self, **other: object) -> str:
        """The parameters as the query of an address, with others in addition."""
        return urlencode([*self.pairs(), *((name, str(value)) for name, value in other.items())])


@dataclass(frozen=True, slots=True)
class Result:
    """The rows of a selection.

    Attributes:
        rows: their numbers in the dataset, int64, in order; at most as many as are listed.
        values: what they are ordered by, float64; None in the order of the dataset.
        total: how many there are in all.
        histogram: of the scores of all of them, in :data:`BINS` equal steps from 0 to 1; empty where there are none.
        approximate: found by the index.
    """

    rows: NDArray[np.int64]
    values: NDArray[np.float64] | None
    total: int
    histogram: tuple[int, ...] = ()
    approximate: bool = False


def orders_of(dataset: Dataset) -> dict[str, str]:
    """The orders that a dataset has."""
    needs = {"score": "score", "-score": "score", "margin": "top_scores", OUTLIER: "label"}
    return {name: text for name, text in ORDERS.items() if needs.get(name, dataset.id) in dataset.schema.names}


def select(
    dataset: CachedDataset,
    selection: Selection,
    *,
    query: NDArray[np.float32] | None = None,
    ids: pa.Array | None = None,
    most: int = MOST_IN_ORDER,
    progress: Progress = lambda done, all: None,
) -> Result:
    """Read the dataset, a few parts at a time.

    Args:
        dataset: the dataset.
        selection: the selection.
        query: the vector of its query, float32 ``[D]``.
        ids: those of its group, of the type of the id column.
        most: rows that are listed in the order of the dataset.
        progress: gets the number of parts that were read, and of all.

    Raises:
        StorageError: a part is missing or damaged.
    """
    if selection.plain:
        rows = np.arange(min(dataset.plan.rows, most), dtype=np.int64)
        return Result(rows, None, dataset.plan.rows)
    means = label_means(dataset) if selection.order == OUTLIER else {}
    needed = [each.column for each in selection.conditions] + [dataset.id] * (ids is not None)
    needed += ["score"] * ("score" in dataset.schema.names)
    needed += {"margin": ["top_scores"], OUTLIER: [dataset.column, "label"]}.get(selection.order, [])
    needed += [dataset.column] * (query is not None)

    def of_part(commit: Commit, table: pa.Table) -> tuple[int, NDArray[np.int64], Found]:
        chosen = matches(table, selection.conditions)
        if ids is not None:
            chosen &= pc.is_in(table[dataset.id], value_set=ids).to_numpy(zero_copy_only=False)
        return _ordered(dataset, selection, table, chosen, int(dataset.starts[commit.shard]), query, means)

    columns = list(dict.fromkeys(needed)) or [dataset.id]
    in_order = selection.order == ROW
    total, histogram = 0, np.zeros(BINS, np.int64)
    found = [Found(np.zeros(0, np.int64), np.zeros(0))]
    with closing(dataset.each(of_part, columns)) as parts:
        for done, (count, scores, some) in enumerate(parts, 1):
            if not in_order:
                found = [merge([*found, some], MOST)]
            elif total < most:
                found.append(some)
            total, histogram = total + count, histogram + scores
            progress(done, len(dataset.commits))
    rows, values = (np.concatenate([getattr(each, name) for each in found]) for name in ("rows", "scores"))
    bars = tuple(histogram.tolist()) if histogram.any() else ()
    if in_order:
        return Result(rows[:most], None, total, bars)
    return Result(rows, -values if selection.order in ("-score", "margin") else values, total, bars)


def _ordered(
    dataset: CachedDataset,
    selection: Selection,
    table: pa.Table,
    chosen: NDArray[np.bool_],
    start: int,
    query: NDArray[np.float32] | None,
    means: Mapping[str | None, NDArray[np.float32]],
) -> tuple[int, NDArray[np.int64], Found]:
    """Rows of a part that match: how many, the histogram of their scores, and the first ones in order."""
    order = selection.order
    if order in (SIMILAR, OUTLIER):
        stored, rows = vectors_of(table[dataset.column], dataset.form.width)
        chosen = chosen & np.isin(np.arange(len(chosen)), rows, assume_unique=True)
        here = chosen[rows]
        stored, rows = (stored, rows) if here.all() else (stored[here], rows[here])
        if order == SIMILAR:
            assert query is not None
            rough = products(dataset.form, stored, query[None])[:, 0]
            first = best(dataset.form, stored, rows + start, rough, query, MOST)
        else:
            labels = table["label"].take(pa.array(rows))
            first = merge([Found(rows + start, 1 - to_means(dataset, stored, labels, means))], MOST)
    elif order == ROW:
        rows = np.flatnonzero(chosen)
        first = Found(rows + start, np.zeros(len(rows)))
    else:
        keys = -margins(table["top_scores"]) if order == "margin" else floats(table["score"])
        keys = -keys if order == "-score" else keys
        chosen = chosen & np.isfinite(keys)
        rows = np.flatnonzero(chosen)
        first = merge([Found(rows + start, keys[rows])], MOST)
    scores = floats(table["score"])[chosen] if "score" in table.column_names else np.zeros(0)
    bins = np.histogram(np.clip(scores[np.isfinite(scores)], 0, 1), bins=BINS, range=(0, 1))[0]
    return int(chosen.sum()), bins, first
