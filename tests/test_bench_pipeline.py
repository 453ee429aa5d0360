"""The benchmark of the pipeline: its arithmetic, its files, its door, and the real thing on a few scenes."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from pipeline.bench import baselines, pipeline, pipeline_records, pipeline_report, pipeline_run
from pipeline.bench.inputs import copy_images, preprocessor_of
from pipeline.bench.pipeline_records import PipelineBench, RunRounds, StageRounds
from pipeline.bench.subprocesses import CommandFailed, Ran, run_command
from pipeline.bench.throughput import Race
from pipeline.config.compose import compose_config
from pipeline.config.schema import ModelConfig
from pipeline.core.errors import ConfigError
from pipeline.core.records import Stage
from pipeline.images.factory import pixel_reader
from pipeline.manifest.manifest import open_manifest
from pipeline.models.checkpoint import open_checkpoint
from pipeline.models.preprocessor import to_spec
from tests.jobs import config_for, scenes_manifest
from tests.test_bench import run

needs_tools = pytest.mark.skipif(
    os.environ.get("PIPELINE_TEST_TOOLS") != "1", reason="PIPELINE_TEST_TOOLS=1 allows tests that run other tools"
)


def stage(name: str, rates: tuple[float, ...], cores: tuple[float, ...], decoder: str | None = None) -> StageRounds:
    return StageRounds(name=name, threads=2, images_per_second=rates, core_seconds=cores, decoder=decoder)


def ran(title: str, steady: tuple[float, ...], command: tuple[float, ...]) -> RunRounds:
    return RunRounds(
        title=title,
        note="as people do",
        steady=steady,
        command=command,
        startup=tuple(7.0 for _ in steady),
        core_seconds=tuple(0.2 for _ in steady),
        peak_mib=1800.0,
    )


def plausible() -> PipelineBench:
    """Two cores, three rounds: 100 ms of core time an image, so that the bound is 20 images/s."""
    whole = dataclasses.replace(ran("the job, as given", (18.0, 19.0, 19.5), (14.0, 15.0, 15.5)), peak_decoder_mib=64.0)
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
        ours=(whole, ran("the job, backend=onnx_int8", (60.0, 61.0, 66.0), (30.0, 31.0, 32.0))),
        tools=(
            ran(baselines.TRANSFORMERS, (12.0, 12.2, 12.4), (9.0, 9.0, 9.0)),
            ran(baselines.DATALOADER, (14.0, 15.0, 15.0), (8.0, 8.0, 8.0)),
            RunRounds(baselines.SENTENCES, "", failure="exit code 1: no <such> module"),
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
    assert pipeline_records.limit_without(bench, Stage.DECODE).images_per_second == pytest.approx(2 / 0.09)


def test_a_run_is_compared_with_the_best_other_tool_of_the_same_round() -> None:
    bench = plausible()
    best, whole = pipeline_records.best_tool(bench, steady=True), pipeline_records.best_tool(bench, steady=False)
    assert best is not None
    assert whole is not None
    assert (best.title, whole.title) == (baselines.DATALOADER, baselines.TRANSFORMERS)
    assert pipeline_records.times(bench, bench.ours[0], steady=True) == pytest.approx([18 / 14, 19 / 15, 19.5 / 15])
    assert pipeline_records.times(bench, bench.ours[0], steady=False) == pytest.approx([14 / 9, 15 / 9, 15.5 / 9])
    assert pipeline_records.times(dataclasses.replace(bench, tools=()), bench.ours[0], steady=True) == []


def test_the_verdict_says_what_binds_what_would_help_and_what_was_beaten() -> None:
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
        "the job, as given: 1.29 times as fast as DataLoader loop once under way, 1.67 times as fast as transformers "
        "pipeline for the whole command"
    )
    assert len(found) == 5


def test_places_that_only_fill_up_batches_are_counted_by_shard() -> None:
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


def test_the_markdown_and_the_page_say_the_same_and_load_nothing() -> None:
    bench = plausible()
    text, found = pipeline_report.to_markdown(bench), Text()
    found.feed(pipeline_report.to_html(bench).decode())
    assert "| **the whole** | - | 19.0 | 18.0 - 19.5 |" in text
    assert "| decode (exact) | 2 | 200.0 | 200.0 - 200.0 | 10.000 | 10.0% |" in text
    assert "| decode (fast) | 2 | 400.0 | 400.0 - 400.0 | 5.000 | - |" in text
    assert "| the bound | 2 | 20.0 | 16.7 - 20.0 | 100.000 | 100% |" in text
    assert "1,800 + 64 each" in text
    for words in (*pipeline_report.findings(bench)[1:], "no <such> module", "372 images of the manifest", "AVX512"):
        shown = words[:1].upper() + words[1:]
        assert words in text or shown in text
        assert words in found.text or shown in found.text
    assert "script" not in found.tags


def test_the_page_stands_without_other_tools() -> None:
    bare = dataclasses.replace(plausible(), tools=(), decoders=(), padding=0.3)
    assert "The job" in pipeline_report.to_html(bare).decode()
    assert "30.0% of the encoder's places were filled up" in pipeline_report.to_markdown(bare)
    assert "x best tool" in pipeline_report.to_markdown(bare)


# -- the door


@pytest.mark.parametrize("text", ["plain", "with space", "it's", "a\\", "a\\'b", "a,b=c]{}$x", 'say "so"'])
def test_a_path_reaches_the_config_whatever_is_in_it(text: str) -> None:
    config = compose_config([f"output.dir={pipeline.quoted(f'/x/{text}')}"])
    assert config.output.dir == f"/x/{text}"


def test_later_overrides_replace_those_of_the_same_key() -> None:
    assert pipeline.merged(["a.b=1", "c=2"], ["a.b=3", "d=4"]) == ["c=2", "a.b=3", "d=4"]


def test_what_is_wrong_with_the_command_line_is_said_all_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    code = pipeline.main(
        [
            "--size",
            "12",
            "--decoders",
            "exact,quick",
            "--repeats",
            "0",
            "loader.batch_size=x",
            "--ours",
            "backend=torhc",
        ]
    )
    said = capsys.readouterr().err
    assert code == ConfigError.exit_code
    for words in ("--size", "quick", "--repeats", "loader.batch_size", "torhc"):
        assert words in said


def test_labels_and_a_batch_size_are_filled_in_where_the_config_has_none() -> None:
    config = compose_config([*pipeline.with_labels(compose_config(["model=clip_vit_b32"]))])
    assert config.images.repeats == "each"
    assert len(config.prompts.labels) == 10
    assert config.loader.batch_size > 0
    given = compose_config(["prompts.labels=[cat]", "loader.batch_size=8"])
    assert pipeline.with_labels(given) == ["images.repeats=each"]


# -- pieces


def test_a_race_goes_on_where_it_stopped_and_counts_core_seconds() -> None:
    race, seen, lock = Race(), [], threading.Lock()

    def unit(number: int) -> int:
        with lock:
            seen.append(number)
        until = time.thread_time() + 0.005
        while time.thread_time() < until:
            pass
        return 2

    with ThreadPoolExecutor(2) as pool:
        first = race.run(unit, threads=2, seconds=0.1, submit=pool.submit)
        race.run(unit, threads=1, seconds=0.0, submit=pool.submit)
    assert sorted(seen) == list(range(len(seen)))
    assert first.core_seconds == pytest.approx(0.0025, rel=0.5)
    assert first.images_per_second > 0


def test_a_command_that_fails_or_hangs_is_told_with_its_last_words(tmp_path: Path) -> None:
    log = tmp_path / "log"
    ran = run_command([sys.executable, "-c", "print('fine')"], log=log, timeout=60)
    assert ran.seconds > 0
    assert ran.core_seconds > 0
    with pytest.raises(CommandFailed, match="exit code 1: no way"):
        run_command([sys.executable, "-c", "raise SystemExit('no way')"], log=log, timeout=60)
    with pytest.raises(CommandFailed, match=r"not done within 0\.5 s"):
        run_command([sys.executable, "-c", "import time; time.sleep(60)"], log=log, timeout=0.5)


def test_a_run_finds_nothing_of_one_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, seen = tmp_path / "dataset", []

    def fail(command: list[str], *, log: Path, timeout: float) -> Ran:
        seen.append(output.exists())
        output.mkdir()
        (output / "_plan.json").write_text("{}")
        raise CommandFailed("not done within 1 s")

    monkeypatch.setattr(pipeline_run, "run_command", fail)
    job = pipeline_run._Job(tmp_path, {"manifest": {"path": "m.parquet"}, "streams": 1}, timeout=1.0)
    for overrides in ((), ("backend=onnx",)):
        with pytest.raises(CommandFailed):
            job.turn(overrides)(0)
    assert seen == [False, False]


def test_bad_images_are_left_out_and_good_ones_are_repeated(tmp_path: Path) -> None:
    config = config_for(scenes_manifest(tmp_path / "scenes.parquet", 24), tmp_path / "out")
    manifest, spec = open_manifest(config.manifest), to_spec({}, "clip", "here")
    with pixel_reader(config, manifest.root, spec) as reader:
        found = copy_images(manifest, reader, tmp_path, count=30, files=True, threads=2)
    assert (found.facts.images, found.facts.bad, found.facts.held) == (30, 2, 22)
    assert found.pixels.shape == (22, *spec.size, 3)
    table = pq.read_table(found.manifest["path"])
    assert len(set(table["id"].to_pylist())) == 30
    assert table["image"][22].as_py() == table["image"][0].as_py() == found.encoded[0]
    files = json.loads((tmp_path / "files.json").read_text())
    assert len(files) == 30
    assert Path(files[29]).read_bytes() == table["image"][29].as_py()


@pytest.mark.parametrize("family", ["clip", "siglip", "chinese_clip"])
def test_the_preprocessing_that_is_saved_for_other_tools_is_the_models_own(family: str) -> None:
    spec = to_spec({}, family, "here")
    assert to_spec(preprocessor_of(spec, family), family, "there") == spec


# -- the real thing


@pytest.mark.slow
def test_the_demo_model_is_measured_from_scenes_to_verdict(tmp_path: Path) -> None:
    done = run(
        *("pipeline", "--no-tools", "--images", "48", "--size", "96x64", "--repeats", "1", "--seconds", "0.05"),
        *("--decoders", "exact", "--out", str(tmp_path), "loader.batch_size=8", "backend.device=cpu"),
    )
    assert done.returncode == 0, done.stderr
    bench = json.loads((tmp_path / "pipeline.json").read_text())
    assert [stage["name"] for stage in bench["stages"]] == list(pipeline_run.STAGES)
    assert all(stage["images_per_second"][0] > 0 for stage in bench["stages"])
    assert all(stage["core_seconds"][0] > 0 for stage in bench["stages"] if stage["name"] in ("decode", "encode"))
    whole = bench["ours"][0]
    assert whole["failure"] is None
    assert whole["steady"][0] > whole["command"][0] > 0
    assert whole["peak_mib"] > 100
    assert bench["images"].startswith("48 rendered scenes (median 0.01 megapixels")
    assert "images/s on" in done.stdout
    assert (tmp_path / "pipeline.md").read_text() == done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pipeline.html", "pipeline.json", "pipeline.md"]


@needs_tools
def test_other_tools_run_on_the_same_files_and_find_the_same_vectors(tmp_path: Path) -> None:
    from pipeline.bench.inputs import save_model
    from pipeline.engine.demo.folder import render_folder

    checkpoint = open_checkpoint(ModelConfig())
    save_model(checkpoint, tmp_path / "model")
    manifest = render_folder(tmp_path / "scenes", 12, width=64, height=64)
    files = [str(manifest.parent / name) for name in pq.read_table(manifest)["path"].to_pylist()]
    (tmp_path / "files.json").write_text(json.dumps(files))
    asked = {
        **{"model": str(tmp_path / "model"), "files": str(tmp_path / "files.json"), "batch": 4, "workers": 2},
        **{"prompts": ["red circle", "blue star"], "device": "cpu", "dtype": "float32"},
    }
    config = config_for(manifest, tmp_path / "out", manifest={"image": "path", "keep": []})
    with pixel_reader(config, open_manifest(config.manifest).root, checkpoint.spec) as reader:
        pixels = copy_images(open_manifest(config.manifest), reader, tmp_path, count=12, files=False, threads=1).pixels
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (checkpoint.spec.mean, checkpoint.spec.std))
    with torch.inference_mode():
        ours = checkpoint.image_features((pixels.permute(0, 3, 1, 2) / 255 - mean) / std)
    ours = torch.nn.functional.normalize(ours, dim=1)
    labels = {}
    for tool in baselines.installed():
        request, answer, out = tmp_path / "request.json", tmp_path / "answer.json", tmp_path / "out.parquet"
        request.write_text(json.dumps({**asked, "tool": tool, "out": str(out)}))
        command = [sys.executable, "-m", "pipeline.bench.baselines", str(request), str(answer)]
        run_command(command, log=tmp_path / "tool.log", timeout=300)
        told = json.loads(answer.read_text())
        assert told["first"] < told["written"]
        table = pq.read_table(out)
        assert table["path"].to_pylist() == files
        labels[tool] = table["label"].to_pylist()
        if "embedding" in table.column_names:
            theirs = torch.tensor(table["embedding"].to_pylist())
            assert (ours * theirs).sum(dim=1).min() > 0.999
    assert len(set(map(tuple, labels.values()))) == 1
