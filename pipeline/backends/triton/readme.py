"""The page for people that lies in a model repository: what is served, how to start it, how to ask."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def readme(card: Mapping[str, Any]) -> str:
    """Markdown of what ``card.json`` says."""
    return "\n".join(_lines(card)) + "\n"


def _lines(card: Mapping[str, Any]) -> Iterator[str]:
    model, serving = card["model"], card["serving"]
    revision = f", revision {model['revision']}" if model["revision"] else ""
    yield f"# {model['name']} for Triton Inference Server"
    yield ""
    yield f"The towers of `{model['name']}`{revision}, each a model of its own; embeddings have {model['dim']} numbers"
    yield "and length 1, so that a product of two is their cosine. `card.json` says the same to programs."
    yield ""
    yield "| model | inputs | output | precision | lowest cosine to fp32 |"
    yield "| --- | --- | --- | --- | ---: |"
    for one in card["models"].values():
        sides = [", ".join(map(_tensor, one[side])) for side in ("inputs", "outputs")]
        yield f"| `{one['name']}` | {' | '.join(sides)} | {one['precision']} | {one['parity']['lowest_cosine']:.6f} |"
    yield ""
    yield "## Start"
    yield ""
    yield "```sh"
    # One in int8 runs on the CPU.
    gpus = "" if any(one["precision"] == "int8" for one in card["models"].values()) else "--gpus all "
    yield f'docker run --rm {gpus}-p 8000:8000 -v "$PWD":/models:ro nvcr.io/nvidia/tritonserver:<release>-py3 \\'
    yield "  tritonserver --model-repository=/models"
    yield 'python client.py localhost:8000 photo.jpg "a cat" "a dog"'
    yield "```"
    yield ""
    yield from _serving(card, serving)
    if "pictures" in card:
        yield from _pictures(card["pictures"])
    if "texts" in card:
        yield from _texts(card["texts"])
    yield ""
    yield "## Scores"
    yield ""
    scores = card["scores"]
    bias = f" + {scores['bias']:.6g}" if scores["bias"] else ""
    yield f"The {scores['function']} of `{scores['scale']:.6g} * cosine{bias}`, as the model was trained."


def _serving(card: Mapping[str, Any], serving: Mapping[str, Any]) -> Iterator[str]:
    graphs = list(card["models"].values())
    ir, opset = max(one["ir"] for one in graphs), max(one["opset"] for one in graphs)
    precision = graphs[0]["precision"]
    yield f"The graphs hold ONNX's standard operators (opset {opset}, IR {ir}), for ONNX Runtime 1.18 and newer."
    yield f"Up to {serving['max_batch_size']} rows of waiting requests are one batch, and a request waits for others at"
    yield f"most {serving['queue_microseconds']} microseconds. Requests are put together where their shapes are equal."
    if serving["tensorrt"]:
        cache = serving["engine_cache"]
        yield ""
        kept = f"is kept in `{cache}` on the server" if cache else "is built at every start (see --engine-cache)"
        yield f"TensorRT builds one engine for all shapes up to the largest, which takes minutes, and {kept}."
        if precision == "fp32":
            yield "Its fp32 products are in TF32 unless the server's environment has `NVIDIA_TF32_OVERRIDE=0`."
        yield "The cosines above were measured with ONNX Runtime on a CPU: compare a few pictures on the GPU too."
    elif precision == "int8":
        yield "int8 runs on CPUs; activations are scaled for each batch, so a row depends on its neighbours a little."
    if precision == "fp16":
        yield "fp16 is for GPUs; its embeddings have length 1 within a thousandth, so normalise them again."


def _pictures(rules: Mapping[str, Any]) -> Iterator[str]:
    resize, crop = rules["resize"], rules["crop"]
    yield ""
    yield "## Pictures"
    yield ""
    yield "`client.py` has it as code (`pixels`):"
    yield ""
    if rules["exif"] == "apply":
        yield "1. turned as the EXIF orientation says"
    if rules["transparency"] != "drop":
        yield f"1. transparency on {rules['transparency']}, then RGB"
    if isinstance(resize, int):
        yield f"1. the shorter edge resized to {resize}, {rules['resample'].lower()}; the longer one rounded down"
    else:
        yield f"1. resized to {resize[1]} x {resize[0]} pixels (width x height), {rules['resample'].lower()}"
    if crop is not None:
        yield f"1. the centre of {crop[1]} x {crop[0]} pixels (width x height)"
    yield f"1. `(pixels / 255 - mean) / std` in float32, mean {list(rules['mean'])}, std {list(rules['std'])}"
    yield "1. channels first"


def _texts(rules: Mapping[str, Any]) -> Iterator[str]:
    yield ""
    yield "## Texts"
    yield ""
    most, multiple = rules["max_tokens"], rules["multiple"]
    length = f"{most} tokens" if multiple == most else f"a multiple of {multiple} tokens, {most} at most"
    yield f"`{rules['tokenizer']}` is for the library `tokenizers`, and cuts texts to {most} tokens."
    yield f"They are padded to {length}: on the right with id {rules['pad_id']} and mask 0."
    if rules["lowercase"]:
        yield "They are put in lower case first."
    yield "`client.py` has it as code (`tokens`)."


def _tensor(tensor: Mapping[str, Any]) -> str:
    axes = ", ".join("any" if axis < 0 else str(axis) for axis in tensor["dims"])
    return f"`{tensor['name']}` {tensor['data_type'].removeprefix('TYPE_')} [N, {axes}]"
