"""Model repositories for Triton: configurations in the published schema, graphs run with Triton's inputs."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import threading
from collections.abc import Iterator
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

pytest.importorskip("onnxruntime", reason="needs the extra onnx")
pytest.importorskip("onnx", reason="needs the extra onnx")

import onnx
import onnxruntime
from google.protobuf import text_format

from pipeline import export
from pipeline.backends.artifacts.onnx_export import GRAPH
from pipeline.backends.artifacts.store import ArtifactStore
from pipeline.backends.triton.model_config import Serving, model_config, preferred, read_graph, slug
from pipeline.backends.triton.pbtxt import to_text
from pipeline.backends.triton.repository import _card, _write_tokenizer, write_repository
from pipeline.config.schema import ImagesConfig, ModelConfig
from pipeline.core.errors import ArtifactError, ConfigError
from pipeline.engine.demo import scenes
from pipeline.images.preprocess import preprocess
from pipeline.models.checkpoint import Checkpoint, open_checkpoint
from pipeline.models.hub import DEMO_FOLDER
from pipeline.models.towers import Normaliser
from tests.families import CASES

pytestmark = [pytest.mark.compat("tritonclient"), pytest.mark.usefixtures("exported_once")]
DTYPES = {"TYPE_FP32": np.float32, "TYPE_INT64": np.int64}
ONNX_TYPES = {"tensor(float)": "TYPE_FP32", "tensor(int64)": "TYPE_INT64"}
TEXTS = ["a red circle", "two blue stars", "", "a green square and a yellow triangle on a table"]
# Keys of the accelerator tensorrt in onnxruntime_backend (src/onnxruntime.cc); a model with another key fails to load.
TENSORRT_KEYS = {
    *("precision_mode", "trt_layer_norm_fp32_fallback", "trt_engine_cache_enable", "trt_engine_cache_path"),
    *("trt_profile_min_shapes", "trt_profile_opt_shapes", "trt_profile_max_shapes"),
}


@cache
def schema() -> Any:
    """Load ``model_config.proto`` of Triton's client as a single module, since its package needs gRPC."""
    files = importlib.metadata.files("tritonclient") or []
    (path,) = (file for file in files if str(file) == "tritonclient/grpc/model_config_pb2.py")
    spec = importlib.util.spec_from_file_location("model_config_pb2", path.locate())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parsed(text: str) -> Any:
    """Parse a configuration; an unknown field or a value of the wrong type raises."""
    return text_format.Parse(text, schema().ModelConfig())


def type_name(value: int) -> str:
    name: str = schema().DataType.Name(value)
    return name


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Path:
    """Repository of the demo model, written by the command."""
    folder = tmp_path_factory.mktemp("served") / "models"
    arguments = ["--to", "triton", "--out", str(folder), "--max-batch", "16", "--queue-microseconds", "1500"]
    assert export.main([*arguments, "model=demo", f"backend.artifacts={store}"]) == 0
    return folder


@pytest.fixture(scope="module")
def configs(repository: Path) -> dict[str, Any]:
    return {path.parent.name: parsed(path.read_text()) for path in repository.glob("*/config.pbtxt")}


@pytest.fixture(scope="module")
def sessions(repository: Path) -> dict[str, Any]:
    names = ("demo_image", "demo_text")
    return {name: onnxruntime.InferenceSession(str(repository / name / "1" / "model.onnx")) for name in names}


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return open_checkpoint(ModelConfig())


@pytest.fixture(scope="module")
def client(repository: Path) -> Any:
    return load_client(repository)


def load_client(folder: Path) -> Any:
    """Load the repository's client as a module."""
    spec = importlib.util.spec_from_file_location("triton_client", folder / "client.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pictures() -> list[Image.Image]:
    sizes = [(96, 64), (50, 120), (48, 48), (333, 250)]
    return [scenes.render(scene, *size) for scene, size in zip(scenes.scenes(5, 4), sizes, strict=True)]


@pytest.fixture(scope="module")
def reference() -> tuple[np.ndarray, np.ndarray]:
    """Normalised features of the demo model in transformers for the images and the texts."""
    model = CLIPModel.from_pretrained(DEMO_FOLDER).eval()
    inputs = CLIPImageProcessorPil.from_pretrained(DEMO_FOLDER)(pictures(), return_tensors="pt")
    tokens = AutoTokenizer.from_pretrained(DEMO_FOLDER)(TEXTS, padding=True, return_tensors="pt")
    with torch.inference_mode():
        features = (model.get_image_features(**inputs).pooler_output, model.get_text_features(**tokens).pooler_output)
    image, text = (torch.nn.functional.normalize(one).numpy() for one in features)
    return image, text


def test_a_repository_holds_a_model_for_each_tower_and_nothing_else_in_folders(repository: Path) -> None:
    # Triton reads every folder as a model, and starts only if all are valid.
    assert sorted(path.name for path in repository.iterdir() if path.is_dir()) == ["demo_image", "demo_text"]
    assert sorted(path.name for path in repository.iterdir() if path.is_file()) == [
        *("README.md", "card.json", "client.py")
    ]
    for name, others in (("demo_image", set()), ("demo_text", {"warmup", "tokenizer.json"})):
        assert {path.name for path in (repository / name).iterdir()} == {"1", "config.pbtxt", *others}
        assert [path.name for path in (repository / name / "1").iterdir()] == ["model.onnx"]
    assert [path.name for path in repository.parent.iterdir()] == ["models"]


def test_a_configuration_says_what_its_graph_says(configs: dict[str, Any], sessions: dict[str, Any]) -> None:
    for name, config in configs.items():
        graph = sessions[name]
        for said, found in ((config.input, graph.get_inputs()), (config.output, graph.get_outputs())):
            assert [
                # As Triton compares them: a dynamic axis is -1, and the first is the batch.
                (one.name, type_name(one.data_type), list(one.dims))
                for one in said
            ] == [
                (one.name, ONNX_TYPES[one.type], [-1 if isinstance(axis, str) else axis for axis in one.shape[1:]])
                for one in found
            ]
            assert all(isinstance(one.shape[0], str) for one in found)


def test_a_configuration_has_every_field_that_was_asked_for(configs: dict[str, Any], store: Path) -> None:
    artifacts = {artifact.card["kind"]: artifact.fingerprint for artifact in ArtifactStore(store).artifacts()}
    group = schema().ModelInstanceGroup
    for tower in ("image", "text"):
        config = configs[f"demo_{tower}"]
        assert {field.name for field, _ in config.ListFields()} == {
            *("name", "platform", "backend", "max_batch_size", "input", "output", "instance_group"),
            *("dynamic_batching", "optimization", "parameters", "model_warmup"),
        }
        assert (config.name, config.platform, config.backend) == (f"demo_{tower}", "onnxruntime_onnx", "onnxruntime")
        assert config.max_batch_size == 16
        assert [(one.kind, one.count, list(one.gpus)) for one in config.instance_group] == [(group.KIND_AUTO, 1, [])]
        assert list(config.dynamic_batching.preferred_batch_size) == [8, 16]
        assert config.dynamic_batching.max_queue_delay_microseconds == 1500
        (accelerator,) = config.optimization.execution_accelerators.gpu_execution_accelerator
        assert (accelerator.name, dict(accelerator.parameters)) == ("cuda", {"use_tf32": "0"})
        assert {key: value.string_value for key, value in config.parameters.items()} == {
            "model": "demo",
            "artifact": artifacts[f"onnx-{tower}"],
        }


def test_the_graphs_hold_what_every_onnx_runtime_since_1_18_knows(repository: Path, store: Path) -> None:
    for name in ("demo_image", "demo_text"):
        graph = read_graph(repository / name / "1" / "model.onnx", "fp32", 77)
        assert graph.ir <= 10
        assert graph.opset <= 21
    for artifact in ArtifactStore(store).artifacts():
        assert artifact.card["options"]["fused"] is False


def test_warm_up_is_data_that_the_model_takes(
    repository: Path, configs: dict[str, Any], sessions: dict[str, Any]
) -> None:
    for name, config in configs.items():
        assert [one.batch_size for one in config.model_warmup] == [1, 16]
        for warmup in config.model_warmup:
            inputs = {}
            for key, value in warmup.inputs.items():
                kind = DTYPES[type_name(value.data_type)]
                # As Triton does: one row from the file, the same for the whole batch.
                row = np.zeros(list(value.dims), kind)
                if not value.zero_data:
                    data = (repository / name / "warmup" / value.input_data_file).read_bytes()
                    assert len(data) == row.nbytes
                    row = np.frombuffer(data, kind).reshape(row.shape)
                inputs[key] = np.broadcast_to(row, (warmup.batch_size, *row.shape))
            assert set(inputs) == {one.name for one in config.input}
            (output,) = sessions[name].run(None, inputs)
            assert output.shape == (warmup.batch_size, 128)
            assert np.allclose(np.linalg.norm(output, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 2, 7, 16])
def test_a_graph_fed_as_triton_feeds_it_gives_transformers_features(
    configs: dict[str, Any], sessions: dict[str, Any], client: Any, reference: tuple[np.ndarray, np.ndarray], rows: int
) -> None:
    cycle = [i % 4 for i in range(rows)]
    drawn = pictures()
    inputs = {
        "demo_image": {"pixel_values": np.stack([client.pixels(drawn[i]) for i in cycle])},
        "demo_text": client.tokens([TEXTS[i] for i in cycle]),
    }
    wanted = dict(zip(("demo_image", "demo_text"), reference, strict=True))
    for name, config in configs.items():
        for tensor in config.input:
            values = inputs[name][tensor.name]
            assert values.dtype == DTYPES[type_name(tensor.data_type)]
            assert len(values.shape) == 1 + len(tensor.dims)
            assert all(said in (-1, axis) for said, axis in zip(tensor.dims, values.shape[1:], strict=True))
        (output,) = sessions[name].run([config.output[0].name], inputs[name])
        assert list(output.shape) == [rows, *config.output[0].dims]
        assert output.dtype == DTYPES[type_name(config.output[0].data_type)]
        assert np.abs(output - wanted[name][cycle]).max() < 1e-5


def test_the_clients_pixels_are_the_pipelines(client: Any, checkpoint: Checkpoint) -> None:
    normalise = Normaliser(checkpoint.spec, torch.device("cpu"))
    for image in (*pictures(), Image.effect_noise((30, 61), 80).convert("RGB")):
        rgb = torch.from_numpy(preprocess(image, checkpoint.spec).rgb.copy()).permute(2, 0, 1)[None]
        assert np.array_equal(client.pixels(image), normalise(rgb)[0].numpy())


def test_the_clients_pixels_are_upright_and_on_white(client: Any) -> None:
    image = pictures()[0]
    turned = image.transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6
    assert np.array_equal(client.pixels(turned), client.pixels(image))
    clear = Image.new("RGBA", (60, 60), (200, 0, 0, 0))
    assert np.array_equal(client.pixels(clear), client.pixels(Image.new("RGB", (60, 60), "white")))


@pytest.mark.parametrize("family", CASES)
def test_the_clients_tokens_are_the_checkpoints(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, client: Any
) -> None:
    """Tokens with the padding and truncation of every family; additional padding has mask 0."""
    checkpoint = CASES[family](tmp_path).checkpoint
    card = _card(checkpoint, {"text": {"name": "small_text"}}, ImagesConfig(), Serving())
    (tmp_path / "small_text").mkdir()
    _write_tokenizer(tmp_path / "small_text" / "tokenizer.json", checkpoint)
    (tmp_path / "card.json").write_text(json.dumps(card))
    (tmp_path / "client.py").write_text(Path(client.__file__).read_text())
    texts = [*TEXTS, "A Photo, of two Blue stars. " * 40]
    given, wanted = load_client(tmp_path).tokens(texts), checkpoint.tokenize(texts)
    width = wanted["input_ids"].shape[1]
    assert given["input_ids"].dtype == given["attention_mask"].dtype == np.int64
    assert np.array_equal(given["input_ids"][:, :width], wanted["input_ids"].numpy())
    assert given["input_ids"].shape[1] == width == checkpoint.max_tokens
    if checkpoint.texts()[1].masked:
        assert np.array_equal(given["attention_mask"], wanted["attention_mask"].numpy())


def test_short_texts_share_a_length(client: Any, checkpoint: Checkpoint) -> None:
    for text in ("", "a cat", "a red circle"):
        tokens = client.tokens([text])
        assert tokens["input_ids"].shape == tokens["attention_mask"].shape == (1, 8)
        width = checkpoint.tokenize([text])["input_ids"].shape[1]
        assert tokens["attention_mask"].sum() == width


class Triton:
    """Server of Triton's HTTP protocol with binary tensors: checks a request and runs the graph."""

    def __init__(self, configs: dict[str, Any], sessions: dict[str, Any]) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                name = self.path.removeprefix("/v2/models/").removesuffix("/infer")
                body = self.rfile.read(int(self.headers["Content-Length"]))
                split = int(self.headers["Inference-Header-Content-Length"])
                request, rest, inputs = json.loads(body[:split]), body[split:], {}
                kinds = {one.name: type_name(one.data_type) for one in configs[name].input}
                for tensor in request["inputs"]:
                    size = tensor["parameters"]["binary_data_size"]
                    assert f"TYPE_{tensor['datatype']}" == kinds[tensor["name"]]
                    values = np.frombuffer(rest[:size], DTYPES[kinds[tensor["name"]]])
                    inputs[tensor["name"]], rest = values.reshape(tensor["shape"]), rest[size:]
                assert rest == b""
                (output,) = sessions[name].run([request["outputs"][0]["name"]], inputs)
                described = {"name": request["outputs"][0]["name"], "datatype": "FP32", "shape": output.shape}
                head = json.dumps({"outputs": [{**described, "parameters": {"binary_data_size": output.nbytes}}]})
                self.send_response(200)
                self.send_header("Inference-Header-Content-Length", str(len(head)))
                self.end_headers()
                self.wfile.write(head.encode() + output.tobytes())

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self.server.server_address[1]}"


@pytest.fixture
def address(configs: dict[str, Any], sessions: dict[str, Any]) -> Iterator[str]:
    triton = Triton(configs, sessions)
    thread = threading.Thread(target=triton.server.serve_forever, args=(0.01,))
    thread.start()
    yield triton.address
    triton.server.shutdown()
    thread.join()
    triton.server.server_close()


def test_the_client_asks_and_reads_the_answer(
    address: str,
    client: Any,
    reference: tuple[np.ndarray, np.ndarray],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    images, texts = reference
    given = client.ask(address, "image", {"pixel_values": np.stack([client.pixels(one) for one in pictures()])})
    assert np.abs(given - images).max() < 1e-5
    assert np.abs(client.ask(address, "text", client.tokens(TEXTS)) - texts).max() < 1e-5
    pictures()[0].save(tmp_path / "scene.png")
    client.main(address, str(tmp_path / "scene.png"), *TEXTS)
    lines = capsys.readouterr().out.splitlines()
    assert [float(line.split()[0]) for line in lines] == pytest.approx(texts @ images[0], abs=1e-4)


@pytest.mark.parametrize("tower", ["image", "text"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_tensorrt_is_asked_for_one_engine_of_all_shapes(repository: Path, tower: str, precision: str) -> None:
    graph = read_graph(repository / f"demo_{tower}" / "1" / "model.onnx", precision, 77)
    serving = Serving(max_batch_size=32, instances=2, tensorrt=True, engine_cache='/srv/"Käse" \\ engines')
    config = parsed(to_text(model_config("m", graph, serving, about={})))
    kind = schema().ModelInstanceGroup.KIND_GPU
    assert [(one.kind, one.count) for one in config.instance_group] == [(kind, 2)]
    (accelerator,) = config.optimization.execution_accelerators.gpu_execution_accelerator
    options = dict(accelerator.parameters)
    assert accelerator.name == "tensorrt"
    assert set(options) <= TENSORRT_KEYS
    assert options["precision_mode"] == precision.upper()
    assert options["trt_engine_cache_path"] == '/srv/"Käse" \\ engines'
    assert ("trt_layer_norm_fp32_fallback" in options) == (precision == "fp16")
    shapes = {key: options[f"trt_profile_{key}_shapes"] for key in ("min", "opt", "max")}
    if tower == "image":
        assert shapes["min"] == "pixel_values:1x3x48x48"
        assert shapes["opt"] == shapes["max"] == "pixel_values:32x3x48x48"
    else:
        assert shapes["min"] == "input_ids:1x2,attention_mask:1x2"
        assert shapes["opt"] == shapes["max"] == "input_ids:32x77,attention_mask:32x77"


def test_int8_stays_on_the_cpu_and_fp16_on_gpus(repository: Path) -> None:
    path = repository / "demo_image" / "1" / "model.onnx"
    kinds = schema().ModelInstanceGroup.Kind
    for precision, kind in (("int8", "KIND_CPU"), ("fp16", "KIND_GPU")):
        text = to_text(model_config("m", read_graph(path, precision, 32), Serving(), about={}))
        config = parsed(text)
        assert config.instance_group[0].kind == kinds.Value(kind)
        assert not config.HasField("optimization")


def test_preferred_sizes_double_up_to_the_largest() -> None:
    assert [preferred(most) for most in (1, 8, 12, 64)] == [[1], [8], [8, 12], [8, 16, 32, 64]]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("openai/clip-vit-base-patch32", "clip-vit-base-patch32"),
        ("/models/my clip (2)/", "my-clip-2"),
        ("demo", "demo"),
        ("モデル", "model"),
    ],
)
def test_a_models_name_can_stand_in_a_url(name: str, wanted: str) -> None:
    assert slug(name) == wanted


def test_the_page_says_what_is_served(repository: Path) -> None:
    page = (repository / "README.md").read_text()
    for text in (
        "`pixel_values` FP32 [N, 3, 48, 48] | `image_embeds` FP32 [N, 128] | fp32 | 1.000000",
        "`input_ids` INT64 [N, any], `attention_mask` INT64 [N, any]",
        "Up to 16 rows",
        "most 1500 microseconds",
        "mean [0.48145466, 0.4578275, 0.40821073]",
        "a multiple of 8 tokens, 32 at most",
        "The softmax of `38.0464 * cosine`",
    ):
        assert text in page


def test_weights_beside_the_graph_come_along(tmp_path: Path, store: Path, checkpoint: Checkpoint) -> None:
    (whole,) = (one for one in ArtifactStore(store).artifacts() if one.card["options"]["tower"] == "text")
    data = {"save_as_external_data": True, "location": "model.onnx.data", "size_threshold": 1024}
    onnx.save(onnx.load(whole.file(GRAPH)), tmp_path / GRAPH, **data)
    split = SimpleNamespace(
        card={**whole.card, "files": [GRAPH, data["location"]]},
        fingerprint=whole.fingerprint,
        file=lambda name: tmp_path / name,
    )
    (name,) = write_repository(str(tmp_path / "models"), checkpoint, {"text": split}, ImagesConfig(), Serving())
    version = tmp_path / "models" / name / "1"
    assert {path.name for path in version.iterdir()} == {GRAPH, "model.onnx.data"}
    assert (version / GRAPH).stat().st_size < whole.file(GRAPH).stat().st_size / 4
    inputs = load_client(tmp_path / "models").tokens(TEXTS)
    opened = [onnxruntime.InferenceSession(str(path)) for path in (version / GRAPH, whole.file(GRAPH))]
    vectors = [session.run(None, inputs)[0] for session in opened]
    assert np.array_equal(*vectors)


def test_texts_of_one_length_have_a_fixed_axis_and_no_mask(tmp_path: Path) -> None:
    """SigLIP's graphs have no mask and a fixed length."""
    tensor, kinds = onnx.helper.make_tensor_value_info, onnx.TensorProto
    ends = tensor("input_ids", kinds.INT64, ["batch", 64]), tensor("text_embeds", kinds.INT64, ["batch", 64])
    node = onnx.helper.make_node("Identity", ["input_ids"], ["text_embeds"])
    graph = onnx.helper.make_graph([node], "text", [ends[0]], [ends[1]])
    onnx.save(onnx.helper.make_model(graph), tmp_path / GRAPH)
    serving = Serving(max_batch_size=4, tensorrt=True)
    text = to_text(model_config("m", read_graph(tmp_path / GRAPH, "fp32", 64), serving, about={}))
    config = parsed(text)
    assert [list(one.dims) for one in config.input] == [[64]]
    (accelerator,) = config.optimization.execution_accelerators.gpu_execution_accelerator
    shapes = [accelerator.parameters[f"trt_profile_{key}_shapes"] for key in ("min", "max")]
    assert shapes == ["input_ids:1x64", "input_ids:4x64"]
    assert [list(one.inputs["input_ids"].dims) for one in config.model_warmup] == [[64], [64]]


class PythonTokenizer:
    """Tokenizer of transformers that does not use the library ``tokenizers``."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.pad_token_id = tokenizer, tokenizer.pad_token_id

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.tokenizer(*args, **kwargs)


def test_what_fails_leaves_nothing(tmp_path: Path, store: Path, repository: Path, checkpoint: Checkpoint) -> None:
    artifacts = {one.card["options"]["tower"]: one for one in ArtifactStore(store).artifacts()}
    _, tokenizer = checkpoint.texts()
    python = dataclasses.replace(tokenizer, own=PythonTokenizer(tokenizer.own))
    other = dataclasses.replace(checkpoint, tokenizer=python)
    out = tmp_path / "models"
    with pytest.raises(ArtifactError, match=r"take a checkpoint with a tokenizer\.json, or export with --tower image"):
        write_repository(str(out), other, artifacts, ImagesConfig(), Serving())
    assert os.listdir(tmp_path) == []
    images = {"image": artifacts["image"]}
    assert write_repository(f"file://{out}", other, images, ImagesConfig(), Serving()) == ["demo_image"]
    assert "texts" not in json.loads((out / "card.json").read_text())
    with pytest.raises(ConfigError, match="is there already"):
        write_repository(str(out), checkpoint, images, ImagesConfig(), Serving())


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--to", "triton"], ["--out = None: names the folder of the repository (add --out models)"]),
        # The current folder, which the repository would replace.
        (["--to", "triton", "--out", ""], ["--out = '': is there already"]),
        (["--to", "triton", "--out", "s3://bucket/models"], ["--out = 's3://bucket/models': must be a local folder"]),
        (["--out", "models", "--tensorrt"], ["--out = 'models': goes with --to triton", "--tensorrt = True: goes"]),
        (
            ["--to", "triton", "--out", "{tmp}", "--format", "torchscript", "--max-batch", "0", "--instances", "-1"],
            [
                *("--out = '{tmp}': is there already", "--format = 'torchscript': Triton is given ONNX graphs"),
                *("--max-batch = 0: wants a whole number from 1 to 4,096", "--instances = -1: "),
            ],
        ),
        (
            ["--to", "triton", "--out", "models", "--tensorrt", "--precision", "int8", "--engine-cache", "here"],
            ["--precision = 'int8': --tensorrt takes fp32, fp16", "--engine-cache = 'here': an absolute path"],
        ),
    ],
)
def test_all_problems_are_said_before_anything_is_exported(
    arguments: list[str], wanted: list[str], tmp_path: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put = [one.replace("{tmp}", str(tmp_path)) for one in arguments]
    assert export.main([*put, f"backend.artifacts={store / 'none'}"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    for text in wanted:
        assert f"  - {text.replace('{tmp}', str(tmp_path))}" in err
    assert not (store / "none").exists()
