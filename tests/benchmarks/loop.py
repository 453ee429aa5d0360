"""A plain loop over a folder of photos, as people write it: torch's DataLoader, transformers, one Parquet file.

``python -m tests.benchmarks.loop PHOTOS MODEL OUT [--dtype bfloat16] [--workers 2] [--labels a,b]`` prints the images
and the seconds after the first batch. It is one of the entrants of :mod:`tests.benchmarks.race`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPModel, CLIPProcessor


class Photos(Dataset[Any]):
    """Paths and pixels of a list of files."""

    def __init__(self, paths: list[str], processor: CLIPProcessor) -> None:
        self.paths, self.processor = paths, processor

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[str, torch.Tensor]:
        image = Image.open(self.paths[index]).convert("RGB")
        return self.paths[index], self.processor(images=image, return_tensors="pt")["pixel_values"][0]


def main() -> None:
    """Embed and label the files that the list names, and write them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("photos", help="a text file with a path on each line")
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--labels", default="dress,hat,shirt")
    options = parser.parse_args()
    processor = CLIPProcessor.from_pretrained(options.model)
    model = CLIPModel.from_pretrained(options.model, dtype=getattr(torch, options.dtype)).eval()
    labels = options.labels.split(",")
    photos = Photos(Path(options.photos).read_text().split("\n"), processor)
    paths: list[str] = []
    vectors, scores = [], []
    with torch.inference_mode():
        texts = processor(text=[f"a photo of a {label}" for label in labels], return_tensors="pt", padding=True)
        text = torch.nn.functional.normalize(model.get_text_features(**texts).pooler_output.float(), dim=-1)
        began, first = 0.0, 0
        for names, pixels in DataLoader(photos, options.batch, num_workers=options.workers):
            features = model.get_image_features(pixel_values=pixels.to(model.dtype)).pooler_output.float()
            features = torch.nn.functional.normalize(features, dim=-1)
            vectors.append(features)
            scores.append((100 * features @ text.T).softmax(dim=-1))
            paths += names
            if not began:
                began, first = time.perf_counter(), len(paths)
    seconds = time.perf_counter() - began
    best = torch.cat(scores).max(dim=1)
    table = pa.table(
        {
            "path": paths,
            "embedding": list(torch.cat(vectors).numpy()),
            "label": [labels[index] for index in best.indices.tolist()],
            "score": best.values.tolist(),
        }
    )
    pq.write_table(table, options.out)
    print(json.dumps({"images": len(paths) - first, "seconds": seconds}))


if __name__ == "__main__":
    main()
