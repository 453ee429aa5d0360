"""A first look at the command line, before Hydra's own, so that all mistakes come in one message.

Hydra stops at the first override that it cannot place, with exit code 1. This checks every override
against the groups under ``conf/`` and the schemas, and offers the nearest name for a typo.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from pipeline.config import Config, check, nearest, schema
from pipeline.errors import Problem


def check_overrides(arguments: Sequence[str], conf: Path) -> list[Problem]:
    """Every problem of the overrides among ``arguments``, and of the config that the good ones make."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    problems: list[Problem] = []
    good: list[str] = []
    for argument in arguments:
        try:
            override = parser.parse_override(argument)
        except HydraException as error:
            reason = str(error).splitlines()[0]
            problems.append(Problem(argument.split("=", 1)[0], argument, f"cannot be read as key=value: {reason}"))
            continue
        key = override.key_or_group
        if key.startswith("hydra.") or key == "hydra" or override.is_sweep_override():
            continue
        raw = argument.split("=", 1)[1] if "=" in argument else None
        found = _check_one(key, raw, override.value() if raw is not None else None, conf)
        problems += found
        if not found:
            good.append(argument)
    if problems:
        problems += _check_rest(good, conf, {problem.key for problem in problems})
    return problems


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


def _check_one(key: str, raw: str | None, value: Any, conf: Path) -> list[Problem]:
    options = groups(conf)
    if key in options:
        if raw in options[key]:
            return []
        allowed = f"must be one of {', '.join(options[key])}"
        hint = nearest(raw or "", options[key])
        if key == "model" and raw:
            hint = hint or f"for any other checkpoint: model=hub model.name={raw}"
        return [Problem(key, raw, allowed, hint)]
    if key not in known_keys():
        hint = nearest(key, [*known_keys(), *options])
        allowed = "there is no such key" if "." in key else f"there is no such group; groups: {', '.join(options)}"
        return [Problem(key, raw, allowed, hint or "python -m pipeline.run --cfg job prints all keys")]
    return _check_type(key, value)


def _check_type(key: str, value: Any) -> list[Problem]:
    from hydra.core.override_parser.types import QuotedString
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    group, name = key.split(".", 1)
    if isinstance(value, QuotedString):
        value = value.text
    try:
        OmegaConf.update(schema(), key, value)
    except OmegaConfBaseException:
        hint = get_type_hints(get_type_hints(Config)[group])[name]
        return [Problem(key, value, f"must be {_in_words(hint)}")]
    return []


def _in_words(hint: Any) -> str:
    words = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
        list[str]: "a list of texts, such as [a,b]",
    }
    for kind, text in words.items():
        if hint == kind:
            return text
        if hint == kind | None:
            return f"{text}, or null"
    return str(hint)


def _check_rest(good: Sequence[str], conf: Path, known_bad: set[str]) -> list[Problem]:
    """What :func:`~pipeline.config.check` says of the config without the overrides that failed."""
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf

    register()
    try:
        with initialize_config_dir(config_dir=str(conf), version_base="1.3"):
            composed = compose("config", overrides=list(good))
        config = OmegaConf.to_object(OmegaConf.merge(schema(), composed))
    except HydraException:
        return []
    if not is_dataclass(config) or not isinstance(config, Config):
        return []
    return [problem for problem in check(config) if problem.key not in known_bad]


def register() -> None:
    """Make the root schema known to Hydra, so that every YAML is checked against it."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="schema", node=schema())
