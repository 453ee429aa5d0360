"""The start of a command: what it imports of transformers, torch and Arrow, and that nothing of it stays."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers.utils.import_utils import fetch__all__

from pipeline.config.schema import ModelConfig
from pipeline.models import lean, weights
from pipeline.models.checkpoint import open_checkpoint
from pipeline.models.files import loaded_weights, read_json
from pipeline.models.fingerprint import digests
from pipeline.models.hub import DEMO_FOLDER
from tests.families import write_chinese_clip, write_clip, write_siglip
from tests.processes import loads, run_python

HEAVY = ("matplotlib", "pandas", "sympy", "torch._dynamo", "torch.distributed.tensor", "torchao")
COMMAND = f"""
import json, sys
from pipeline.core.processes import mark_as_command
mark_as_command()
from pipeline.models.lean import _Later, import_transformers, load_torch_aside
load_torch_aside()
import_transformers()
from pipeline.core.plain import leave_out_pandas
leave_out_pandas()
import pyarrow as pa
import torch
pa.array([1.5])
from pipeline.config.schema import ModelConfig
from pipeline.models.checkpoint import open_checkpoint
opened = open_checkpoint(ModelConfig())
with torch.inference_mode():
    texts = opened.text_features(opened.tokenize(["a red circle", "a star"]))
    images = opened.image_features(torch.ones(2, 3, 48, 48))
heavy = [name for name in {HEAVY} if name in sys.modules]
left = [name for name, module in sys.modules.items() if isinstance(module, _Later)]
left += [f"{{name}}.{{key}}" for name, module in sys.modules.items() if name.partition(".")[0] == "torch"
         for key, value in list(vars(module).items()) if isinstance(value, _Later)]
import torch._dynamo
from transformers import CLIPModel
print(json.dumps([heavy, left, texts.tolist(), images.tolist(), opened.fingerprint["architecture"],
    type(torch._dynamo).__name__, type(opened.image.model) is CLIPModel]))
"""


def test_a_command_opens_the_same_model_without_compiler_and_training() -> None:
    done = run_python("-c", COMMAND)
    assert done.returncode == 0, done.stderr
    heavy, left, texts, images, architecture, compiler, same = json.loads(done.stdout)
    assert (heavy, left, compiler, same) == ([], [], "module", True)
    opened = open_checkpoint(ModelConfig())
    with torch.inference_mode():
        assert opened.text_features(opened.tokenize(["a red circle", "a star"])).tolist() == texts
        assert opened.image_features(torch.ones(2, 3, 48, 48)).tolist() == images
    assert opened.fingerprint["architecture"] == architecture


@pytest.mark.slow
def test_a_command_opens_a_model_beside_libraries_that_do_not_load_without_the_compiler(tmp_path: Path) -> None:
    for name in ("accelerate", "kernels", "peft", "scipy", "sklearn", "timm", "torchao", "torchvision"):
        package, metadata = tmp_path / name, tmp_path / f"{name}-9.0.dist-info"
        package.mkdir()
        metadata.mkdir()
        (package / "__init__.py").write_text(f"raise RuntimeError('{name} was imported')")
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.0\n")
    done = run_python("-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{COMMAND}")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[:2] == [[], []]


@pytest.mark.slow
def test_a_release_that_is_built_otherwise_is_imported_as_it_is() -> None:
    broken = "import pipeline.models.lean as lean; lean._once = None; from pipeline.models.lean import _Later"
    done = run_python("-c", COMMAND.replace("from pipeline.models.lean import _Later", f"{broken}"))
    assert done.returncode == 0, done.stderr
    heavy, left, _, images, architecture, compiler, same = json.loads(done.stdout)
    assert (left, compiler, same) == ([], "module", True)
    assert "torch._dynamo" in heavy
    opened = open_checkpoint(ModelConfig())
    assert opened.fingerprint["architecture"] == architecture
    with torch.inference_mode():
        assert opened.image_features(torch.ones(2, 3, 48, 48)).tolist() == images


@pytest.mark.parametrize("claimed", [True, False])
def test_other_processes_and_those_that_have_transformers_keep_it(claimed: bool) -> None:
    first = (
        "from pipeline.core.processes import mark_as_command; mark_as_command(); sys.modules['transformers'] = sys"
        if claimed
        else "pass"
    )
    code = f"{first}; from pipeline.models.lean import import_transformers; import_transformers()"
    assert loads(code, "torch", "transformers.modeling_utils") == []


@pytest.mark.parametrize(
    "content",
    [
        "",
        "x = 1\n",
        "# __all__ is missing\n",
        '__all__ = ["A", "B"]',
        '"""Docs."""\n__all__ = ["A"]\n',
        'x = 1\n__all__ = [\n    "A",\n    "B",\n]\n',
        '__all__ = ["A"]\nx = __all__\n__all__ = ["B"]\nx = 1\n',
    ],
)
def test_the_names_of_a_file_are_those_that_transformers_finds(content: str) -> None:
    assert lean._of_the_end(fetch__all__)(content) == fetch__all__(content)


@pytest.mark.parametrize("write", [None, write_clip, write_chinese_clip, write_siglip])
def test_a_model_is_the_one_that_transformers_loads(
    write: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = DEMO_FOLDER
    if callable(write):
        folder = tmp_path / "model"
        write(folder)
    ours = weights.load_model(folder, folder)
    filled = weights._filled(ours.config, loaded_weights(folder))
    assert (filled is None) == (write is write_chinese_clip)
    monkeypatch.setattr(weights, "_filled", lambda *given: None)
    theirs = weights.load_model(folder, folder)
    values = read_json(folder / "config.json")
    assert digests(ours.config.to_dict(), values) == digests(theirs.config.to_dict(), values)
    assert (type(ours), ours.training) == (type(theirs), theirs.training)
    assert ours.config._attn_implementation == theirs.config._attn_implementation
    for kind in ("named_parameters", "named_buffers"):
        own, other = dict(getattr(ours, kind)()), dict(getattr(theirs, kind)())
        assert own.keys() == other.keys()
        assert all(own[name].dtype == other[name].dtype and own[name].equal(other[name]) for name in own)
