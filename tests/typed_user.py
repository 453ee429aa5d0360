"""A program that uses the API as a stranger's does; mypy checks it with the package (tests/test_gates.py)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, assert_type

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pipeline import Dataset, PipelineError, embed, embed_texts, open_dataset


def main(folder: Path, frame: pd.DataFrame, arrays: list[NDArray[np.uint8]]) -> pd.DataFrame:
    try:
        photos = embed(folder, model="clip_vit_b32", labels=["cat", "dog"], settings={"labels.top_k": 2})
    except PipelineError as error:
        raise SystemExit(error.exit_code) from error
    assert_type(photos, Dataset)
    assert_type(photos.embeddings, NDArray[np.float32])
    assert_type(photos.counts, dict[str, int])
    assert_type(photos.report, Mapping[str, Any])
    assert_type(embed_texts(["a cat"], model="clip_vit_b32"), NDArray[np.float32])
    embed(frame, image="file", id="sku", keep=["price"], output=folder / "out", batch_size="auto", progress=False)
    embed(arrays, ids=range(len(arrays)))
    hits = photos.search("a cat on a sofa", top=3)
    assert_type(hits[0].score, float)
    with photos.relabel(["kitten", "puppy"], templates="a {}") as other:
        assert_type(other.failures, pd.DataFrame)
    return open_dataset(folder / "out").frame(["sku", "label"])
