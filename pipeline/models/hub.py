"""From ``model.name`` to a local folder with the checkpoint's files."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.schema import DEMO_MODEL, ModelConfig
from pipeline.core.errors import ModelError
from pipeline.models.files import (
    CONFIG,
    INDEX,
    OPEN_CLIP_CONFIG,
    OPEN_CLIP_WEIGHTS,
    WEIGHTS,
    first_line,
    is_open_clip,
    shards_of,
)
from pipeline.storage.urls import from_here, local_file

DEMO_FOLDER = Path(__file__).resolve().parents[1] / "engine" / "demo" / "model"
TOKENIZER_FILES = (
    *("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "spiece.model", "tokenizer.model"),
    *("sentencepiece.bpe.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
)
# Files of a checkpoint that are read, and those that tell another library's layout. A second file of weights is not
# downloaded.
WANTED_FILES = (
    *(CONFIG, "preprocessor_config.json", "processor_config.json", *TOKENIZER_FILES, WEIGHTS, INDEX),
    *("modules.json", OPEN_CLIP_CONFIG, "text_tower/config.json", "adapter_config.json"),
)
# The folder of a CLIP in models of sentence-transformers.
INNER = "0_CLIPModel"
# open_clip spells ids of the hub so; its own form is meant then, where the hub has two of a model.
OPEN_CLIP_PREFIX = "hf-hub:"
# The hub's own bot adds safetensors to older checkpoints as pull requests; OpenAI's CLIP has them only there.
# transformers trusts the same author and title.
CONVERTER, CONVERSION = "SFconvertbot", "Adding `safetensors` variant of this model"
# Seconds to wait for an answer of the hub.
HUB_SECONDS = 20.0
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Cached:
    """A checkpoint in the hub's cache.

    Attributes:
        folder: where its files are.
        weights: where its weights are; another folder where the cache has only those of a conversion.
        conversion: the pull request that the weights are from, such as ``refs/pr/7``; None: the revision itself.
    """

    folder: Path
    weights: Path
    conversion: str | None


def hub_id(config: ModelConfig) -> str:
    """The id on the hub, without open_clip's prefix."""
    return config.name.removeprefix(OPEN_CLIP_PREFIX)


def wanted_files(config: ModelConfig) -> tuple[str, ...]:
    """The files of a repository that are downloaded, before it is known in which form its checkpoint is."""
    if not config.name.startswith(OPEN_CLIP_PREFIX):
        return WANTED_FILES
    return (*(name for name in WANTED_FILES if name not in (WEIGHTS, INDEX)), *OPEN_CLIP_WEIGHTS[:2])


def find_folder(config: ModelConfig) -> Path:
    """The demo's folder, a local folder, or the cached files of the hub.

    Raises:
        ModelError: no such folder, or the download failed.
    """
    if config.name == DEMO_MODEL:
        return DEMO_FOLDER
    local = local_file(config.name)
    if local.is_dir():
        return local
    if hub_id(config).startswith((".", "/", "~")) or hub_id(config).count("/") > 1:
        raise ModelError(f"model.name={config.name}: no such folder{from_here(config.name)}")
    from huggingface_hub.errors import HFValidationError

    try:
        with _no_endless_wait():
            return _download(config)
    except HFValidationError as error:
        raise ModelError(f"model.name={config.name}: neither a folder nor a hub id: {error}") from error
    except Exception as error:
        if not _from_hub(error):
            raise
        cached = find_cached(config)
        if cached is not None:
            log.info("%s: not asked on the hub (%s); taken from %s", config.name, first_line(error), cached.folder)
            return cached.folder
        raise ModelError(
            f"model.name={config.name}, revision {config.revision or 'main'}: the Hugging Face hub did not give it: "
            f"{_reason(error)}. On a machine without a network, copy the checkpoint's folder there and give it as "
            "model.name, or measure with model.weights=random"
        ) from error


def find_weights(config: ModelConfig, folder: Path) -> Path:
    """The folder with the weights of the checkpoint in ``folder``: itself, or the cache's conversion of them."""
    if folder == DEMO_FOLDER or local_file(config.name).is_dir() or _has_weights(config, folder):
        return folder
    cached = find_cached(config)
    return cached.weights if cached is not None and cached.folder == folder else folder


def find_cached(config: ModelConfig) -> Cached | None:
    """A checkpoint of the hub as the cache has it, without asking the hub; None where something of it is missing.

    The weights may be in a pull request of the hub's bot alone (:data:`CONVERTER`). Its number is known to the hub, so
    a cache with several pull requests is no answer; model.revision says which then.
    """
    name = hub_id(config)
    folder = _snapshot(name, config.revision or "main")
    whole = config.weights == "random"
    if folder is not None and (whole or _has_weights(config, folder)):
        return Cached(folder, folder, None)
    if whole or config.revision is not None:
        return None
    found: dict[Path, Cached] = {}
    for revision in _pull_requests(name):
        place = _snapshot(name, revision, WEIGHTS, INDEX)
        if place is None or not _has_weights(config, place):
            continue
        configs = [each / CONFIG for each in (place, folder) if each is not None and (each / CONFIG).is_file()]
        # A conversion changes nothing but the format of the weights.
        if configs and configs[0].read_bytes() == configs[-1].read_bytes():
            found[place] = Cached(configs[0].parent, place, revision)
    if len(found) > 1:
        choice = " or ".join(str(each.conversion) for each in found.values())
        log.warning("%s: the cache has weights of several pull requests: model.revision=%s", config.name, choice)
        return None
    return next(iter(found.values()), None)


def _snapshot(name: str, revision: str, *files: str) -> Path | None:
    """The cache's folder of a revision that holds one of the files, by default one that begins a checkpoint."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    for file in files or (CONFIG, OPEN_CLIP_CONFIG, "modules.json"):
        try:
            found = try_to_load_from_cache(name, file, revision=revision)
        except (HFValidationError, OSError):
            return None
        if isinstance(found, str):
            return Path(found).parent
    return None


def _pull_requests(name: str) -> list[str]:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="model"), "refs/refs/pr")
    return [f"refs/pr/{path.name}" for path in sorted(folder.glob("*"))]


def _has_weights(config: ModelConfig, folder: Path) -> bool:
    """True if the weights that are loaded are all in the folder, or in that of a CLIP in it."""
    if (folder / INNER).is_dir():
        return _has_weights(config, folder / INNER)
    theirs = is_open_clip(folder)
    if config.name.startswith(OPEN_CLIP_PREFIX) or theirs:
        return any((folder / name).is_file() for name in OPEN_CLIP_WEIGHTS[: None if theirs else 2])
    if (folder / WEIGHTS).is_file():
        return True
    shards = shards_of(folder)
    return bool(shards) and all((folder / name).is_file() for name in shards)


@contextmanager
def _no_endless_wait() -> Iterator[None]:
    """Limit the wait for answers that the hub's client waits for without end: a network may swallow packets."""
    from huggingface_hub import get_session

    def limit(request: Any) -> None:
        given = request.extensions.get("timeout", {})
        limits = {kind: given.get(kind) or HUB_SECONDS for kind in ("connect", "read", "write", "pool")}
        request.extensions = {**request.extensions, "timeout": limits}

    hooks: Any = get_session().event_hooks["request"]
    hooks.append(limit)
    try:
        yield
    finally:
        hooks.remove(limit)


def _from_hub(error: Exception) -> bool:
    """True for an error of the hub, of its cache or of the network; its HTTP client's types change with its version."""
    clients = ("http", "requests", "urllib3", "huggingface_hub")
    types = {each.__module__.partition(".")[0] for each in type(error).__mro__}
    return isinstance(error, OSError) or any(name.startswith(clients) for name in types)


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
    from huggingface_hub import get_repo_discussions

    folder = _fetch(config, config.revision)
    if config.weights == "random" or config.revision is not None or _has_weights(config, folder):
        return folder
    # Without the hub, the cache may have the conversion.
    for discussion in get_repo_discussions(hub_id(config), author=CONVERTER, discussion_type="pull_request"):
        if discussion.title == CONVERSION and discussion.status == "open":
            revision = f"refs/pr/{discussion.num}"
            log.info("%s has no safetensors on main; taking the hub's own conversion, %s", config.name, revision)
            return _fetch(config, revision)
    return folder


def _fetch(config: ModelConfig, revision: str | None) -> Path:
    """Download what is read of a revision; then the shards of its weights, if an index names them, or open_clip's."""
    from huggingface_hub import snapshot_download

    def fetch(files: Sequence[str]) -> Path:
        return Path(snapshot_download(hub_id(config), revision=revision, allow_patterns=[*files]))

    wanted = wanted_files(config)
    folder = fetch(wanted)
    if is_open_clip(folder) and config.weights != "random" and not _has_weights(config, folder):
        return fetch([*wanted, *OPEN_CLIP_WEIGHTS[:2]])
    if (folder / "modules.json").is_file() and not (folder / CONFIG).is_file():
        fetch([f"{INNER}/{name}" for name in WANTED_FILES])
    shards = [] if (folder / WEIGHTS).is_file() else shards_of(folder)
    # An index that names other places is refused when the weights are opened.
    return fetch([*wanted, *shards]) if shards and all("/" not in each for each in shards) else folder
