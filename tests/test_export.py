"""``python -m pipeline.export``: what it says, finds again and refuses."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from pathlib import Path

import pytest

from pipeline import export
from pipeline.backends.artifacts import exports
from pipeline.backends.artifacts.store import ArtifactStore
from tests.jobs import scenes_manifest
from tests.processes import WARNINGS, run_python
from tests.test_run import HEAVY, imported

pytestmark = pytest.mark.usefixtures("exported_once")
ONNX = ("onnx", "onnxruntime", "onnxscript")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


def call(capsys: pytest.CaptureFixture[str], root: Path, *arguments: str) -> tuple[int, str, str]:
    code = export.main([*arguments, f"backend.artifacts={root}"])
    return code, *capsys.readouterr()


def shell(*arguments: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return run_python(*options, "-m", "pipeline.export", *arguments, PYTHONWARNINGS=WARNINGS)


@pytest.mark.slow
def test_both_towers_are_exported_described_and_found_again(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = call(capsys, root, "model=demo")
    assert code == 0
    assert err.count("exporting demo") == 2
    image, text = re.split(r"^(?=onnx-)", out, flags=re.MULTILINE)[1:]
    figures = r"demo, fp32: \d\.\d MB, lowest cosine to fp32 1\.000000, mean 1\.000000\n"
    assert re.match(f"onnx-image of {figures}", image)
    assert re.match(f"onnx-text of {figures}", text)
    assert "  pixel_values [batch, 3, 48, 48] -> image_embeds [batch, 128]\n" in image
    assert "  input_ids [batch, tokens], attention_mask [batch, tokens] -> text_embeds [batch, 128]\n" in text
    assert re.search(r"^  operators: 12 MatMul, .*4 Attention.*, \.\.\.$", image, re.MULTILINE)
    made = {artifact.card["kind"]: artifact for artifact in ArtifactStore(root).artifacts()}
    assert image.endswith(f"\n  {made['onnx-image'].file('model.onnx')}\n")
    assert text.endswith(f"\n  {made['onnx-text'].file('model.onnx')}\n")

    # Nothing is built the second time, neither here nor in another process.
    monkeypatch.setattr(exports, "_build", None)
    again = call(capsys, root, "model=demo")
    assert (again[0], again[1]) == (0, out)
    assert "exporting" not in again[2]
    done = shell("--tower", "text", f"backend.artifacts={root}")
    assert (done.returncode, done.stdout, done.stderr) == (0, text, "")
    assert {artifact.card["created"] for artifact in ArtifactStore(root).artifacts()} == {
        artifact.card["created"] for artifact in made.values()
    }


@pytest.mark.slow
def test_static_scales_follow_from_the_manifest(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = scenes_manifest(tmp_path / "scenes.parquet", 24, damaged={0: b"no picture"}, group=8)
    arguments = ("--tower", "image", "--precision", "int8", "--static")
    own = (*arguments, f"manifest.path={manifest}", "manifest.image=image", "parity.images=6")
    code, out, _ = call(capsys, root, *own)
    assert code == 0
    assert out.startswith("onnx-image of demo, int8 static: ")
    fingerprint = Path(out.splitlines()[-1].strip()).parent.name
    card = json.loads((root / fingerprint / "card.json").read_text())
    # Four good pictures of each group: every second one for the scales, the others for the comparison.
    assert {id for id, _ in card["parity"]["worst"]} <= {f"scene/{i:04d}.jpg" for i in (2, 4, 9, 11, 17, 19)}
    assert call(capsys, root, *own)[1] == out
    damaged = scenes_manifest(tmp_path / "damaged.parquet", 8, damaged=dict.fromkeys(range(8), b"no picture"))
    code, out, err = call(capsys, root, *arguments, f"manifest.path={damaged}", "manifest.image=image")
    assert (code, out) == (2, "")
    assert err.endswith(f"error: manifest.path={damaged}: none of the images that were tried can be decoded\n")


def test_a_missed_tolerance_has_exit_code_4(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--format", "torchscript", "--tower", "image", "--precision", "bf16", "parity.lowest_cosine.bf16=1.0")
    code, out, err = call(capsys, tmp_path, *arguments)
    assert (code, out) == (4, "")
    assert re.search(r"^error: demo, image tower in TorchScript bf16, .*wants 1\.0, measured 0\.99", err, re.MULTILINE)
    assert os.listdir(tmp_path) == []


def test_torchscript_is_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, tmp_path, "--format", "torchscript", "--tower", "image")
    assert code == 0
    head, file = out.splitlines()
    assert head.startswith("torchscript of demo, fp32 cpu: ")
    assert Path(file.strip()).name == "model.pt"
    assert Path(file.strip()).is_file()


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (("--precision", "bf16"), ["--precision = 'bf16': onnx takes fp32, fp16, int8"]),
        (("--format", "torchscript", "--precision", "fp16"), ["--precision = 'fp16': torchscript takes fp32, bf16"]),
        (("--format", "torchscript", "--tower", "text"), ["--tower = 'text': TorchScript is exported for the image"]),
        (("--static", "--tower", "image"), ["--static = True: goes with --precision int8 of ONNX"]),
        (("--static", "--precision", "int8"), ["--static = True: is calibrated on images (add --tower image)"]),
        (
            ("--precision", "bf16", "--static", "parity.images=0", "loader.batch_size=-1", "modle=demo"),
            ["--precision = ", "--static = True: goes with", "--static = True: is calibrated", "modle"],
        ),
        (
            ("--precision", "bf16", "parity.images=0", "loader.batch_size=-1"),
            ["--precision = ", "parity.images = 0", "loader.batch_size = -1"],
        ),
    ],
)
def test_all_problems_are_said_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], wanted: list[str]
) -> None:
    code, out, err = call(capsys, tmp_path, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: the config has ")
    for text in wanted:
        assert f"  - {text}" in err
    assert os.listdir(tmp_path) == []


def test_unknown_flags_have_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--precision", "int4"], ["--tower", "both", "--nonsense"], ["--format", "tflite"]):
        with pytest.raises(SystemExit, match="2"):
            export.main(arguments)
        assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [("--help",), ("--precision", "bf16")], ids=" ".join)
def test_answers_that_need_no_model_load_nothing_heavy(arguments: tuple[str, ...]) -> None:
    started = time.perf_counter()
    done = shell(*arguments, options=("-X", "importtime"))
    seconds = time.perf_counter() - started
    loaded = imported(done.stderr)
    assert {"pipeline", "argparse"} <= loaded
    assert not loaded & {*HEAVY, *ONNX}
    assert seconds < 5
    if arguments == ("--help",):
        assert done.returncode == 0
        for flag in ("--format", "--tower", "--precision", "--static", "--plain", "OVERRIDE", "examples:"):
            assert flag in done.stdout
    else:
        assert done.returncode == 2
