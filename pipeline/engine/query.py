"""The model that made a dataset, opened again for texts and pictures of the same space, in fp32."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.schema import Config, ModelConfig, value_of
from pipeline.config.validate import check
from pipeline.core.errors import ConfigError, ModelError, Problem, PromptsError
from pipeline.dataset.dataset import Dataset
from pipeline.dataset.saved_config import config_of
from pipeline.storage.factory import open_storage
from pipeline.storage.moved import is_gone
from pipeline.storage.urls import within

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pipeline.models.checkpoint import Checkpoint
    from pipeline.models.label_files import LabelSet


def config_of_dataset(dataset: Dataset, model: ModelConfig | None = None) -> Config:
    """The config that the dataset was made with; ``model`` says where its checkpoint lies now.

    Raises:
        PlanMismatch: its plan keeps no config.
    """
    config = config_of(dataset.plan.config, dataset.url)
    return config if model is None else config.changed({"model": model})


def open_model(dataset: Dataset, model: ModelConfig) -> Checkpoint:
    """The checkpoint that made the dataset.

    Raises:
        ModelError: it is another one now, so that its texts would not fit to the embeddings; or it cannot be opened.
    """
    from pipeline.models.checkpoint import as_recorded, open_checkpoint

    if is_gone(model.name):
        raise ModelError(
            f"model.name={model.name}: no such folder, and {dataset.url} was made with it; if it moved, give its new "
            "place: --model FOLDER in a search, model.name=FOLDER in a relabelling"
        )
    wanted = dataset.plan.fingerprints["model"]
    checkpoint = as_recorded(open_checkpoint(model), wanted)
    found = json.loads(json.dumps(checkpoint.fingerprint))
    if found != wanted:
        differing = ", ".join(sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name)))
        raise ModelError(
            f"{model.name}: is not the model that made {dataset.url} (what differs: {differing}), and two models' "
            "embeddings say nothing of one another. Give the one that did, as with model.name=FOLDER or "
            "model.revision=COMMIT, or run the whole job with this one"
        )
    return checkpoint


def labels_of(config: Config) -> LabelSet:
    """The label set of a config, the demo's own for the demo model; empty where it names none.

    Raises:
        PromptsError: its file cannot be read.
    """
    from pipeline.engine.demo.folder import prompts_of
    from pipeline.models.label_files import read_labels

    return read_labels(prompts_of(config))


def embed_text(checkpoint: Checkpoint, texts: list[str]) -> NDArray[np.float32]:
    """One L2-normalised row for each text as it is, without a template, float32 ``[N, D]``.

    Raises:
        PromptsError: one is no text, such as what a terminal of another encoding sends.
    """
    from pipeline.models.label_files import is_text
    from pipeline.models.text import embed_prompts

    for text in texts:
        if not is_text(text):
            raise PromptsError(f"{text!r}: is not UTF-8, so it cannot be embedded")
    vectors: NDArray[np.float32] = embed_prompts(checkpoint, [[text] for text in texts])
    return vectors


def embed_image(checkpoint: Checkpoint, config: Config, path: Path) -> NDArray[np.float32]:
    """The picture in a local file, by the dataset's own decoder and preprocessing, L2-normalised float32 ``[D]``.

    Raises:
        ConfigError: it is no picture that the dataset's job would have taken; the message says why.
        ModelError: the image tower does not give an embedding.
    """
    import numpy as np
    import torch

    from pipeline.core.records import Failure, ImageRef
    from pipeline.engine.opening import spec_of
    from pipeline.images.factory import pixel_reader
    from pipeline.models.numbers import are_unit, say_damaged
    from pipeline.models.towers import Normaliser

    place, spec = path.resolve(), spec_of(config, checkpoint)
    with pixel_reader(config.changed({"loader.workers": 1}), str(place.parent), spec) as reader:
        pixels: Any = reader.read(ImageRef(id=str(path), path=place.name))
    if isinstance(pixels, Failure):
        raise ConfigError([Problem("--image", str(path), f"{pixels.status}: {pixels.error}")])
    batch = torch.from_numpy(np.array(pixels.rgb)).permute(2, 0, 1)[None]
    with torch.inference_mode():
        vectors: NDArray[np.float32] = checkpoint.image(Normaliser(spec, torch.device("cpu"))(batch)).numpy()
    if not are_unit(vectors).all():
        raise ModelError(
            f"{checkpoint.name}: {say_damaged(checkpoint.image, 'image')} for {path}, which is near to nothing; the "
            "checkpoint is damaged: download or convert it again"
        )
    vector: NDArray[np.float32] = vectors[0]
    return vector


def derive(source: Dataset, composed: Config, typed: Sequence[str]) -> Config:
    """The source's config with the values that were typed; ``composed`` holds them, ``typed`` are groups and keys.

    Raises:
        ConfigError: the new dataset would lie in the source, or around it.
    """

    config = config_of_dataset(source)
    if {"prompts.labels", "prompts.path"} & {*typed}:
        # One takes the place of the other.
        config = config.changed({"prompts.labels": [], "prompts.path": None})
    for key in typed:
        config = config.changed({key: value_of(composed, key) if "." in key else getattr(composed, key)})
    if not {"labels", "labels.heads"} & {*typed}:
        _check_heads(source, config)
    problems = check(config)
    output = open_storage(config.output.dir).url
    inside, around = within(output, source.url), within(source.url, output)
    if inside or around:
        # Readers take Parquet files in folders below a dataset for its own.
        where = "is the source itself" if inside and around else "lies in the source" if inside else "holds the source"
        problems.append(Problem("output.dir", config.output.dir, where, "name a folder beside it"))
    if problems:
        raise ConfigError(problems)
    return config


def _check_heads(source: Dataset, config: Config) -> None:
    """Refuse heads that are taken from the source, and are not those any more that it was made with.

    Raises:
        ModelError: a file changed, moved or is gone.
    """
    from pipeline.models.heads import read_head

    way_out = "Say which heads the new dataset has: labels.heads=[PATH.json], or labels.heads=[] for none"
    try:
        found = {head.name: head.fingerprint for head in map(read_head, config.labels.heads)}
    except ModelError as error:
        raise ModelError(
            f"{error} (labels.heads of {source.url}, which is taken where none is given). {way_out}"
        ) from error
    recorded = source.plan.fingerprints.get("heads", {})
    if changed := [name for name in found if found[name] != recorded.get(name)]:
        paths = ", ".join(config.labels.heads)
        raise ModelError(
            f"{paths}: {', '.join(changed)} changed since {source.url} was made, whose heads are taken where none are "
            f"given. {way_out}"
        )
