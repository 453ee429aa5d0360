"""Exported towers: contents of the graphs, comparison with fp32, and lookup in the store."""

from __future__ import annotations

import dataclasses
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("onnxruntime", reason="needs the extra onnx")
pytest.importorskip("onnx", reason="needs the extra onnx")

import onnx

from pipeline.backends.artifacts import exports, onnx_export, torchscript
from pipeline.backends.artifacts.exports import BATCH_SIZES, GraphOptions, onnx_graph
from pipeline.backends.artifacts.onnx_export import check_fusions, check_graph
from pipeline.backends.artifacts.store import Artifact, ArtifactStore
from pipeline.backends.artifacts.torchscript import TraceOptions, traced
from pipeline.config.schema import ModelConfig, ParityConfig
from pipeline.core.errors import ArtifactError, BackendUnavailable, ParityError
from pipeline.core.records import Sample
from pipeline.engine.demo.folder import label_names, rendered_sample
from pipeline.models.checkpoint import Checkpoint, open_checkpoint
from pipeline.models.text import embed_prompts
from pipeline.models.towers import Normaliser
from tests.conftest import ROOT
from tests.families import CASES, CHINESE, ENGLISH
from tests.forks import forks
from tests.processes import wait_until

pytestmark = pytest.mark.usefixtures("exported_once")
LIMITS = ParityConfig()
IMAGE, TEXT = GraphOptions("image"), GraphOptions("text")
DYNAMIC = GraphOptions("image", "int8", quantization="dynamic")
STATIC = GraphOptions("image", "int8", quantization="static")
TEXT_INT8 = GraphOptions("text", "int8", quantization="dynamic")
PLAIN = [GraphOptions("image", fused=False), GraphOptions("text", fused=False)]
FP16 = [GraphOptions(tower, "fp16", fused=fused) for tower in ("image", "text") for fused in (True, False)]
FAMILIES = ["clip", "metaclip_2", "siglip", "chinese_clip"]


# Instructions for sums of 8-bit products (x86: AVX-512 VNNI, AVX-VNNI).
VNNI = "vnni" in Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else False


def name_of(options: GraphOptions) -> str:
    kind = "fused" if options.fused else "plain"
    return "-".join(filter(None, [options.tower, options.precision, options.quantization, kind]))


def cases(*options: GraphOptions) -> list[Any]:
    """Return the exports of the image tower as they are, and those of the text tower as slow ones."""
    slow = pytest.mark.slow
    return [pytest.param(one, id=name_of(one), marks=slow if one.tower == "text" else ()) for one in options]


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return open_checkpoint(ModelConfig())


@pytest.fixture(scope="module")
def sample(checkpoint: Checkpoint) -> Sample:
    return rendered_sample(checkpoint.spec, 16)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ArtifactStore:
    return ArtifactStore(tmp_path_factory.mktemp("store"))


class Demo:
    """Exports of the demo model, made on demand."""

    def __init__(self, checkpoint: Checkpoint, sample: Sample, store: ArtifactStore) -> None:
        self.checkpoint, self.sample, self.store = checkpoint, sample, store

    def __call__(self, options: GraphOptions) -> Artifact:
        return onnx_graph(self.checkpoint, options, self.store, sample=lambda: self.sample, limits=LIMITS)

    def graph(self, options: GraphOptions) -> Any:
        return onnx.load(self(options).file(onnx_export.GRAPH)).graph

    def layers(self, tower: str) -> int:
        return self.checkpoint.tower(tower).sizes.layers


@pytest.fixture(scope="module")
def demo(checkpoint: Checkpoint, sample: Sample, store: ArtifactStore) -> Demo:
    return Demo(checkpoint, sample, store)


@pytest.fixture(scope="module")
def everything(demo: Demo) -> list[Artifact]:
    """Make all exports before a test prevents exporting: other tests may have run in another process."""
    return [demo(options) for options in (IMAGE, TEXT, *PLAIN, *FP16, DYNAMIC, STATIC, TEXT_INT8)]


class Rebuilt(Exception):
    """Raised if the artefact is not in the store."""


@pytest.fixture
def no_build(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*arguments: Any) -> Any:
        raise Rebuilt

    monkeypatch.setattr(exports, "_build", build)


class Exported:
    """Checkpoint whose texts are embedded by an ONNX graph."""

    def __init__(self, checkpoint: Checkpoint, path: Path) -> None:
        self.texts, self.tokenize, self.max_tokens = checkpoint.texts, checkpoint.tokenize, checkpoint.max_tokens
        self.session = exports.session(path)

    def text_features(self, tokens: dict[str, torch.Tensor]) -> torch.Tensor:
        inputs = {"attention_mask": torch.ones_like(tokens["input_ids"]), **tokens}
        inputs = {value.name: inputs[value.name].numpy() for value in self.session.get_inputs()}
        return torch.from_numpy(self.session.run(None, inputs)[0])


def floats(graph: Any, kind: int = onnx.TensorProto.FLOAT) -> list[Any]:
    """Return the weights of one type that are not scalars."""
    return [tensor for tensor in graph.initializer if tensor.data_type == kind and np.prod(tensor.dims) > 1]


def idle(graph: Any) -> list[str]:
    """Return the nodes whose inputs are all weights."""
    alive = {value.name for value in graph.input}
    found = []
    for node in graph.node:
        if alive.intersection(node.input):
            alive.update(node.output)
        else:
            found.append(f"{node.op_type} {node.name}")
    return found


@pytest.mark.parametrize("options", cases(IMAGE, TEXT, *PLAIN))
def test_inputs_outputs_and_axes_are_declared(demo: Demo, options: GraphOptions) -> None:
    artifact = demo(options)
    path = artifact.file(onnx_export.GRAPH)
    onnx.checker.check_model(str(path))
    opened = exports.session(path)
    sides = [{v.name: (v.type, v.shape) for v in side} for side in (opened.get_inputs(), opened.get_outputs())]
    height, width = demo.checkpoint.spec.size
    if options.tower == "image":
        assert sides[0] == {"pixel_values": ("tensor(float)", ["batch", 3, height, width])}
        assert sides[1] == {"image_embeds": ("tensor(float)", ["batch", demo.checkpoint.dim])}
    else:
        axes = ("tensor(int64)", ["batch", "tokens"])
        assert sides[0] == {"input_ids": axes, "attention_mask": axes}
        assert sides[1] == {"text_embeds": ("tensor(float)", ["batch", demo.checkpoint.dim])}
    assert artifact.card["facts"]["inputs"].keys() == sides[0].keys()
    assert artifact.card["facts"]["batch_sizes"] == list(BATCH_SIZES) == [1, 2, 7, 64]
    parity = artifact.card["parity"]
    assert parity["images"] == sum(BATCH_SIZES)
    assert 1 - 1e-9 < parity["lowest_cosine"] <= parity["mean_cosine"] < 1 + 1e-9
    assert parity["top1"] is None
    assert len(parity["worst"]) == 5
    assert parity["worst"][0][0].startswith("scene-" if options.tower == "image" else "'")


@pytest.mark.parametrize("options", cases(IMAGE, TEXT))
def test_every_layer_is_fused(demo: Demo, options: GraphOptions) -> None:
    counts, layers = demo(options).card["facts"]["operators"], demo.layers(options.tower)
    assert counts["Attention"] == counts["QuickGelu"] == layers
    assert counts["SkipLayerNormalization"] >= 2 * layers - 1
    assert "Softmax" not in counts
    plain = demo(dataclasses.replace(options, fused=False))
    graph = onnx.load(plain.file(onnx_export.GRAPH)).graph
    assert {node.domain for node in graph.node} == {""}
    check_fusions(counts, layers=layers, attention=True, what="tower")
    for name in ("Attention", "SkipLayerNormalization", "QuickGelu"):
        short = counts[name] - (2 if options.tower == "text" and name.startswith("Skip") else 1)
        with pytest.raises(ArtifactError, match=f"tower: .* {short} of .*{name}"):
            check_fusions({**counts, name: short}, layers=layers, attention=True, what="tower")
    with pytest.raises(ArtifactError, match=f"0 of {layers} Attention"):
        check_fusions(plain.card["facts"]["operators"], layers=layers, attention=True, what="tower")
    check_fusions({**counts, "Attention": 0}, layers=layers, attention=False, what="tower")


@pytest.mark.parametrize("options", cases(IMAGE, TEXT, *PLAIN))
def test_constants_are_folded(demo: Demo, options: GraphOptions) -> None:
    graph = demo.graph(options)
    assert idle(graph) == []
    # The file is little larger than the weights: nothing was folded twice.
    size = demo(options).size / 4
    tower = demo.checkpoint.image if options.tower == "image" else None
    if tower is not None:
        assert size < 1.1 * sum(p.numel() for p in tower.parameters()) + 20_000


@pytest.mark.parametrize("options", cases(*FP16))
def test_fp16_is_fp16_inside_and_fp32_outside(demo: Demo, options: GraphOptions) -> None:
    artifact = demo(options)
    model = onnx.load(artifact.file(onnx_export.GRAPH))
    outside = [v for v in (*model.graph.input, *model.graph.output) if v.name.endswith(("values", "embeds"))]
    assert {v.type.tensor_type.elem_type for v in outside} == {onnx.TensorProto.FLOAT}
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)
    assert all(names)
    assert idle(model.graph) == []
    norms = [node for node in model.graph.node if node.op_type == "LayerNormalization"]
    of_norms = {name for node in norms for name in node.input}
    assert {t.name for t in floats(model.graph)} <= (set() if options.fused else of_norms)
    assert len(floats(model.graph, onnx.TensorProto.FLOAT16)) > 4 * demo.layers(options.tower)
    assert artifact.size < 0.6 * demo(dataclasses.replace(options, precision="fp32")).size
    assert 0.999_99 < artifact.card["parity"]["lowest_cosine"] < 1 - 1e-10
    producers = {output: node for node in model.graph.node for output in node.output}
    # The length is computed in fp32, where squares do not overflow.
    assert producers[producers[model.graph.output[0].name].input[0]].op_type == "Cast"
    if options.fused:
        return
    del model.graph.value_info[:]
    found = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*found.value_info, *found.input)}
    kinds |= {tensor.name: tensor.data_type for tensor in found.initializer}
    assert {kinds[name] for node in norms for name in node.input} == {onnx.TensorProto.FLOAT}
    products = [node for node in model.graph.node if node.op_type == "MatMul"]
    assert {kinds[name] for node in products for name in node.input} == {onnx.TensorProto.FLOAT16}


@pytest.mark.parametrize("options", cases(DYNAMIC, STATIC, TEXT_INT8))
def test_int8_weights_are_int8(demo: Demo, options: GraphOptions) -> None:
    artifact = demo(options)
    graph = demo.graph(options)
    weights = {tensor.name for tensor in floats(graph, onnx.TensorProto.INT8) if len(tensor.dims) == 2}
    constants = {tensor.name for tensor in graph.initializer}
    whole = options == DYNAMIC
    assert len(weights) >= (4 if whole else 6) * demo.layers(options.tower)
    # No product has a float weight.
    assert [n.name for n in graph.node if n.op_type == "MatMul" and n.input[1] in constants] == []
    counts = artifact.card["facts"]["operators"]
    layers = demo.layers(options.tower)
    assert counts.get("QAttention", 0) == (layers if whole else 0)
    assert counts["SkipLayerNormalization"] >= 2 * layers - 1
    if options.tower == "image":
        assert artifact.size < (0.32 if whole else 0.40) * demo(IMAGE).size
    if options == STATIC:
        producers = {output: node for node in graph.node for output in node.output}
        products = [node for node in graph.node if node.op_type == "MatMul"]
        assert {producers[name].op_type for node in products for name in node.input} == {"DequantizeLinear"}
        assert "DynamicQuantizeLinear" not in counts
    assert 0.99 < artifact.card["parity"]["lowest_cosine"] < 1 - 1e-6


@pytest.mark.slow
def test_int8_texts_keep_the_causal_mask(demo: Demo) -> None:
    graph = demo.graph(TEXT_INT8)
    kinds = {node.op_type for node in graph.node}
    # ONNX Runtime's QAttention silently ignores the causal mask.
    assert not kinds & {"QAttention", "Attention"}
    assert "Softmax" in kinds
    long = [f"{name} " * 8 for name in label_names()[:6]]
    tokens = demo.checkpoint.tokenize(long)
    assert tokens["input_ids"].shape[1] > 16
    found = Exported(demo.checkpoint, demo(TEXT_INT8).file(onnx_export.GRAPH)).text_features(tokens)
    expected = torch.nn.functional.normalize(demo.checkpoint.text_features(tokens), dim=1)
    assert (found * expected).sum(1).min() > 0.998


def test_rows_do_not_depend_on_their_neighbours(demo: Demo) -> None:
    pixels = Normaliser(demo.checkpoint.spec, torch.device("cpu"))(demo.sample.pixels).numpy()
    for options in (IMAGE, STATIC):
        opened = exports.session(demo(options).file(onnx_export.GRAPH))
        (whole,) = opened.run(None, {"pixel_values": pixels})
        (part,) = opened.run(None, {"pixel_values": pixels[5:8]})
        np.testing.assert_allclose(part, whole[5:8], atol=1e-5)


def test_a_missed_tolerance_publishes_nothing(demo: Demo, tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path / "store")
    limits = dataclasses.replace(LIMITS, lowest_cosine={**LIMITS.lowest_cosine, "int8": 1.0})
    wanted = r"demo, image tower in ONNX int8 dynamic, batches of 1 .*lowest_cosine.int8 wants 1.0.*worst.*scene-000000"
    with pytest.raises(ParityError, match=wanted):
        onnx_graph(demo.checkpoint, DYNAMIC, store, sample=lambda: demo.sample, limits=limits)
    assert os.listdir(store.root) == []
    assert store.artifacts() == []


def test_an_export_made_under_looser_limits_is_held_to_those_of_today(demo: Demo) -> None:
    demo(DYNAMIC)
    limits = dataclasses.replace(LIMITS, mean_cosine={**LIMITS.mean_cosine, "int8": 1.0})
    with pytest.raises(ParityError, match=r"of demo is too far.*mean_cosine.int8 wants 1.0"):
        onnx_graph(demo.checkpoint, DYNAMIC, demo.store, sample=lambda: demo.sample, limits=limits)


@pytest.mark.parametrize("size", [1, 7])
def test_every_batch_size_is_held(demo: Demo, size: int) -> None:
    sizes = []

    def run(inputs: Any) -> np.ndarray:
        sizes.append(len(inputs["pixel_values"]))
        vectors = demo.checkpoint.image(torch.from_numpy(inputs["pixel_values"])).numpy()
        return vectors[:, ::-1].copy() if len(vectors) == size else vectors

    exported = exports.ExportedTower(run, tower="image", precision="fp32", title="here")
    with pytest.raises(ParityError, match=f"here, batches of {size} is too far"):
        exports.check_parity(exported, demo.checkpoint, sample=lambda: demo.sample, limits=LIMITS)
    assert sizes == list(BATCH_SIZES[: BATCH_SIZES.index(size) + 1])


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp(request.param)
    return CASES[request.param](folder).checkpoint


@pytest.mark.slow
def test_every_family_exports_both_towers(family: Checkpoint, store: ArtifactStore) -> None:
    pictures = rendered_sample(family.spec, 16)

    def make(options: GraphOptions) -> tuple[Artifact, dict[str, int]]:
        artifact = onnx_graph(family, options, store, sample=lambda: pictures, limits=LIMITS)
        if options.precision == "fp32":
            assert idle(onnx.load(artifact.file(onnx_export.GRAPH)).graph) == []
        return artifact, artifact.card["facts"]["operators"]

    active = {"siglip": ("FastGelu", "FastGelu"), "chinese_clip": ("QuickGelu", "BiasGelu")}.get(
        family.family, ("QuickGelu", "QuickGelu")
    )
    for options, gelu in zip((IMAGE, TEXT), active, strict=True):
        artifact, counts = make(options)
        # SigLIP's pooling block has an attention that is not self-attention.
        pooled = family.family == "siglip" and options == IMAGE
        assert (counts["Attention"], counts[gelu]) == (2, 3 if pooled else 2)
        assert counts["SkipLayerNormalization"] == (3 if options == IMAGE and not pooled else 4)
        assert counts.get("Softmax", 0) == int(pooled)
        # A wrong operator, such as the exact GELU for its approximation, is far below this.
        assert artifact.card["parity"]["lowest_cosine"] > 1 - 1e-11
    tokens = make(TEXT)[0].card["facts"]["inputs"]["input_ids"]
    assert tokens == ["batch", "64" if family.family == "siglip" else "tokens"]

    # The small vocabularies contain few words.
    texts = {"clip": label_names(), "chinese_clip": CHINESE}.get(family.family, ENGLISH)
    prompts = [[template.replace("{}", text) for template in ("{}", "a photo of a {}", "一张{}")] for text in texts]
    bank = embed_prompts(family, prompts)
    assert np.linalg.norm(bank[0] - bank[1]) > 0.002, "the prompts must not look alike to this test"
    exported: Any = Exported(family, make(TEXT)[0].file(onnx_export.GRAPH))
    np.testing.assert_allclose(embed_prompts(exported, prompts), bank, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not VNNI, reason="without VNNI, sums of 8-bit products saturate, which costs small towers more")
@pytest.mark.parametrize(("options", "lowest"), [(STATIC, 0.995), (TEXT_INT8, 0.999)])
def test_every_family_quantizes_both_towers(
    family: Checkpoint, store: ArtifactStore, options: GraphOptions, lowest: float
) -> None:
    # A few images for the calibration, and others for the comparison.
    pictures = rendered_sample(family.spec, 16)
    artifact = onnx_graph(family, options, store, sample=lambda: pictures, limits=LIMITS)
    assert artifact.card["parity"]["lowest_cosine"] > lowest
    assert not {"QAttention", "Attention"} & artifact.card["facts"]["operators"].keys()


@pytest.mark.slow
def test_another_origin_is_never_found(
    demo: Demo, everything: list[Artifact], no_build: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def find(checkpoint: Checkpoint, options: GraphOptions = IMAGE, *, pixels: int = 0) -> Artifact:
        moved = dataclasses.replace(demo.sample, pixels=demo.sample.pixels ^ pixels)
        return onnx_graph(checkpoint, options, demo.store, sample=lambda: moved, limits=LIMITS)

    model = demo.checkpoint
    assert len({artifact.fingerprint for artifact in everything}) == 11
    assert find(model, pixels=1).fingerprint == find(model).fingerprint
    assert find(model, DYNAMIC, pixels=1) == find(model, DYNAMIC)
    with pytest.raises(Rebuilt):
        find(model, STATIC, pixels=1)
    seeds = [open_checkpoint(ModelConfig(name="demo", weights="random", seed=seed)) for seed in (1, 2)]
    for other in (dataclasses.replace(model, revision="other"), *seeds):
        with pytest.raises(Rebuilt):
            find(other)
    assert len({exports.recipe("onnx-image", seed, {}).fingerprint for seed in seeds}) == 2
    # The name does not count.
    assert find(dataclasses.replace(model, name="renamed")) == find(model)
    version = exports._version
    for package in ("torch", "transformers", "onnx", "onnxscript", "onnxruntime"):
        assert version(package) != "unknown"
        monkeypatch.setattr(exports, "_version", lambda name, p=package: "9" if name == p else version(name))
        with pytest.raises(Rebuilt):
            find(model)
    monkeypatch.setattr(exports, "_version", version)
    assert find(model) == demo(IMAGE)
    assert exports._version("no-such-package") == "unknown"


def export_beside_another(folder: str, number: int) -> int:
    checkpoint = open_checkpoint(ModelConfig())
    exports.need_packages()
    sample = rendered_sample(checkpoint.spec, 4)
    Path(folder, f"ready-{number}").touch()
    wait_until(lambda: len(list(Path(folder).glob("ready-*"))) == 2, 120)
    store = ArtifactStore(f"{folder}/store")
    artifact = onnx_graph(checkpoint, IMAGE, store, sample=lambda: sample, limits=LIMITS)
    print(f"made {artifact.path} {artifact.card['created']}")
    return 0


@pytest.mark.slow
def test_two_processes_make_one_artefact(tmp_path: Path) -> None:
    call = "tests.test_exports:export_beside_another"
    both = [forks().start(call, str(tmp_path), number) for number in range(2)]
    assert [child.wait() for child in both] == [0, 0], [child.said() for child in both]
    (artifact,) = ArtifactStore(tmp_path / "store").artifacts()
    made = f"made {artifact.path} {artifact.card['created']}\n"
    assert [child.said().count(made) for child in both] == [1, 1]
    assert os.listdir(tmp_path / "store") == [artifact.fingerprint]
    assert sorted(os.listdir(artifact.path)) == ["card.json", "model.onnx"]


@pytest.mark.slow
def test_large_weights_lie_beside_the_graph(demo: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_export, "LARGE", 100_000)
    store = ArtifactStore(tmp_path / "store")
    for options in (IMAGE, PLAIN[0], FP16[0], DYNAMIC, STATIC):
        artifact = onnx_graph(demo.checkpoint, options, store, sample=lambda: demo.sample, limits=LIMITS)
        graph = onnx.load(artifact.file(onnx_export.GRAPH), load_external_data=False).graph
        places = {
            entry.value
            for tensor in graph.initializer
            for entry in tensor.external_data
            if entry.key == "location" and tensor.data_location == onnx.TensorProto.EXTERNAL
        }
        assert places == {"model.onnx.data"}, name_of(options)
        assert artifact.card["files"].keys() == {"model.onnx", "model.onnx.data"}
        assert sorted(os.listdir(artifact.path)) == ["card.json", "model.onnx", "model.onnx.data"]
        assert artifact.file("model.onnx").stat().st_size < artifact.size / 2
        # The file does not contain the data before the conversion.
        assert artifact.size < 1.1 * demo(options).size
        assert artifact.card["parity"]["lowest_cosine"] == pytest.approx(
            demo(options).card["parity"]["lowest_cosine"], abs=1e-5
        )
        assert store.problems(artifact) == []
        exports.session(artifact.file(onnx_export.GRAPH))


def test_check_graph_names_what_is_wrong(tmp_path: Path) -> None:
    def write(*, name: str = "pixel_values", batch: str | int = "batch", operator: str = "Identity") -> Path:
        kinds = [
            onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [batch, 3]) for n in (name, "image_embeds")
        ]
        node = onnx.helper.make_node(operator, [name], ["image_embeds"])
        graph = onnx.helper.make_graph([node], "graph", kinds[:1], kinds[1:])
        onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)]), tmp_path / "x.onnx")
        return tmp_path / "x.onnx"

    check_graph(write(), "image")
    with pytest.raises(ArtifactError, match="pixels -> image_embeds, not"):
        check_graph(write(name="pixels"), "image")
    with pytest.raises(ArtifactError, match="first axis of pixel_values is 4, not dynamic"):
        check_graph(write(batch=4), "image")
    with pytest.raises(ArtifactError, match="not a valid ONNX model"):
        check_graph(write(operator="Nonsense"), "image")


@pytest.mark.slow
def test_torchscript_is_traced_loaded_and_compared(demo: Demo, tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path / "store")
    cpu = torch.device("cpu")

    def trace(precision: str, limits: ParityConfig = LIMITS) -> Artifact:
        options = TraceOptions(precision, cpu)
        return traced(demo.checkpoint, options, store, sample=lambda: demo.sample, limits=limits)

    made = trace("fp32")
    assert made.card["parity"]["lowest_cosine"] > 1 - 1e-9
    assert made.card["files"].keys() == {"model.pt"}
    pixels = Normaliser(demo.checkpoint.spec, torch.device("cpu"))(demo.sample.pixels)
    module = torchscript.load(made.file("model.pt"), cpu)
    for size in (1, 3, 16):
        expected = demo.checkpoint.image(pixels[:size])
        torch.testing.assert_close(module(pixels[:size]), expected, atol=1e-5, rtol=0)
    assert trace("fp32") == made
    other = trace("bf16")
    assert other.fingerprint != made.fingerprint
    assert 0.99 < other.card["parity"]["lowest_cosine"] < 1 - 1e-7
    assert other.size < 0.6 * made.size
    assert next(demo.checkpoint.image.parameters()).dtype == torch.float32
    before = sorted(os.listdir(store.root))
    (store.root / made.fingerprint).rename(tmp_path / "away")
    strict = dataclasses.replace(LIMITS, mean_cosine={**LIMITS.mean_cosine, "fp32": 1.1})
    with pytest.raises(ParityError, match=r"TorchScript fp32.*mean_cosine.fp32 wants 1.1.*scene-"):
        trace("fp32", strict)
    assert sorted(os.listdir(store.root)) == [name for name in before if name != made.fingerprint]


def test_the_deprecated_api_is_called_in_one_module() -> None:
    users = [path for path in (ROOT / "pipeline").rglob("*.py") if "torch.jit" in path.read_text(encoding="utf-8")]
    assert users == [ROOT / "pipeline" / "backends" / "artifacts" / "torchscript.py"]


def test_quiet_restores_logs_and_warnings(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("tests.quiet")
    filters, level = list(warnings.filters), logging.root.manager.disable

    def fail() -> None:
        with onnx_export.quiet():
            logger.warning("unheard")
            logger.error("heard")
            warnings.warn("unseen", stacklevel=1)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert caplog.messages == ["heard"]
    assert logging.root.manager.disable == level
    assert warnings.filters == filters
    logging.disable(logging.INFO)
    try:
        with onnx_export.quiet():
            pass
        assert logging.root.manager.disable == logging.INFO
    finally:
        logging.disable(level)


def test_a_missing_package_is_named_with_its_extra(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    exports.need_packages()
    find = exports.find_spec
    monkeypatch.setattr(exports, "find_spec", lambda name: None if name == "onnxscript" else find(name))
    with pytest.raises(BackendUnavailable, match=r"not installed: onnxscript; pip install .*\[onnx\]'"):
        demo(IMAGE)
    exports.need_packages("onnx")
    wanted = r"no_such_one, no_such_two; pip install .*\[extra\]'"
    with pytest.raises(BackendUnavailable, match=wanted):
        exports.need_packages("no_such_one", "onnx", "no_such_two", extra="extra")
