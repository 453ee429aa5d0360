"""The page over datasets: what it selects equals brute force, what it shows is text, and only its owner sees it."""

from __future__ import annotations

import io
import json
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

pytest.importorskip("uvicorn", reason="needs the extra serve")
pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("python_multipart", reason="needs the extra serve")

from pipeline.browse.__main__ import main
from pipeline.browse.cached import CachedDataset, Memory
from pipeline.browse.collection import Collection
from pipeline.browse.conditions import Condition, matches
from pipeline.browse.exports import command_of
from pipeline.browse.measures import count_labels, margins
from pipeline.browse.opened import OpenedDataset
from pipeline.browse.points import points_of
from pipeline.browse.selection import MOST, Result, Selection, select
from pipeline.browse.views import label_distance, nights_of
from pipeline.browse.works import KEPT, Works
from pipeline.core.errors import ConfigError, NoDataset, StorageError
from pipeline.dataset.analysis import analysis_url, writing
from pipeline.dataset.dataset import open_dataset
from pipeline.dataset.index import build_index
from tests.finished import everything, run_scenes, write_vectors
from tests.jobs import scenes_manifest
from tests.nights import Collection as Photos
from tests.nights import night
from tests.sites import Site, sites

ROWS, DIM = 230, 16
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"


def silent(done: int, total: int) -> None:
    """A progress that nobody watches."""


def unit(rows: int, seed: int, dim: int = DIM) -> np.ndarray:
    drawn = np.random.default_rng(seed).normal(size=(rows, dim)).astype(np.float32)
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


def vectors_dataset(url: str, *, seed: int = 0, dtype: str = "float32", rows: int = ROWS) -> CachedDataset:
    """A dataset of random vectors, of which some failed, with labels, scores and columns of several types."""
    dice = np.random.default_rng(seed)
    drawn = unit(rows, seed)
    drawn[dice.random(rows) < 0.1] = np.nan
    scores = dice.random(rows).astype(np.float32)
    second = scores * dice.random(rows).astype(np.float32)
    names = np.array(["cat", "dog", HOSTILE, "Ü ö/&?#", None], dtype=object)
    made = write_vectors(
        url, drawn, dtype=dtype, shard_rows=50,
        label=dice.choice(names, rows).tolist(), score=scores, top_labels=[["a", "b"]] * rows,
        top_scores=[[float(one), float(other)] for one, other in zip(scores, second, strict=True)],
        width=pa.array(dice.integers(0, 20, rows), mask=dice.random(rows) < 0.2),
        ratio=dice.normal(size=rows), flag=dice.random(rows) < 0.5,
        day=pa.array([None if dice.random() < 0.1 else f"2026-01-{1 + number % 28:02d}" for number in range(rows)]),
        taken=pa.array(dice.integers(0, 2**40, rows), pa.timestamp("ms")),
        kind=pa.array(dice.choice(["jpeg", "png"], rows)).dictionary_encode(),
        nested=[{"a": 1}] * rows,
    )  # fmt: skip
    return CachedDataset.of(made, Memory(1 << 24))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> CachedDataset:
    return vectors_dataset(str(tmp_path_factory.mktemp("browse") / "vectors"))


def found(dataset: CachedDataset, query: str, vector: np.ndarray | None = None) -> Result:
    from urllib.parse import parse_qsl

    return select(dataset, Selection.parse(parse_qsl(query, keep_blank_values=True), dataset), query=vector)


# --- what is selected ---


CONDITIONS = {
    "label is": (Condition("label", "is", "cat"), lambda t: t["label"] == "cat"),
    "label is not": (Condition("label", "not", "cat"), lambda t: t["label"] != "cat"),
    "label is markup": (Condition("label", "is", HOSTILE), lambda t: t["label"] == HOSTILE),
    "label contains": (Condition("label", "has", "AT"), lambda t: t["label"].fillna("").str.contains("at")),
    "contains is no pattern": (Condition("label", "has", "t(1"), lambda t: t["label"] == HOSTILE),
    "label is empty": (Condition("label", "null"), lambda t: t["label"].isna()),
    "score below": (Condition("score", "lt", "0.5"), lambda t: t["score"] < 0.5),
    "score from": (Condition("score", "ge", "0.25"), lambda t: t["score"] >= 0.25),
    "width is": (Condition("width", "is", "7"), lambda t: t["width"] == 7),
    "width is not": (Condition("width", "not", "7"), lambda t: t["width"] != 7),
    "width above": (Condition("width", "gt", "10"), lambda t: t["width"] > 10),
    "width is not empty": (Condition("width", "some"), lambda t: t["width"].notna()),
    "width contains": (Condition("width", "has", "1"), lambda t: t["width"].map("{:.0f}".format).str.contains("1")),
    "flag is": (Condition("flag", "is", "true"), lambda t: t["flag"]),
    "kind of a dictionary": (Condition("kind", "is", "png"), lambda t: t["kind"] == "png"),
    "day up to": (Condition("day", "le", "2026-01-09"), lambda t: t["day"].fillna("9") <= "2026-01-09"),
    "time after": (Condition("taken", "gt", "1990-01-01"), lambda t: t["taken"] > pd.Timestamp("1990-01-01")),
    "status is": (Condition("status", "is", "ok"), lambda t: t["status"] == "ok"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONDITIONS)
def test_a_condition_is_met_by_the_rows_that_pandas_finds(dataset: CachedDataset, name: str) -> None:
    condition, wanted = CONDITIONS[name]
    table = everything(dataset)
    frame = table.drop_columns(["nested"]).to_pandas()
    mask = np.asarray(wanted(frame).fillna(False), bool)
    assert 0 < mask.sum() < len(mask)
    assert (matches(table, [condition]) == mask).all()
    query = urlencode({"column": condition.column, "op": condition.operator, "value": condition.value})
    result = found(dataset, query)
    assert result.rows.tolist() == np.flatnonzero(mask).tolist()
    assert result.total == mask.sum()
    scores = frame["score"][mask].dropna()
    assert sum(result.histogram) == len(scores)


def test_rows_meet_every_condition_and_keep_the_order_of_the_form(dataset: CachedDataset) -> None:
    query = "column=width&op=gt&value=5&column=&op=is&value=&column=score&op=lt&value=0.8&column=label&op=null&value="
    frame = everything(dataset).drop_columns(["nested"]).to_pandas()
    mask = (frame["width"] > 5) & (frame["score"] < 0.8) & frame["label"].isna()
    assert found(dataset, query).rows.tolist() == np.flatnonzero(mask).tolist()
    selection = Selection.parse([("column", "width"), ("op", "gt"), ("value", "20")], dataset)
    assert Selection.parse(selection.pairs(), dataset) == selection


@pytest.mark.parametrize(
    ("query", "key"),
    [
        ("column=nobody&op=is&value=1", "column"),
        ("column=embedding&op=is&value=1", "column"),
        ("column=nested&op=is&value=1", "column"),
        ("column=width&op=like&value=1", "op"),
        ("column=width&op=lt&value=wide", "value of width"),
        ("column=taken&op=lt&value=yesterday", "value of taken"),
        ("column=flag&op=is&value=maybe", "value of flag"),
        ("column=width&op=is&value=99999999999999999999999", "value of width"),
        ("like=230", "like"),
        ("like=-1", "like"),
        ("like=1e3", "like"),
        ("sort=name", "sort"),
        ("sort=1;drop table", "sort"),
    ],
)
def test_a_selection_that_cannot_be_is_refused_by_name(dataset: CachedDataset, query: str, key: str) -> None:
    with pytest.raises(ConfigError) as error:
        found(dataset, query)
    assert [each.key for each in error.value.problems] == [key]


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize("condition", ["", "&column=label&op=is&value=cat"])
def test_similar_rows_are_those_of_brute_force(tmp_path: Path, dtype: str, condition: str) -> None:
    made = vectors_dataset(str(tmp_path / "d"), seed=3, dtype=dtype)
    table = everything(made)
    vectors = np.stack([
        np.full(DIM, np.nan) if row is None else made.form.decode(np.asarray(row, made.dtype)[None])[0]
        for row in table["embedding"].to_pylist()
    ])  # fmt: skip
    query = unit(1, 99)[0]
    cosines = vectors.astype(np.float64) @ query
    mask = np.isfinite(cosines) & ((np.array(table["label"].to_pylist()) == "cat") if condition else True)
    wanted = np.flatnonzero(mask)[np.argsort(-cosines[mask], kind="stable")]
    result = found(made, f"like=0{condition}", query)
    assert result.rows.tolist() == wanted.tolist()
    assert result.values is not None
    np.testing.assert_allclose(result.values, cosines[wanted], atol=1e-6)
    assert result.total == len(wanted)


@pytest.mark.parametrize("seed", range(3))
def test_rows_are_ordered_by_certainty_margin_and_distance(tmp_path: Path, seed: int) -> None:
    made = vectors_dataset(str(tmp_path / "d"), seed=seed)
    frame = everything(made).drop_columns(["nested"]).to_pandas()
    best = found(made, "sort=score").rows
    assert best.tolist() == frame["score"].sort_values(ascending=False, kind="stable").index.tolist()
    assert found(made, "sort=-score").rows.tolist() == frame["score"].sort_values(kind="stable").index.tolist()
    margin = frame["top_scores"].map(lambda pair: pair[0] - pair[1])
    result = found(made, "sort=margin")
    np.testing.assert_allclose(result.values, np.sort(margin), atol=1e-6)
    good = frame[frame["embedding"].notna()]
    matrix = np.stack(good["embedding"].tolist()).astype(np.float64)
    distance = pd.Series(0.0, good.index)
    for label in good["label"].unique():
        none = pd.isna(label)
        mine = (good["label"].isna() if none else good["label"] == label).to_numpy()
        # Rows without a label are compared with all rows.
        mean = matrix.mean(axis=0) if none else matrix[mine].mean(axis=0)
        distance[mine] = 1 - matrix[mine] @ (mean / np.linalg.norm(mean))
    result = found(made, "sort=outlier")
    assert result.values is not None
    np.testing.assert_allclose(result.values, np.sort(distance)[::-1], atol=1e-5)
    assert result.total == len(good)


def test_margins_need_two_scores() -> None:
    lists = pa.chunked_array([[[0.9, 0.05], [0.7], None], [[], [0.5, 0.5, 0.1]]], pa.list_(pa.float32()))
    np.testing.assert_allclose(margins(lists), [0.85, np.nan, np.nan, np.nan, 0.0], atol=1e-6)
    assert np.isnan(margins(pa.chunked_array([pa.nulls(3, pa.list_(pa.float32()))]))).all()


def test_a_long_result_lists_the_first_rows_and_counts_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = vectors_dataset(str(tmp_path / "d"))
    monkeypatch.setattr("pipeline.browse.selection.MOST", 20)
    everywhere = found(made, "sort=score&column=width&op=some")
    assert (len(everywhere.rows), everywhere.total) == (20, sum(everywhere.histogram))
    assert MOST > 1000
    few = select(made, Selection(conditions=(Condition("width", "some"),)), most=7)
    assert len(few.rows) == 7
    assert few.total == everywhere.total


@pytest.mark.parametrize("limit", [0, 2_000, 20_000, 1 << 24])
def test_rows_are_read_right_with_any_memory(tmp_path: Path, limit: int) -> None:
    made = vectors_dataset(str(tmp_path / "d"))
    table, memory = everything(made), Memory(limit)
    held = CachedDataset.of(open_dataset(str(tmp_path / "d")), memory)
    dice = np.random.default_rng(limit)
    for _ in range(4):
        numbers = dice.integers(0, ROWS, 9).tolist()
        assert (
            held.rows(numbers, ["id", "width", "kind"])
            == table.select(["id", "width", "kind"]).take(numbers).to_pylist()
        )
        assert pa.concat_tables(held.stream(["id", "score"])).equals(table.select(["id", "score"]))
        assert memory.bytes <= limit


def test_a_column_larger_than_the_memory_does_not_push_itself_out() -> None:
    memory = Memory(10)
    for part in range(4):
        memory.put(part, part, 4, kind="column")
    assert [memory.get(part) for part in range(4)] == [0, 1, None, None]
    memory.put("other", 1, 4, kind="second")
    assert memory.get("other") == 1
    assert memory.bytes <= 10


def test_labels_are_counted(dataset: CachedDataset) -> None:
    frame = everything(dataset).drop_columns(["nested"]).to_pandas()
    counts = count_labels(dataset, silent)
    assert counts.counts == frame["label"].value_counts().to_dict()
    assert counts.mean == pytest.approx(frame["score"].mean())
    assert sum(counts.histogram) == frame["score"].notna().sum()
    for name, histogram in counts.histograms.items():
        wanted = np.histogram(frame["score"][frame["label"] == name], bins=40, range=(0, 1))[0]
        assert histogram == tuple(wanted)
    assert label_distance(counts, counts) == 0
    apart = replace(counts, counts={"other": 3})
    assert label_distance(counts, apart) == pytest.approx(1)


def test_the_map_holds_rows_of_the_dataset(dataset: CachedDataset) -> None:
    points = points_of(dataset, silent)
    table = everything(dataset)
    good = [row for row, vector in enumerate(table["embedding"].to_pylist()) if vector is not None]
    assert points["rows"] == good
    assert {min(points["x"]), max(points["x"]), min(points["y"]), max(points["y"])} == {0, 1000}
    labels = table["label"].to_pylist()
    for row, code in zip(points["rows"], points["label"], strict=True):
        assert points["names"][code] == (labels[row] or "no label")


def test_a_failed_work_begins_anew_and_a_finished_one_does_not() -> None:
    works, calls = Works(), list[int]()

    def work(progress: Any) -> int:
        calls.append(1)
        progress(1, 2)
        if len(calls) == 1:
            raise StorageError("gone")
        return len(calls)

    try:
        with pytest.raises(StorageError):
            works.start("key", work).result(5)
        assert works.start("key", work).result(5) == 2
        assert works.start("key", work).result(5) == 2
        for other in range(40):
            works.start(other, lambda progress: 1).result(5)
        assert works.start("key", work).result(5) == 3
        # As many results as are kept are not computed again.
        for _ in range(2):
            for other in range(KEPT):
                again = works.start(("kept", other), lambda progress: calls.append(1))
                again.result(5)
        assert len(calls) == 3 + KEPT
    finally:
        works.close()


# --- the page ---


@pytest.fixture
def site() -> Iterator[Callable[..., Site]]:
    with sites() as serve:
        yield serve


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    run_scenes(folder, "demo", scenes_manifest(folder / "m.parquet", 60))
    return folder / "demo"


def test_only_who_has_the_token_sees_the_page(site: Any, scenes: Path) -> None:
    served = site(scenes)
    stranger = Site(served.port, "")
    for path in (
        "/",
        "/0/",
        "/0/row/1",
        "/0/thumbnail/1",
        "/0/picture/1",
        "/static/browse.js",
        "/0/export?format=csv",
        "/x",
    ):
        status, headers, data = stranger.ask(path)
        assert (status, b"--token" in data or b"token" in data) == (403, True)
        assert "set-cookie" not in headers
    for wrong in ("", "secre", "secrets", "SECRET", "%00", "é"):
        assert stranger.ask(f"/0/?{urlencode({'token': wrong})}")[0] == 403
    assert Site(served.port, "", served.cookie.replace("secret", "guess")).ask("/0/")[0] == 403
    status, headers, _ = stranger.ask("/0/?q=a+cat&token=secret&column=a&column=b")
    assert (status, headers["location"]) == (303, "/0/?q=a+cat&column=a&column=b")
    cookie = headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=lax" in cookie
    assert served.ask("/0/")[0] == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:{port}", "127.0.0.1:1", "", "localhost"])
def test_another_name_of_the_server_is_refused(site: Any, scenes: Path, host: str) -> None:
    served = site(scenes)
    assert served.ask("/0/", Host=host.format(port=served.port))[0] == 421
    assert served.ask("/0/", Host=f"LocalHost:{served.port}")[0] == 200


@pytest.mark.parametrize("origin", ["", "http://evil.example", "null", "http://127.0.0.1:1"])
def test_a_form_of_another_page_is_refused(site: Any, scenes: Path, origin: str) -> None:
    served = site(scenes)
    headers = {"Origin": origin} if origin else {}
    assert served.ask("/0/upload", method="POST", body=b"x", **headers)[0] == 403


def test_every_page_of_a_dataset_answers(site: Any, scenes: Path) -> None:
    served = site(scenes)
    text = served.page("/0/?sort=score")
    assert text.count('class="picture"') == 48
    # The rest comes as one scrolls.
    more = re.search(r'hx-get="([^"]+)"', text)
    assert more is not None
    rest = served.page(more[1].replace("&amp;", "&"))
    assert "<html" not in rest
    ids = re.findall(r'row/(\d+)"', text) + re.findall(r'row/(\d+)"', rest)
    assert sorted(map(int, ids)) == sorted(
        found(CachedDataset.of(open_dataset(str(scenes)), Memory(0)), "sort=score").rows
    )
    assert "2 of 60 rows failed" in served.page("/0/failures")
    assert "most certain" in served.page("/0/labels?truth=truth")
    assert "python -m pipeline.dedup" in served.page("/0/duplicates")
    assert "python -m pipeline.sample" in served.page("/0/clusters")
    assert "<canvas" in served.page("/0/map")
    assert "python -m pipeline.verify" in served.page("/0/about")
    for _ in range(100):
        points = json.loads(served.ask("/0/map.json")[2])
        if "rows" in points:
            break
    assert len(points["rows"]) == 58
    assert "Next row" in served.page("/0/row/0")
    status, headers, data = served.ask("/0/thumbnail/0")
    assert (status, headers["content-type"], data[:2]) == (200, "image/jpeg", b"\xff\xd8")
    status, headers, data = served.ask("/0/picture/0")
    assert (status, headers["content-security-policy"]) == (200, "default-src 'none'; sandbox")
    table = pq.read_table(scenes.parent / "m.parquet")
    assert data == table["image"][0].as_py()
    # A failed row has no picture, and says so.
    status, headers, _ = served.ask("/0/thumbnail/3")
    assert (status, headers["content-type"]) == (200, "image/svg+xml")


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/1/", 404), ("/0/row/60", 404), ("/0/row/x", 404), ("/0/nothing", 404), ("/nights/0", 404),
        *((path.replace("N", "9" * digits), 404) for digits in (18, 19, 5000)
          for path in ("/N/", "/0/row/N", "/0/thumbnail/N", "/0/picture/N", "/nights/N")),
        *((f"/0/?{name}={'9' * digits}", 400) for digits in (18, 19, 5000) for name in ("from", "like")),
        ("/static/..%2fapp.py", 404), ("/static/browse.css", 404), ("/0/?sort=nothing", 400), ("/0/?like=99", 400),
        ("/0/?from=x", 400), ("/0/labels?truth=nobody", 400), ("/0/export?format=exe", 400),
        ("/0/export?format=csv&group=duplicates:1", 400), ("/0/picture/3", 415),
    ],
)  # fmt: skip
def test_a_page_that_cannot_be_says_so(site: Any, scenes: Path, path: str, status: int) -> None:
    text = site(scenes).page(path, status)
    assert "Traceback" not in text
    assert "<h1>This cannot be shown</h1>" in text


def test_a_text_and_a_picture_find_what_they_show(site: Any, scenes: Path) -> None:
    served = site(scenes)
    table = everything(open_dataset(str(scenes)))
    truth = table["truth"][0].as_py()
    text = served.page(f"/0/?{urlencode({'q': f'a {truth}'})}")
    first = int(re.findall(r'row/(\d+)"', text)[0])
    assert table["label"][first].as_py() == truth
    picture = pq.read_table(scenes.parent / "m.parquet")["image"][0].as_py()
    body = b'--x\r\nContent-Disposition: form-data; name="picture"; filename="a"\r\n\r\n' + picture + b"\r\n--x--\r\n"
    about = {"Content_Type": "multipart/form-data; boundary=x", "Origin": f"http://127.0.0.1:{served.port}"}
    status, headers, _ = served.ask("/0/upload", method="POST", body=body, **about)
    assert status == 303
    assert re.findall(r'row/(\d+)"', served.page(headers["location"]))[0] == "0"
    status, _, data = served.ask("/0/upload", method="POST", body=body.replace(picture, b"no picture"), **about)
    assert (status, b"not_an_image" in data) == (400, True)
    assert "is not known any more" in served.page("/0/?image=0123456789abcdef")
    # Less of what it is, it comes last.
    less = served.page(f"/0/?{urlencode({'minus': f'a {truth}'})}")
    assert int(re.findall(r'row/(\d+)"', less)[0]) != first


def test_nothing_of_a_dataset_is_markup(site: Any, tmp_path: Path) -> None:
    ids = [f"{HOSTILE}{number}" for number in range(5)]
    write_vectors(
        str(tmp_path / "d"), unit(5, 1), id=ids, label=[HOSTILE] * 5, score=np.linspace(0, 1, 5).astype(np.float32),
        caption=[HOSTILE, "javascript:alert(1)", "{{ 7 * 7 }}", "{% raw %}", "\x1b[31m"],
    )  # fmt: skip
    served = site(tmp_path / "d")
    hostile = urlencode({"q": "", "column": "label", "op": "is", "value": HOSTILE, "sort": "score"})
    pages = [
        "/0/",
        f"/0/?{hostile}",
        "/0/row/0",
        "/0/row/2",
        "/0/labels?truth=caption",
        f"/0/labels?{urlencode({'find': HOSTILE})}",
    ]
    pages += ["/0/about", "/0/failures"]
    for path in pages:
        text = served.page(path)
        assert "<script>alert" not in text
        assert "<img src=x" not in text
        assert re.findall(r"<script[^>]*>", text) == [
            '<script src="/static/htmx.min.js" defer>', '<script src="/static/browse.js" defer>'
        ]  # fmt: skip
        assert re.findall(r'(?:href|src)="\s*(?:javascript|data|http)[^"]*"', text) == []
        assert "49" not in re.findall(r"<td class=\"wrap\">(.*?)</td>", text)
    wrong = served.page(f"/0/?{urlencode({'sort': HOSTILE})}", 400)
    assert "<script>alert" not in wrong


def test_a_picture_outside_of_the_root_is_not_shown(site: Any, tmp_path: Path) -> None:
    from tests.jobs import scene

    (tmp_path / "photos").mkdir()
    for place in ("photos/in.jpg", "secret.jpg"):
        (tmp_path / place).write_bytes(scene(1)[0])
    (tmp_path / "photos" / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    paths = [
        "in.jpg",
        "../secret.jpg",
        str(tmp_path / "secret.jpg"),
        "link.jpg",
        "file:///etc/passwd",
        "http://127.0.0.1/",
    ]
    table = pa.table({"id": [f"{number}" for number in range(len(paths))], "path": paths})
    pq.write_table(table, tmp_path / "m.parquet")
    about = {"image": "path", "keep": [], "root": str(tmp_path / "photos")}
    run_scenes(tmp_path, "d", tmp_path / "m.parquet", manifest=about, errors={"max_fraction": 1.0})
    served = site(tmp_path / "d")
    assert served.ask("/0/picture/0")[0] == 200
    for row in range(1, len(paths)):
        status, headers, data = served.ask(f"/0/picture/{row}")
        assert (status, headers["content-type"][:9]) == (404, "text/html"), paths[row]
        assert re.search(rb"outside_root|scheme_not_allowed", data)
        assert served.ask(f"/0/thumbnail/{row}")[1]["content-type"] == "image/svg+xml"


def test_pictures_in_tars_are_shown(site: Any, tmp_path: Path) -> None:
    import tarfile

    from pipeline.job.main import run_job
    from tests.jobs import config_for, scene

    (tmp_path / "tars").mkdir()
    drawn = [scene(number)[0] for number in range(7)]
    for name, numbers in (("a", range(3)), ("b", range(3, 7))):
        with tarfile.open(tmp_path / "tars" / f"{name}.tar", "w") as tar:
            for number in numbers:
                member = tarfile.TarInfo(f"{number}.jpg")
                member.size = len(drawn[number])
                tar.addfile(member, io.BytesIO(drawn[number]))
    config = config_for(tmp_path / "tars", tmp_path / "d", manifest={"image": "image", "keep": [], "shard_rows": 0})
    run_job(config)
    served = site(tmp_path / "d")
    assert "7 rows" in served.page("/0/")
    for row in range(7):
        assert served.ask(f"/0/picture/{row}")[2] == drawn[row]
        assert served.ask(f"/0/thumbnail/{row}")[1]["content-type"] == "image/jpeg"


@pytest.mark.slow
def test_a_million_labels_are_counted_and_found(site: Any, tmp_path: Path) -> None:
    rows = 1_000_000
    labels = [f"label-{number:07d}" for number in range(rows)]
    write_vectors(str(tmp_path / "d"), np.tile(unit(1, 1, 8), (rows, 1)), shard_rows=250_000, label=labels)
    served = site(tmp_path / "d")
    text = served.page("/0/labels")
    assert "1,000,000 labels" in text
    assert len(text) < 200_000
    assert "label-0999999" in served.page("/0/labels?find=0999999")
    assert re.findall(r'row/(\d+)"', served.page("/0/?column=label&op=is&value=label-0123456")) == ["123456"]


def test_a_torn_part_is_said_and_the_page_goes_on(site: Any, scenes: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(scenes, copy)
    served = site(copy, memory=1 << 20)
    assert "60" in served.page("/0/")
    part = sorted(copy.glob("part-*.parquet"))[-1]
    whole = part.read_bytes()
    part.write_bytes(whole[: len(whole) // 2])
    text = served.page("/0/?column=truth&op=some", 503)
    assert "python -m pipeline.verify" in text
    assert "Traceback" not in text
    part.unlink()
    assert part.name in served.page("/0/?column=truth&op=is&value=x", 503)
    part.write_bytes(whole)
    assert ">60</b> rows" in served.page("/0/?column=truth&op=some")


def test_a_dataset_that_is_replaced_is_shown_anew(site: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.browse.collection.FRESH_SECONDS", 0.0)
    write_vectors(str(tmp_path / "d"), unit(5, 1))
    served = site(tmp_path / "d")
    assert "5 rows" in served.page("/0/")
    shutil.rmtree(tmp_path / "d")
    assert "This cannot be shown" in served.page("/0/", 503)
    write_vectors(str(tmp_path / "d"), unit(7, 2))
    assert "7 rows" in served.page("/0/")


def test_a_manifest_that_is_gone_leaves_the_rows(site: Any, tmp_path: Path) -> None:
    manifest = scenes_manifest(tmp_path / "m.parquet", 20)
    run_scenes(tmp_path, "d", manifest)
    manifest.unlink()
    served = site(tmp_path / "d")
    assert served.page("/0/").count('class="picture"') == 20
    assert served.ask("/0/thumbnail/0")[1]["content-type"] == "image/svg+xml"
    assert "m.parquet" in served.page("/0/picture/0", 404)
    assert "No pictures are shown" in served.page("/0/about")


def test_groups_are_shown_from_the_analyses_beside_the_dataset(site: Any, tmp_path: Path) -> None:
    made = write_vectors(str(tmp_path / "d"), unit(12, 1))
    schema = pa.schema([
        ("id", pa.string()), ("group", pa.int64()), ("size", pa.int32()), ("keep", pa.bool_()),
        ("kept_id", pa.string()), ("similarity", pa.float32()), ("reason", pa.string()),
    ])  # fmt: skip
    rows = {
        "id": ["row-1", "row-7", "row-11", "row-2", "row-3"], "group": [0, 0, 0, 1, 1], "size": [3, 3, 3, 2, 2],
        "keep": [True, False, False, True, False], "kept_id": ["row-1", "row-1", "row-1", "row-2", "row-2"],
        "similarity": [1.0, 0.99, 0.98, 1.0, 0.97], "reason": ["first"] * 5,
    }  # fmt: skip
    about: dict[str, Any] = {"parameters": {"threshold": 0.95}, "counts": {}}
    with writing(analysis_url(made, "duplicates"), "duplicates", made, schema, **about) as writer:
        writer.write_table(pa.table(rows, schema=schema))
    clusters = pa.schema([("id", pa.string()), ("cluster", pa.int32()), ("distance", pa.float32())])
    with writing(analysis_url(made, "clusters"), "clusters", made, clusters, **about) as writer:
        ids = [f"row-{row}" for row in range(12)]
        writer.write_table(pa.table({"id": ids, "cluster": [0] * 8 + [1] * 4, "distance": [0.1] * 12}, schema=clusters))
    sample = pa.schema([("id", pa.string()), ("label", pa.string())])
    with writing(analysis_url(made, "sample"), "sample", made, sample, **about) as writer:
        writer.write_table(pa.table({"id": ["row-4", "row-9"], "label": ["a", "b"]}, schema=sample))
    served = site(tmp_path / "d")
    text = served.page("/0/duplicates")
    assert "2 groups of near duplicates" in text
    assert re.findall(r'row/(\d+)"', text) == ["1", "7", "11", "2", "3"]
    assert "similarity 0.980" in text
    assert re.findall(r'row/(\d+)"', served.page("/0/?group=duplicates:1")) == ["2", "3"]
    assert re.findall(r'row/(\d+)"', served.page("/0/?group=clusters:1")) == ["8", "9", "10", "11"]
    assert "2 clusters" in served.page("/0/clusters")
    assert 'href="/0/?group=sample"' in served.page("/0/clusters")
    assert re.findall(r'row/(\d+)"', served.page("/0/?group=sample")) == ["4", "9"]
    assert "must be like" in served.page("/0/?group=sample:1")
    # Of another state, they are not shown.
    shutil.rmtree(tmp_path / "d")
    write_vectors(str(tmp_path / "d"), unit(12, 2))
    assert "python -m pipeline.dedup" in site(tmp_path / "d").page("/0/duplicates")


def test_the_index_is_used_where_there_is_one(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    made = write_vectors(str(tmp_path / "d"), unit(400, 5), shard_rows=100)
    build_index(made, lambda: None)
    opened = OpenedDataset(CachedDataset.of(made, Memory(1 << 24)), None)
    try:
        near = opened.find(Selection(like=7, order="similar"), silent)
        exact = opened.find(Selection(like=7, order="similar", exact=True), silent)
        assert (near.approximate, exact.approximate) == (True, False)
        assert near.rows[0] == exact.rows[0] == 7
        kept = opened.find(Selection(like=7, order="similar", conditions=(Condition("id", "is", "row-9"),)), silent)
        assert (kept.rows.tolist(), kept.approximate) == ([9], False)
    finally:
        opened.close()


def test_nights_are_shown_with_drift_and_failures(site: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.browse.collection.FRESH_SECONDS", 0.0)
    (tmp_path / "photos").mkdir()
    photos, store = Photos(tmp_path / "photos"), tmp_path / "nights"
    for number in range(12):
        photos.draw(number, damaged=number == 3)
    photos.write()
    night(photos.config(), store, "2026-11-27")
    for number in range(12, 16):
        photos.draw(number)
    photos.write()
    night(photos.config(), store, "2026-11-28")
    served = site(store)
    text = served.page("/nights/0")
    assert re.findall(r">(2026-11-\d\d)<", text) == ["2026-11-28", "2026-11-27"]
    assert "Timeline of the nights" in served.page("/")
    assert "1 of 16 rows failed" in served.page("/0/failures")
    assert served.ask("/0/thumbnail/15")[1]["content-type"] == "image/jpeg"
    assert served.ask("/0/thumbnail/0")[1]["content-type"] == "image/jpeg"
    collection = Collection([str(store)], 1 << 24)
    newest, oldest = nights_of(collection, 0, silent)
    assert (newest["failed"], newest["rows"], oldest["rows"]) == (1, 16, 12)
    assert 0 < newest["drift"] < 1
    assert oldest["drift"] is None
    shutil.rmtree(store / "date=2026-11-27")
    (newest, oldest), _ = nights_of(collection, 0, silent), collection.close()
    assert "date=2026-11-27" in oldest["problem"]
    assert newest["drift"] is None


# --- exports ---


@pytest.mark.parametrize(
    "query", ["column=truth&op=has&value=red", "sort=-score", "", "like=0&column=status&op=is&value=ok"]
)
def test_an_export_has_the_rows_of_the_selection(scenes: Path, tmp_path: Path, query: str) -> None:
    dataset = CachedDataset.of(open_dataset(str(scenes)), Memory(0))
    vector = np.asarray(everything(dataset)["embedding"][0].as_py(), np.float32)
    wanted = found(dataset, query, vector if "like" in query else None)
    ids = everything(dataset)["id"].take(pa.array(wanted.rows)).to_pylist()
    for name in ("rows.parquet", "rows.csv"):
        assert main([str(scenes), "--select", query, "--export", str(tmp_path / name)]) == 0
    table = pq.read_table(tmp_path / "rows.parquet")
    assert table["id"].to_pylist() == ids
    assert pa.csv.read_csv(tmp_path / "rows.csv")["id"].to_pylist() == ids
    if wanted.values is not None:
        np.testing.assert_array_equal(table["order"].to_numpy(), wanted.values)


def test_more_rows_than_are_listed_are_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.browse.selection.MOST_IN_ORDER", 10)
    made = vectors_dataset(str(tmp_path / "d"))
    for query in ("column=width&op=some", ""):
        assert main([made.url, "--select", query, "--export", str(tmp_path / "rows.parquet")]) == 0
        width = everything(made)["width"]
        assert pq.read_metadata(tmp_path / "rows.parquet").num_rows == (
            len(width) - width.null_count if query else ROWS
        )


def test_an_exported_manifest_gives_the_same_embeddings(tmp_path: Path) -> None:
    from tests.jobs import config_for

    config = run_scenes(tmp_path, "d", scenes_manifest(tmp_path / "m.parquet", 40))
    chosen = tmp_path / "elsewhere.parquet"
    query = "column=truth&op=has&value=r&sort=-score"
    assert main([config.output.dir, "--select", query, "--export", str(chosen), "--format", "manifest"]) == 0
    from pipeline.job.main import run_job

    run_job(config_for(chosen, tmp_path / "again"))
    before = {row["id"]: row["label"] for row in everything(open_dataset(config.output.dir)).to_pylist()}
    again = everything(open_dataset(str(tmp_path / "again"))).to_pylist()
    assert again
    assert all("r" in row["truth"] and before[row["id"]] == row["label"] for row in again)


@pytest.mark.compat("datasets")
def test_an_export_is_a_dataset_of_hugging_face(scenes: Path, tmp_path: Path) -> None:
    from datasets import load_dataset
    from PIL import Image

    place = tmp_path / "rows.parquet"
    query = "column=status&op=is&value=ok"
    assert main([str(scenes), "--select", query, "--export", str(place), "--format", "datasets"]) == 0
    loaded = load_dataset("parquet", data_files=str(place), cache_dir=str(tmp_path / "cache"))["train"]
    assert len(loaded) == 58
    assert isinstance(loaded[0]["image"], Image.Image)
    stored = pq.read_table(scenes.parent / "m.parquet")["image"][0].as_py()
    assert loaded[0]["image"].size == Image.open(io.BytesIO(stored)).size


def test_the_command_of_a_selection_writes_the_same_rows(scenes: Path, tmp_path: Path) -> None:
    import shlex

    opened = OpenedDataset(CachedDataset.of(open_dataset(str(scenes)), Memory(0)), None)
    selection = Selection.parse([("column", "truth"), ("op", "has"), ("value", 'it\'s & "red"')], opened.dataset)
    words = shlex.split(command_of(opened, selection))
    assert words[:3] == ["python", "-m", "pipeline.browse"]
    words[words.index("--export") + 1] = str(tmp_path / "rows.parquet")
    assert main(words[3:]) == 0
    assert pq.read_metadata(tmp_path / "rows.parquet").num_rows == 0
    opened.close()


def test_an_export_of_too_many_pictures_names_the_command(
    site: Any, scenes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.browse.app.MOST_PICTURES", 50)
    served = site(scenes)
    text = served.page("/0/export?format=datasets", 400)
    assert "--format datasets" in text
    assert served.ask("/0/export?format=datasets&column=status&op=is&value=not_an_image")[0] == 200
    assert served.ask("/0/export?format=manifest")[0] == 200


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_the_command_prints_its_address_and_ends_with_0_on_a_signal(scenes: Path, name: str) -> None:
    command = [sys.executable, "-m", "pipeline.browse", str(scenes)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as started:
        assert started.stdout is not None
        assert started.stderr is not None
        address = started.stdout.readline().strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/\?token=[\w-]{32}", address)
        opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
        assert opener.open(address, timeout=30).status == 200
        started.send_signal(getattr(signal, name))
        assert started.wait(30) == 0
        assert started.stderr.read() == ""


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["nowhere"], 2, "no dataset is here"),
        (["{d}", "--port", "70000"], 2, "--port"),
        (["{d}", "--memory", "0"], 2, "--memory"),
        (["{d}", "--select", "q=a"], 2, "--export"),
        (["{d}", "{d}", "--export", "x.csv"], 2, "takes one dataset"),
        (["{d}", "--export", "no/such/folder/x.csv"], 1, "no/such/folder"),
        (["{d}", "--export", "x.csv", "--select", "column=nobody&op=is&value=1"], 2, "nobody"),
        (["{d}", "--host", "256.0.0.1"], 2, "--host"),
    ],
)
def test_wrong_options_are_said(
    scenes: Path, arguments: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main([each.format(d=scenes) for each in arguments]) == code
    assert said in capsys.readouterr().err
    assert not list(tmp_path.glob("x.*"))


def test_a_collection_without_a_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NoDataset):
        Collection([str(tmp_path)], 1 << 20)
