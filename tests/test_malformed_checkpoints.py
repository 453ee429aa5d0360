"""Checkpoints that are not what they should be: they work, or one message names the file and the key."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from pipeline.config.schema import ModelConfig
from pipeline.core.errors import ModelError
from pipeline.models import transformers_form
from pipeline.models.checkpoint import Checkpoint, open_checkpoint
from pipeline.models.hub import DEMO_FOLDER
from pipeline.models.text import embed_prompts

TEXTS = [["a red circle"], ["a photo of a large striped blue heart", "a star"]]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DEMO_FOLDER, tmp_path / "copy"))


def opened(folder: Path) -> Checkpoint:
    return open_checkpoint(ModelConfig(name=str(folder)))


def change(path: Path, key: str, value: Any) -> None:
    """Set ``a.b`` of a JSON file."""
    values = json.loads(path.read_text())
    inner = values
    *outer, last = key.split(".")
    for name in outer:
        inner = inner[name]
    inner[last] = value
    path.write_text(json.dumps(values))


def retensor(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def numbers(opened: Checkpoint) -> tuple[np.ndarray, np.ndarray, Any]:
    pixels = torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    return embed_prompts(opened, TEXTS), opened.image_features(pixels).numpy(), opened.spec


def tried(folder: Path) -> tuple[tuple[np.ndarray, np.ndarray, Any] | None, str]:
    """Embeddings of an opened checkpoint, or the message of its refusal."""
    try:
        return numbers(opened(folder)), ""
    except ModelError as error:
        return None, str(error)


CONFIG = [
    ("text_config.layer_norm_eps", [1, 0, -1e-5, "1e-05", None, [1e-5], True, 2.0]),
    ("vision_config.image_size", [[48, 48], "48", 0, -48, None, 48.0, {"height": 48}, True]),
    ("vision_config.patch_size", [[8, 8], "8", 0, -8, None, 8.5]),
    ("text_config.hidden_size", ["96", [96], 0, -96, None, 1e2]),
    ("vision_config.num_hidden_layers", ["4", -1, 0, None, [4], 10**12]),
    ("text_config.vocab_size", [10**12, "652"]),
    ("vision_config.intermediate_size", [10**9]),
    ("text_config.num_attention_heads", [0, "4", None]),
    ("vision_config.hidden_act", ["swoosh", 3, None, ["gelu"], {}]),
    ("projection_dim", [[128], "128", 0, -1, True]),
    ("text_config.eos_token_id", ["651", -1, 651.0, {}]),
    ("text_config", ["small", [1], 5]),
    ("vision_config", ["small", [1], 5]),
    ("attn_implementation", ["flash_attention_2", "flash_attention_3", "flex_attention", "paged|sdpa"]),
    ("_attn_implementation", ["flash_attention_2"]),
    ("attn_implementation", [{"vision_config": "flash_attention_2", "text_config": "sdpa"}]),
    ("vision_config.attn_implementation", ["flash_attention_2"]),
    ("quantization_config", [{"quant_method": "bitsandbytes", "load_in_4bit": True}, {}, "int8"]),
    ("vision_config.quantization_config", [{"quant_method": "bitsandbytes", "load_in_8bit": True}]),
    ("transformers_weights", ["other.safetensors", "../other.safetensors"]),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in CONFIG for value in values])
def test_a_config_that_no_model_is_built_from_is_refused_with_its_key(copy: Path, key: str, value: Any) -> None:
    change(copy / "config.json", key, value)
    with pytest.raises(ModelError) as caught:
        opened(copy)
    message = str(caught.value)
    assert "config.json" in message
    assert key.rsplit(".", 1)[-1] in message
    assert "\n" not in message
    assert len(message) < 600


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"{", b"7", b"\xff\xfe{\x00}\x00", b"{}\xff"])
@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_file_that_is_no_json_object_is_named(copy: Path, name: str, content: bytes) -> None:
    (copy / name).write_bytes(content)
    with pytest.raises(ModelError, match=rf"/{name}: "):
        opened(copy)


@pytest.mark.parametrize(
    "name", ["config.json", "preprocessor_config.json", "tokenizer_config.json", "special_tokens_map.json"]
)
def test_a_byte_order_mark_is_refused_or_read(copy: Path, name: str) -> None:
    text = (copy / name).read_text() if (copy / name).exists() else "{}"
    (copy / name).write_text("\ufeff" + text)
    found, refusal = tried(copy)
    if found is None:
        assert name in refusal
        assert "byte order mark" in refusal
    else:
        assert all(map(np.array_equal, found[:2], numbers(open_checkpoint(ModelConfig()))[:2]))


def shards(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index: dict[str, str] = {}
    for number in range(3):
        names = sorted(tensors)[number::3]
        file = f"model-0000{number + 1}-of-00003.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def test_sharded_weights_open_and_a_missing_shard_is_named(copy: Path) -> None:
    shards(copy)
    (copy / "second.safetensors").write_bytes(b"not loaded")
    checkpoint = opened(copy)
    assert list(checkpoint.fingerprint["weights"]) == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    assert np.array_equal(numbers(checkpoint)[0], numbers(open_checkpoint(ModelConfig()))[0])
    (copy / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ModelError, match=r"1 of 3 files.*missing: model-00002-of-00003\.safetensors"):
        opened(copy)


def add_token(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<hat>"])
    tokenizer.save_pretrained(folder)


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def as_integers(tensors: dict[str, torch.Tensor]) -> None:
    tensors["text_projection.weight"] = (tensors["text_projection.weight"] * 100).to(torch.int8)


WEIGHTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "an added token": (add_token, "'<hat>' with the id 652.*resize_token_embeddings"),
    "truncated": (truncate, r"model\.safetensors: the weights cannot be loaded"),
    "integers": (lambda folder: retensor(folder, as_integers), r"the tensor text_projection\.weight holds I8"),
    "a scale of shape [1]": (
        lambda folder: retensor(folder, lambda t: t.update(logit_scale=t["logit_scale"].view(1))),
        r"the tensor logit_scale has the shape \[1\], and config\.json says \[\]",
    ),
    "another projection": (
        lambda folder: change(folder / "config.json", "projection_dim", 64),
        r"projection\.weight has the shape \[128, \d+\], and config\.json says \[64, ",
    ),
    "fewer layers": (
        lambda folder: change(folder / "config.json", "vision_config.num_hidden_layers", 3),
        "layers that config.json leaves out, for example vision_model",
    ),
    "more layers": (
        lambda folder: change(folder / "config.json", "text_config.num_hidden_layers", 3),
        r"lack 16 tensors of the model, for example text_model\.encoder\.layers\.2",
    ),
    "another file of weights alone": (
        lambda folder: (folder / "model.safetensors").rename(folder / "model.fp16.safetensors"),
        r"only model\.fp16\.safetensors, which transformers does not load",
    ),
    "open_clip beside a config": (
        lambda folder: [
            (folder / "config.json").write_text("{}"),
            (folder / "open_clip_config.json").write_text("{}"),
        ],
        r"open_clip_config\.json: model_cfg is None; wanted an object",
    ),
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_that_do_not_fit_are_explained(copy: Path, kind: str) -> None:
    spoil, message = WEIGHTS[kind]
    spoil(copy)
    with pytest.raises(ModelError, match=message) as caught:
        opened(copy)
    assert "\n" not in str(caught.value)


def test_half_precision_is_read_as_it_is(copy: Path) -> None:
    retensor(copy, lambda tensors: tensors.update({name: each.bfloat16() for name, each in tensors.items()}))
    assert opened(copy).image.model.dtype == torch.float32


@pytest.mark.parametrize(
    "name", ["open_clip_config.json", "open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
)
def test_a_folder_of_open_clip_is_named_as_what_it_is(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    alone = r"no config\.json.*checkpoint of open_clip without its open_clip_config\.json"
    wanted = r"open_clip_config\.json: model_cfg is None" if name.endswith(".json") else alone
    with pytest.raises(ModelError, match=wanted):
        opened(tmp_path)


def test_the_extra_of_open_clip_is_named_where_it_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"embed_dim": 24, "vision_cfg": {"width": 48}, "text_cfg": {"width": 32}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": values}))
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ModelError, match=r"needs the library open_clip .*pip install .*\[open_clip\]"):
        opened(tmp_path)


@pytest.mark.parametrize("inner", ["0_CLIPModel", "clip", None])
def test_a_folder_of_sentence_transformers_is_named_as_what_it_is(tmp_path: Path, inner: str | None) -> None:
    (tmp_path / "modules.json").write_text('[{"idx": 0, "path": "0_CLIPModel"}]')
    if inner is not None:
        shutil.copytree(DEMO_FOLDER, tmp_path / inner)
    with pytest.raises(ModelError, match="folder of sentence-transformers; give") as caught:
        opened(tmp_path)
    if inner is not None:
        assert f"model.name={tmp_path / inner}" in str(caught.value)
        opened(tmp_path / inner)


def modules(folder: Path, *kinds: str, inner: str = "0_CLIPModel") -> None:
    """A folder of sentence-transformers with a CLIP in it, and what follows."""
    shutil.copytree(DEMO_FOLDER, folder / inner, dirs_exist_ok=True)
    entries = [{"path": f"{i}_{kind}", "type": f"sentence_transformers.models.{kind}"} for i, kind in enumerate(kinds)]
    (folder / "modules.json").write_text(json.dumps([{**entries[0], "path": inner}, *entries[1:]]))


@pytest.mark.parametrize(("inner", "kind"), [("0_CLIPModel", "CLIPModel"), ("", "Transformer")])
def test_a_clip_of_sentence_transformers_is_the_model_in_it(tmp_path: Path, inner: str, kind: str) -> None:
    modules(tmp_path, kind, "Normalize", inner=inner)
    assert opened(tmp_path).fingerprint == opened(DEMO_FOLDER).fingerprint


def test_what_sentence_transformers_adds_is_refused_by_name(tmp_path: Path) -> None:
    modules(tmp_path, "CLIPModel", "Dense", "Normalize", "LayerNorm")
    with pytest.raises(ModelError, match=r"modules\.json: sentence-transformers computes Dense, LayerNorm after"):
        opened(tmp_path)


@pytest.mark.parametrize("inner", ["../other", "/etc", "a/b", ".."])
def test_a_module_outside_of_the_folder_is_not_opened(tmp_path: Path, inner: str) -> None:
    modules(tmp_path, "CLIPModel")
    entry = {"path": inner, "type": "sentence_transformers.models.CLIPModel"}
    (tmp_path / "modules.json").write_text(json.dumps([entry]))
    with pytest.raises(ModelError, match="of a module is no folder within this one"):
        opened(tmp_path)


def test_an_adapter_alone_is_refused_with_the_call_that_merges_it(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "a/clip"}')
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x")
    call = r"holds an adapter .*from_pretrained\('a/clip'\).*PeftModel.*merge_and_unload\(\)\.save_pretrained"
    with pytest.raises(ModelError, match=call):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("family", "near"),
    [
        ("vit_mae", "the nearest is dinov2 or vit"),
        ("blip", "the nearest is clip, such as openai/clip-vit-base-patch32"),
        ("altclip", "the nearest is metaclip_2 or siglip"),
        ("convnext", r"the nearest is dinov2.*open_clip's form \(pip install .*open_clip"),
        ("clip_text_model", "clip with both of its towers"),
        ("gpt2", "chinese_clip"),
    ],
)
def test_a_model_type_that_does_not_open_is_named_with_the_nearest(tmp_path: Path, family: str, near: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    with pytest.raises(ModelError, match=f"model_type '{family}' is not supported; supported are clip.*{near}"):
        opened(tmp_path)


def keys(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict) and value:
            yield from keys(value, f"{prefix}{key}.")


FILES = ("config.json", "preprocessor_config.json", "tokenizer_config.json")
EVERY = [(name, key) for name in FILES for key in keys(json.loads((DEMO_FOLDER / name).read_text()))]
VALUES: list[Any] = [None, "x", -1, 0.5, [], [1, "x"], {"a": 1}, True, False, "", 10**12]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "key"), EVERY, ids=[f"{name}-{key}" for name, key in EVERY])
def test_any_value_of_any_key_works_or_is_refused_in_one_line(
    copy: Path, monkeypatch: pytest.MonkeyPatch, name: str, key: str
) -> None:
    text, wanted = (copy / name).read_text(), numbers(open_checkpoint(ModelConfig()))
    if name != "config.json":
        # The model is made from that file and the weights, whose values do not change here.
        model = transformers_form.load_model(DEMO_FOLDER, DEMO_FOLDER)
        monkeypatch.setattr(transformers_form, "load_model", lambda *given: model)
    for value in VALUES:
        (copy / name).write_text(text)
        change(copy / name, key, value)
        found, refusal = tried(copy)
        if found is None:
            assert "\n" not in refusal, value
            assert str(copy) in refusal, value
            continue
        # Only what says how pictures are made may change a number.
        if name == "preprocessor_config.json":
            found = (*found[:2], wanted[2])
        for ours, theirs in zip(found, wanted, strict=True):
            assert np.array_equal(ours, theirs) if isinstance(ours, np.ndarray) else ours == theirs, (key, value)
