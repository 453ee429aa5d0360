"""The benchmark of backends: its rows, its figures, its child processes, and the command."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from pipeline.bench import backends_run, selection, stats
from pipeline.bench.records import Row
from pipeline.config.schema import Config
from pipeline.core.child import Child
from pipeline.core.errors import PipelineError
from tests.conftest import ROOT
from tests.jobs import scenes_manifest
from tests.processes import is_running, run_python, wait_until
from tests.test_bench_report import measured, plausible

HEAVY = ("torch", "transformers", "pyarrow", "PIL", "matplotlib", "onnxruntime")
# Answers requests without computing anything; the name of the backend chooses its failure.
STUB = """
import json, os, sys, time
import numpy as np
setup = json.loads(sys.stdin.readline())
kind = setup["config"]["backend"]["name"]
print("{}", flush=True)
work, opened, measured = setup["work"], 0, 0
for line in sys.stdin:
    request = json.loads(line)
    with open(work + "/order.txt", "a") as file:
        file.write(f"{request['do']} {kind}\\n")
    if request["do"] == "prepare":
        np.savez(work + "/sample.npz", pixels=np.zeros((2, 4, 4, 3), np.uint8), ids=np.array(["a", "b"]))
        np.savez(work + "/bank.npz", names=np.array(["x", "y"]), features=np.eye(2, dtype=np.float32))
        answer = {"device": "cpu", "images": 2, "labels": 2, "sample": "nothing", "machine": {"device": "cpu"}}
    elif request["do"] == "open":
        opened += 1
        if kind == "onnx" or (kind == "tensorrt" and request["batch"] > 1):
            print("last words", file=sys.stderr, flush=True)
            os.kill(os.getpid(), 9)
        if kind == "torch_int8":
            answer = {"error": "no such kernel here", "exit_code": 2}
        elif kind == "torch_fp8":
            time.sleep(60)
        else:
            np.save(request["vectors"], np.array([[1, 0], [0.6, 0.8]] if kind == "torch" else [[1, 0], [0.8, 0.6]]))
            answer = {"startup_seconds": 0.5 * opened, "precision": "fp32", "weight_bytes": 7, "fingerprint": {}}
    else:
        measured += 1
        if kind == "torchscript" and measured == 2:
            sys.exit(3)
        rate = 10.0 * measured if kind == "torch" else 30.0
        answer = {"images_per_second": rate, "latencies": [1 / rate], "rss": 50.0 + measured, "device": 0.0}
    print(json.dumps(answer), flush=True)
"""


def stub(row: Row, work: Path) -> Child:
    return Child([sys.executable, "-c", STUB], log=work / f"{row.file_name}.log")


def plan(*names: str, batches: tuple[int, ...] = (1, 4), repeats: int = 2, timeout: float = 30.0) -> backends_run.Plan:
    return backends_run.Plan([Row(name) for name in names], list(batches), repeats, seconds=0.1, timeout=timeout)


# -- rows


def test_a_backend_alone_stands_for_all_its_rows_and_words_choose_one() -> None:
    found, problems = selection.read_only(
        "onnx_int8, torch:compiled:bf16 ,torch:fp16:max-autotune,onnx:fp32,onnx_int8:static"
    )
    assert problems == []
    assert found == [
        Row("onnx_int8", "int8"),
        Row("onnx_int8", "int8", quantization="static"),
        Row("torch", "bf16", "compiled"),
        Row("torch", "fp16", "max-autotune"),
        Row("onnx", "fp32"),
    ]


def test_all_problems_of_the_options_are_reported_at_once() -> None:
    _, problems = selection.read_only("torhc,torch:bf61,onnx:compiled,tensorrt")
    assert [(problem.value, problem.hint) for problem in problems] == [
        ("torhc", "did you mean torch?"),
        ("torch:bf61", "did you mean bf16?"),
        ("onnx:compiled", ""),
    ]
    assert [problem.value for problem in selection.read_only(",")[1]] == [","]
    assert selection.read_batches("32,1, 8,32") == ([1, 8, 32], [])
    assert [problem.value for problem in selection.read_batches("8,x,0,65537,")[1]] == ["x", "0", "65537", ""]


def test_the_reference_comes_first_and_compiled_depends_on_the_device() -> None:
    assert selection.for_device([Row("torch", "bf16", "compiled")], "cuda") == [
        selection.REFERENCE,
        Row("torch", "bf16", "reduce-overhead"),
    ]
    assert selection.for_device(selection.ROWS, "cpu")[:2] == [selection.REFERENCE, Row("torch", "fp32", "default")]
    assert len(selection.for_device(selection.ROWS, "cpu")) == len(selection.ROWS)


@pytest.mark.parametrize(
    ("row", "precision", "title", "overrides"),
    [
        (
            Row("torch", "bf16", "default"),
            "bf16",
            "torch bf16 compiled",
            "backend=torch backend.precision=bf16 backend.compile=default",
        ),
        (Row("torchscript"), "fp32", "torchscript fp32", "backend=torchscript backend.precision=fp32"),
        (Row("torchscript"), "auto", "torchscript", ""),
        (
            Row("onnx_int8", "int8", quantization="static"),
            "int8",
            "onnx_int8 static",
            "backend=onnx_int8 backend.quantization=static",
        ),
        (Row("tensorrt", "fp16"), "fp16", "tensorrt", "backend=tensorrt"),
    ],
)
def test_a_row_has_a_title_and_the_overrides_that_give_it(row: Row, precision: str, title: str, overrides: str) -> None:
    from pipeline.config.compose import compose_config

    assert row.title(precision) == title
    if overrides:
        assert " ".join(row.overrides(precision)) == overrides
        opened = compose_config(row.overrides(precision)).backend
        assert (opened.name, opened.compile, opened.quantization) == (row.backend, row.compile, row.quantization)


# -- figures


def test_percentiles_are_measured_values() -> None:
    values = [float(i) for i in range(1, 101)]
    assert stats.percentile(values[::-1], 99) == 99
    assert stats.percentile(values, 50) == 50
    assert stats.percentile([5.0, 1.0], 99) == 5
    assert stats.percentile([3.0], 50) == 3


def test_ratios_are_of_medians_at_the_best_and_at_the_same_batch() -> None:
    bench = plausible()
    reference = dataclasses.replace(
        bench.results[0], at=(measured(1, (9.0, 10.0, 100.0)), measured(8, (20.0, 21.0)), measured(32, (5.0, 15.0)))
    )
    other = dataclasses.replace(bench.results[2], at=(measured(1, (30.0,)), measured(32, (80.0, 90.0, 60.0))))
    assert stats.best(reference) is reference.at[1]
    assert stats.rate(reference.at[0]) == 10
    assert stats.speed(other, reference) == pytest.approx(80 / 20.5)
    assert stats.speed_at_same_batch(other, reference) == pytest.approx(80 / 10)
    assert stats.speed(bench.results[-1], reference) is None


def test_the_advice_is_the_fastest_row_that_holds_the_thresholds() -> None:
    advice = stats.advise(plausible())
    assert advice.text == "onnx_int8 dynamic: 4.1 times torch fp32 (58.8 images/s at batch 32), lowest cosine 0.9998"
    assert advice.overrides == "backend=onnx_int8 loader.batch_size=32"
    assert advice.remark == "onnx_int8 static is faster (61.6 images/s), but its lowest cosine 0.9670 is below 0.98"


def test_torch_fp32_is_advised_where_nothing_faster_holds() -> None:
    bench = plausible()
    strict = dataclasses.replace(bench, results=(bench.results[0], bench.results[-4]))
    assert strict.results[1].title == "onnx_int8 static"
    advice = stats.advise(strict)
    assert advice.text == "torch fp32: 14.4 images/s at batch 32; nothing that holds the parity thresholds is faster"
    assert advice.overrides == "backend=torch backend.precision=fp32 loader.batch_size=32"


def test_a_cosine_is_never_rounded_up() -> None:
    assert stats.floored(0.999996, 5) == "0.99999"
    assert stats.floored(0.9998, 4) == "0.9998"
    assert stats.floored(1 - 1e-9, 4) == "1.0000"
    assert stats.floored(-1.0, 2) == "-1.00"


# -- children and rounds


def test_rows_that_cannot_run_are_listed_with_the_reason_and_the_rest_goes_on(tmp_path: Path) -> None:
    chosen = plan("onnx", "torch_int8", "torchscript", "tensorrt", "onnx_int8")
    results, _ = backends_run.run(Config(), chosen, tmp_path, start=stub)
    found = {result.row.backend: result for result in results}
    assert [one.batch for one in found["torch"].at] == [1, 4]
    assert [one.batch for one in found["onnx_int8"].at] == [1, 4]
    assert found["onnx_int8"].failure is None
    died = "the process was ended by SIGKILL, often a sign that memory ran out"
    assert found["onnx"].failure == f"{died}: last words"
    assert found["torch_int8"].failure == "no such kernel here"
    assert found["torchscript"].failure == "the process ended with exit code 3"
    assert found["torchscript"].at == ()
    assert [one.batch for one in found["tensorrt"].at] == [1]
    assert found["tensorrt"].failure == f"stopped after batch 1: {died}: last words"


@pytest.mark.slow
def test_a_row_that_does_not_answer_in_time_is_ended(tmp_path: Path) -> None:
    results, _ = backends_run.run(Config(), plan("torch_fp8", timeout=3.0), tmp_path, start=stub)
    assert results[1].failure == "no answer within 3 s; --timeout sets another limit"
    assert len(results[0].at) == 2


def test_rounds_go_over_all_rows_in_turn_one_at_a_time(tmp_path: Path) -> None:
    results, _ = backends_run.run(
        Config(), plan("tensorrt", "onnx_int8", batches=(1,), repeats=3), tmp_path, start=stub
    )
    order = (tmp_path / "order.txt").read_text().splitlines()
    assert order == [
        "prepare torch",
        *("open torch", "open tensorrt", "open onnx_int8"),
        *("measure torch", "measure tensorrt", "measure onnx_int8"),
        *("measure tensorrt", "measure onnx_int8", "measure torch"),
        *("measure onnx_int8", "measure torch", "measure tensorrt"),
    ]
    reference, other = results[0].at[0], results[1].at[0]
    assert reference.images_per_second == (10.0, 20.0, 30.0)
    assert reference.latencies == (1 / 10, 1 / 20, 1 / 30)
    assert (reference.rss, reference.startup_seconds) == (53.0, 0.5)
    assert (reference.lowest_cosine, reference.top1) == (1.0, 1.0)
    # [0.6, 0.8] against [0.8, 0.6]: another label is the best.
    assert other.lowest_cosine == pytest.approx(0.96)
    assert other.mean_cosine == pytest.approx(0.98)
    assert other.top1 == 0.5


def test_without_the_reference_there_is_no_table(tmp_path: Path) -> None:
    def broken(row: Row, work: Path) -> Child:
        return Child([sys.executable, "-c", "raise SystemExit('no')"], log=work / "log")

    with pytest.raises(PipelineError, match="ended with exit code 1: no"):
        backends_run.run(Config(), plan("onnx_int8"), tmp_path, start=broken)


def test_thresholds_do_not_keep_a_row_out_unless_its_exports_are_kept() -> None:
    config = Config()
    private = backends_run._set_up(Row("onnx"), config, Path("/work"))["config"]
    assert private["backend"]["artifacts"] == "/work/onnx-auto-none-dynamic/artifacts"
    assert set(private["parity"]["lowest_cosine"].values()) == {0.0}
    kept = dataclasses.replace(config, backend=dataclasses.replace(config.backend, artifacts="/kept"))
    shared = backends_run._set_up(Row("onnx"), kept, Path("/work"))["config"]
    assert (shared["backend"]["artifacts"], shared["parity"]) == ("/kept", dataclasses.asdict(config.parity))


# -- a real run


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def finished(work: Path) -> subprocess.CompletedProcess[str]:
    """The demo model through real processes, with a sample from a manifest."""
    manifest = scenes_manifest(work / "scenes.parquet", 12)
    return run(
        *("backends", "--only", "torch:bf16,torch:fp16", "--batches", "2,1", "--repeats", "2", "--seconds", "0.02"),
        *("--out", str(work / "out"), "backend.device=cpu", "parity.images=5", "prompts.labels=[red circle,blue star]"),
        *(f"manifest.path={manifest}", "manifest.image=image"),
    )


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_python("-m", "pipeline.bench", *arguments, timeout=300)


@pytest.mark.slow
def test_the_demo_model_is_measured_for_real(finished: subprocess.CompletedProcess[str], work: Path) -> None:
    assert finished.returncode == 0, finished.stderr
    assert sorted(path.name for path in (work / "out").iterdir()) == ["backends.html", "backends.json", "backends.md"]
    assert finished.stdout == (work / "out" / "backends.md").read_text()
    bench = json.loads((work / "out" / "backends.json").read_text())
    assert (bench["images"], bench["labels"], bench["model"]) == (5, 2, "demo (pretrained)")
    assert bench["sample"] == f"images of {work}/scenes.parquet"
    assert bench["command"].startswith("python -m pipeline.bench backends --only torch:bf16,torch:fp16 ")
    assert bench["machine"]["device"] == "cpu"
    assert {"python", "torch"} <= set(bench["versions"])
    exact, half, refused = bench["results"]
    assert [r["row"]["precision"] for r in (exact, half, refused)] == ["fp32", "bf16", "fp16"]
    for result in (exact, half):
        assert result["failure"] is None
        assert [one["batch"] for one in result["at"]] == [1, 2]
        for one in result["at"]:
            assert len(one["images_per_second"]) == 2
            assert min(one["images_per_second"]) > 0
            assert one["rss"] > 100
            assert one["startup_seconds"] > 0
        single = result["at"][0]
        assert 1 / np.mean(single["latencies"]) == pytest.approx(np.mean(single["images_per_second"]), rel=1)
        assert result["at"][1]["latencies"] == []
    assert exact["weight_bytes"] > 1.9 * half["weight_bytes"] > 0
    assert exact["at"][0]["lowest_cosine"] == pytest.approx(1, abs=1e-9)
    assert 0.99 < half["at"][0]["lowest_cosine"] < 1 - 1e-7
    assert "fp16 needs CUDA" in refused["failure"]
    assert refused["at"] == []


@pytest.mark.slow
def test_progress_is_printed_to_standard_error(finished: subprocess.CompletedProcess[str]) -> None:
    lines = finished.stderr.splitlines()
    assert lines[0] == "opening the model, drawing the sample, embedding the labels"
    assert any(line.startswith("batch 1 (1 of 2): torch bf16 opened in ") for line in lines)
    assert any(line.startswith("batch 1 (1 of 2): torch fp16 cannot run: ") for line in lines)
    assert sum(", round " in line for line in lines) == 4
    assert "Traceback" not in finished.stderr


@pytest.mark.slow
def test_children_end_when_the_parent_is_killed_or_interrupted(tmp_path: Path) -> None:
    for how in (signal.SIGKILL, signal.SIGINT):
        command = [sys.executable, "-m", "pipeline.bench", "--only", "torch:bf16", "--out", str(tmp_path / how.name)]
        parent = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        assert parent.stderr is not None
        assert parent.stderr.readline().startswith("opening")
        children = wait_for_children(parent.pid)
        os.kill(parent.pid, how)
        rest = parent.stderr.read()
        code = parent.wait(20)
        assert_ended(children)
        if how == signal.SIGINT:
            assert code == 1
            assert rest == "error: interrupted; nothing was written\n"
            assert list((tmp_path / how.name).iterdir()) == []
        parent.stderr.close()


def wait_for_children(pid: int) -> list[int]:
    """The children of a process, once the first one imports its libraries."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        children = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        # Its memory grows once it imports libraries.
        if children and int(Path(f"/proc/{children[0]}/statm").read_text().split()[1]) > 10_000:
            return children
        time.sleep(0.05)
    raise AssertionError("no child was started")


def assert_ended(pids: list[int]) -> None:
    """Check that they ended at once, not when the libraries are loaded and the answer finds no reader."""
    wait_until(lambda: not any(map(is_running, pids)), 2)


# -- the command


def test_help_is_quick_and_loads_nothing_heavy() -> None:
    code = (
        "import sys, pipeline.bench.__main__ as command\n"
        "try: command.main(['backends', '--help'])\n"
        f"finally: print([name for name in {HEAVY} if name in sys.modules])"
    )
    started = time.perf_counter()
    done = run_python("-c", code)
    assert time.perf_counter() - started < 3
    assert done.returncode == 0
    assert "--only ROWS" in done.stdout
    assert done.stdout.endswith("[]\n")


def test_all_problems_of_a_command_line_come_at_once_with_exit_code_2(tmp_path: Path) -> None:
    given = (
        "--only",
        "torch:bf61",
        "--batches",
        "0",
        "--repeats",
        "0",
        "--seconds",
        "nan",
        "--out",
        str(tmp_path / "out"),
    )
    done = run(*given, "modle=demo", "loader.workers=abc")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "the config has 6 problems" in done.stderr
    for word in ("torch:bf61", "--batches", "--repeats", "--seconds", "did you mean model?", "loader.workers"):
        assert word in done.stderr
    assert not (tmp_path / "out").exists()


def test_what_goes_by_row_cannot_be_set_for_all(tmp_path: Path) -> None:
    done = run("--out", str(tmp_path / "out"), "backend=onnx", "backend.precision=fp32", "loader.batch_size=8")
    assert done.returncode == 2
    assert "the config has 3 problems" in done.stderr
    assert "--only" in done.stderr
    assert "--batches" in done.stderr


@pytest.mark.slow
def test_a_device_that_is_not_there_ends_with_its_reason(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    done = run("--only", "torch:fp32", "--out", str(tmp_path / "out"), "backend.device=cuda")
    assert done.returncode == 2
    assert "error: backend.device=cuda" in done.stderr
