"""``embed``, ``embed_texts`` and ``open_dataset``: the pipeline in a program or a notebook."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Literal

from pipeline.api.config import check_model, config_from, label_settings, model_settings, prompts_of
from pipeline.config.ranges import DEFAULT, DefaultNumber
from pipeline.config.schema import LoaderConfig
from pipeline.core.errors import ConfigError, Problem

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

    from pipeline.api.dataset import Dataset
    from pipeline.api.inputs import Columns, InputManifest
    from pipeline.config.schema import Config

# Libraries import it, and it warns in a notebook without ipywidgets, which the text bars here do not need.
with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "IProgress not found")
    import tqdm.auto  # noqa: F401

# Settings that a call does not take, and why.
_MODEL = dict.fromkeys(("model", "model.name"), "is set by the argument model")
_REFUSED = {
    **_MODEL,
    "manifest.path": "is set by the argument images",
    "output.dir": "is set by the argument output",
    "run.dry": "is for the command line: python -m pipeline.run run.dry=true",
}


def embed(
    images: str | os.PathLike[str] | pd.DataFrame | Iterable[Any],
    *,
    model: str | os.PathLike[str] = "demo",
    labels: Sequence[str] | Mapping[str, str | Sequence[str] | None] | str | os.PathLike[str] | None = None,
    templates: Sequence[str] | str | None = None,
    output: str | os.PathLike[str] | None = None,
    ids: Sequence[str] | Sequence[int] | None = None,
    id: str | None = None,
    image: str | None = None,
    text: str | None = None,
    keep: Sequence[str] = (),
    root: str | os.PathLike[str] | None = None,
    backend: str = "torch",
    precision: str = "auto",
    device: str = "auto",
    decoder: str = "exact",
    batch_size: int | Literal["auto"] = LoaderConfig.batch_size,
    progress: bool = True,
    settings: Mapping[str, object] | None = None,
) -> Dataset:
    """Embed and label images; the rows are those that ``python -m pipeline.run`` writes with the same settings.

    An image that cannot be read is a row with a status, see ``Dataset.failures``. Failures are an error only with
    ``errors.max_fraction`` in ``settings``. Calls in several threads run one after another.

    Args:
        images: Paths or addresses, encoded bytes, PIL images or uint8 arrays ``[H, W, 3]``, in any iterable; a pandas
            DataFrame or an Arrow table (of polars, DuckDB, ...) with a column of them; a folder of images; or a
            manifest: a Parquet file, a folder of them or a glob. Relative paths start where Python runs, or at
            ``root``; http and https addresses in a list or table are fetched.
        model: A name under ``conf/model`` such as ``clip_vit_b32``, an id of the Hugging Face hub, or a folder.
        labels: The labels; a mapping from each label to its prompt, its prompts, or None for the templates, which is
            written beside ``output`` as a label file; or a YAML, CSV or Parquet file of them. The default is the demo
            model's own labels, and no labels for any other model.
        templates: Sentences around a label, such as ``"a photo of a {}"``.
        output: The folder or address of the dataset; the same call resumes it. The default is a temporary folder that
            is removed with the returned object. If ``images`` is not a manifest, one is written beside ``output`` as
            ``NAME.DIGEST.parquet``.
        ids: One for each image, unique. The default is the paths, or the row numbers.
        id: The id column of a table or manifest; the default is ``id``, or else the index of a DataFrame.
        image: The image column; the default is ``path``, or for tables ``image``.
        text: A column of texts of a table or manifest, which are embedded too: ``text_embedding`` and ``similarity``.
        keep: Columns to copy to the dataset.
        root: The folder of relative paths; paths outside it are refused.
        backend: A name under ``conf/backend``.
        precision: ``fp32``, ``bf16``, ``fp16``, or ``auto``.
        device: ``cpu``, ``cuda``, ``cuda:N``, or ``auto``.
        decoder: A name under ``conf/images``: ``exact``, ``fast``, ``scaled``, ``gpu``.
        batch_size: Images in a batch; ``auto`` measures the best size. The default is 64 on a CPU (fewer
            for less than 512 rows), and 512 or 1,024 on CUDA.
        progress: Show a progress bar.
        settings: Other settings of the command line: ``{"labels.top_k": 3, "cluster": "local"}``.

    Raises:
        ConfigError: settings are wrong; the message lists all of them.
        ManifestError: there are no images, or ids are not unique.
        PlanMismatch: ``output`` holds a dataset of other images or settings.
        PipelineError: any other expected error; see :mod:`pipeline.core.errors`.
    """
    prompts = prompts_of(labels)
    own = {
        **model_settings(model),
        **label_settings(labels, templates),
        "backend": backend,
        "images": decoder,
        "backend.precision": precision,
        "backend.device": device,
        "loader.batch_size": DEFAULT if isinstance(batch_size, DefaultNumber) else batch_size,
        "report.progress": "bar" if progress else "none",
        "log.level": "warning",
        "errors.max_fraction": 1.0,
        # A temporary dataset needs no report page.
        **({"report.html": False} if output is None else {}),
    }
    others = dict(settings or {})
    problems = check_model(model) + _remove_refused(others, _REFUSED)
    # The manifest and the output are filled in after the settings are checked.
    config = config_from({**own, "manifest.path": "given", **others}, problems)

    from pipeline.api.arrow import id_list
    from pipeline.api.inputs import Columns

    columns = Columns(
        id=id, image=image, keep=[keep] if isinstance(keep, str) else keep, ids=id_list(ids),
        root=None if root is None else os.fspath(root), text=text,
    )  # fmt: skip
    return _run(config, images, columns, prompts, None if output is None else os.fspath(output))


def _run(
    config: Config, images: object, columns: Columns, prompts: Mapping[str, list[str] | None] | None, output: str | None
) -> Dataset:
    """Write the manifest, run the job, and open its dataset; without ``output``, in a temporary folder."""
    from pipeline.api.dataset import Dataset
    from pipeline.api.inputs import manifest_of
    from pipeline.api.paths import absolute
    from pipeline.api.process_state import settings_restored
    from pipeline.api.scratch import Scratch, manifest_beside, written_prompts
    from pipeline.dataset.dataset import open_dataset
    from pipeline.engine.demo.notes import notes_of
    from pipeline.job.cluster.main_guard import leave_if_run_again
    from pipeline.job.main import RunOptions, run_job

    leave_if_run_again()
    # Before the caller's iterator runs, which may change the current folder.
    place = "" if output is None else absolute(output)
    with ExitStack() as opened:
        scratch = Scratch()
        opened.callback(scratch.close)
        manifest = manifest_of(images, columns, scratch.path / "manifest.parquet")
        place = str(scratch.path / "dataset") if output is None else place
        config = _placed(config, manifest, place)
        if manifest.written is not None and output is not None:
            path = opened.enter_context(manifest_beside(manifest.written, place))
            config = config.changed({"manifest.path": path})
        if prompts is not None:
            path = opened.enter_context(written_prompts(prompts, scratch if output is None else None, place))
            config = config.changed({"prompts.labels": [], "prompts.path": path})
        for note in notes_of(config):
            # Of the caller of embed, so that Python says it once for each place in a program.
            warnings.warn(note, stacklevel=3)
        with settings_restored():
            run_job(config, RunOptions(notes=False))
        stored = open_dataset(place)
        if output is not None:
            return Dataset(stored)
        # The returned object removes the folder.
        opened.pop_all()
        return Dataset(stored, scratch)


def embed_texts(
    texts: Sequence[str] | str,
    *,
    model: str | os.PathLike[str] = "demo",
    templates: Sequence[str] | str = "{}",
    settings: Mapping[str, object] | None = None,
) -> NDArray[np.float32]:
    """Embed texts: one row of length 1 each, float32 ``[N, D]``; inner products with image embeddings are cosines.

    With several ``templates``, the mean of a text's embeddings is normalised. ``settings`` are those of the group
    ``model``, such as ``{"model.revision": "..."}``.

    Raises:
        ConfigError: there is no such model, or a template has no ``{}``.
        ModelError: the checkpoint cannot be opened.
        PromptsError: a text is empty, or not UTF-8.
    """
    others = dict(settings or {})
    problems = check_model(model) + _remove_refused(others, _MODEL)
    config = config_from({**model_settings(model), **label_settings(None, templates), **others}, problems)

    from pipeline.core.errors import PromptsError
    from pipeline.models.checkpoint import open_checkpoint
    from pipeline.models.label_files import is_text
    from pipeline.models.text import embed_prompts

    wanted = [texts] if isinstance(texts, str) else list(texts)
    for position, text in enumerate(wanted):
        if not isinstance(text, str) or not text.strip() or not is_text(text):
            raise PromptsError(f"texts[{position}]: {text!r} is not a text that can be embedded")
    if not wanted:
        raise PromptsError("texts: the list is empty")
    prompts = [[template.replace("{}", text) for template in config.prompts.templates] for text in wanted]
    vectors: NDArray[np.float32] = embed_prompts(open_checkpoint(config.model), prompts)
    return vectors


def open_dataset(url: str | os.PathLike[str]) -> Dataset:
    """Open the finished dataset at a folder or an fsspec address.

    Raises:
        NoDataset: there is none.
        UnfinishedDataset: its job has not ended.
        StorageError: its metadata is inconsistent.
    """
    from pipeline.api.dataset import Dataset
    from pipeline.api.paths import absolute
    from pipeline.dataset import dataset

    return Dataset(dataset.open_dataset(absolute(os.fspath(url))))


def _remove_refused(settings: dict[str, object], refused: Mapping[str, str]) -> list[Problem]:
    return [Problem(key, settings.pop(key), allowed) for key, allowed in refused.items() if key in settings]


def _placed(config: Config, manifest: InputManifest, output: str) -> Config:
    """The config with the manifest and the output."""
    from pipeline.config.validate import check
    from pipeline.storage.urls import within

    config = config.changed(
        {
            **{f"manifest.{name}": value for name, value in manifest.config.items()},
            "images.schemes": list(dict.fromkeys([*config.images.schemes, *manifest.schemes])),
            "output.dir": output,
        }
    )
    problems = check(config)
    if manifest.folder is not None and within(output, manifest.folder):
        problems.append(Problem("output", output, "lies in the folder of images", "name a folder beside it"))
    if problems:
        raise ConfigError(problems)
    return config
