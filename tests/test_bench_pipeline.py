"""The benchmark of the pipeline: its arithmetic, its files, its command, and a real run on a few scenes."""

from __future__ import annotations

import dataclasses
import itertools
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.bench import command, pipeline, pipeline_records, pipeline_report, pipeline_run, report, stages, timing
from pipeline.bench.images import take_images
from pipeline.bench.pipeline_records import JobRounds, PipelineBench, StageRounds
from pipeline.config.compose import compose_config
from pipeline.core.child import ChildEnded
from pipeline.core.errors import ConfigError
from pipeline.core.records import Stage
from pipeline.images.factory import pixel_reader
from pipeline.manifest.manifest import open_manifest
from pipeline.models.preprocessor import to_spec
from tests.jobs import config_for, scenes_manifest
from tests.test_bench import run


def stage(name: str, rates: tuple[float, ...], cores: tuple[float, ...], decoder: str | None = None) -> StageRounds:
    return StageRounds(name=name, threads=2, images_per_second=rates, core_seconds=cores, decoder=decoder)


def plausible() -> PipelineBench:
    """Two cores, three rounds: 100 ms of core time an image, so that the bound is 20 images/s."""
    return PipelineBench(
        started="2026-11-03T10:20:30+00:00",
        command="python -m pipeline.bench pipeline model=clip_vit_b32",
        model="clip_vit_b32 (random weights)",
        images="372 images of the manifest (median 0.24 megapixels, 41 kB; 372 in memory for the stages alone)",
        backend="torch fp32",
        decoder="exact",
        labels=10,
        batch=31,
        streams=2,
        padding=0.0,
        repeats=3,
        seconds=4.0,
        machine={"processor": "A fast one", "cores": 2, "system": "Linux", "device": "cpu", "instructions": "AVX512"},
        versions={"python": "3.11.7", "torch": "2.13.0"},
        stages=(
            stage("rows", (90_000.0,) * 3, (0.0,) * 3),
            stage(Stage.READ, (40_000.0,) * 3, (0.0, 0.0, 0.0)),
            stage(Stage.DECODE, (200.0,) * 3, (0.010, 0.010, 0.030)),
            stage(Stage.COPY, (40_000.0,) * 3, (0.0,) * 3),
            stage(Stage.ENCODE, (22.0, 22.2, 21.0), (0.090, 0.090, 0.090)),
            stage(Stage.LABEL, (80_000.0,) * 3, (0.0,) * 3),
            stage(Stage.WRITE, (9_000.0,) * 3, (0.0,) * 3),
        ),
        decoders=(stage(Stage.DECODE, (400.0,) * 3, (0.005,) * 3, "fast"),),
        job=JobRounds(
            steady=(18.0, 19.0, 19.5),
            command=(14.0, 15.0, 15.5),
            startup=(7.0, 7.0, 7.0),
            core_seconds=(0.2, 0.2, 0.2),
            peak_mib=1800.0,
            peak_decoder_mib=64.0,
        ),
    )


# -- arithmetic


def test_the_bound_is_of_medians_and_the_ratio_is_taken_in_each_round() -> None:
    bench = plausible()
    assert pipeline_records.limit(bench).images_per_second == pytest.approx(20.0)
    assert pipeline_records.limit(bench).by == Stage.ENCODE
    assert pipeline_records.limit(bench, number=2).images_per_second == pytest.approx(2 / 0.12)
    assert pipeline_records.ratios(bench) == pytest.approx([0.9, 0.95, 19.5 / (2 / 0.12)])
    assert pipeline_records.shares(bench)[Stage.ENCODE] == pytest.approx(0.9)


def test_another_decoder_moves_the_bound_by_what_it_saves() -> None:
    bench = plausible()
    assert pipeline_records.limit(bench, decoder=bench.decoders[0]).images_per_second == pytest.approx(2 / 0.095)
    assert pipeline_records.limit(bench, without=Stage.DECODE).images_per_second == pytest.approx(2 / 0.09)


def test_the_findings_name_the_bound_the_gains_and_the_whole_command() -> None:
    found = pipeline_report.findings(plausible())
    assert found[0] == (
        "2 cores allow at most 20.0 images/s; this run had 19.0 (95%); core time: encode 90%, decode 10%; the ratio is "
        "0.950 (0.900 - 1.170)"
    )
    assert found[1] == (
        "the decoder fast does 2.00 times as many images a core as exact; images.decoder=fast moves the bound to "
        "21.1 images/s (+5.3%)"
    )
    assert found[2] == "the most that a faster decode could give is 22.2 images/s (+11.1%)"
    assert found[3] == (
        "the whole command did 15.0 images/s (14.0 - 15.5), with 7.0 s of start-up and 200.0 core ms an image"
    )
    assert len(found) == 4


def test_padding_is_counted_by_shard() -> None:
    assert pipeline_run.padding(372, 4096, 31) == 0.0
    assert pipeline_run.padding(100, 4096, 64) == pytest.approx(28 / 128)
    # Two shards of 24, each in three batches of 10, and a last one of 2.
    assert pipeline_run.padding(50, 24, 10) == pytest.approx(1 - 50 / 70)


# -- files


class Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        assert not {"src", "href"} & {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_markdown_and_the_page_hold_the_same_and_load_nothing() -> None:
    bench = plausible()
    content, found = pipeline_report.to_report(bench), Text()
    text = report.to_markdown(content)
    found.feed(report.to_html(content).decode())
    assert "| **the whole** | - | 19.0 | 18.0 - 19.5 |" in text
    assert "| decode (exact) | 2 | 200.0 | 200.0 - 200.0 | 10.000 | 10.0% |" in text
    assert "| decode (fast) | 2 | 400.0 | 400.0 - 400.0 | 5.000 | - |" in text
    assert "| the bound | 2 | 20.0 | 16.7 - 20.0 | 100.000 | 100% |" in text
    assert "1,800 MiB" in found.text
    assert "64 MiB of a decoder process" in found.text
    for words in (*pipeline_report.findings(bench)[1:], "372 images of the manifest", "AVX512", bench.command):
        shown = words[:1].upper() + words[1:]
        assert words in text or shown in text
        assert words in found.text or shown in found.text
    assert "script" not in found.tags


def test_a_report_without_other_decoders_names_the_padding() -> None:
    bare = pipeline_report.to_report(dataclasses.replace(plausible(), decoders=(), padding=0.3))
    assert "the whole" in report.to_html(bare).decode()
    assert "30.0% of the encoder's rows were padding" in report.to_markdown(bare)


# -- the command


@pytest.mark.parametrize("text", ["plain", "with space", "it's", "a\\", "a\\'b", "a,b=c]{}$x", 'say "so"'])
def test_a_path_reaches_the_config_whatever_is_in_it(text: str) -> None:
    config = compose_config([f"output.dir={command.quoted(f'/x/{text}')}"])
    assert config.output.dir == f"/x/{text}"


def test_later_overrides_replace_those_of_the_same_key() -> None:
    assert pipeline_run.merged(["a.b=1", "c=2"], ["a.b=3", "d=4"]) == ["c=2", "a.b=3", "d=4"]


def test_all_problems_of_the_command_line_are_reported_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--size", "12", "--decoders", "exact,quick", "--repeats", "0", "--images", "0"]
    code = pipeline.main([*options, "loader.batch_size=x", "backend=torhc"])
    said = capsys.readouterr().err
    assert code == ConfigError.exit_code
    for words in ("--size", "quick", "--repeats", "--images", "loader.batch_size", "torhc"):
        assert words in said


def test_labels_and_sizes_are_filled_in_where_the_config_has_none() -> None:
    config = compose_config([*pipeline_run.defaults(compose_config(["model=clip_vit_b32"]))])
    assert config.images.repeats == "each"
    assert len(config.prompts.labels) == 10
    assert config.loader.batch_size > 0
    assert config.manifest.shard_rows == 4096
    given = compose_config(["prompts.labels=[cat]", "loader.batch_size=8", "manifest.shard_rows=100"])
    assert pipeline_run.defaults(given) == ["images.repeats=each"]


# -- pieces


def test_a_measurement_continues_after_the_last_piece_and_counts_core_seconds() -> None:
    numbers, seen, lock = itertools.count(), [], threading.Lock()

    def work() -> int:
        with lock:
            seen.append(next(numbers))
        until = time.thread_time() + 0.005
        while time.thread_time() < until:
            pass
        return 2

    with ThreadPoolExecutor(2) as pool:
        first = timing.measure(work, 0.1, timing.Workers(2, pool.submit))
        timing.measure(work, 0.0, timing.Workers(1, pool.submit))
    assert sorted(seen) == list(range(len(seen)))
    assert first.core_seconds == pytest.approx(0.0025, rel=0.5)
    assert first.images_per_second > 0


def test_a_run_begins_without_the_output_of_one_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, seen = tmp_path / "dataset", []

    class Failing:
        def __init__(self, command: list[str], *, log: Path, answers: bool) -> None:
            seen.append(output.exists())
            output.mkdir()
            (output / "_plan.json").write_text("{}")

        def wait(self, *, timeout: float) -> None:
            raise ChildEnded("not done within 1 s", "timeout")

        def __enter__(self) -> Failing:
            return self

        def __exit__(self, *error: object) -> None:
            return

    monkeypatch.setattr(pipeline_run, "Child", Failing)
    for overrides in ((), ("backend=onnx",)):
        with pytest.raises(ChildEnded):
            pipeline_run.run_job(overrides, tmp_path, streams=1, timeout=1.0)
    assert seen == [False, False]


def test_bad_images_are_left_out_and_good_ones_are_repeated(tmp_path: Path) -> None:
    config = config_for(scenes_manifest(tmp_path / "scenes.parquet", 24), tmp_path / "out")
    manifest, spec = open_manifest(config.manifest), to_spec({}, "clip", "here")
    with pixel_reader(config, manifest.root, spec) as reader:
        found = take_images(manifest, reader, tmp_path, count=30, threads=2)
    assert (found.count, found.bad, len(found.encoded)) == (30, 2, 22)
    assert found.pixels.shape == (22, *spec.size, 3)
    table = pq.read_table(found.manifest["path"])
    assert len(set(table["id"].to_pylist())) == 30
    assert table["image"][22].as_py() == table["image"][0].as_py() == found.encoded[0]


# -- a real run


@pytest.mark.slow
def test_the_demo_model_is_measured_from_scenes_to_the_report(tmp_path: Path) -> None:
    done = run(
        *("pipeline", "--images", "48", "--size", "96x64", "--repeats", "1", "--seconds", "0.05"),
        *("--decoders", "exact", "--out", str(tmp_path), "loader.batch_size=8", "backend.device=cpu"),
    )
    assert done.returncode == 0, done.stderr
    bench = json.loads((tmp_path / "pipeline.json").read_text())
    assert [stage["name"] for stage in bench["stages"]] == list(stages.NAMES)
    assert all(stage["images_per_second"][0] > 0 for stage in bench["stages"])
    assert all(stage["core_seconds"][0] > 0 for stage in bench["stages"] if stage["name"] in ("decode", "encode"))
    whole = bench["job"]
    assert whole["steady"][0] > whole["command"][0] > 0
    assert whole["core_seconds"][0] > 0
    assert whole["peak_mib"] > 100
    assert bench["images"].startswith("48 rendered scenes (median 0.01 megapixels")
    assert "images/s, " in done.stdout
    assert (tmp_path / "pipeline.md").read_text() == done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pipeline.html", "pipeline.json", "pipeline.md"]
