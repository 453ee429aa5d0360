from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from pipeline.config.schema import Config, ImagesConfig, LoaderConfig
from pipeline.core.errors import StorageError
from pipeline.core.processes import spent
from pipeline.core.records import Clocks, Parity, Stage, Timeline
from pipeline.core.run_report import Pace, RunReport, StagePace
from pipeline.report import page
from pipeline.report.bottleneck import (
    Cost,
    GpuUse,
    Limit,
    LoopFigures,
    ProcessSetup,
    find_bottleneck,
    find_limit,
    find_pace,
    gpu_use,
    verdict,
)
from pipeline.report.history import earlier_runs
from pipeline.report.scores import Extremes, Row
from pipeline.report.summary import HINTS, DatasetSummary, Failed
from pipeline.storage.factory import open_storage
from pipeline.telemetry.clocks import StageClocks
from pipeline.telemetry.logs import NAME, log_to
from pipeline.telemetry.progress import Progress
from pipeline.telemetry.run_stats import RunStats, WorkerStats
from tests.conftest import ROOT
from tests.pictures import saved

REPORT = RunReport(
    started="2026-01-02T03:04:05+00:00",
    rows=900,
    images=898,
    resumed_rows=100,
    total_rows=1000,
    wall_seconds=125.0,
    startup_seconds=5.0,
    images_per_second=7.2,
    steady_images_per_second=8.0,
    stages={Stage.ENCODE: 60.0, Stage.DECODE: 30.0, Stage.WAIT_INPUT: 20.0},
    bound="decoding",
    advice="raise loader.workers",
    counts={"ok": 998, "truncated": 2},
    failures=({"id": "<script>alert(1)</script>", "status": "truncated", "error": "cut & short"},),
    labels={"cat": 600, "<b>dog</b>": 398},
    prompts={"labels": 3, "cached": True},
    parity=Parity(
        images=64, lowest_cosine=0.99875, mean_cosine=0.9995, top1=0.984375, worst=(("<i>odd</i>.jpg", 0.99875),)
    ),
    decoder_parity=None,
    batch_sizes=(64,),
    memory={"peak_rss_mib": 512.0},
    machine={"processor": "test", "cores": 2, "device": "cpu"},
    versions={"python": "3.11"},
    fingerprints={"model": "x"},
    config=asdict(replace(Config(), loader=LoaderConfig(batch_size=96))),
    exit_code=0,
    timeline=Timeline(began=1767323045.0, width=0.5, amounts={"images": (0.0, 5.0), "decode": (0.5, 1.0)}),
    scores=(0,) * 39 + (998,),
    run="20260102T030405Z-1",
)
CONTENT = DatasetSummary(
    folder="out",
    parts=(),
    labels=REPORT.labels,
    failed=(Failed(7, "<script>alert(1)</script>", "truncated", "cut & short"),),
    scores=REPORT.scores,
    extremes=(Extremes("cat", 600, most=(Row(1, "sure.jpg", "cat", 0.99),), least=(Row(2, "lost.jpg", "cat", 0.12),)),),
    odd=(Row(2, "lost.jpg", "cat", 0.12),),
)
FIRST = Row(number=0, id='a"b.jpg', label="cat", score=0.87)


JPEG = saved(Image.new("RGB", (8, 8), "red"), "JPEG")


class Collector(HTMLParser):
    """Tags with their attributes, and the text, of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def render(
    report: RunReport = REPORT,
    content: DatasetSummary = CONTENT,
    examples: Sequence[Row] = (),
    pictures: Mapping[int, bytes] = {},
    *,
    plots: bool = False,
) -> str:
    """The page; without its plots, which take most of the time, unless they are asked for."""
    if not plots:
        report, content = replace(report, timeline=None), replace(content, scores=())
    return page.to_html(report.to_dict(), content, examples, pictures, output="out").decode()


def test_the_page_shows_everything_and_loads_nothing() -> None:
    html = render(examples=[FIRST], pictures=dict.fromkeys((0, 1, 2), JPEG), plots=True)
    found = Collector()
    found.feed(html)
    for text in (
        *(
            "898 images in 2\N{NO-BREAK SPACE}min 5\N{NO-BREAK SPACE}s (7.2 images/s); bottleneck: decoding on 2 cores",
            "0.87",
        ),
        *("Raise loader.workers.", "2 of 1,000 rows failed (0.20%)", "the file ends early", "sure.jpg", "lost.jpg"),
        *("run 20260102T030405Z-1", "2026-01-02 03:04:05 UTC", "loader.batch_size"),
    ):
        assert text in found.text
    assert "<script>alert(1)</script>" in found.text, "shown as text"
    assert "script" not in {tag for tag, _ in found.tags}
    pictures = [str(values["src"]) for tag, values in found.tags if tag == "img"]
    assert len(pictures) == 4
    assert all(address.startswith("data:image/jpeg;base64,") for address in pictures)
    assert "no picture can be shown" in found.text, "of the row that failed"
    links = [str(value) for _, values in found.tags for name, value in values.items() if name.endswith("href")]
    assert all(link.startswith("#") for link in links)
    assert "@import" not in html
    assert "url(h" not in html


def test_the_page_shows_the_phases_of_the_start_up_one_behind_the_other() -> None:
    assert page.phase_rows({"imports": 3.0, "model": 1.0}) == [
        page.PhaseRow("imports", 3.0, offset=0, width=75),
        page.PhaseRow("model", 1.0, offset=75, width=25),
    ]
    shown = render(replace(REPORT, startup={"imports": 3.0, "model": 1.0}, ending={"last parts": 0.3}))
    assert "margin-left:75.0%;width:25.0%" in shown
    assert "After the last batch: last parts 0.3 s" in shown
    assert "<h3>Start-up</h3>" not in render()


def test_the_page_stands_without_labels_images_and_failures() -> None:
    bare = replace(REPORT, labels={}, failures=(), stages={}, counts={"ok": 1000}, timeline=None, scores=())
    html = render(bare, DatasetSummary(folder="out", parts=(), labels={}, failed=()))
    for heading in (
        "<h2>Labels</h2>",
        "rows failed (0.20%)",
        "The run over time",
        "Some of the images",
        "Most and least",
    ):
        assert heading not in html


def test_the_plots_follow_the_colours_of_the_page_and_fit_a_phone() -> None:
    html = render(plots=True)
    found = Collector()
    found.feed(html)
    plots = [values for tag, values in found.tags if tag == "svg"]
    assert [str(values["aria-label"])[:10] for values in plots] == ["Images per", "Rows by th"]
    for svg in re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL):
        used = set(re.findall(r"var\(--([a-z0-9-]+)\)", svg))
        assert {"ink", "soft"} & used
        assert not set(re.findall(r"#[0-9a-fA-F]{6}", svg)), "a colour of its own, which dark mode would not change"
        for name in used:
            assert len(re.findall(rf"--{name}: ", html)) == 2, "one for light, one for dark"
    names = re.findall(r'\bid="([^"]+)"', html)
    assert len(names) == len(set(names))


def test_the_page_tells_what_was_set_and_what_the_default_is() -> None:
    settings = page.settings(REPORT.config)
    assert [(s.key, s.value, s.usual) for s in settings if s.usual] == [("loader.batch_size", "96", "64")]
    assert len(settings) > 60


def test_words_of_the_page_are_as_they_are_typed_and_small_scores_are_told_apart() -> None:
    filters = page.environment().filters
    assert filters["capital"]("raise loader.workers from 1") == "Raise loader.workers from 1"
    assert filters["capital"]("images.decoder=fast would") == "images.decoder=fast would"
    assert [filters["score"](score) for score in (0.87, 0.0049, 0.001, 0.0)] == ["0.87", "0.005", "0.001", "0.00"]


def test_every_documented_status_has_a_hint() -> None:
    named = set(
        re.findall(
            r"`([a-z_]+)`",
            (ROOT / "pipeline/job/README.md").read_text().partition("| status | what")[2].partition("\n\n")[0],
        )
    )
    assert set(HINTS) == {name for name in named if "." not in name}


def test_a_report_remembers_the_runs_before_it() -> None:
    assert earlier_runs(None) == earlier_runs(b"{torn") == earlier_runs(b"[1]") == earlier_runs(b"{}") == ()
    one = REPORT.to_json()
    [first] = earlier_runs(one)
    assert (first["images"], first["failed"], first["decoder"], first["device"]) == (898, 2, "exact", "cpu")
    second = replace(
        REPORT, history=earlier_runs(one), started="2026-01-03T03:04:05+00:00", steady_images_per_second=16
    )
    assert [run["started"][:10] for run in earlier_runs(second.to_json())] == ["2026-01-02", "2026-01-03"]
    text = render(second)
    assert "Compared with earlier runs" in text
    assert "(this run)" in text
    assert "Compared with earlier runs" not in render()
    many = replace(REPORT, history=tuple({**first} for _ in range(30)))
    assert len(earlier_runs(many.to_json())) == 20


def test_the_json_holds_every_field() -> None:
    assert json.loads(REPORT.to_json())["labels"] == REPORT.labels
    assert set(json.loads(REPORT.to_json())) == set(RunReport.__slots__)
    assert REPORT.to_dict() == json.loads(REPORT.to_json())


@pytest.mark.parametrize(
    ("seconds", "startup", "facts", "bound", "advice"),
    [
        ({}, 1, {}, "nothing", "done already"),
        ({Stage.ENCODE: 9, Stage.WAIT_INPUT: 1}, 60, {}, "start-up", "60.0 of 100.0 s"),
        ({Stage.ENCODE: 5, Stage.WAIT_INPUT: 5, Stage.READ: 9, Stage.DECODE: 1}, 1, {}, "reading", "loader.workers"),
        ({Stage.ENCODE: 5, Stage.WAIT_INPUT: 5, Stage.DECODE: 9}, 1, {"threads": 1}, "decoding", "from 1 to 4"),
        ({Stage.ENCODE: 5, Stage.WAIT_INPUT: 5, Stage.DECODE: 9}, 1, {}, "decoding", "all 4 cores"),
        ({Stage.ENCODE: 5, Stage.WAIT_INPUT: 5}, 1, {"decoder": "exact"}, "decoding", "images.decoder=fast"),
        # Four batches side by side take a quarter of the time that their clocks add up to.
        ({Stage.ENCODE: 40, Stage.WAIT_INPUT: 5}, 1, {"streams": 4}, "decoding", "all 4 cores"),
        ({Stage.ENCODE: 40, Stage.WAIT_INPUT: 5}, 1, {}, "encoding", "bf16"),
        ({Stage.ENCODE: 5, Stage.WAIT_OUTPUT: 5}, 1, {}, "writing", "shard_rows"),
        ({Stage.ENCODE: 9, Stage.WAIT_INPUT: 1}, 1, {}, "encoding", "bf16"),
        ({Stage.ENCODE: 9, Stage.WAIT_INPUT: 1}, 1, {"precision": "bf16"}, "encoding", "more cores"),
        ({Stage.ENCODE: 9, Stage.WAIT_INPUT: 1}, 1, {"device": "cuda"}, "encoding", "batch_size"),
    ],
)
def test_the_bound_follows_from_the_clocks(
    seconds: dict[str, float], startup: float, facts: dict[str, object], bound: str, advice: str
) -> None:
    setup = replace(ProcessSetup("cpu", "fp32", "fast", threads=4, streams=1, cores=4), **facts)  # type: ignore[arg-type]
    found = find_bottleneck(Clocks(seconds), setup, startup=startup, wall=100)
    assert found.stage == bound
    assert advice in found.advice


@pytest.mark.parametrize(
    ("use", "stage", "advice"),
    [
        (GpuUse(busy=0.97, starved=0.0), "encoding", "busy in 97% of the time"),
        (GpuUse(busy=0.31, starved=0.9), "launching", "31% of the time, and 90% of the batches waited"),
    ],
)
def test_a_gpu_that_waits_for_its_launches_is_not_called_the_bottleneck(use: GpuUse, stage: str, advice: str) -> None:
    setup = ProcessSetup("cuda", "bf16", "fast", threads=16, streams=1, cores=16)
    found = find_bottleneck(Clocks({Stage.ENCODE: 9, Stage.WAIT_INPUT: 1}), setup, startup=1, wall=100, gpu=use)
    assert found.stage == stage
    assert advice in found.advice


def test_the_rate_of_a_gpu_follows_from_its_own_clock() -> None:
    clocks = Clocks({Stage.ENCODE: 9.0}, {Stage.ENCODE: 9.0})
    worker = WorkerStats("0", "host", 1, "cuda:0", 16, 1.0, clocks=clocks, own_core_seconds=10.0)
    setup, loop = (
        ProcessSetup("cuda", "bf16", "fast", threads=16, streams=1, cores=16),
        LoopFigures(1000, seconds=10.0, steady=100.0),
    )

    def stats_of(*workers: WorkerStats) -> RunStats:
        return RunStats(began=0.0, ended=10.0, rows=1000, images=1000, workers=workers)

    def rate(stats: RunStats) -> float | None:
        found = find_pace(stats, setup, loop)
        assert found is not None
        return found.stages[Stage.ENCODE].images_per_second

    assert gpu_use(stats_of(worker), 10.0) is None
    assert rate(stats_of(worker)) == pytest.approx(1000 / 9)
    timed = replace(worker, gpu_batches=10, gpu_seconds=2.5, gpu_starved=9)
    assert rate(stats_of(timed)) == pytest.approx(400)
    assert gpu_use(stats_of(timed), 10.0) == GpuUse(busy=0.25, starved=0.9)
    both = stats_of(timed, replace(timed, name="1", gpu_seconds=7.5, gpu_starved=1))
    assert gpu_use(both, 10.0) == GpuUse(busy=0.5, starved=0.5)
    assert RunStats.from_json({**both.to_json(), "workers": 2}) == both


def test_clocks_add_up_over_threads_and_over_shards() -> None:
    clocks = StageClocks()
    threads = [threading.Thread(target=lambda: [clocks.add("x", 0.5) for _ in range(1000)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert clocks.total().seconds == {"x": 2000.0}
    assert (Clocks({"x": 1.0}) + Clocks({"x": 2.0, "y": 3.0})).seconds == {"x": 3.0, "y": 3.0}


def test_clocks_tell_the_core_seconds_of_the_threads_that_work_and_not_of_those_that_wait() -> None:
    clocks = StageClocks()

    def work(seconds: float) -> None:
        until = time.thread_time() + seconds
        while time.thread_time() < until:
            pass

    with clocks.time("outer"):
        work(0.02)
        with clocks.time("inner"):
            work(0.04)
            time.sleep(0.05)

    def thread() -> None:
        work(0.03)
        clocks.add("told", 1.0)
        work(0.02)
        clocks.add("next", 1.0)

    other = threading.Thread(target=thread)
    other.start()
    other.join()
    found = clocks.total()
    # What the outer one did before counts for neither: an inner clock begins where it begins.
    assert found.cores["inner"] == pytest.approx(0.04, abs=0.01)
    assert found.cores["told"] == pytest.approx(0.03, abs=0.01)
    assert found.cores["next"] == pytest.approx(0.02, abs=0.01)
    assert found.seconds["inner"] > 0.05
    assert (found + found).cores["told"] == 2 * found.cores["told"]


def test_what_children_spend_is_counted_while_they_live_and_when_they_are_gone() -> None:
    code = "import sys, time\nwhile time.process_time() < 0.3: pass\nprint(flush=True)\nsys.stdin.read()"
    before = spent()
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    alive = spent() - before
    child.communicate()
    gone = spent() - before
    if sys.platform == "linux":
        assert alive.children >= 0.28
    assert gone.children >= 0.28
    assert gone.own < gone.children
    assert gone.total == gone.own + gone.children


def test_the_bound_of_a_cpu_is_the_cores_over_the_core_seconds_of_all_stages() -> None:
    costs = {
        Stage.READ: Cost(0.001, 4000.0),
        Stage.DECODE: Cost(0.009, 200.0),
        Stage.ENCODE: Cost(0.090, 21.0),
        Stage.WRITE: Cost(0.0, 5000.0),
    }
    found = find_limit(costs, cores=2, device="cpu")
    assert found == Limit(pytest.approx(20.0), Stage.ENCODE, cores=True)
    slow = find_limit({**costs, Stage.READ: Cost(0.001, 15.0)}, cores=2, device="cpu")
    assert slow == Limit(15.0, Stage.READ, cores=False), "a network that is waited for"


def test_the_bound_of_a_gpu_is_the_slowest_of_what_it_the_cores_and_the_disks_do() -> None:
    costs = {
        Stage.READ: Cost(0.0002, 90_000.0),
        Stage.DECODE: Cost(0.0014, 11_000.0),
        Stage.COPY: Cost(1.0, 40_000.0),
        Stage.ENCODE: Cost(1.0, 9_000.0),
        "other": Cost(1.0, float("inf")),
    }
    assert find_limit(costs, cores=16, device="cuda") == Limit(9_000.0, Stage.ENCODE, cores=False)
    quick = {**costs, Stage.ENCODE: Cost(1.0, 30_000.0)}
    assert find_limit(quick, cores=16, device="cuda") == Limit(pytest.approx(10_000.0), Stage.DECODE, cores=True)


def test_the_pace_of_a_run_follows_from_its_clocks_and_its_core_seconds() -> None:
    clocks = Clocks(
        {Stage.DECODE: 20.0, Stage.ENCODE: 95.0, Stage.WRITE: 1.0, Stage.WAIT_INPUT: 3.0},
        {Stage.DECODE: 1.0, Stage.ENCODE: 90.0, Stage.WRITE: 0.5, Stage.WAIT_INPUT: 0.2},
    )
    setup, loop = (
        ProcessSetup("cpu", "fp32", "exact", threads=2, streams=2, cores=2),
        LoopFigures(1000, seconds=52.0, steady=18.0),
    )
    worker = WorkerStats("0", "host", 1, "cpu", 2, 1.0, clocks=clocks, own_core_seconds=92.0, child_core_seconds=8.0)
    stats = RunStats(began=0.0, ended=52.0, rows=1000, images=1000, workers=(worker,))
    found = find_pace(stats, setup, loop)
    assert found is not None
    assert found.stages[Stage.DECODE] == StagePace(pytest.approx(100.0), 9.0, pytest.approx(0.09))
    assert found.stages[Stage.ENCODE].images_per_second == pytest.approx(1000 * 2 / 95)
    assert found.stages["other"] == StagePace(None, pytest.approx(0.5), pytest.approx(0.005))
    assert Stage.WAIT_INPUT not in found.stages
    assert found.bound == pytest.approx(20.0)
    assert found.ratio == pytest.approx(0.9)
    assert found.cores_busy == pytest.approx(100 / 52)
    assert found.verdict == (
        "2 cores allow at most 20.0 images/s; this run had 18.0 (90%), the rest went to waiting, contention or other "
        "programs; core time: encode 90%, decode 9%"
    )
    # One batch on both cores: the second thread has no clock.
    one = replace(worker, clocks=Clocks(clocks.seconds, {**clocks.cores, Stage.ENCODE: 45.0}))
    together = find_pace(replace(stats, workers=(one,)), replace(setup, streams=1), loop)
    assert together is not None
    assert together.stages[Stage.ENCODE].core_seconds == pytest.approx(90.5)
    assert "other" not in together.stages
    assert find_pace(stats, setup, LoopFigures(0, seconds=52.0, steady=0.0)) is None
    assert find_pace(replace(stats, workers=()), setup, loop) is None


def test_statistics_of_parts_add_up() -> None:
    worker = WorkerStats("0", "a", 1, "cpu", 2, 1.0, images=3, repeats=1, memory={"peak_rss_mib": 5.0})
    other = replace(worker, host="b", clocks=Clocks({Stage.ENCODE: 2.0}), memory={"peak_rss_mib": 9.0})
    one = RunStats(began=10.0, ended=20.0, rows=4, images=3, workers=(worker,))
    both = one + RunStats(began=5.0, ended=15.0, rows=6, images=5, workers=(other, replace(worker, pid=2)))
    assert (both.began, both.ended, both.seconds, both.rows, both.images) == (5.0, 20.0, 15.0, 10, 8)
    assert (both.processes, both.cores, both.cores_of_hosts, both.repeats) == (2, 4, 4, 3)
    assert both.clocks.seconds == {Stage.ENCODE: 2.0}
    assert both.memory == {"peak_rss_mib": 9.0}
    assert RunStats.from_json(json.loads(json.dumps(both.to_json()))) == both


@pytest.mark.parametrize(
    ("limit", "rate", "device", "words"),
    [
        (Limit(20.0, "encode", cores=True), None, "cpu", "core time: encode 60%, decode 40%"),
        (Limit(20.0, "encode", cores=True), 22.0, "cpu", "core time: encode 60%, decode 40%"),
        (Limit(20.0, "encode", cores=True), 20.5, "cpu", "2 cores allow about 20.0 images/s, which this run reached"),
        (Limit(9e3, "encode", cores=False), 9e3, "cuda", "the GPU allows about 9,000 images/s, which this run"),
        (
            Limit(15.0, "read", cores=False),
            14.7,
            "cpu",
            "the stage read allows at most 15.0 images/s; this run had 14.7 (98%)",
        ),
    ],
)
def test_a_run_too_short_for_a_comparison_has_none(limit: Limit, rate: float | None, device: str, words: str) -> None:
    found = verdict(limit, {"encode": 0.6, "decode": 0.4}, rate=rate, cores=2, device=device)
    assert found.startswith(words)
    assert found.endswith("core time: encode 60%, decode 40%")
    pace = Pace(stages={}, cores_busy=1.0, bound=20.0, ratio=1.17, verdict=found)
    short = render(replace(REPORT, pace=pace))
    assert "that this machine allows" not in short
    assert "core time: encode" in short.replace("Core time", "core time")
    assert "that this machine allows" in render(replace(REPORT, pace=replace(pace, ratio=0.9)))


def test_the_page_shows_the_pace_of_every_stage_and_the_bound() -> None:
    pace = Pace(
        stages={
            Stage.DECODE: StagePace(412.5, 9.25, 0.09),
            Stage.ENCODE: StagePace(21.0, 90.0, 0.9),
            "other": StagePace(None, 1.0, 0.01),
        },
        cores_busy=1.92,
        bound=8.4,
        ratio=0.952,
        verdict="2 cores allow at most 8.4 images/s",
    )
    report = replace(REPORT, pace=pace, memory={"peak_rss_mib": 512.0, "peak_decoder_mib": 64.0})
    found = Collector()
    found.feed(render(report))
    for text in (
        "2 cores allow at most 8.4 images/s.",
        "412.5",
        "9.25",
        "90.0%",
        "95%",
        "of the 8.4 images/s that this machine allows",
        "1.9",
    ):
        assert text in found.text
    assert "64 MiB in a decoder process" in found.text
    assert json.loads(report.to_json())["pace"]["stages"]["decode"]["core_seconds"] == 9.25


def test_progress_leaves_the_first_batch_out_of_the_steady_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 10.0, 10.0, 12.0, 12.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    with Progress(30, done=0, mode="none") as progress:
        progress.embedded(10)
        progress.embedded(10)
    assert progress.first_batch_seconds == 10
    assert progress.steady_images_per_second == 5


def test_plain_progress_says_a_line_every_ten_seconds(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    with caplog.at_level(logging.INFO), Progress(100, done=40, mode="plain") as progress:
        for _ in range(5):
            clock[0] += 4
            progress.embedded(10)
        progress.failed(1)
    assert [record.getMessage() for record in caplog.records] == ["70 of 100 rows, 2.5 images/s, 0 failed"]


def test_the_bar_is_drawn_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(10, done=5, mode="bar") as progress:
        progress.embedded(4)
        progress.failed(1)
    captured = capsys.readouterr()
    assert "10/10" in captured.err
    assert "failed=1" in captured.err
    assert captured.out == ""


@pytest.mark.parametrize("columns", [0, 100])
def test_a_terminal_gets_the_bar_whatever_it_says_of_its_width(columns: int) -> None:
    import fcntl
    import os
    import pty
    import struct
    import subprocess
    import sys
    import termios

    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24 if columns else 0, columns, 0, 0))
    code = (
        "from pipeline.telemetry.progress import Progress\n"
        "with Progress(10, done=0, mode='auto') as p: p.embedded(9); p.failed(1)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, stderr=follower, check=True)
    os.close(follower)
    shown = os.read(leader, 10_000).decode()
    os.close(leader)
    assert "10/10" in shown
    assert "failed=1" in shown


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_the_log_lies_beside_the_dataset(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    storage = open_storage(str(tmp_path / "new") if kind == "local" else "memory://logs")
    log = logging.getLogger("pipeline.somewhere")
    with log_to(storage):
        log.info("a sentence")
        log.warning("a worry")
    log.info("not any more")
    text = (storage.read(NAME) or b"").decode()
    assert "INFO pipeline.somewhere: a sentence" in text
    assert "not any more" not in text
    with pytest.raises(StorageError, match="no space"), log_to(storage):
        raise StorageError("no space")
    with pytest.raises(ZeroDivisionError), log_to(storage):
        print(1 / 0)
    text = (storage.read(NAME) or b"").decode()
    assert "Traceback" in text
    assert kind == "memory" or "ERROR pipeline: no space\n" in text
    assert capsys.readouterr().err == "a sentence\nwarning: a worry\n"


def test_the_page_tells_how_near_to_fp32_the_backend_is() -> None:
    def text(parity: Parity | None) -> str:
        return render(replace(REPORT, parity=parity))

    assert REPORT.parity is not None
    for words in ("Compared with fp32", "0.998750", "98.4 %", "&lt;i&gt;odd&lt;/i&gt;.jpg"):
        assert words in text(REPORT.parity)
    assert "Compared with fp32" not in text(None)
    fast = asdict(replace(Config(), images=ImagesConfig(decoder="fast")))
    html = render(replace(REPORT, decoder_parity=REPORT.parity, config=fast))
    assert "Compared with the exact decoder" in html
    assert "decoded by images.decoder=fast and by exact" in html
    unlabelled = text(replace(REPORT.parity, top1=None))
    assert "Compared with fp32" in unlabelled
    assert "same best label" not in unlabelled
