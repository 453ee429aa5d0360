"""Every family against transformers' own model and processor, in small, and against published values."""

from __future__ import annotations

import io
import json
import urllib.request
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize
from transformers import Siglip2Config, Siglip2Model

from pipeline.backends.base import factory
from pipeline.backends.torch_module import in_a_layer, quantize_layers
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
from pipeline.models.text import build_bank, embed_prompts
from pipeline.models.towers import Normaliser
from tests import models_readme
from tests.families import CASES, ENGLISH, Case, open_chinese_clip, write_clip, write_siglip
from tests.image_towers import TOWERS
from tests.jobs import config_for, scenes_manifest

IMAGES = [render(sample(5, i), *size) for i, size in enumerate([(90, 64), (48, 71), (32, 32)])]


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return CASES[request.param](tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module", params=[*CASES, *TOWERS])
def images_case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Of every family, those without texts among them."""
    return (CASES | TOWERS)[request.param](tmp_path_factory.mktemp("checkpoint"))


def pixels_of(checkpoint: Checkpoint, images: list[Image.Image]) -> torch.Tensor:
    """Normalised pixels float32 ``[N, 3, H, W]``."""
    spec = checkpoint.spec
    pixels = torch.stack([torch.from_numpy(preprocess(image, spec).rgb.copy()) for image in images])
    return ((pixels / 255 - torch.tensor(spec.mean)) / torch.tensor(spec.std)).permute(0, 3, 1, 2)


def test_tokens_are_those_of_the_family_s_processor(case: Case) -> None:
    inputs = case.inputs(case.texts, IMAGES)
    tokens = case.checkpoint.tokenize(case.texts)
    assert tokens["input_ids"].dtype == torch.int64
    assert torch.equal(tokens["input_ids"], inputs["input_ids"])
    assert ("attention_mask" in tokens) == ("attention_mask" in inputs)
    if "attention_mask" in tokens:
        assert torch.equal(tokens["attention_mask"], inputs["attention_mask"])
    # The only further input is one that the model fills with zeros itself.
    assert not inputs.get("token_type_ids", torch.zeros(1)).any()
    assert len({tuple(row.tolist()) for row in tokens["input_ids"]}) == len(case.texts)


def test_pixels_are_those_of_the_family_s_processor(images_case: Case) -> None:
    checkpoint = images_case.checkpoint
    tolerance = 1e-6 + images_case.levels / 255 / min(checkpoint.spec.std)
    found, expected = pixels_of(checkpoint, IMAGES), images_case.pixels(IMAGES)
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


def test_image_features_are_those_of_the_family_s_model(images_case: Case) -> None:
    checkpoint, pixels = images_case.checkpoint, images_case.pixels(IMAGES)
    found, expected = checkpoint.image_features(pixels), images_case.image_features(pixels)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert found.shape == (3, checkpoint.dim)
    torch.testing.assert_close(checkpoint.image(pixels), normalize(expected, dim=1), atol=1e-6, rtol=0)
    assert torch.pdist(normalize(found, dim=1)).min() > 1e-3, "the pictures must not look alike to this test"


def test_features_are_those_of_the_family_s_model(case: Case) -> None:
    inputs = case.inputs(case.texts, IMAGES)
    expected = case.image_features(inputs.pop("pixel_values"))
    found = case.checkpoint.text_features(case.checkpoint.tokenize(case.texts))
    torch.testing.assert_close(found, case.model.get_text_features(**inputs).pooler_output, atol=1e-6, rtol=0)
    assert found.shape == (len(case.texts), case.checkpoint.dim)
    assert expected.shape == (3, case.checkpoint.dim)
    assert torch.pdist(normalize(found, dim=1)).min() > 1e-3, "the texts must not look alike to this test"


def test_pooling_and_projection_are_those_of_the_papers(case: Case) -> None:
    """CLIP: EOS and the class token (Radford et al. 2021). SigLIP: the last token and attention pooling (Zhai et al.
    2023). Chinese-CLIP: BERT's CLS and the class token (Yang et al. 2022). All but SigLIP's images are projected."""
    inputs = case.inputs(case.texts, IMAGES)
    model, family = case.model, case.checkpoint.family
    image = model.vision_model(pixel_values=inputs.pop("pixel_values")).last_hidden_state
    text = model.text_model(**inputs).last_hidden_state
    if family == "siglip":
        head = model.vision_model.head
        pooled = head.attention(head.probe.expand(3, -1, -1), image, image)[0]
        images = (pooled + head.mlp(head.layernorm(pooled)))[:, 0]
        texts = model.text_model.head(text[:, -1])
    else:
        images = model.visual_projection(model.vision_model.post_layernorm(image[:, 0]))
        ended, rows = family in ("clip", "metaclip_2"), len(text)
        place = inputs["attention_mask"].sum(1) - 1 if ended else torch.zeros(rows, dtype=torch.int64)
        texts = model.text_projection(text[torch.arange(rows), place])
    checkpoint = case.checkpoint
    own = pixels_of(checkpoint, IMAGES)
    torch.testing.assert_close(checkpoint.image_features(own), images, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(checkpoint.text_features(checkpoint.tokenize(case.texts)), texts, atol=1e-5, rtol=1e-5)


def test_scores_are_those_of_the_family_s_model(case: Case, tmp_path: Path) -> None:
    prompts = PromptsConfig(labels=case.texts, templates=["{}"], cache=str(tmp_path))
    bank = build_bank(case.checkpoint, read_labels(prompts), prompts, LabelsConfig())
    batch = Embeddings(case.checkpoint.image(pixels_of(case.checkpoint, IMAGES)))
    found = label(batch, bank, torch.from_numpy(bank.features), top_k=len(case.texts))
    logits = case.model(**case.inputs(case.texts, IMAGES)).logits_per_image
    scores = logits.sigmoid() if case.checkpoint.family == "siglip" else logits.softmax(dim=1)
    torch.testing.assert_close(found.scores, scores.gather(1, found.indices), atol=1e-7, rtol=1e-4)
    assert torch.equal(found.indices, logits.argsort(dim=1, descending=True))
    assert logits.std(dim=1).min() > 0.02, "the scores must not look alike to this test"


def test_the_towers_give_the_same_embeddings_and_share_the_weights(case: Case) -> None:
    inputs = case.inputs(case.texts, IMAGES)
    checkpoint = case.checkpoint
    image, (text, _) = checkpoint.image, checkpoint.texts()
    expected = case.model(**inputs)
    ids = inputs["input_ids"]
    torch.testing.assert_close(image(inputs["pixel_values"]), expected.image_embeds, atol=1e-6, rtol=0)
    mask = inputs.get("attention_mask", torch.ones_like(ids))
    torch.testing.assert_close(text(ids, mask), expected.text_embeds, atol=1e-6, rtol=0)
    if checkpoint.family == "siglip":
        assert torch.equal(text(ids, torch.zeros_like(ids)), text(ids, mask))

    halves = [{name: p.data_ptr() for name, p in tower.model.named_parameters()} for tower in (image, text)]
    assert (halves[0] | halves[1]).keys() == dict(case.model.named_parameters()).keys()
    shared = halves[0].keys() & halves[1].keys()
    assert shared <= {"logit_scale", "logit_bias"}
    assert all(halves[0][name] == halves[1][name] for name in shared)
    assert all(name.startswith(("visi", "visual", "logit")) for name in halves[0])


def test_every_image_tower_has_layers_to_quantize(images_case: Case) -> None:
    tower = images_case.checkpoint.image
    found = [name for name, module in tower.named_modules() if in_a_layer(module, name)]
    # Of each layer the three projections of attention, its output, and two of the MLP (three of a gated one).
    assert len(found) in (6 * tower.sizes.layers, 7 * tower.sizes.layers)
    with pytest.raises(BackendUnavailable, match="finds no linear layers"):
        quantize_layers(torch.nn.Linear(2, 2), "torch_int8", None)


# The lowest cosine to fp32 that a precision must keep with weights of noise, which int8 has few levels for.
LOWEST = {"fp32": 0.999_99, "bf16": 0.999, "int8": 0.95}
BACKENDS = [
    BackendConfig(precision="bf16", device="cpu"),
    *(BackendConfig(name=name, precision="fp32", device="cpu") for name in ("torchscript", "onnx")),
    BackendConfig(name="onnx_int8", precision="int8", device="cpu"),
]


@pytest.mark.slow
@pytest.mark.needs("onnx", "onnxscript", "onnxruntime")
@pytest.mark.parametrize("config", BACKENDS, ids=lambda config: f"{config.name}-{config.precision}")
def test_backends_hold_parity_for_every_family(images_case: Case, config: BackendConfig, tmp_path: Path) -> None:
    checkpoint, limits = images_case.checkpoint, ParityConfig(lowest_cosine=LOWEST, mean_cosine=LOWEST)
    pictures = rendered_sample(checkpoint.spec, 16)
    config = replace(config, artifacts=str(tmp_path))
    encoder = factory(config.name)(checkpoint, config, batch_size=16, sample=lambda: pictures, limits=limits)
    normalise = Normaliser(checkpoint.spec, torch.device("cpu"))
    expected = images_case.image_features(normalise(pictures.pixels))
    cosines = (torch.as_tensor(encoder.encode(pictures.pixels)) * normalize(expected.detach(), dim=1)).sum(dim=1)
    assert cosines.min() > LOWEST[config.precision]


@pytest.mark.compat("sentence_transformers")
def test_a_folder_of_sentence_transformers_gives_what_it_gives(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    checkpoint = CASES["sentence-transformers"](tmp_path).checkpoint
    theirs = SentenceTransformer(str(tmp_path), device="cpu")
    found = checkpoint.image(pixels_of(checkpoint, IMAGES))
    torch.testing.assert_close(found, torch.from_numpy(theirs.encode(IMAGES)), atol=1e-5, rtol=0)
    texts = torch.from_numpy(embed_prompts(checkpoint, [[text] for text in ENGLISH]))
    torch.testing.assert_close(texts, torch.from_numpy(theirs.encode(ENGLISH)), atol=1e-5, rtol=0)


def test_chinese_clip_cuts_to_52_tokens_and_keeps_the_end(tmp_path: Path) -> None:
    checkpoint = open_chinese_clip(tmp_path).checkpoint
    assert checkpoint.max_tokens == 52
    whole = checkpoint.tokenizer.own("猫" * 80)["input_ids"]
    assert len(whole) == 82
    tokens = checkpoint.tokenize(["猫" * 80, "猫"])
    # cn_clip.clip.tokenize: CLS, the first 50, SEP.
    assert tokens["input_ids"][0].tolist() == [*whole[:51], whole[-1]]
    assert tokens["attention_mask"].sum(1).tolist() == [52, 3]
    alone = checkpoint.text_features(checkpoint.tokenize(["猫"]))
    torch.testing.assert_close(checkpoint.text_features(tokens)[1:], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tokens", [64, 16])
def test_siglip_s_own_tokenizer_lowers_and_drops_punctuation(tmp_path: Path, tokens: int) -> None:
    write_siglip(tmp_path, tokens=tokens)
    checkpoint = open_checkpoint(ModelConfig(name=str(tmp_path)))
    vocabulary = checkpoint.tokenizer.own.get_vocab()
    words = [vocabulary[word] for word in ("▁a", "▁photo", "▁of", "▁two", "▁blue", "▁stars")]
    found = checkpoint.tokenize(["A Photo, of two Blue stars.", " ".join(["cat"] * 90)])["input_ids"]
    assert found[0].tolist() == [*words, *[1] * (tokens - len(words))]
    assert found[1].tolist() == [*[vocabulary["▁cat"]] * (tokens - 1), 1]


def test_clip_refuses_an_end_that_its_tokenizer_does_not_write(tmp_path: Path) -> None:
    write_clip(tmp_path, eos=7)
    with pytest.raises(ModelError, match="at token 7 "):
        open_checkpoint(ModelConfig(name=str(tmp_path)))


def test_naflex_is_refused_and_the_way_out_is_named(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    Siglip2Model(Siglip2Config(text_config={**sizes, "vocab_size": 99}, vision_config=sizes)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"NaFlex.*google/siglip2-base-patch16-224"):
        open_checkpoint(ModelConfig(name=str(tmp_path)))


def test_a_job_labels_in_chinese(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    case = open_chinese_clip(folder)
    labels, templates = ["红色圆形", "一只猫", "蓝方", "绿星"], ["一张{}的照片", "{}"]
    manifest = scenes_manifest(tmp_path / "scenes.parquet", 6, damaged={})
    config = config_for(
        manifest,
        tmp_path / "out",
        model={"name": str(folder)},
        prompts={"labels": labels, "templates": templates, "cache": str(tmp_path / "cache")},
    )
    report = run_job(config)
    assert report.counts == {"ok": 6}
    rows = pq.read_table(tmp_path / "out").to_pydict()

    images = [Image.open(io.BytesIO(data)) for data in pq.read_table(manifest)["image"].to_pylist()]
    texts = [template.replace("{}", name) for name in labels for template in templates]
    expected = case.model(**case.inputs(texts, images))
    ensembled = normalize(expected.text_embeds.view(4, 2, -1).mean(1), dim=1)
    scores = (expected.image_embeds @ ensembled.T * case.model.logit_scale.exp()).softmax(dim=1)
    assert rows["label"] == [labels[i] for i in scores.argmax(dim=1)]
    np.testing.assert_allclose(rows["score"], scores.amax(dim=1).detach(), atol=1e-5)
    np.testing.assert_allclose(rows["embedding"], expected.image_embeds.detach(), atol=1e-5)
    written = json.loads((tmp_path / "out" / "_report.json").read_text(encoding="utf-8"))
    assert set(written["labels"]) <= set(labels)


COCO = "http://images.cocodataset.org/val2017/000000039769.jpg"
POKEMON = (
    "https://raw.githubusercontent.com/OFA-Sys/Chinese-CLIP/a2643ec6cd19133dadddbb3a95214942e2a5d39a/"
    "examples/pokemon.jpeg"
)
SYNTHETIC = (
    "https://huggingface.co/datasets/hf-internal-testing/transformers-synthetic-assets/resolve/main/images/pokemon.jpeg"
)
NAMES = ["杰尼龟", "妙蛙种子", "小火龙", "皮卡丘"]


@pytest.mark.hub
@pytest.mark.parametrize(
    ("name", "url", "texts", "logits", "scores", "tolerance"),
    [
        # transformers, CLIPModelIntegrationTest.
        (
            "openai/clip-vit-base-patch32",
            COCO,
            ["a photo of a cat", "a photo of a dog"],
            [24.5701, 19.3049],
            None,
            1e-3,
        ),
        # transformers, SiglipModelIntegrationTest.
        (
            "google/siglip-base-patch16-224",
            COCO,
            ["a photo of 2 cats", "a photo of 2 dogs"],
            [-0.7567, -10.3354],
            [3.1937e-01, 3.2463e-05],
            1e-3,
        ),
        # The authors' own code: the README of OFA-Sys/Chinese-CLIP.
        (
            "OFA-Sys/chinese-clip-vit-base-patch16",
            POKEMON,
            NAMES,
            None,
            [1.268734e-03, 5.436878e-02, 6.795761e-04, 9.436829e-01],
            1e-3,
        ),
        # transformers, ChineseCLIPModelIntegrationTest.
        (
            "OFA-Sys/chinese-clip-vit-base-patch16",
            SYNTHETIC,
            NAMES,
            None,
            [9.7735e-04, 1.1008e-02, 4.4070e-04, 9.8757e-01],
            5e-3,
        ),
    ],
)
def test_published_values_come_out(
    name: str, url: str, texts: list[str], logits: list[float] | None, scores: list[float] | None, tolerance: float
) -> None:
    with urllib.request.urlopen(url) as reply:
        image = Image.open(io.BytesIO(reply.read())).convert("RGB")
    checkpoint = open_checkpoint(ModelConfig(name=name))
    features = torch.from_numpy(embed_prompts(checkpoint, [[text] for text in texts]))
    image_features = checkpoint.image(pixels_of(checkpoint, [image]))
    found = (image_features @ features.T * checkpoint.scale + checkpoint.bias)[0]
    if logits is not None:
        torch.testing.assert_close(found, torch.tensor(logits), atol=tolerance, rtol=1e-3)
    if scores is not None:
        given = found.softmax(dim=0) if checkpoint.scoring == "softmax" else found.sigmoid()
        torch.testing.assert_close(given, torch.tensor(scores), atol=tolerance, rtol=1e-3)


def test_the_page_lists_what_opens() -> None:
    text = models_readme.PAGE.read_text(encoding="utf-8")
    assert models_readme.page(text) == text, "run python -m tests.models_readme"
    assert models_readme.table() in text
