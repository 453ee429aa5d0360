"""What a client of these models does: pictures and texts to tensors, as in training, and the request to the server.

This file lies in the repository that it describes, and needs numpy, pillow and tokenizers:

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
# What of a message is JSON; tensors follow.
LENGTH = "Inference-Header-Content-Length"


@cache
def card() -> dict[str, Any]:
    """What the repository says about itself."""
    values: dict[str, Any] = json.loads((HERE / "card.json").read_text(encoding="utf-8"))
    return values


@cache
def tokenizer() -> Tokenizer:
    """The model's tokenizer, which cuts texts to the longest that the model takes."""
    return Tokenizer.from_file(str(HERE / card()["texts"]["tokenizer"]))


def pixels(image: Image.Image) -> np.ndarray:
    """A picture as the image model takes it, normalised, float32 ``[3, H, W]``."""
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
        # What lies outside the picture is black.
        left, top = (_corner(have - wanted, rules["corner"]) for have, wanted in zip(size, crop[::-1], strict=True))
        image = image.crop((left, top, left + crop[1], top + crop[0]))
    rgb = np.asarray(image, dtype=np.float32) / np.float32(255)
    mean, std = (np.array(rules[name], dtype=np.float32) for name in ("mean", "std"))
    return np.ascontiguousarray(((rgb - mean) / std).transpose(2, 0, 1))


def _corner(margin: int, rule: str) -> int:
    return round(margin / 2) if rule == "round" and margin > 0 else margin // 2


def tokens(texts: Sequence[str]) -> dict[str, np.ndarray]:
    """Texts as the text model takes them: ``input_ids`` and ``attention_mask``, int64 ``[N, T]``.

    The server puts requests of one length into one batch, so lengths are rounded up.
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
    """Embeddings of length 1, float32 ``[N, D]``, of the model of a tower, ``image`` or ``text``.

    Over HTTP with tensors as bytes: https://github.com/kserve/open-inference-protocol with Triton's binary data.
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
    # A model in fp16 gives lengths of 1 within a thousandth.
    unit: np.ndarray = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit


def main(address: str, path: str, *texts: str) -> None:
    """Print how near each text is to the picture."""
    with Image.open(path) as image:
        picture = ask(address, "image", {"pixel_values": pixels(image)[None]})[0]
    for text, cosine in zip(texts, ask(address, "text", tokens(texts)) @ picture, strict=True):
        print(f"{cosine:.4f}  {text}")


if __name__ == "__main__":
    if len(sys.argv) < 4:
        raise SystemExit(f"usage: python {sys.argv[0]} HOST:PORT PICTURE TEXT [TEXT ...]")
    main(*sys.argv[1:])
