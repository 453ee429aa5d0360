"""Client of the models in this repository: preprocess images and texts as in training, and send the request.

The file reads ``card.json`` beside it, and needs numpy, pillow and tokenizers:

    python client.py localhost:8000 photo.jpg "a cat" "a dog"
"""

from __future__ import annotations

import json
import sys
import urllib.request
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from tokenizers import Tokenizer

HERE = Path(__file__).parent
# Header with the length of the JSON part of a message; tensors follow it.
LENGTH = "Inference-Header-Content-Length"


@cache
def card() -> dict[str, Any]:
    """Return the contents of ``card.json``."""
    values: dict[str, Any] = json.loads((HERE / "card.json").read_text(encoding="utf-8"))
    return values


@cache
def tokenizer() -> Tokenizer:
    """Return the tokenizer, which truncates texts to the model's limit."""
    return Tokenizer.from_file(str(HERE / card()["texts"]["tokenizer"]))


def pixels(image: Image.Image) -> np.ndarray:
    """Return the normalised input of the image model for one image, float32 ``[3, H, W]``."""
    rules = card()["pictures"]
    if rules["exif"] == "apply":
        image = ImageOps.exif_transpose(image)
    if image.has_transparency_data and rules["transparency"] != "drop":
        colour = 0 if rules["transparency"] == "black" else 255
        background = Image.new("RGBA", image.size, (colour, colour, colour, 255))
        image = Image.alpha_composite(background, image.convert("RGBA"))
    image = image.convert("RGB")
    resize, crop = rules["resize"], rules["crop"]
    if isinstance(resize, int):
        short, long = sorted(image.size)
        scaled = int(resize * long / short)
        size = (resize, scaled) if image.width <= image.height else (scaled, resize)
    else:
        size = (resize[1], resize[0])
    image = image.resize(size, Image.Resampling[rules["resample"]])
    if crop is not None:
        # The area outside the image is black.
        left, top = (_corner(have - wanted, rules["corner"]) for have, wanted in zip(size, crop[::-1], strict=True))
        image = image.crop((left, top, left + crop[1], top + crop[0]))
    rgb = np.asarray(image, dtype=np.float32) / np.float32(255)
    mean, std = (np.array(rules[name], dtype=np.float32) for name in ("mean", "std"))
    return np.ascontiguousarray(((rgb - mean) / std).transpose(2, 0, 1))


def _corner(margin: int, rule: str) -> int:
    return round(margin / 2) if rule == "round" and margin > 0 else margin // 2


def tokens(texts: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the inputs of the text model: ``input_ids`` and ``attention_mask``, int64 ``[N, T]``.

    Lengths are rounded up, since only requests of equal length share a batch.
    """
    rules = card()["texts"]
    rows = tokenizer().encode_batch([text.lower() if rules["lowercase"] else text for text in texts])
    longest = max(len(row.ids) for row in rows)
    length = min(rules["max_tokens"], -(-longest // rules["multiple"]) * rules["multiple"])
    ids = np.full((len(rows), length), rules["pad_id"], dtype=np.int64)
    mask = np.zeros((len(rows), length), dtype=np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = row.ids
        mask[i, : len(row.ids)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def ask(address: str, tower: str, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """Request embeddings of length 1, float32 ``[N, D]``, from the model of a tower, ``image`` or ``text``.

    The protocol is https://github.com/kserve/open-inference-protocol over HTTP, with Triton's binary tensors.
    """
    model = card()["models"][tower]
    heads, bodies = [], []
    for tensor in model["inputs"]:
        values = inputs[tensor["name"]]
        bodies.append(values.tobytes())
        size = {"binary_data_size": len(bodies[-1])}
        kind = tensor["data_type"].removeprefix("TYPE_")
        heads.append({"name": tensor["name"], "shape": list(values.shape), "datatype": kind, "parameters": size})
    wanted = [{"name": model["outputs"][0]["name"], "parameters": {"binary_data": True}}]
    head = json.dumps({"inputs": heads, "outputs": wanted}).encode()
    request = urllib.request.Request(
        f"http://{address}/v2/models/{model['name']}/infer",
        data=b"".join([head, *bodies]),
        headers={"Content-Type": "application/octet-stream", LENGTH: str(len(head))},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        body, split = response.read(), int(response.headers[LENGTH])
    shape = json.loads(body[:split])["outputs"][0]["shape"]
    vectors = np.frombuffer(body[split:], dtype="<f4").reshape(shape)
    # The lengths from an fp16 model differ from 1 by up to a thousandth.
    unit: np.ndarray = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit


def main(address: str, path: str, *texts: str) -> None:
    """Print the cosine of each text to the image."""
    with Image.open(path) as image:
        picture = ask(address, "image", {"pixel_values": pixels(image)[None]})[0]
    for text, cosine in zip(texts, ask(address, "text", tokens(texts)) @ picture, strict=True):
        print(f"{cosine:.4f}  {text}")


if __name__ == "__main__":
    if len(sys.argv) < 4:
        raise SystemExit(f"usage: python {sys.argv[0]} HOST:PORT IMAGE TEXT [TEXT ...]")
    main(*sys.argv[1:])
