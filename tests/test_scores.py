from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from pipeline.report import scores
from pipeline.report.scores import BINS, Scores


def add(into: Scores, labels: list[str | None], values: list[float | None], start: int, cut: int = 7) -> None:
    ids = [f"id-{start + i}" for i in range(len(labels))]
    into.add(
        pa.chunked_array([ids[:cut], ids[cut:]], pa.string()),
        pa.chunked_array([labels[:cut], labels[cut:]], pa.string()),
        pa.chunked_array([values[:cut], values[cut:]], pa.float32()),
        start=start,
    )


def test_the_ends_are_those_of_the_sorted_rows() -> None:
    chance = np.random.default_rng(3)
    rows = [
        (None, None) if chance.random() < 0.1 else (f"label {chance.integers(6)}", round(float(chance.random()), 2))
        for _ in range(3000)
    ]
    found = Scores(keep=4)
    for start in range(0, 3000, 100):
        part = rows[start : start + 100]
        add(found, [label for label, _ in part], [value for _, value in part], start)
    labelled = [(label, np.float32(score).item(), n) for n, (label, score) in enumerate(rows) if label is not None]
    assert sum(found.histogram) == len(labelled) == sum(found.labels.values())
    assert list(found.labels.values()) == sorted(found.labels.values(), reverse=True)
    for ends in found.extremes(6):
        own = [(score, n) for label, score, n in labelled if label == ends.label]
        # Of equal scores the first rows.
        most = sorted(own, key=lambda pair: (-pair[0], pair[1]))[:4]
        least = sorted(own)[:4]
        assert [(row.score, row.number) for row in ends.most] == most
        assert [(row.score, row.number) for row in ends.least] == least
        assert [row.id for row in ends.most] == [f"id-{n}" for _, n in most]
        assert ends.count == len(own)
    assert [row.number for row in found.least_certain(3)] == [n for _, n in sorted((s, n) for _, s, n in labelled)[:3]]


def test_a_label_with_few_rows_shows_none_twice() -> None:
    found = Scores(keep=3)
    add(found, ["cat", "dog", "cat", None], [0.9, 0.5, 0.1, None], 0)
    cat, dog = found.extremes(5)
    assert ([row.number for row in cat.most], cat.least) == ([0, 2], ())
    assert [row.number for row in dog.most] == [1]


def test_scores_beyond_the_range_and_none_at_all_do_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = Scores(keep=2)
    add(empty, [None, None], [None, None], 0)
    assert (empty.histogram, empty.labels, empty.extremes(3), empty.least_certain(2)) == ((), {}, (), ())
    found = Scores(keep=2)
    # A threshold leaves rows with a score and no label.
    add(found, ["a", None, "a"], [1.0000001, 0.25, float("nan")], 0)
    assert (found.histogram[-1], found.histogram[BINS // 4]) == (1, 1)
    assert [row.number for row in found.extremes(1)[0].most] == [0]
    monkeypatch.setattr(scores, "MOST_LABELS", 2)
    crowded = Scores(keep=1)
    add(crowded, ["a", "b", "c", "c"], [0.1, 0.2, 0.3, 0.4], 0)
    assert crowded.labels == {"c": 2, "a": 1, "b": 1}
    assert [ends.label for ends in crowded.extremes(3)] == ["a", "b"]
