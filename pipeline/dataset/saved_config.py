"""The config of a dataset in its plan: every setting that the rows depend on, without settings of a single run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from pipeline.config.choices import BACKENDS
from pipeline.config.ranges import AUTO
from pipeline.config.schema import DEMO_MODEL, Config, from_dict, value_of
from pipeline.config.validate import check
from pipeline.core.errors import ConfigError, PlanMismatch
from pipeline.storage.moved import find_again, is_gone, moved_with
from pipeline.storage.urls import is_local, local_file

# Settings that do not change the rows, and must not change the plan.
_OF_THE_RUN = {
    "cluster", "report", "run", "log", "metrics", "serve", "loader.workers", "loader.prefetch", "loader.feeders",
    "loader.isolation",
    "prompts.cache", "backend.artifacts", "backend.streams", "output.dir", "output.lease_seconds",
    "errors.grace_seconds", "backend.cuda_graph",
}  # fmt: skip
# Settings that backend=auto chooses.
_OF_THE_BACKEND = ("name", "precision", "compile", "quantization")
# Settings with these values are left out, so that plans are those of earlier versions.
_OFTEN_LEFT_OUT: dict[str, object] = {
    "manifest.text": None,
    "output.dims": None,
    "output.vector": "fixed",
    "labels.heads": [],
}
# Files by which a folder is a checkpoint: of transformers, of open_clip, of sentence-transformers.
MODEL_FILES = ("config.json", "open_clip_config.json", "modules.json")
# Addresses that may be relative to the current folder.
_PLACES = ("manifest.path", "manifest.root", "prompts.path")
# Addresses of a plan that may move.
PLACES = (*_PLACES, "model.name")


def recipe_of(config: Config) -> dict[str, Any]:
    """The settings that a plan keeps, by group; local paths are absolute."""
    recipe: dict[str, Any] = {}
    for group, values in asdict(config).items():
        kept = {name: value for name, value in values.items() if not {group, f"{group}.{name}"} & _OF_THE_RUN}
        if kept:
            recipe[group] = kept
    if config.images.decoder != "gpu":
        # Of no meaning there; the plans of earlier versions are without it.
        del recipe["images"]["gpu_share"]
    for key, default in _OFTEN_LEFT_OUT.items():
        group, name = key.split(".")
        if value_of(config, key) == default:
            del recipe[group][name]
    for key in _PLACES:
        group, name = key.split(".")
        address = value_of(config, key)
        if address is not None and is_local(address):
            recipe[group][name] = _absolute(address)
    if config.labels.heads:
        recipe["labels"]["heads"] = list(map(_absolute, config.labels.heads))
    # A model is a name on the hub, unless it is a folder.
    if config.model.name != DEMO_MODEL and any(
        (local_file(config.model.name) / name).is_file() for name in MODEL_FILES
    ):
        recipe["model"]["name"] = _absolute(config.model.name)
    return recipe


def config_of(recipe: Mapping[str, Any], output: str) -> Config:
    """The config that makes the same rows at ``output``; settings that the plan does not keep have defaults.

    What is no longer where the plan says is looked for at the same place relative to the dataset, as in a project
    folder that was renamed. Manifest, model and labels are compared with the plan's fingerprints by every command.

    Raises:
        PlanMismatch: the plan keeps no config, or one of another version.
    """
    if not recipe:
        raise PlanMismatch(f"{output}/_plan.json: keeps no config to repair with; run the command that began it")
    try:
        config = _with_moved_places(from_dict(recipe).changed({"output.dir": output}))
        problems = check(config)
    except (TypeError, AttributeError) as error:
        known = ", ".join(each.name for each in fields(Config))
        raise PlanMismatch(
            f"{output}/_plan.json: its config is not one of this version ({error}; groups: {known}); run the command "
            "that began it"
        ) from error
    if problems:
        raise ConfigError(problems)
    return config


def with_backend_of(config: Config, recipe: Mapping[str, Any]) -> Config:
    """The config with the backend that the settings in a plan name, where it leaves that open (``backend=auto``)."""
    kept = recipe.get("backend", {})
    if config.backend.name != AUTO or kept.get("name") not in BACKENDS:
        return config
    return config.changed({f"backend.{name}": kept[name] for name in _OF_THE_BACKEND if name in kept})


def gone_places(config: Config) -> list[str]:
    """The keys of a config's local addresses that lead to nothing."""
    return [key for key in PLACES if value_of(config, key) is not None and is_gone(value_of(config, key))]


def _with_moved_places(config: Config) -> Config:
    """The config with the new places of what moved together with the dataset."""
    found: dict[str, Any] = {}
    for key in gone_places(config):
        # A model is a folder of files; another folder of its name is none.
        files = [f"/{name}" for name in MODEL_FILES] if key == "model.name" else [""]
        again = next((place for file in files if (place := _moved(value_of(config, key), file, config))), None)
        if key != "manifest.root" and again is not None:
            found[key] = again
    heads = config.labels.heads
    found["labels.heads"] = [(_moved(each, "", config) or each) if is_gone(each) else each for each in heads]
    # The folder of the images is found by the move of their manifest alone, whose digest the plan knows.
    root, old = config.manifest.root, config.manifest.path
    if root is not None and old is not None and "manifest.path" in found and is_gone(root):
        moved = moved_with(root, old, found["manifest.path"])
        if moved is not None and not is_gone(moved):
            found["manifest.root"] = moved
    return config.changed(found)


def _moved(address: str, file: str, config: Config) -> str | None:
    """The place near the output where ``file`` of an address lies now; None if it is not found."""
    again = next(find_again(f"{address}{file}", config.output.dir), None)
    return None if again is None else again.removesuffix(file)


def _absolute(address: str) -> str:
    return str(local_file(address).absolute())
