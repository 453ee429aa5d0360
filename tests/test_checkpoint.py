from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel, AutoTokenizer, SiglipConfig, SiglipModel

from pipeline.config.schema import ModelConfig, conf_dir
from pipeline.core.errors import ModelError
from pipeline.models.architectures import ARCHITECTURES
from pipeline.models.checkpoint import open_checkpoint
from pipeline.models.hub import DEMO_FOLDER
from pipeline.models.preprocessor import to_spec
from tests.conftest import data_folder
from tests.processes import run_python


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A local folder with the demo's files."""
    return Path(shutil.copytree(DEMO_FOLDER, tmp_path / "copy"))


def small_siglip(folder: Path) -> Path:
    """A SigLIP of a few thousand parameters, saved as a checkpoint."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO_FOLDER)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": len(tokenizer), "max_position_embeddings": 64, "projection_size": 32}
    config = SiglipConfig(text_config=text, vision_config={**sizes, "image_size": 32, "patch_size": 8})
    torch.manual_seed(0)
    SiglipModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    values = {"size": {"height": 32, "width": 32}, "resample": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    return folder


def test_the_demo_loads_like_any_checkpoint(copy: Path) -> None:
    demo, local = open_checkpoint(ModelConfig()), open_checkpoint(ModelConfig(name=str(copy)))
    assert demo.fingerprint == local.fingerprint
    assert (demo.family, demo.scoring, demo.dim, demo.spec.size) == ("clip", "softmax", 128, (48, 48))
    assert sum(file.stat().st_size for file in DEMO_FOLDER.iterdir()) <= 6_000_000


@pytest.mark.parametrize("change", ["weights", "tokenizer", "preprocessor", "config", "special tokens"])
def test_any_changed_file_changes_the_fingerprint(copy: Path, change: str) -> None:
    before = open_checkpoint(ModelConfig(name=str(copy))).fingerprint
    if change == "weights":
        from safetensors.torch import load_file, save_file

        tensors = load_file(copy / "model.safetensors")
        tensors["logit_scale"] += 0.001
        save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    elif change == "special tokens":
        (copy / "special_tokens_map.json").write_text('{"unk_token": "<|startoftext|>"}')
    else:
        name, key, value = {
            "tokenizer": ("tokenizer_config.json", "model_max_length", 16),
            "preprocessor": ("preprocessor_config.json", "resample", 2),
            "config": ("config.json", "logit_scale_init_value", 2.0),
        }[change]
        content = json.loads((copy / name).read_text())
        (copy / name).write_text(json.dumps({**content, key: value}))
    assert open_checkpoint(ModelConfig(name=str(copy))).fingerprint != before


def test_random_weights_follow_from_the_seed_and_leave_the_global_one_alone() -> None:
    state = torch.random.get_rng_state()
    first = open_checkpoint(ModelConfig(name=str(DEMO_FOLDER), weights="random", seed=3))
    second = open_checkpoint(ModelConfig(name=str(DEMO_FOLDER), weights="random", seed=3))
    other = open_checkpoint(ModelConfig(name=str(DEMO_FOLDER), weights="random", seed=4))
    assert torch.equal(torch.random.get_rng_state(), state)
    weights = [c.image.model.visual_projection.weight for c in (first, second, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert first.fingerprint == second.fingerprint != other.fingerprint


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dim", "parameters"),
    [
        ("openai/clip-vit-base-patch32", 512, 151_277_313),
        ("google/siglip2-base-patch16-224", 768, 375_187_970),
        ("OFA-Sys/chinese-clip-vit-base-patch16", 512, 188_262_913),
    ],
)
def test_full_size_architectures_need_no_download(name: str, dim: int, parameters: int) -> None:
    checkpoint = open_checkpoint(ModelConfig(name=name, weights="random"))
    assert checkpoint.dim == dim
    whole = {*checkpoint.image.parameters(), *checkpoint.texts()[0].parameters()}
    assert sum(p.numel() for p in whole) == parameters
    features = checkpoint.text_features(checkpoint.tokenize(["a red circle", "一只猫"]))
    assert features.shape == (2, dim)
    assert torch.isfinite(features).all()
    assert not torch.equal(features[0], features[1])


# Parameters of the published weights, in millions: MTEB's list of models, the README of OFA-Sys/Chinese-CLIP, and the
# cards of the models of images alone (86 M of DINOv3, 2 B of MetaCLIP 2), to the first digit behind the point.
PUBLISHED_MILLIONS = {
    "openai/clip-vit-base-patch32": 151.3,
    "openai/clip-vit-base-patch16": 149.6,
    "openai/clip-vit-large-patch14": 427.6,
    "openai/clip-vit-large-patch14-336": 427.9,
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": 986.1,
    "facebook/metaclip-2-worldwide-huge-quickgelu": 1858.8,
    "google/siglip-base-patch16-224": 203.2,
    "google/siglip-so400m-patch14-384": 878.0,
    "google/siglip2-base-patch16-224": 375.2,
    "google/siglip2-large-patch16-256": 881.5,
    "google/siglip2-so400m-patch14-384": 1136.0,
    "OFA-Sys/chinese-clip-vit-base-patch16": 188.3,
    "OFA-Sys/chinese-clip-vit-large-patch14": 406.2,
    "facebook/dinov2-small": 22.1,
    "facebook/dinov2-base": 86.6,
    "facebook/dinov2-large": 304.4,
    "facebook/dinov3-vits16-pretrain-lvd1689m": 21.6,
    "facebook/dinov3-vitb16-pretrain-lvd1689m": 85.7,
    "facebook/dinov3-vitl16-pretrain-lvd1689m": 303.1,
    "google/vit-base-patch16-224-in21k": 86.4,
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_has_the_published_size(name: str) -> None:
    values, preprocessor = ARCHITECTURES[name]
    settings = AutoConfig.for_model(**values)
    spec = to_spec(preprocessor, settings.model_type, name)
    with torch.device("meta"):
        model = AutoModel.from_config(settings).eval()
        pixels = torch.zeros(1, 3, *spec.size)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == PUBLISHED_MILLIONS[name]
    side = getattr(settings, "vision_config", settings).image_size
    if settings.model_type == "dinov2":
        assert (side, spec.size) == (518, (224, 224)), "positions are interpolated"
        side = 224
    assert spec.size == (side, side)
    options = [
        path.read_text() for path in (conf_dir() / "model").glob("*.yaml") if f"name: {name}\n" in path.read_text()
    ]
    for text in options:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            (model.get_image_features if hasattr(model, "get_image_features") else model)(pixel_values=pixels)
        said = re.search(r"([0-9.]+) GFLOP an\simage", text.replace("\n# ", " "))
        assert said is not None, text
        assert float(said[1]) == pytest.approx(counter.get_total_flops() / 1e9, rel=0.01)
        assert f"{side} pixels" in text
    assert str(side) in name or side == 224, "the resolution stands in the name unless it is 224"


def test_siglip_pads_its_texts_and_scores_by_sigmoid(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(ModelConfig(name=str(small_siglip(tmp_path))))
    assert (checkpoint.family, checkpoint.scoring, checkpoint.dim) == ("siglip", "sigmoid", 32)
    assert checkpoint.bias == pytest.approx(float(checkpoint.image.model.logit_bias))
    tokens = checkpoint.tokenize(["a", "a red circle"])
    assert list(tokens) == ["input_ids"]
    assert tokens["input_ids"].shape == (2, 64)
    pixels = torch.rand(2, 3, 32, 32)
    expected = checkpoint.image.model.get_image_features(pixel_values=pixels).pooler_output
    assert torch.equal(checkpoint.image_features(pixels), expected)


def test_text_of_different_lengths_gives_the_same_features_in_any_company() -> None:
    checkpoint = open_checkpoint(ModelConfig())
    alone = checkpoint.text_features(checkpoint.tokenize(["a red circle"]))
    padded = checkpoint.text_features(checkpoint.tokenize(["a red circle", "a photo of a large striped blue heart"]))
    torch.testing.assert_close(alone[0], padded[0], atol=1e-5, rtol=1e-5)


def test_openai_s_tokenizer_gives_the_published_ids() -> None:
    folder = data_folder("clip_tokenizer")
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder)
    expected = json.loads((folder / "expected_ids.json").read_text())
    cases = expected if isinstance(expected, list) else list(expected.values())
    assert len(cases) == 25
    for case in cases:
        assert tokenizer(case["text"])["input_ids"] == case["ids"], case["text"]


def drop_tensors(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = {k: v for k, v in load_file(folder / "model.safetensors").items() if "layers.0." not in k}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def resize(folder: Path) -> None:
    content = json.loads((folder / "preprocessor_config.json").read_text())
    content |= {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
    (folder / "preprocessor_config.json").write_text(json.dumps(content))


def test_siglip_reads_lower_case(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(ModelConfig(name=str(small_siglip(tmp_path))))
    tokens = checkpoint.tokenize(["A Red CIRCLE", "a red circle"])["input_ids"]
    assert torch.equal(tokens[0], tokens[1])
    assert tokens[0, 0] != checkpoint.tokenizer.pad_id, "padding stands on the right"


def test_a_sentencepiece_file_that_cannot_be_read_is_explained(tmp_path: Path) -> None:
    small_siglip(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "SiglipTokenizer"}')
    (tmp_path / "spiece.model").write_bytes(b"rubbish")
    with pytest.raises(ModelError, match="the tokenizer cannot be loaded"):
        open_checkpoint(ModelConfig(name=str(tmp_path)))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "no \\*.safetensors"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "bert"}'), "'bert' is not supported"),
        (lambda folder: (folder / "preprocessor_config.json").unlink(), "no preprocessor_config"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer"),
        (lambda folder: (folder / "config.json").write_text("{"), "not a JSON object"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 99), "cannot be loaded"),
        (drop_tensors, "lack 32 tensors of the model, for example"),
        (resize, "56 x 56 pixels, the model takes 48 x 48"),
    ],
)
def test_a_folder_that_is_no_checkpoint_is_explained(copy: Path, spoil, message: str) -> None:  # type: ignore[no-untyped-def]
    spoil(copy)
    with pytest.raises(ModelError, match=message):
        open_checkpoint(ModelConfig(name=str(copy)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "code",
    [
        "from pipeline.config.schema import ModelConfig as Model; from pipeline.models.checkpoint import *; "
        "open_checkpoint(Model())",
        "import pipeline.models.checkpoint, importlib.util as i; i.find_spec('torchao') and __import__('torchao')",
    ],
    ids=["imported and opened", "before torchao"],
)
def test_nothing_is_said_that_a_user_cannot_act_on(code: str) -> None:
    reply = run_python("-c", code)
    assert (reply.returncode, reply.stderr) == (0, "")


def test_other_messages_of_torchao_still_come_through(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("torchao").warning("Skipping import of cpp extensions")
    logging.getLogger("torchao").warning("Failed to load %s", "_C.so")
    assert caplog.messages == ["Skipping import of cpp extensions"]
