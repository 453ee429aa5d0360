"""Composition of the config from overrides or Python values; all mistakes are reported in one message.

Hydra stops at the first override that it cannot place, with exit code 1. This module checks every override against the
groups under ``conf/`` and the schemas, and suggests the nearest name for a typo. ``python -m pipeline.run`` then lets
Hydra compose what was checked; everything else composes with :func:`merge`, without Hydra's process-wide state.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from pipeline.config.hydra_guard import check_setting
from pipeline.config.options import unread, with_quotes
from pipeline.config.ranges import AUTO, DEFAULT, DefaultNumber
from pipeline.config.schema import Config, LoaderConfig, ManifestConfig, conf_dir, nearest, value_of
from pipeline.config.validate import AUTOMATIC, check, known_keys, limits
from pipeline.core.errors import ConfigError, Problem

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig

# Keys that are meant where a location or a list is given to a whole group.
MEANT = {"manifest": "manifest.path", "output": "output.dir", "prompts": "prompts.labels", "labels": "prompts.labels"}
# The number for the word ``default`` until the config is made.
_DEFAULT_SIZE = -1
TYPES: list[tuple[Any, str]] = [
    (int, "a whole number"),
    (float, "a number"),
    (bool, "true or false"),
    (str, "text"),
    (list[str], "a list of texts, such as [a,b]"),
    (dict[str, float], "numbers by name, such as {int8:0.99}"),
]


@dataclass(frozen=True)
class TypedLoader(LoaderConfig):
    """Group ``loader`` as it is typed: ``batch_size`` may be one of two words, for which the config has numbers."""

    batch_size: int | str = DEFAULT  # type: ignore[assignment]


@dataclass(frozen=True)
class TypedManifest(ManifestConfig):
    """Group ``manifest`` as it is typed: ``shard_rows`` may be ``auto``, for which the config has 0."""

    shard_rows: int | str = AUTO  # type: ignore[assignment]


def compose_config(arguments: Sequence[str]) -> Config:
    """Return the config of ``GROUP=OPTION`` and ``KEY=VALUE`` overrides, for commands other than the main one.

    Raises:
        ConfigError: with every problem.
    """
    settings, problems = _read_overrides(arguments)
    config, found = read_config(merge(settings))
    if problems := joined(problems, found):
        raise ConfigError(problems)
    if config.run.dry:
        # A user who sets it expects that nothing is written.
        raise ConfigError([Problem("run.dry", True, "is for python -m pipeline.run only")])
    return config


def check_overrides(arguments: Sequence[str], *, sweep: bool = False) -> list[Problem]:
    """Return every problem of the overrides ``arguments``, and if there is one, those of the config of the others.

    With ``sweep``, a key may have several values, one for each run (``--multirun``).
    """
    settings, problems = _read_overrides(arguments, sweep=sweep)
    return joined(problems, read_config(merge(settings))[1]) if problems else []


def to_config(composed: DictConfig) -> Config:
    """Return the composed config as frozen dataclasses.

    Raises:
        ConfigError: with every problem that :func:`read_config` finds.
    """
    config, problems = read_config(composed)
    if problems:
        raise ConfigError(problems)
    return config


def joined(problems: Sequence[Problem], others: Iterable[Problem]) -> list[Problem]:
    """Return ``problems`` and those of the ``others`` that are about other keys."""
    keys = {problem.key for problem in problems}
    return [*problems, *(problem for problem in others if problem.key not in keys)]


def groups(conf: Path) -> dict[str, list[str]]:
    """The config groups and their options: the folders and files under ``conf``."""
    return {
        folder.name: sorted(file.stem for file in folder.glob("*.yaml"))
        for folder in sorted(conf.iterdir())
        if folder.is_dir()
    }


def register() -> None:
    """Register the root schema with Hydra, so that it checks every YAML file."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="schema", node=schema())


def schema() -> DictConfig:
    """Return a new root schema for OmegaConf: it has types and no other keys, and takes values unlike dataclasses."""
    return deepcopy(_schema())


@cache
def _schema() -> DictConfig:
    # Every override is checked against a schema; a copy takes a fifth of the time.
    from omegaconf import OmegaConf

    node: DictConfig = OmegaConf.structured(Config(loader=TypedLoader(), manifest=TypedManifest()))
    for part in (node, *(node[group.name] for group in fields(Config))):
        OmegaConf.set_readonly(part, None)
    # A merge keeps the default where the other side has ???: model=hub would run the demo model.
    node.model.name = "???"
    return node


def merge(settings: Iterable[tuple[str, Any]]) -> DictConfig:
    """Merge the defaults of ``conf/config.yaml`` with options of groups, then with values of keys, in their order.

    Args:
        settings: pairs of a group and its option, or of a key and its value, that :func:`check_one` accepts.
    """
    from omegaconf import OmegaConf

    conf, values = conf_dir(), []
    defaults: Any = OmegaConf.to_container(_load(conf / "config.yaml"), resolve=False)
    options = {
        key: option for entry in defaults["defaults"] if isinstance(entry, dict) for key, option in entry.items()
    }
    for key, value in settings:
        if key in options:
            options[key] = value
        else:
            values.append((key, value))
    composed: Any = schema()
    for group in fields(Config):
        file = _load(conf / group.name / f"{options[group.name]}.yaml")
        composed[group.name] = OmegaConf.merge(composed[group.name], file)
    for key, value in values:
        # A mapping changes the entries that it names; a list replaces the list.
        OmegaConf.update(composed, key, value, merge=True)
    merged: DictConfig = composed
    return merged


@cache
def _load(path: Path) -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.load(path)


def read_config(composed: DictConfig) -> tuple[Config, list[Problem]]:
    """Return the config and every problem: missing and unresolvable values, and what ``validate.check`` finds.

    In the config, defaults replace missing and unresolvable values.

    Raises:
        ConfigError: a key is in no schema.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        merged: Any = OmegaConf.merge(schema(), composed)
    except OmegaConfBaseException as error:
        # A user's file that does not have the schema among its defaults can hold any key.
        reason = str(error).splitlines()[0]
        raise ConfigError(
            [Problem(str(error.full_key or "config"), "", reason, "add schema to its defaults")]
        ) from error
    problems = []
    for key in known_keys():
        group, name = key.split(".")
        if problem := _resolve(merged[group], key):
            problems.append(problem)
            default = value_of(Config(), key)
            merged[group][name] = _DEFAULT_SIZE if isinstance(default, DefaultNumber) else default
    config = OmegaConf.to_object(merged)
    if not isinstance(config, Config):
        raise TypeError(f"composed to {type(config).__name__}, not Config")
    loader = LoaderConfig(**vars(config.loader))
    if loader.batch_size == _DEFAULT_SIZE:
        loader = replace(loader, batch_size=LoaderConfig.batch_size)
    config = replace(config, loader=loader, manifest=ManifestConfig(**vars(config.manifest)))
    return config, problems + check(config)


def _resolve(node: DictConfig, key: str) -> Problem | None:
    """Resolve the value of ``key`` within its group, and replace ``auto`` by 0."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    name = key.partition(".")[2]
    if OmegaConf.is_missing(node, name):
        hint = "such as model.name=openai/clip-vit-base-patch32" if key == "model.name" else f"add {key}=..."
        return Problem(key, "???", "has no default; give a value", hint)
    value = None
    try:
        value = node[name]
        if OmegaConf.is_config(value):
            OmegaConf.to_container(value, resolve=True, throw_on_missing=True)
        if key in AUTOMATIC:
            node[name] = _number(key, value)
    except OmegaConfBaseException as error:
        raw: Any = OmegaConf.to_container(node)
        return Problem(key, raw[name], str(error).splitlines()[0])
    except ValueError:
        return Problem(key, value, limits(key))
    return None


def _number(key: str, typed: int | str) -> int:
    """Return the number that stands for what was typed; raise ValueError for a word that ``key`` does not take."""
    if typed == AUTO:
        return 0
    if typed == DEFAULT and isinstance(value_of(Config(), key), DefaultNumber):
        return _DEFAULT_SIZE
    number = int(typed)
    if number in (0, _DEFAULT_SIZE):
        raise ValueError(f"{number} stands for a word, and cannot be typed")
    return number


def _read_overrides(arguments: Sequence[str], *, sweep: bool = False) -> tuple[list[tuple[str, Any]], list[Problem]]:
    """Return the good overrides as arguments of :func:`merge`, and the problems of the others."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    settings: list[tuple[str, Any]] = []
    problems: list[Problem] = []
    for argument in with_quotes(arguments):
        try:
            # Hydra accepts a value without a key.
            override = None if argument.startswith("=") else parser.parse_override(argument)
        except HydraException:
            override = None
        if override is None:
            problems.append(unread(argument, known_keys()))
        elif override.key_or_group.startswith(("hydra.", "hydra/")):
            problems += check_setting(override, argument)
        elif sweep and override.is_sweep_override():
            problems += _check_sweep(override)
        elif found := _check_override(override, argument):
            problems += found
        else:
            settings.append((override.key_or_group, override.value()))
    return settings, problems


def _check_override(override: Override, argument: str) -> list[Problem]:
    key = override.key_or_group
    raw = argument.split("=", 1)[1] if "=" in argument else None
    if override.is_delete():
        return [Problem(key, argument, "a key cannot be removed; give it another value")]
    if override.is_sweep_override():
        hint = f"a list: {key}=[{raw}]; one text with commas: '{key}=\"{raw}\"'"
        return [Problem(key, raw, "must be one value", hint)]
    if override.package is not None:
        return [Problem(key, argument, "takes no package", f"write {key}={raw}")]
    found = check_one(key, raw, override.value())
    if not found and override.is_add():
        return [Problem(key, argument, "is in the config already", "leave out the +")]
    return found


def _check_sweep(override: Override) -> list[Problem]:
    """Check the groups of a sweep; values of keys are checked in the run that uses them."""
    from hydra.core.override_parser.types import ValueType

    key = override.key_or_group
    if key in known_keys() or key in _entries(key):
        return []
    values: list[str | None] = [None]
    if key in groups(conf_dir()):
        # A glob matches existing options only; a choice could be a path out of the group.
        glob = override.value_type == ValueType.GLOB_CHOICE_SWEEP
        values = [] if glob or not override.is_discrete_sweep() else list(override.sweep_string_iterator())
    return [problem for value in values for problem in check_one(key, value, value)]


def check_one(key: str, raw: str | None, value: Any) -> list[Problem]:
    """Return the problems of one option of a group or one value of a key; ``raw`` is the value as it was typed."""
    options = groups(conf_dir())
    if key in options:
        return [] if raw in options[key] else [_wrong_option(key, raw, options[key])]
    entries = _entries(key)
    if key not in known_keys() and key not in entries:
        hint = nearest(key, [*known_keys(), *options, *entries])
        allowed = "there is no such key" if "." in key else f"there is no such group; groups: {', '.join(options)}"
        return [Problem(key, raw, allowed, hint or "python -m pipeline.run --cfg job prints all keys")]
    if isinstance(value, dict) and isinstance(value_of(Config(), key), dict):
        return [problem for name, one in value.items() for problem in check_one(f"{key}.{name}", str(one), one)]
    return _check_type(key, value)


def _wrong_option(group: str, raw: str | None, options: Sequence[str]) -> Problem:
    hint = nearest(raw or "", options)
    if group in MEANT and re.search(r"[./\[,]", raw or ""):
        hint = f"did you mean {MEANT[group]}={raw}?"
    if group == "model" and raw:
        hint = hint or f"for any other checkpoint: model=hub model.name={raw}"
    return Problem(group, raw, f"must be one of {', '.join(options)}", hint)


def _entries(key: str) -> list[str]:
    """The entries of the mapping that ``key`` names one of, such as ``parity.top1.int8``."""
    mapping = key.rpartition(".")[0]
    value = value_of(Config(), mapping) if mapping in known_keys() else None
    return [f"{mapping}.{name}" for name in value] if isinstance(value, dict) else []


def _check_type(key: str, value: Any) -> list[Problem]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    group, name, *entry = key.split(".")
    # A copy of the group alone takes a tenth of the time.
    typed = deepcopy(_schema()[group])
    try:
        OmegaConf.update(typed, ".".join((name, *entry)), value)
        if key in AUTOMATIC and not OmegaConf.is_interpolation(typed, name):
            _number(key, value)
    except (OmegaConfBaseException, ValueError):
        if key in AUTOMATIC:
            return [Problem(key, value, limits(key))]
        hint = float if entry else get_type_hints(get_type_hints(Config)[group])[name]
        allowed = next(text for kind, text in TYPES if hint in (kind, kind | None))
        null = "" if hint in [kind for kind, _ in TYPES] else ", or null"
        way_out = f"write {key}=[{value}]" if hint == list[str] and isinstance(value, str) else ""
        return [Problem(key, value, f"must be {allowed}{null}", way_out)]
    return []
