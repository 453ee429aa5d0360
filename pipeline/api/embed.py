"""``embed``: the main job, called from a program or a notebook."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from pipeline.api.config import check_model, config_from, label_settings, model_settings
from pipeline.core.errors import ConfigError, Problem

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

    from pipeline.api.dataset import Dataset
    from pipeline.api.inputs import Given
    from pipeline.config.schema import Config

# Libraries import it, and in every notebook without ipywidgets it would warn once; the bars here are text.
with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "IProgress not found")
    import tqdm.auto  # noqa: F401

# Settings that a call has no use for, and why.
_MODEL = dict.fromkeys(("model", "model.name"), "is what the argument model says")
_REFUSED = {
    **_MODEL,
    "manifest.path": "is what the argument images says",
    "output.dir": "is what the argument output says",
    "run.dry": "is for the command line: python -m pipeline.run run.dry=true",
}


def embed(
    images: str | os.PathLike[str] | pd.DataFrame | Iterable[Any],
    *,
    model: str | os.PathLike[str] = "demo",
    labels: Sequence[str] | str | os.PathLike[str] | None = None,
    templates: Sequence[str] | str | None = None,
    output: str | os.PathLike[str] | None = None,
    ids: Sequence[str] | Sequence[int] | None = None,
    id: str | None = None,
    image: str | None = None,
    keep: Sequence[str] = (),
    root: str | os.PathLike[str] | None = None,
    backend: str = "torch",
    precision: str = "auto",
    device: str = "auto",
    decoder: str = "exact",
    batch_size: int | Literal["auto"] = 64,
    progress: bool = True,
    settings: Mapping[str, object] | None = None,
) -> Dataset:
    """Embed and label images; the rows are those that ``python -m pipeline.run`` writes with the same settings.

    An image that cannot be read is a row with a status, see ``Dataset.failures``; only ``errors.max_fraction`` among
    the settings makes many of them an error. Calls in several threads take turns.

    Args:
        images: Paths or addresses, encoded bytes, PIL images or uint8 arrays ``[H, W, 3]``, in any iterable; a pandas
            DataFrame or an Arrow table (of polars, DuckDB, ...) with a column of them; a folder of images; or a
            manifest: a Parquet file, a folder of them or a glob. Relative paths start where Python runs, or at
            ``root``; http and https addresses that are handed over one by one are fetched.
        model: A name under ``conf/model`` such as ``clip_vit_b32``, an id of the Hugging Face hub, or a folder.
        labels: The labels, or a YAML, CSV or Parquet file of them; without, the demo model takes its own, and any
            other model writes embeddings alone.
        templates: Sentences around a label, such as ``"a photo of a {}"``.
        output: Where the dataset stays; the same call resumes it. Without, it lies in a temporary folder and goes with
            the object that is returned. What is no manifest yet is written beside it, as ``NAME.DIGEST.parquet``.
        ids: One for each image, unique. Without, paths are ids, or the numbers of the rows.
        id: The column of ids of a table or manifest; without, ``id``, or else the index of a DataFrame.
        image: The column of images; without, ``path``, or of tables ``image``.
        keep: Columns that travel to the dataset.
        root: The folder that relative paths start from, and that no path leaves.
        backend: A name under ``conf/backend``.
        precision: ``fp32``, ``bf16``, ``fp16``, or ``auto``.
        device: ``cpu``, ``cuda``, ``cuda:N``, or ``auto``.
        decoder: A name under ``conf/images``: ``exact``, ``fast``, ``scaled``, ``gpu``.
        batch_size: Images in a batch; ``auto`` measures which is best.
        progress: Show a bar.
        settings: Anything else that the command line takes: ``{"labels.top_k": 3, "cluster": "local"}``.

    Raises:
        ConfigError: settings are wrong; it names all of them.
        ManifestError: there are no images, or ids are not unique.
        PlanMismatch: ``output`` holds a dataset of other images or settings.
        PipelineError: anything else that is foreseen; see :mod:`pipeline.core.errors`.
    """
    own = {
        **model_settings(model),
        **label_settings(labels, templates),
        "backend": backend,
        "images": decoder,
        "backend.precision": precision,
        "backend.device": device,
        "loader.batch_size": batch_size,
        "report.progress": "bar" if progress else "none",
        "log.level": "warning",
        "errors.max_fraction": 1.0,
        # Nobody looks at the page of a dataset that goes with the object.
        **({"report.html": False} if output is None else {}),
    }
    told = dict(settings or {})
    problems = check_model(model) + _take_out(told, _REFUSED)
    # The places are filled in when the settings are known to be good.
    config = config_from({**own, "manifest.path": "given", **told}, problems)

    from pipeline.api.arrow import listed
    from pipeline.api.dataset import Dataset
    from pipeline.api.inputs import Columns, manifest_of
    from pipeline.api.paths import absolute
    from pipeline.api.process_state import settings_kept
    from pipeline.api.scratch import Beside, Scratch
    from pipeline.dataset.dataset import open_dataset
    from pipeline.job.main import run_job

    columns = Columns(
        id=id, image=image, keep=[keep] if isinstance(keep, str) else keep, ids=listed(ids),
        root=None if root is None else os.fspath(root),
    )  # fmt: skip
    # From wherever the process stands later.
    place, scratch = "" if output is None else absolute(os.fspath(output)), Scratch()
    try:
        given = manifest_of(images, columns, scratch.path / "manifest.parquet")
        place = place if output is not None else str(scratch.path / "dataset")
        config = _placed(config, given, place)
        beside = Beside(given, place) if given.written is not None and output is not None else None
        if beside is not None:
            config = replace(config, manifest=replace(config.manifest, path=beside.url))
        try:
            with settings_kept():
                run_job(config)
            stored = open_dataset(place)
        except BaseException as error:
            if beside is not None:
                beside.failed(error)
            raise
    except BaseException:
        scratch.close()
        raise
    if output is None:
        return Dataset(stored, scratch)
    scratch.close()
    return Dataset(stored)


def embed_texts(
    texts: Sequence[str] | str,
    *,
    model: str | os.PathLike[str] = "demo",
    templates: Sequence[str] | str = "{}",
    settings: Mapping[str, object] | None = None,
) -> NDArray[np.float32]:
    """One row of length 1 for each text, float32 ``[N, D]``: products with embeddings of images are cosines.

    Texts are embedded as they are, or in ``templates``, of which the mean is taken. ``settings`` are those of the group
    ``model``, such as ``{"model.revision": "..."}``.

    Raises:
        ConfigError: no such model, a template without ``{}``.
        ModelError: the checkpoint cannot be had.
        PromptsError: a text is empty, or not UTF-8.
    """
    told = dict(settings or {})
    problems = check_model(model) + _take_out(told, _MODEL)
    config = config_from({**model_settings(model), **label_settings(None, templates), **told}, problems)

    from pipeline.core.errors import PromptsError
    from pipeline.models.checkpoint import open_checkpoint
    from pipeline.models.text import embed_prompts, is_text

    wanted = [texts] if isinstance(texts, str) else list(texts)
    for place, text in enumerate(wanted):
        if not isinstance(text, str) or not text.strip() or not is_text(text):
            raise PromptsError(f"texts[{place}]: {text!r} is no text to embed")
    if not wanted:
        raise PromptsError("texts: none were given")
    prompts = [[template.replace("{}", text) for template in config.prompts.templates] for text in wanted]
    vectors: NDArray[np.float32] = embed_prompts(open_checkpoint(config.model), prompts)
    return vectors


def open_dataset(url: str | os.PathLike[str]) -> Dataset:
    """The finished dataset at a folder or an fsspec address.

    Raises:
        NoDataset: there is none.
        UnfinishedDataset: its job has not ended.
        StorageError: its books contradict one another.
    """
    from pipeline.api.dataset import Dataset
    from pipeline.api.paths import absolute
    from pipeline.dataset import dataset

    return Dataset(dataset.open_dataset(absolute(os.fspath(url))))


def _take_out(told: dict[str, object], refused: Mapping[str, str]) -> list[Problem]:
    return [Problem(key, told.pop(key), allowed) for key, allowed in refused.items() if key in told]


def _placed(config: Config, given: Given, output: str) -> Config:
    """The config with the manifest that was found or made, and with the output."""
    from pipeline.config.validate import check
    from pipeline.storage.urls import within

    config = replace(
        config,
        manifest=replace(config.manifest, **given.columns),
        images=replace(config.images, schemes=list(dict.fromkeys([*config.images.schemes, *given.schemes]))),
        output=replace(config.output, dir=output),
    )
    problems = check(config)
    if given.folder is not None and within(output, given.folder):
        problems.append(Problem("output", output, "lies in the folder of images", "name a folder beside it"))
    if problems:
        raise ConfigError(problems)
    return config
