"""From the command line to the frozen config, with all mistakes in one message.

Hydra stops at the first override that it cannot place, with exit code 1. This checks every override
against the groups under ``conf/`` and the schemas, and offers the nearest name for a typo.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from pipeline.config.hydra_guard import check_setting
from pipeline.config.options import unread
from pipeline.config.ranges import AUTO, AUTOMATIC, MEANT
from pipeline.config.schema import Config, LoaderConfig, conf_dir, nearest, value_of
from pipeline.config.validate import check, limits
from pipeline.core.errors import ConfigError, Problem

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig


@dataclass(frozen=True)
class TypedLoader(LoaderConfig):
    """The group ``loader`` as it is typed, which may say ``auto`` where the config keeps a number."""

    batch_size: int | str = LoaderConfig.batch_size  # type: ignore[assignment]


def check_overrides(arguments: Sequence[str], conf: Path, *, sweep: bool = False) -> list[Problem]:
    """Every problem of the overrides among ``arguments``, and of the config that the good ones make.

    With ``sweep``, a key may have several values, one for each run (``--multirun``).
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    problems: list[Problem] = []
    good: list[str] = []
    for argument in arguments:
        try:
            # Hydra takes a value without a key.
            override = None if argument.startswith("=") else parser.parse_override(argument)
        except HydraException:
            override = None
        if override is None:
            problems.append(unread(argument, known_keys()))
            continue
        key = override.key_or_group
        if key.startswith(("hydra.", "hydra/")):
            problems += check_setting(override, argument)
            continue
        if sweep and override.is_sweep_override():
            problems += _check_sweep(override, conf)
            continue
        raw = argument.split("=", 1)[1] if "=" in argument else None
        if override.is_delete():
            found = [Problem(key, argument, "a key cannot be taken out; give it another value")]
        elif override.is_sweep_override():
            hint = f"a list: {key}=[{raw}]; one text with commas: '{key}=\"{raw}\"'"
            found = [Problem(key, raw, "must be one value", hint)]
        else:
            found = check_one(key, raw, override.value(), conf)
            if not found and override.is_add():
                found = [Problem(key, argument, "stands in the config already", "leave out the +")]
        problems += found
        if not found:
            good.append(argument)
    if problems:
        problems += _check_rest(good, conf, {problem.key for problem in problems})
    return problems


def schema() -> DictConfig:
    """The root schema for OmegaConf: typed and closed, but open to new values, unlike the dataclasses."""
    from omegaconf import OmegaConf

    node: DictConfig = OmegaConf.structured(Config(loader=TypedLoader()))
    for part in (node, *(node[group.name] for group in fields(Config))):
        OmegaConf.set_readonly(part, None)
    # A merge leaves what is below a ??? as it is: with a default here, model=hub would run the demo model.
    node.model.name = "???"
    return node


def to_config(composed: DictConfig) -> Config:
    """The composed config as frozen dataclasses.

    Raises:
        ConfigError: with every problem that :func:`read_config` finds.
    """
    config, problems = read_config(composed)
    if problems:
        raise ConfigError(problems)
    return config


def read_config(composed: DictConfig) -> tuple[Config, list[Problem]]:
    """The config, and every problem: values that are missing or point nowhere, and what
    :func:`~pipeline.config.validate.check` finds.

    In the config, defaults stand in for values that are missing or point nowhere.

    Raises:
        ConfigError: it holds what no schema knows.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        merged: Any = OmegaConf.merge(schema(), composed)
    except OmegaConfBaseException as error:
        # A file of one's own that does not take the schema into its defaults can hold anything.
        reason = str(error).splitlines()[0]
        raise ConfigError(
            [Problem(str(error.full_key or "config"), "", reason, "add schema to its defaults")]
        ) from error
    problems = []
    for group in fields(Config):
        node = merged[group.name]
        for name, default in vars(getattr(Config(), group.name)).items():
            key = f"{group.name}.{name}"
            if OmegaConf.is_missing(node, name):
                hint = "such as model.name=openai/clip-vit-base-patch32" if key == "model.name" else f"add {key}=..."
                problem = Problem(key, "???", "has no default; give a value", hint)
            else:
                try:
                    value = node[name]
                    if OmegaConf.is_config(value):
                        OmegaConf.to_container(value, resolve=True, throw_on_missing=True)
                    if key in AUTOMATIC:
                        node[name] = _number(value)
                    continue
                except OmegaConfBaseException as error:
                    raw: Any = OmegaConf.to_container(node)
                    problem = Problem(key, raw[name], str(error).splitlines()[0])
                except ValueError:
                    problem = Problem(key, value, limits(key))
            problems.append(problem)
            node[name] = default
    config = OmegaConf.to_object(merged)
    if not isinstance(config, Config):
        raise TypeError(f"composed to {type(config).__name__}, not Config")
    config = replace(config, loader=LoaderConfig(**vars(config.loader)))
    return config, problems + check(config)


def compose_config(arguments: Sequence[str]) -> Config:
    """The config of ``GROUP=OPTION`` and ``KEY=VALUE`` overrides, for doors that are not Hydra's own.

    Raises:
        ConfigError: with every problem.
    """
    from hydra import compose, initialize_config_dir

    problems = check_overrides(arguments, conf_dir())
    if problems:
        raise ConfigError(problems)
    register()
    with initialize_config_dir(config_dir=str(conf_dir()), version_base="1.3"):
        config = to_config(compose("config", overrides=list(arguments)))
    if config.run.dry:
        # Who gives it expects that nothing is done.
        raise ConfigError([Problem("run.dry", True, "is for python -m pipeline.run alone")])
    return config


def known_keys() -> list[str]:
    """Every dotted key of the schemas, such as ``loader.batch_size``."""
    groups = get_type_hints(Config)
    return [f"{group}.{field.name}" for group, kind in groups.items() for field in fields(kind)]


def groups(conf: Path) -> dict[str, list[str]]:
    """The config groups and their options, as the folders and files under ``conf`` say."""
    return {
        folder.name: sorted(file.stem for file in folder.glob("*.yaml"))
        for folder in sorted(conf.iterdir())
        if folder.is_dir()
    }


def _check_sweep(override: Override, conf: Path) -> list[Problem]:
    """What is wrong with the groups that a sweep goes through; values are checked in the run that takes them."""
    from hydra.core.override_parser.types import ValueType

    key = override.key_or_group
    if key in known_keys() or key in _entries(key):
        return []
    values: list[str | None] = [None]
    if key in groups(conf):
        # A glob finds what is there; a choice could be a path out of the group.
        glob = override.value_type == ValueType.GLOB_CHOICE_SWEEP
        values = [] if glob or not override.is_discrete_sweep() else list(override.sweep_string_iterator())
    return [problem for value in values for problem in check_one(key, value, value, conf)]


def check_one(key: str, raw: str | None, value: Any, conf: Path) -> list[Problem]:
    """What is wrong with one choice of a group or one value of a key; ``raw`` is the value as it was typed."""
    options = groups(conf)
    if key in options:
        if raw in options[key]:
            return []
        allowed = f"must be one of {', '.join(options[key])}"
        hint = nearest(raw or "", options[key])
        if key in MEANT and re.search(r"[./\[,]", raw or ""):
            hint = f"did you mean {MEANT[key]}={raw}?"
        if key == "model" and raw:
            hint = hint or f"for any other checkpoint: model=hub model.name={raw}"
        return [Problem(key, raw, allowed, hint)]
    entries = _entries(key)
    if key not in known_keys() and key not in entries:
        hint = nearest(key, [*known_keys(), *options, *entries])
        allowed = "there is no such key" if "." in key else f"there is no such group; groups: {', '.join(options)}"
        return [Problem(key, raw, allowed, hint or "python -m pipeline.run --cfg job prints all keys")]
    if isinstance(value, dict) and isinstance(value_of(Config(), key), dict):
        return [problem for name, one in value.items() for problem in check_one(f"{key}.{name}", str(one), one, conf)]
    return _check_type(key, value)


def _entries(key: str) -> list[str]:
    """The keys below a mapping, such as ``parity.top1.int8``, where ``key`` is meant as one of them."""
    mapping = key.rpartition(".")[0]
    value = value_of(Config(), mapping) if mapping in known_keys() else None
    return [f"{mapping}.{name}" for name in value] if isinstance(value, dict) else []


def _check_type(key: str, value: Any) -> list[Problem]:
    from hydra.core.override_parser.types import QuotedString
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    group, name, *entry = key.split(".")
    if isinstance(value, QuotedString):
        value = value.text
    typed = schema()
    try:
        OmegaConf.update(typed, key, value)
        if key in AUTOMATIC and not OmegaConf.is_interpolation(typed[group], name):
            _number(value)
    except (OmegaConfBaseException, ValueError):
        if key in AUTOMATIC:
            return [Problem(key, value, limits(key))]
        hint = float if entry else get_type_hints(get_type_hints(Config)[group])[name]
        way_out = f"write {key}=[{value}]" if hint == list[str] and isinstance(value, str) else ""
        return [Problem(key, value, f"must be {_in_words(hint)}", way_out)]
    return []


def _number(typed: int | str) -> int:
    """The number that the config keeps of one that may be typed as ``auto``; raises ValueError for other words."""
    if typed == AUTO:
        return 0
    number = int(typed)
    if number == 0:
        raise ValueError(f"{AUTO} is what is kept as 0")
    return number


def _in_words(hint: Any) -> str:
    words = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
        list[str]: "a list of texts, such as [a,b]",
        dict[str, float]: "numbers by name, such as {int8:0.99}",
    }
    for kind, text in words.items():
        if hint == kind:
            return text
        if hint == kind | None:
            return f"{text}, or null"
    return str(hint)


def _check_rest(good: Sequence[str], conf: Path, known_bad: set[str]) -> list[Problem]:
    """What is wrong with the config without the overrides that failed."""
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException

    register()
    try:
        with initialize_config_dir(config_dir=str(conf), version_base="1.3"):
            composed = compose("config", overrides=list(good))
    except HydraException:
        return []
    return [problem for problem in read_config(composed)[1] if problem.key not in known_bad]


def register() -> None:
    """Make the root schema known to Hydra, so that every YAML is checked against it."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="schema", node=schema())
