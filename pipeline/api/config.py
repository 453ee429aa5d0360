"""The config of a call: what the files under ``conf/`` choose and what the caller sets, checked as the command line is.

Hydra composes the same for the command; it keeps one state for the whole process, which a notebook should not share.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.compose import check_one, groups, read_config, schema
from pipeline.config.schema import Config, conf_dir, nearest
from pipeline.config.validate import check
from pipeline.core.errors import ConfigError, Problem

if TYPE_CHECKING:
    from omegaconf import DictConfig


def config_from(settings: Mapping[str, object], before: Sequence[Problem] = ()) -> Config:
    """The config of ``{"GROUP": "OPTION", "GROUP.KEY": value}``: groups first, then keys, in the order given.

    Values are Python's own: numbers, texts, lists, dicts, None; a text means itself, ``"${...}"`` too. ``before`` are
    problems that were found by now.

    Raises:
        ConfigError: with every problem, as the command line would say them.
    """
    conf, known = conf_dir(), groups(conf_dir())
    problems = list(before)
    chosen = _defaults(conf)
    values: dict[str, object] = {}
    literal: dict[str, object] = {}
    for key, given in settings.items():
        given = _plain(given)
        value = _harmless(given)
        found = check_one(key, None if value is None else str(value), value, conf)
        problems += [replace(problem, value=given) if problem.key == key else problem for problem in found]
        if found:
            continue
        if key in known:
            chosen[key] = str(value)
        else:
            values[key] = value
            if value != given:
                literal[key] = given
    config, others = read_config(_compose(conf, chosen, values))
    if literal:
        stood_in = check(config)
        for key, given in literal.items():
            group, name = key.split(".")
            config = replace(config, **{group: replace(getattr(config, group), **{name: given})})
        others = [problem for problem in others if problem not in stood_in] + check(config)
    named = {problem.key for problem in problems}
    problems += [problem for problem in others if problem.key not in named]
    if problems:
        raise ConfigError(problems)
    return config


def model_settings(model: str | os.PathLike[str]) -> dict[str, object]:
    """A model by its name under ``conf/model``, its id on the Hugging Face hub, or its folder."""
    name, options = os.fspath(model), groups(conf_dir())["model"]
    if name in options and name != "hub":
        return {"model": name}
    return {"model": "hub", "model.name": os.path.expanduser(name)}


def check_model(model: str | os.PathLike[str]) -> list[Problem]:
    """A single word is neither an id of the hub nor a folder, and most often a typo."""
    name, options = os.fspath(model), [name for name in groups(conf_dir())["model"] if name != "hub"]
    if name in options or "/" in name or os.sep in name or os.path.isdir(os.path.expanduser(name)):
        return []
    allowed = f"must be one of {', '.join(options)}, an id of the Hugging Face hub (openai/clip-...), or a folder"
    return [Problem("model", name, allowed, nearest(name, options))]


def label_settings(
    labels: Sequence[str] | str | os.PathLike[str] | None, templates: Sequence[str] | str | None
) -> dict[str, object]:
    """Labels as a list, or the file that holds them; None leaves the defaults."""
    found: dict[str, object] = {}
    if isinstance(labels, str | os.PathLike):
        found["prompts.path"] = os.fspath(labels)
    elif labels is not None:
        found["prompts.labels"] = [str(label) for label in labels]
    if templates is not None:
        found["prompts.templates"] = [templates] if isinstance(templates, str) else list(templates)
    return found


def _harmless(value: object) -> object:
    """What stands in while OmegaConf holds it: a text of Python's means nothing but itself, and has no escape there."""
    if isinstance(value, str):
        return "? ? ?" if value == "???" else value.replace("${", "$ {")
    if isinstance(value, Mapping):
        return {name: _harmless(one) for name, one in value.items()}
    return [_harmless(one) for one in value] if isinstance(value, list) else value


def _plain(value: object) -> object:
    """Paths, tuples, numbers of NumPy and the like as a YAML file would have them."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [_plain(one) for one in value]
    return value


def _defaults(conf: Path) -> dict[str, str]:
    """The option of every group that ``conf/config.yaml`` takes."""
    entries = _read(conf / "config.yaml")["defaults"]
    pairs = (pair for entry in entries if isinstance(entry, dict) for pair in entry.items())
    return {group: option for group, option in pairs if " " not in group and "/" not in group}


def _compose(conf: Path, chosen: Mapping[str, str], values: Mapping[str, object]) -> DictConfig:
    from omegaconf import OmegaConf

    composed: Any = schema()
    for group, option in chosen.items():
        composed[group] = OmegaConf.merge(composed[group], _read(conf / group / f"{option}.yaml") or {})
    for key, value in values.items():
        # A dict changes the entries that it names; a list takes the place of the other.
        OmegaConf.update(composed, key, value, merge=True)
    plain: DictConfig = OmegaConf.create(OmegaConf.to_container(composed))  # type: ignore[assignment]
    return plain


def _read(path: Path) -> Any:
    import yaml

    return yaml.safe_load(path.read_text(encoding="utf-8"))
