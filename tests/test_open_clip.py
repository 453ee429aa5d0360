"""Checkpoints of open_clip against open_clip itself: every shape of tower, in small, through the backends and jobs."""

from __future__ import annotations

import asyncio
import io
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize

from pipeline import export, relabel, search
from pipeline.backends.base import factory
from pipeline.backends.torch_attention import kernels
from pipeline.config.schema import BackendConfig, LabelsConfig, ModelConfig, ParityConfig, PromptsConfig
from pipeline.core.errors import BackendUnavailable, ModelError
from pipeline.core.records import Embeddings
from pipeline.engine.demo.folder import rendered_sample
from pipeline.engine.demo.scenes import render, sample
from pipeline.images.preprocess import preprocess
from pipeline.job.main import run_job
from pipeline.models.checkpoint import Checkpoint, open_checkpoint
from pipeline.models.label_files import read_labels
from pipeline.models.labels import label
from pipeline.models.open_clip_models import need_open_clip
from pipeline.models.text import build_bank
from pipeline.models.towers import Normaliser
from tests.conftest import DATA
from tests.jobs import config_for, scenes_manifest
from tests.open_clips import SHAPES, write_open_clip
from tests.processes import run_python

pytestmark = [pytest.mark.compat("open_clip", "timm", "ftfy"), pytest.mark.usefixtures("exported_once")]
TEXTS = ["a red circle", "A Photo, of two Blue stars.", "a cat &amp; two stars", "a red cat " * 20]
IMAGES = [render(sample(5, i), *size) for i, size in enumerate([(90, 64), (48, 71), (33, 32)])]
CPU = torch.device("cpu")
# One scale for all activations of a layer is coarse for random ones of a few values.
LIMITS = ParityConfig(
    mean_cosine={**ParityConfig().mean_cosine, "int8": 0.95},
    lowest_cosine={**ParityConfig().lowest_cosine, "int8": 0.9},
)
# The shapes of image towers; the others have the tower of a ViT, or of EVA02.
TOWERS = ("ViT", "SigLIP", "MobileCLIP", "EVA02", "CoCa", "ConvNeXt", "ResNet", "ViTamin")
# Lowest cosine to fp32 that a backend must keep; the rounding of bf16 shows most in the deep random MobileCLIP.
BACKENDS: dict[str, tuple[dict[str, str], float]] = {
    "torch bf16": ({"name": "torch", "precision": "bf16"}, 0.985),
    "torch compiled": ({"name": "torch", "precision": "fp32", "compile": "default"}, 0.99999),
    "torchscript": ({"name": "torchscript", "precision": "fp32"}, 0.99999),
    "onnx": ({"name": "onnx", "precision": "fp32"}, 0.99999),
    "onnx_int8": ({"name": "onnx_int8", "precision": "int8"}, 0.93),
    "onnx_int8 static": ({"name": "onnx_int8", "precision": "int8", "quantization": "static"}, 0.97),
    "torch_int8": ({"name": "torch_int8", "precision": "int8"}, 0.99),
}


@dataclass(frozen=True)
class Case:
    """A small checkpoint in a folder, opened here and by open_clip."""

    folder: Path
    checkpoint: Checkpoint
    model: Any
    tokenizer: Any


def case_of(folder: Path, shape: str, **changes: Any) -> Case:
    write_open_clip(folder, shape, **changes)
    library = need_open_clip("the tests")
    model = library.create_model(f"local-dir:{folder}").eval()
    tokenizer = library.get_tokenizer(f"local-dir:{folder}")
    return Case(folder, open_checkpoint(ModelConfig(name=str(folder))), model, tokenizer)


@pytest.fixture(scope="module", params=SHAPES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return case_of(tmp_path_factory.mktemp("checkpoint") / "model", request.param)


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_open_clip(tmp_path_factory.mktemp("checkpoint") / "vit", "ViT")


def opened(folder: Path) -> Checkpoint:
    return open_checkpoint(ModelConfig(name=str(folder)))


def pixels_of(checkpoint: Checkpoint) -> torch.Tensor:
    """Normalised pixels float32 ``[N, 3, H, W]``."""
    pixels = np.stack([preprocess(image, checkpoint.spec).rgb for image in IMAGES])
    return Normaliser(checkpoint.spec, CPU)(torch.from_numpy(pixels).permute(0, 3, 1, 2))


def test_features_tokens_and_scores_are_those_of_open_clip(case: Case, tmp_path: Path) -> None:
    checkpoint, ids = case.checkpoint, case.tokenizer(TEXTS)
    tokens = checkpoint.tokenize(TEXTS)
    assert tokens.keys() == {"input_ids"}
    assert torch.equal(tokens["input_ids"], ids)
    assert ids.shape[1] == checkpoint.max_tokens
    assert [checkpoint.texts()[1].count(text) > checkpoint.max_tokens for text in TEXTS] == [False, False, False, True]
    pixels = pixels_of(checkpoint)
    with torch.inference_mode():
        images, texts = (encode(part, normalize=False) for encode, part in
                         ((case.model.encode_image, pixels), (case.model.encode_text, ids)))  # fmt: skip
        found, words = checkpoint.image_features(pixels), checkpoint.text_features(tokens)
    torch.testing.assert_close(found, images, atol=5e-6, rtol=0)
    torch.testing.assert_close(words, texts, atol=5e-6, rtol=0)
    assert found.shape[1] == words.shape[1] == checkpoint.dim
    assert min(torch.pdist(normalize(each, dim=1)).min() for each in (found, words)) > 1e-3

    prompts = PromptsConfig(labels=TEXTS, templates=["{}"], cache=str(tmp_path))
    bank = build_bank(checkpoint, read_labels(prompts), prompts, LabelsConfig())
    with torch.inference_mode():
        best = label(Embeddings(checkpoint.image(pixels)), bank, torch.from_numpy(bank.features), top_k=4)
        logits = case.model.logit_scale.exp() * normalize(images, dim=1) @ normalize(texts, dim=1).T
        biased = case.model.logit_bias is not None
        scores = (logits + case.model.logit_bias).sigmoid() if biased else logits.softmax(dim=1)
    assert checkpoint.scoring == ("sigmoid" if biased else "softmax")
    torch.testing.assert_close(best.scores, scores.gather(1, best.indices), atol=1e-6, rtol=1e-4)


def test_pixels_are_those_of_open_clip(case: Case) -> None:
    # open_clip was imported with it, if it can be: it may be missing, or built for another torch.
    if "torchvision" not in sys.modules:
        pytest.skip("torchvision, by which open_clip makes pixels, cannot be imported")
    from open_clip.transform import PreprocessCfg, image_transform_v2

    transform = image_transform_v2(PreprocessCfg(**case.model.visual.preprocess_cfg), is_train=False)
    photos = [Image.open(path).convert("RGB") for path in sorted((DATA / "clothing").rglob("*.jpg"))[:20]]
    spec = case.checkpoint.spec
    for image in [*IMAGES, *photos]:
        pixels = torch.from_numpy(preprocess(image, spec).rgb.copy()).permute(2, 0, 1)[None]
        assert torch.equal(Normaliser(spec, CPU)(pixels)[0], transform(image)), image.size


@pytest.mark.parametrize("shape", TOWERS)
def test_every_backend_runs_every_shape_of_tower(shape: str, tmp_path: Path) -> None:
    checkpoint = opened(write_open_clip(tmp_path / "model", shape))
    drawn = rendered_sample(checkpoint.spec, 16)
    with torch.inference_mode():
        reference = checkpoint.image(Normaliser(checkpoint.spec, CPU)(drawn.pixels[:8]))
    # Half precision on CUDA wants to know the kernel of the attention.
    fast = "no attention" if shape == "ConvNeXt" else "cpu"
    assert kernels(checkpoint.image, Normaliser(checkpoint.spec, CPU)(drawn.pixels[:8])) == [fast]
    lowest = {}
    # Another test's models count towards the limit of torch.compile, behind which it runs a model as it is.
    torch._dynamo.reset()
    for name, (options, wanted) in BACKENDS.items():
        # torch_int8 is compiled too, which takes half a minute.
        if name == "torch compiled" and shape not in ("ViT", "ResNet"):
            continue
        config = BackendConfig(device="cpu", artifacts=str(tmp_path / "store"), **options)
        opening = partial(factory(config.name), checkpoint, config, batch_size=8, sample=lambda: drawn)
        if (shape, name) == ("ResNet", "torch_int8"):
            with pytest.raises(BackendUnavailable, match="finds no linear layers"):
                opening(limits=LIMITS)
            continue
        encoder = opening(limits=LIMITS)
        lowest[name] = (encoder.encode(drawn.pixels[:8]) * reference).sum(dim=1).min().item() - wanted
    assert min(lowest.values()) >= 0, lowest


def test_a_job_a_new_labelling_a_search_and_an_export_work_with_it(
    vit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = scenes_manifest(tmp_path / "m.parquet", 24, damaged={})
    labels = {"labels": ["red circle", "blue star"], "templates": ["a {}"], "cache": str(tmp_path / "cache")}
    run_job(config_for(manifest, tmp_path / "out", model={"name": str(vit)}, prompts=labels))
    table = pq.read_table(next((tmp_path / "out").glob("part-*.parquet")))
    assert set(table["status"].to_pylist()) == {"ok"}
    assert set(table["label"].to_pylist()) <= {"red circle", "blue star"}
    checkpoint = opened(vit)
    first = Image.open(io.BytesIO(pq.read_table(manifest)["image"][0].as_py())).convert("RGB")
    pixels = torch.from_numpy(preprocess(first, checkpoint.spec).rgb.copy()).permute(2, 0, 1)[None]
    expected = checkpoint.image(Normaliser(checkpoint.spec, CPU)(pixels))[0]
    torch.testing.assert_close(torch.tensor(table["embedding"][0].as_py()), expected, atol=1e-5, rtol=0)

    typed = ['prompts.labels=["a cat","two stars"]', f"prompts.cache={tmp_path / 'cache'}", "report.progress=none"]
    assert relabel.main([str(tmp_path / "out"), f"output.dir={tmp_path / 'new'}", *typed]) == 0
    capsys.readouterr()
    assert search.main([str(tmp_path / "new"), "a red circle", "--top", "3"]) == 0
    assert "scene/" in capsys.readouterr().out
    both = ["model=hub", f"model.name={vit}", f"backend.artifacts={tmp_path / 'store'}"]
    assert export.main(both) == 0
    assert capsys.readouterr().out.count("lowest cosine to fp32 1.0000") == 2
    arguments = ["--to", "triton", "--tower", "image", "--out", str(tmp_path / "models"), *both]
    assert export.main(arguments) == 0
    card = json.loads(next((tmp_path / "models").glob("**/card.json")).read_text())
    assert (card["pictures"]["corner"], card["model"]["family"]) == ("round", "open_clip")


def test_the_service_embeds_with_it(vit: Path, tmp_path: Path) -> None:
    from tests.test_numbers import service_of

    service = service_of(str(vit), tmp_path)

    async def ask() -> Any:
        service.start(lambda error: None)
        assert service._task is not None
        await service._task
        try:
            assert service.not_ready_reason is None
            return await service.texts(["a red circle"])
        finally:
            await service.close()

    checkpoint = opened(vit)
    wanted = normalize(checkpoint.text_features(checkpoint.tokenize(["a red circle"])), dim=1)
    torch.testing.assert_close(torch.tensor(np.stack(asyncio.run(ask()))), wanted, atol=1e-6, rtol=0)


Spoil = Callable[[Path], Any]


def change(key: str, value: Any) -> Spoil:
    """Set a value in ``open_clip_config.json``; ``None`` takes it out."""

    def spoil(folder: Path) -> None:
        path = folder / "open_clip_config.json"
        whole = json.loads(path.read_text())
        *places, last = key.split(".")
        inner = whole
        for place in places:
            inner = inner[place]
        inner[last] = value
        path.write_text(json.dumps(whole))

    return spoil


def retensor(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Spoil:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / "open_clip_model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "open_clip_model.safetensors")

    return spoil


WRONG: dict[str, tuple[Spoil, str]] = {
    "no model_cfg": (change("model_cfg", None), r"open_clip_config\.json: model_cfg is None; wanted an object"),
    "a tower is a text": (change("model_cfg.vision_cfg", "ViT"), "vision_cfg is 'ViT'; wanted an object"),
    "a width of nothing": (change("model_cfg.vision_cfg.width", 0), "vision_cfg.width is 0; wanted a whole number"),
    "an unknown key": (change("model_cfg.vision_cfg.attn_type", "rope"), "attn_type='rope' is not known to open_clip"),
    "a file of timm": (
        change("model_cfg.vision_cfg.timm_model_name", "hf-hub:someone/model"),
        "timm_model_name is 'hf-hub:someone/model'; wanted the name of a model of timm, without a prefix",
    ),
    "no model of timm": (
        change("model_cfg.vision_cfg.timm_model_name", "vit_none"),
        "no model of model_cfg.*vit_none",
    ),
    "code of a tokenizer": (
        change("model_cfg.text_cfg.tokenizer_kwargs", {"trust_remote_code": True}),
        "tokenizer_kwargs.trust_remote_code=True is not supported",
    ),
    "random tokens": (
        change("model_cfg.text_cfg.tokenizer_kwargs", {"reduction_mask": "random"}),
        "reduction_mask='random' is not supported",
    ),
    "no files of a tokenizer": (
        change("model_cfg.text_cfg.hf_tokenizer_name", "bert-base-uncased"),
        "no tokenizer, and text_cfg of open_clip_config.json names bert-base-uncased; copy tokenizer.json and",
    ),
    "no config of a text tower": (
        change("model_cfg.text_cfg.hf_model_name", "roberta-base"),
        r"its text tower is roberta-base of.*copy config\.json of roberta-base to .*text_tower/config\.json",
    ),
    "bars": (change("preprocess_cfg.resize_mode", "longest"), "resize_mode=longest.*is not supported"),
    "a filter": (change("preprocess_cfg.interpolation", "lanczos"), "interpolation is 'lanczos'; wanted bicubic or"),
    "a colour": (change("preprocess_cfg.mean", [0.5]), r"preprocess_cfg: mean is \[0.5\]; wanted three numbers"),
    "more layers": (change("model_cfg.text_cfg.layers", 3), "lacks 12 tensors of the model, for example transformer"),
    "fewer layers": (change("model_cfg.text_cfg.layers", 1), "holds 12 tensors that the model does not have"),
    "another width": (change("model_cfg.embed_dim", 32), r"has the shape \[32, 24\], and the model \[32, 32\]"),
    "scored by sigmoid": (change("model_cfg.init_logit_bias", -10), "lacks 1 tensors.*logit_bias"),
    "a bias left over": (
        retensor(lambda tensors: tensors.update(logit_bias=torch.tensor(1.0))),
        "holds 1 tensors.*logit_bias",
    ),
    "whole numbers": (
        retensor(lambda tensors: tensors.update({"ln_final.weight": torch.ones(32, dtype=torch.int8)})),
        "the tensor ln_final.weight holds I8",
    ),
    "a torn file": (
        lambda folder: (folder / "open_clip_model.safetensors").write_bytes(b"x" * 99),
        "the weights cannot be loaded",
    ),
    "no weights": (
        lambda folder: (folder / "open_clip_model.safetensors").unlink(),
        "no open_clip_model.safetensors beside",
    ),
    "a factor in place of its logarithm": (
        retensor(lambda tensors: tensors.update(logit_scale=torch.tensor(100.0))),
        "logit_scale is 100",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_in_a_folder_is_named(kind: str, tmp_path: Path) -> None:
    spoil, message = WRONG[kind]
    folder = write_open_clip(tmp_path / "model", "ViT")
    spoil(folder)
    with pytest.raises(ModelError, match=message) as caught:
        opened(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_picture_of_another_size_than_that_of_timm_is_refused(tmp_path: Path) -> None:
    folder = write_open_clip(tmp_path / "model", "EVA02")
    change("model_cfg.vision_cfg.image_size", 64)(folder)
    with pytest.raises(ModelError, match=r"takes no pictures of 64 x 64 pixels \(vision_cfg.image_size\)"):
        opened(folder)


def test_a_pickle_is_refused_with_the_command_that_converts_it(tmp_path: Path) -> None:
    folder = write_open_clip(tmp_path / "model", "ViT")
    before = opened(folder).image_features(torch.ones(1, 3, 32, 32))
    weights = folder / "open_clip_model.safetensors"
    torch.save(load_file(weights), folder / "open_clip_pytorch_model.bin")
    weights.unlink()
    with pytest.raises(ModelError, match=r"only open_clip_pytorch_model\.bin, a pickle") as caught:
        opened(folder)
    command = str(caught.value).partition("running code in it: ")[2].replace("python -c", f"{sys.executable} -c")
    subprocess.run(command, shell=True, check=True)
    assert torch.equal(opened(folder).image_features(torch.ones(1, 3, 32, 32)), before)


def test_an_older_layout_of_the_text_tower_opens_as_by_open_clip(tmp_path: Path) -> None:
    """Tensors of a CLIP for a model with a text tower of its own, and numbers that were trained on several GPUs."""
    folder = write_open_clip(tmp_path / "model", "ViT")
    change("model_cfg.custom_text", True)(folder)
    retensor(lambda tensors: tensors.update(logit_scale=tensors["logit_scale"].reshape(1)))(folder)
    library = need_open_clip("the tests")
    model, checkpoint = library.create_model(f"local-dir:{folder}").eval(), opened(folder)
    ids = checkpoint.tokenize(TEXTS)
    with torch.inference_mode():
        expected = model.encode_text(ids["input_ids"])
        torch.testing.assert_close(checkpoint.text_features(ids), expected, atol=5e-6, rtol=0)


@pytest.mark.parametrize(
    ("spoil", "entry"),
    [
        (retensor(lambda tensors: tensors["logit_scale"].add_(0.1)), "weights"),
        (change("model_cfg.quick_gelu", True), "architecture"),
        (change("model_cfg.text_cfg.tokenizer_kwargs", {"clean": "whitespace"}), "tokenizer"),
        (change("preprocess_cfg.interpolation", "bilinear"), "preprocess"),
        (change("model_cfg.vision_cfg.patch_dropout", 0.5), None),
        (change("model_cfg.init_logit_scale", 1.0), None),
        (change("preprocess_cfg.size", 999), None),
    ],
)
def test_the_fingerprint_holds_what_decides_numbers_and_nothing_else(
    spoil: Spoil, entry: str | None, tmp_path: Path
) -> None:
    folder = write_open_clip(tmp_path / "model", "ViT")
    before = opened(folder).fingerprint
    spoil(folder)
    after = opened(folder).fingerprint
    assert before["family"] == "open_clip"
    assert {key for key in before if before[key] != after[key]} == ({entry} if entry else set())


def test_random_weights_follow_from_the_seed_by_name_and_by_hub_id(tmp_path: Path) -> None:
    names = ("RN50", "hf-hub:timm/resnet50_clip.openai", "timm/resnet50_clip.openai")
    found = [open_checkpoint(ModelConfig(name=name, weights="random", seed=2)) for name in names]
    assert [each.dim for each in found] == [1024] * 3
    assert {json.dumps(each.fingerprint) for each in found} == {json.dumps(found[0].fingerprint)}
    tensors = [each.image.model.conv1.weight for each in found]
    assert torch.equal(tensors[0], tensors[1])
    other = open_checkpoint(ModelConfig(name="RN50", weights="random", seed=3))
    assert not torch.equal(other.image.model.conv1.weight, tensors[0])


STAND_IN = """
import sys
from pipeline.core.processes import mark_as_command
mark_as_command()
from pipeline.models.lean import _Absent, _Later, import_open_clip, import_transformers
import_transformers()
library = import_open_clip()
left = [name for name, module in sys.modules.items() if isinstance(module, (_Absent, _Later))]
left += [name for name in sys.modules if name.partition(".")[0] == "torchvision"]
left += [f"{name}.{key}" for name in ("torch", "timm", "open_clip") for key, value in vars(sys.modules[name]).items()
         if isinstance(value, (_Absent, _Later))]
assert not left, left
assert "torch._dynamo" not in sys.modules
import torch._dynamo
assert type(torch._dynamo).__name__ == "module"
"""


def test_nothing_stays_of_what_stands_for_torchvision_while_open_clip_is_imported() -> None:
    done = run_python("-c", STAND_IN)
    assert (done.returncode, done.stderr) == (0, "")
