"""Checks of the model (in the package, a folder, the hub's cache or on the hub) and of the hub, without a download."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from pipeline.config.schema import DEMO_MODEL, ModelConfig
from pipeline.core.errors import ModelError
from pipeline.doctor.check import Check, Status, Subject
from pipeline.engine.demo.notes import FACT, WAY_OUT, notes_of
from pipeline.models.architectures import ARCHITECTURES
from pipeline.models.files import is_open_clip
from pipeline.models.hub import DEMO_FOLDER, INNER, Cached, find_cached, find_folder, hub_id, wanted_files

GROUP = "hub and model"
HUB_SECONDS = 5.0
OFFLINE = "copy the checkpoint here and set model.name to its folder"


def look(subject: Subject) -> Iterator[Check]:
    """Check that the hub answers, and that the model can be opened."""
    from huggingface_hub import constants

    config, where = subject.job.model, constants.ENDPOINT
    local, problem = is_local(config), ""
    if constants.HF_HUB_OFFLINE:
        problem = "not checked: HF_HUB_OFFLINE is set"
    elif not (local and subject.quick):
        problem = hub_problem(None if local else hub_id(config))
    if local and (problem or subject.quick):
        yield Check(GROUP, "hub", Status.SKIP, f"{problem or 'not checked'}; this job does not need it")
    elif not problem:
        yield Check(GROUP, "hub", Status.OK, f"{where} answers" + ("" if local else f", and has {config.name}"))
    elif constants.HF_HUB_OFFLINE:
        yield Check(GROUP, "hub", Status.SKIP, problem)
    else:
        way_out = "check the model's name, the network and HF_TOKEN, or set HF_ENDPOINT to a mirror"
        yield Check(GROUP, "hub", Status.WARN, problem, way_out)
    yield _opened(config, None) if local else _from_hub(config, problem, constants.HF_HUB_CACHE)
    if notes_of(subject.job):
        yield Check(GROUP, "demo model", Status.WARN, FACT, WAY_OUT)


def _from_hub(config: ModelConfig, problem: str, cache: str) -> Check:
    """Check that a job gets the model: from the cache, or from a hub that answers."""
    cached = find_cached(config)
    if cached is not None:
        return _opened(config, cached)
    fact = f"{config.name}, revision {config.revision or 'main'}, is not in {cache}"
    if problem:
        way_out = f"connect this machine to the hub once, or {OFFLINE}"
        return Check(GROUP, "model", Status.FAIL, f"{fact}, and cannot be downloaded from the hub", way_out)
    patterns = " ".join(f"'{pattern}'" for pattern in wanted_files(config))
    way_out = f"the first run downloads it; ahead of time: hf download {hub_id(config)} --include {patterns}"
    return Check(GROUP, "model", Status.WARN, fact, way_out)


def is_local(config: ModelConfig) -> bool:
    """Return True if the model does not come from the hub."""
    folder = config.name == DEMO_MODEL or Path(os.path.expanduser(config.name)).is_dir()
    # Such a name can only be a folder.
    path = config.name.startswith((".", "/", "~")) or config.name.count("/") > 1
    return folder or path or _needs_no_files(config)


def _needs_no_files(config: ModelConfig) -> bool:
    """Return True for random weights of a model whose config is known here."""
    if config.weights != "random" or config.name in ARCHITECTURES:
        return config.weights == "random"
    if find_spec("open_clip") is None or Path(os.path.expanduser(config.name)).is_dir():
        return False
    from pipeline.models.open_clip_models import published

    return published(hub_id(config)) is not None


def as_cached(config: ModelConfig) -> ModelConfig | None:
    """Return the same model as a folder of this machine, which opens without the hub; None where it is not cached."""
    if is_local(config):
        return config
    cached = find_cached(config)
    # A folder has all its files in one place.
    return None if cached is None or cached.weights != cached.folder else replace(config, name=str(cached.folder))


def hub_problem(name: str | None) -> str:
    """Return the reason why the hub, or the model ``name`` on it, is not available, or an empty string."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    where = constants.ENDPOINT
    try:
        if name is not None:
            HfApi().model_info(name, timeout=HUB_SECONDS)
        else:
            with urllib.request.urlopen(urllib.request.Request(where, method="HEAD"), timeout=HUB_SECONDS):
                pass
    except urllib.error.HTTPError as error:
        # A mirror may have no front page.
        return f"{where} answers with HTTP {error.code}" if error.code >= 500 else ""
    except RepositoryNotFoundError:
        return f"{where} has no model {name}, or it is private (HF_TOKEN)"
    except HFValidationError as error:
        return f"{name} is no valid name on the hub: {error}"
    except Exception as error:
        # The types that its HTTP client raises change with its version.
        if not isinstance(error, (HfHubHTTPError, OSError)) and not type(error).__module__.startswith("http"):
            raise
        return f"{where} does not answer ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})"
    return ""


def _opened(config: ModelConfig, cached: Cached | None) -> Check:
    """Check the files of the model's folder, without opening them."""
    if _needs_no_files(config):
        return Check(GROUP, "model", Status.OK, f"{config.name} with random weights, which need no download")
    try:
        folder = cached.folder if cached is not None else find_folder(config)
    except ModelError as error:
        way_out = "set model.name to a folder with a checkpoint, or to a model of the hub"
        return Check(GROUP, "model", Status.FAIL, str(error), way_out)
    weights = cached.weights if cached is not None else folder
    if (folder / INNER / "config.json").is_file():
        folder = weights = folder / INNER
    if not (folder / "config.json").is_file() and not is_open_clip(folder):
        fact = f"{folder}: no config.json, so this is not a Hugging Face checkpoint"
        way_out = "set model.name to the folder that holds config.json and model.safetensors"
        return Check(GROUP, "model", Status.FAIL, fact, way_out)
    size = sum(os.path.getsize(path) for path in weights.glob("*.safetensors"))
    if not size and config.weights != "random":
        way_out = "choose a model.revision that has them, or convert the checkpoint with save_pretrained()"
        return Check(GROUP, "model", Status.FAIL, f"{folder}: no *.safetensors", way_out)
    place = "comes with the package" if folder == DEMO_FOLDER else f"in {folder}"
    if cached is not None and cached.conversion is not None:
        place += f", its safetensors from the hub's conversion {cached.conversion}"
    return Check(GROUP, "model", Status.OK, f"{config.name}, {size / 1e6:,.1f} MB of weights, {place}")
