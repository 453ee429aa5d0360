"""``python -m pipeline.bench.baselines REQUEST ANSWER``: what people use today, as they use it, from files to Parquet.

Each tool runs in a process of its own, and imports nothing of this package. It writes down when the results of its
first batch were there and when its Parquet file was closed, in seconds since the epoch.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

TRANSFORMERS, DATALOADER, SENTENCES = "transformers pipeline", "DataLoader loop", "sentence-transformers"
NOTES = {
    TRANSFORMERS: "pipeline('zero-shot-image-classification'): labels and scores, no embeddings; it embeds the labels "
    "again with every batch",
    DATALOADER: "torch DataLoader with a worker process for each core, the checkpoint's own image processor in the "
    "workers, then the model, the best label, pandas.to_parquet",
    SENTENCES: "SentenceTransformer.encode of opened images, the best label, pandas.to_parquet",
}


def installed() -> list[str]:
    """The tools that this Python can run."""
    found = [TRANSFORMERS, DATALOADER]
    return [*found, SENTENCES] if importlib.util.find_spec("sentence_transformers") else found


def main(arguments: list[str] | None = None) -> int:
    """Run the tool that the file REQUEST describes, and write its times into the file ANSWER."""
    request, answer = map(Path, sys.argv[1:] if arguments is None else arguments)
    asked = json.loads(request.read_text())
    asked["files"] = json.loads(Path(asked["files"]).read_text())
    answer.write_text(json.dumps(RUN[asked["tool"]](asked)))
    return 0


def _transformers(asked: Mapping[str, Any]) -> dict[str, float]:
    import pandas as pd
    import torch
    from transformers import pipeline

    files, labels = asked["files"], asked["prompts"]
    classify: Any = pipeline(
        "zero-shot-image-classification",
        model=asked["model"],
        device=asked["device"],
        dtype=getattr(torch, asked["dtype"]),
        batch_size=asked["batch"],
    )
    rows, first = [], 0.0

    def each() -> Iterator[str]:
        yield from files

    for found in classify(each(), candidate_labels=labels, hypothesis_template="{}"):
        first = first or time.time()
        rows.append((found[0]["label"], found[0]["score"]))
    table = pd.DataFrame(rows, columns=["label", "score"])
    table.insert(0, "path", files)
    return _written(table, asked, first)


class _Files:
    """A map-style dataset: opens and preprocesses in the worker."""

    def __init__(self, files: list[str], processor: Any) -> None:
        self._files, self._processor = files, processor

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Any:
        from PIL import Image

        with Image.open(self._files[index]) as image:
            return self._processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"][0]


def _dataloader(asked: Mapping[str, Any]) -> dict[str, float]:
    import numpy as np
    import torch
    from torch.utils.data import DataLoader
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    device, dtype = torch.device(asked["device"]), getattr(torch, asked["dtype"])
    model: Any = AutoModel.from_pretrained(asked["model"], dtype=dtype).eval().to(device)
    processor: Any = AutoImageProcessor.from_pretrained(asked["model"])
    tokenizer: Any = AutoTokenizer.from_pretrained(asked["model"])
    tokens = tokenizer(asked["prompts"], padding=True, return_tensors="pt").to(device)
    loader: Any = DataLoader(
        _Files(asked["files"], processor),  # type: ignore[arg-type]
        batch_size=asked["batch"],
        num_workers=asked["workers"],
        pin_memory=device.type == "cuda",
    )
    vectors, best, first = [], [], 0.0
    with torch.inference_mode():
        texts = torch.nn.functional.normalize(model.get_text_features(**tokens).pooler_output, dim=1)
        for pixels in loader:
            found = model.get_image_features(pixel_values=pixels.to(device, dtype)).pooler_output
            found = torch.nn.functional.normalize(found, dim=1)
            best.append((found @ texts.T).argmax(dim=1).cpu().numpy())
            vectors.append(found.float().cpu().numpy())
            first = first or time.time()
    return _written(_table(asked, np.concatenate(vectors), np.concatenate(best)), asked, first)


def _sentences(asked: Mapping[str, Any]) -> dict[str, float]:
    import numpy as np
    import torch
    from PIL import Image
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(
        asked["model"], device=asked["device"], model_kwargs={"dtype": getattr(torch, asked["dtype"])}
    )
    texts = model.encode(asked["prompts"], normalize_embeddings=True)
    vectors, first = [], 0.0
    # A list of opened images is what its documentation shows; a few batches at a time, as all would not fit in memory.
    batch = asked["batch"]
    starts = [0, *range(batch, len(asked["files"]), 8 * batch)]
    for start, stop in zip(starts, [*starts[1:], len(asked["files"])], strict=True):
        images = [Image.open(file).convert("RGB") for file in asked["files"][start:stop]]
        vectors.append(model.encode(images, batch_size=batch, normalize_embeddings=True, show_progress_bar=False))
        first = first or time.time()
    every = np.concatenate(vectors)
    return _written(_table(asked, every, (every @ texts.T).argmax(axis=1)), asked, first)


def _table(asked: Mapping[str, Any], vectors: Any, best: Any) -> Any:
    import pandas as pd

    labels = [asked["prompts"][index] for index in best]
    return pd.DataFrame({"path": asked["files"], "embedding": list(vectors), "label": labels})


def _written(table: Any, asked: Mapping[str, Any], first: float) -> dict[str, float]:
    table.to_parquet(asked["out"])
    return {"first": first, "written": time.time(), "peak_mib": _peak_mib()}


def _peak_mib() -> float:
    """Peak resident memory of this process, without its workers; 0 where the system does not tell."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            return next((int(line.split()[1]) / 1024 for line in file if line.startswith("VmHWM:")), 0.0)
    except OSError:
        return 0.0


RUN: dict[str, Callable[[Mapping[str, Any]], dict[str, float]]] = {
    TRANSFORMERS: _transformers,
    DATALOADER: _dataloader,
    SENTENCES: _sentences,
}

if __name__ == "__main__":
    raise SystemExit(main())
