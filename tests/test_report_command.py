"""The command that draws pages again, compares two runs and shows the nights."""

from __future__ import annotations

import json
import re
from datetime import date, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.schema import Config
from pipeline.job.main import run_job
from pipeline.nightly.store import RUN_SCHEMA
from pipeline.report.__main__ import main
from pipeline.report.compare import compare_page, headline
from pipeline.report.nights import read_nights, recent_nights
from tests.jobs import config_for, scenes_manifest


def small_job(output: Path, rows: int, damaged: dict[int, bytes] | None = None) -> Config:
    """A job that draws its page."""
    manifest = scenes_manifest(output.with_suffix(".parquet"), rows, damaged=damaged)
    return config_for(manifest, output, report={"html": True})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Config:
    config = small_job(tmp_path_factory.mktemp("report") / "out", 60)
    run_job(config)
    return config


def out(config: Config) -> Path:
    return Path(config.output.dir)


@pytest.mark.slow
def test_a_page_that_is_drawn_again_is_the_same(finished: Config, capsys: pytest.CaptureFixture[str]) -> None:
    page = out(finished) / "_report.html"
    before = page.read_text()
    page.unlink()
    assert main([finished.output.dir]) == 0
    assert capsys.readouterr().out == f"{page}\n"
    # The config of the plan does not keep what is the run's alone, such as the number of examples.
    pictures = re.findall(r"data:image/jpeg;base64,[^\"]+", before)
    again = page.read_text()
    assert len(pictures) > 20
    assert set(pictures) <= set(re.findall(r"data:image/jpeg;base64,[^\"]+", again))
    assert re.findall(r"<h1>.*", before) == re.findall(r"<h1>.*", again)
    assert before.partition("Rows by status")[2].partition("<h3>")[0] in again


@pytest.mark.slow
def test_without_its_manifest_the_page_has_no_pictures(
    finished: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = Path(str(finished.manifest.path))
    moved = manifest.rename(tmp_path / "elsewhere.parquet")
    try:
        assert main([finished.output.dir, "--out", str(tmp_path / "page.html")]) == 0
        assert "no pictures are shown" in capsys.readouterr().err
    finally:
        moved.rename(manifest)
    assert "base64" not in (tmp_path / "page.html").read_text()
    assert main([finished.output.dir, "--examples", "0", "--out", str(tmp_path / "none.html")]) == 0
    assert capsys.readouterr().err == ""
    assert "base64" not in (tmp_path / "none.html").read_text()
    assert main([finished.output.dir, "--examples", "3", "--out", str(tmp_path / "three.html")]) == 0
    assert "Some of the images" in (tmp_path / "three.html").read_text()


def test_two_runs_stand_side_by_side(finished: Config, tmp_path: Path) -> None:
    other = finished.changed({"prompts.labels": ["a red circle", "a star"], "output.dir": str(tmp_path / "other")})
    run_job(other)
    page = tmp_path / "compare.html"
    assert main(["--compare", finished.output.dir, other.output.dir, "--out", str(page)]) == 0
    html = page.read_text()
    for text in ("Labels whose share changed most", "prompts.labels", "B to A", "Cost of 1,000 images", "a red circle"):
        assert text in html
    assert "loader.batch_size" not in html, "it is the same"
    assert html.count("<svg") == 1


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        (100.0, 150.0, "1.50 times as fast"),
        (150.0, 100.0, "67% of the first's throughput"),
        (100.0, 101.0, "same throughput"),
        (0.0, 100.0, "The first embedded nothing"),
        (100.0, 0.0, "The second embedded nothing"),
        (0.0, 0.0, "Neither run"),
    ],
)
def test_the_comparison_in_one_sentence(a: float, b: float, words: str) -> None:
    one, other = ({"steady_images_per_second": rate, "images_per_second": rate} for rate in (a, b))
    assert words in headline(one, other)


def test_a_report_of_an_older_version_compares_too(finished: Config, tmp_path: Path) -> None:
    report = json.loads((out(finished) / "_report.json").read_text())
    old = {**report, "pace": None, "timeline": None, "memory": {}, "images": 0}
    html = compare_page(old, report, names=("old", "new")).decode()
    assert "Over time" not in html
    assert html.index("peak memory") < html.index("Cost of 1,000 images")


def test_mistakes_are_said_in_one_line(
    finished: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    pq.write_table(pa.table({"x": [1]}), tmp_path / "x.parquet")
    (tmp_path / "text.parquet").write_text("no Parquet")
    for arguments, code, words in (
        (["empty"], 2, "no dataset is here"),
        (["--compare", finished.output.dir, "empty"], 2, "no dataset is here"),
        (["--history", "empty"], 2, "empty/runs.parquet: not there"),
        (["--history", "x.parquet"], 1, "has no column date"),
        (["--history", "text.parquet"], 1, "not readable as Parquet"),
        ([finished.output.dir, "--examples", "0", "--out", "nowhere/page.html"], 1, "nowhere/page.html"),
    ):
        assert main(arguments) == code, arguments
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
    for usage in ([], [finished.output.dir, "--history", "x.parquet"]):
        with pytest.raises(SystemExit, match="2"):
            main(usage)


def test_a_torn_report_is_named_with_the_way_out(
    finished: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = out(finished) / "_report.json"
    whole = report.read_bytes()
    try:
        for content, words in ((whole[:100], "not readable as a report"), (b"{}", "not readable as a report")):
            report.write_bytes(content)
            assert main([finished.output.dir, "--out", str(tmp_path / "page.html")]) == 1
            assert words in capsys.readouterr().err
        report.unlink()
        assert main([finished.output.dir, "--out", str(tmp_path / "page.html")]) == 1
        assert "has no _report.json; run the job again" in capsys.readouterr().err
    finally:
        report.write_bytes(whole)
    assert not (tmp_path / "page.html").exists()


def nights(path: Path, days: list[date], **values: object) -> None:
    columns = {field.name: [0] * len(days) for field in RUN_SCHEMA if pa.types.is_integer(field.type)}
    rows = {
        **columns,
        **{name: [""] * len(days) for name in ("counts", "layout", "previous", "reason", "fingerprints", "versions")},
        **{"dataset": [""] * len(days), "date": days, "started": [None] * len(days), "finished": [None] * len(days)},
        **{"seconds": [60.0 + 7 * i for i in range(len(days))], "images_per_second": [100.0] * len(days)},
        **values,
    }
    pq.write_table(pa.table(rows, schema=RUN_SCHEMA), path)


def test_the_nights_are_drawn_with_those_that_are_missing_or_bad(tmp_path: Path) -> None:
    days = [date(2026, 11, 1) + timedelta(days=n) for n in (3, 0, 1, 4)]
    codes = [3, 0, 0, 0]
    nights(tmp_path / "runs.parquet", days, exit_code=codes, rows=[10] * 4, new=[10, 4, 3, 1], embedded=[10, 4, 3, 1])
    page = tmp_path / "nights.html"
    assert main(["--history", str(tmp_path), "--out", str(page)]) == 0
    html = page.read_text()
    assert "4 nights up to 2026-11-05: the last one embedded 1 of 10 rows in 1 min 21 s" in html
    assert "1 ended with an exit code other than 0: 2026-11-04 (3)" in html
    assert "No night on 2026-11-03." in html
    assert html.index("<td>2026-11-05") < html.index("<td>2026-11-01")
    assert [str(row["date"]) for row in read_nights(str(tmp_path))] == sorted(map(str, days))
    recent = recent_nights(f"{tmp_path}/date=2026-11-02", "2026-11-02")
    assert [str(row["date"]) for row in recent] == ["2026-11-01", "2026-11-02"]
    assert recent_nights(f"{tmp_path}/store/date=2026-11-02", "2026-11-02") == []
    nights(tmp_path / "runs.parquet", days[:1])
    assert main(["--history", str(tmp_path), "--out", str(page)]) == 0
    assert "All ended with exit code 0." in page.read_text()


def test_a_dataset_without_a_good_row_has_a_page_too(tmp_path: Path) -> None:
    damaged = dict.fromkeys(range(24), b"no picture")
    half = small_job(tmp_path / "half", 48, damaged)
    run_job(half.changed({"errors.max_fraction": 1.0}))
    page = (tmp_path / "half" / "_report.html").read_text()
    assert "Some of the images" in page, "those of the second part"
    assert "not_an_image (3 of 24)" in re.sub(r"<[^>]+>", "", page)
    none = small_job(tmp_path / "none", 6, damaged)
    run_job(none.changed({"errors.max_fraction": 1.0}))
    assert "6 of 6 rows failed" in (tmp_path / "none" / "_report.html").read_text()
    assert main([none.output.dir]) == 0


def test_scores_under_the_threshold_are_shown_and_counted(tmp_path: Path) -> None:
    config = small_job(tmp_path / "out", 24, damaged={})
    run_job(config.changed({"labels.threshold": 1.0}))
    page = (tmp_path / "out" / "_report.html").read_text()
    assert re.search(r"\d+ embedded rows have no label", page)
    assert "score of the best label" in page


def test_what_an_earlier_run_left_is_replaced_and_a_page_is_never_in_the_way(tmp_path: Path) -> None:
    config = small_job(tmp_path / "out", 30)
    run_job(config)
    report, page = tmp_path / "out" / "_report.json", tmp_path / "out" / "_report.html"
    # As of a run that gave a shard up, and of one that was killed before it told of the rest.
    old = json.loads(report.read_text())
    report.write_text(json.dumps({**old, "given_up": [1], "exit_code": 3}))
    page.write_text("stale")
    run_job(config)
    assert json.loads(report.read_text())["given_up"] == []
    assert "stale" not in page.read_text()
    told = report.read_bytes()
    page.unlink()
    run_job(config)
    assert report.read_bytes() == told, "nothing was done"
    assert page.exists()
    page.unlink()
    report.unlink()
    page.mkdir()
    run_job(config)
    assert report.exists()


@pytest.mark.parametrize("number", [0, 1])
def test_a_torn_part_is_named_with_the_way_out(
    finished: Config, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    part = sorted(out(finished).glob("part-*"))[number]
    whole = part.read_bytes()
    try:
        part.write_bytes(whole[:1000])
        assert main([finished.output.dir]) == 1
    finally:
        part.write_bytes(whole)
    error = capsys.readouterr().err
    assert part.name in error
    assert "--repair" in error
