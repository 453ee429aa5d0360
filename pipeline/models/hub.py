"""From ``model.name`` to a local folder with the checkpoint's files."""

from __future__ import annotations

import logging
from pathlib import Path

from pipeline.config.schema import DEMO_MODEL, ModelConfig
from pipeline.core.errors import ModelError
from pipeline.storage.urls import from_here

DEMO_FOLDER = Path(__file__).resolve().parents[1] / "engine" / "demo" / "model"
WANTED_FILES = ("*.json", "*.txt", "*.model", "*.safetensors")
# The hub's own bot adds safetensors to older checkpoints as pull requests; OpenAI's CLIP has them only there.
# transformers trusts the same author and title.
CONVERTER, CONVERSION = "SFconvertbot", "Adding `safetensors` variant of this model"
log = logging.getLogger(__name__)


def find_folder(config: ModelConfig) -> Path:
    """The demo's folder, a local folder, or the cached files of the hub.

    Raises:
        ModelError: no such folder, or the download failed.
    """
    if config.name == DEMO_MODEL:
        return DEMO_FOLDER
    local = Path(config.name).expanduser()
    if local.is_dir():
        return local
    if config.name.startswith((".", "/", "~")) or config.name.count("/") > 1:
        raise ModelError(f"model.name={config.name}: no such folder{from_here(config.name)}")
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return _download(config)
    except HFValidationError as error:
        raise ModelError(f"model.name={config.name}: neither a folder nor a hub id: {error}") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        raise ModelError(
            f"model.name={config.name}, revision {config.revision or 'main'}: the Hugging Face hub did not give it: "
            f"{_reason(error)}. On a machine without a network, copy the checkpoint's folder there and give it as "
            "model.name, or measure with model.weights=random"
        ) from error


def _reason(error: Exception) -> str:
    """The reason in words that do not need knowledge of the hub's cache and variables."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, GatedRepoError):
        return "its owners ask for consent; give it on the model's page, and log in with: hf auth login"
    if isinstance(error, RepositoryNotFoundError):
        return "there is no such model, or it is private; check the name, or log in with: hf auth login"
    if isinstance(error, RevisionNotFoundError):
        return "it has no such revision; check model.revision"
    if constants.HF_HUB_OFFLINE and isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled):
        return "it is not in the cache, and HF_HUB_OFFLINE forbids to ask; unset that where there is a network"
    first = (str(error).splitlines() or [""])[0].removeprefix("Got: ").rstrip(".")
    if isinstance(error, LocalEntryNotFoundError):
        return f"it is not in the cache, and the hub cannot be reached ({first}); check the network and the proxy"
    return f"{type(error).__name__}: {first}; check the name and the network"


def _download(config: ModelConfig) -> Path:
    from huggingface_hub import get_repo_discussions, snapshot_download

    wanted = list(WANTED_FILES)
    folder = Path(snapshot_download(config.name, revision=config.revision, allow_patterns=wanted))
    if config.weights == "random" or config.revision is not None or any(folder.glob("*.safetensors")):
        return folder
    for discussion in get_repo_discussions(config.name, author=CONVERTER, discussion_type="pull_request"):
        if discussion.title == CONVERSION and discussion.status == "open":
            revision = f"refs/pr/{discussion.num}"
            log.info("%s has no safetensors on main; taking the hub's own conversion, %s", config.name, revision)
            return Path(snapshot_download(config.name, revision=revision, allow_patterns=wanted))
    return folder
