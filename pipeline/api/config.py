"""The config of a call of the Python API: options of groups and values of keys, checked like overrides."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from pipeline.config.compose import check_one, groups, joined, merge, read_config
from pipeline.config.schema import Config, conf_dir, nearest
from pipeline.config.validate import check
from pipeline.core.errors import ConfigError, Problem


def config_from(settings: Mapping[str, object], before: Sequence[Problem] = ()) -> Config:
    """Return the config of ``{"GROUP": "OPTION", "GROUP.KEY": value}``: first groups, then keys, in the order given.

    Values are Python's: numbers, texts, lists, dicts, None. A text is taken literally, ``"${...}"`` too. ``before`` are
    problems that were found earlier.

    Raises:
        ConfigError: with every problem, in the words of the command line.
    """
    problems = list(before)
    accepted: list[tuple[str, object]] = []
    literal: dict[str, object] = {}
    for key, given in settings.items():
        given = _plain(given)
        value = _without_interpolation(given)
        found = check_one(key, None if value is None else str(value), value)
        problems += [replace(problem, value=given) if problem.key == key else problem for problem in found]
        if found:
            continue
        accepted.append((key, value))
        if value != given:
            literal[key] = given
    config, others = read_config(merge(accepted))
    if literal:
        of_substitutes = check(config)
        config = config.changed(literal)
        others = [problem for problem in others if problem not in of_substitutes] + check(config)
    if problems := joined(problems, others):
        raise ConfigError(problems)
    return config


def model_settings(model: str | os.PathLike[str]) -> dict[str, object]:
    """Return the settings of a model: a name under ``conf/model``, an id of the Hugging Face hub, or a folder."""
    name, options = os.fspath(model), groups(conf_dir())["model"]
    if name in options and name != "hub":
        return {"model": name}
    return {"model": "hub", "model.name": os.path.expanduser(name)}


def check_model(model: str | os.PathLike[str]) -> list[Problem]:
    """Return a problem for a single word that is neither a known name nor a folder: most often a typo."""
    name, options = os.fspath(model), [name for name in groups(conf_dir())["model"] if name != "hub"]
    if name in options or "/" in name or os.sep in name or os.path.isdir(os.path.expanduser(name)):
        return []
    allowed = f"must be one of {', '.join(options)}, an id of the Hugging Face hub (openai/clip-...), or a folder"
    return [Problem("model", name, allowed, nearest(name, options))]


def label_settings(labels: object, templates: Sequence[str] | str | None) -> dict[str, object]:
    """Return the settings of labels, given as a list, as a mapping or as a file; None leaves the defaults.

    The prompts of a mapping are :func:`prompts_of` it.

    Raises:
        ConfigError: they are neither, or one is not a text.
    """
    found: dict[str, object] = {}
    if isinstance(labels, str | os.PathLike):
        found["prompts.path"] = os.fspath(labels)
    elif labels is not None:
        found["prompts.labels"] = _texts([*labels] if isinstance(labels, Mapping) else labels)
    if templates is not None:
        found["prompts.templates"] = [templates] if isinstance(templates, str) else list(templates)
    return found


def prompts_of(labels: object) -> dict[str, list[str] | None] | None:
    """Return the prompts by label of a mapping, None for a label that takes the templates; None for other labels.

    Raises:
        ConfigError: a label or a prompt is not a text.
    """
    if not isinstance(labels, Mapping):
        return None
    _texts(list(labels))
    problems, found = [], dict[str, list[str] | None]()
    for name, given in labels.items():
        prompts = [given] if isinstance(given, str) else given
        if prompts is not None and not (
            isinstance(prompts, list | tuple) and prompts and all(isinstance(prompt, str) for prompt in prompts)
        ):
            problems.append(Problem(f"labels[{name!r}]", given, "must be a prompt, a list of prompts, or None"))
            continue
        found[str(name)] = None if prompts is None else [str(prompt) for prompt in prompts]
    if problems:
        raise ConfigError(problems[:3])
    return found


def _texts(labels: object) -> list[str]:
    """The labels of a list, an array or a column, which are texts.

    Raises:
        ConfigError: one is not.
    """
    if isinstance(labels, bytes | bytearray | set | frozenset) or not isinstance(labels, Iterable):
        allowed = "must be a list of texts, whose order is that of equal scores, or the path of a label file"
        raise ConfigError([Problem("labels", labels, allowed)])
    given = list(labels)
    wrong = [(place, label) for place, label in enumerate(given) if not isinstance(label, str)]
    if wrong:
        raise ConfigError([Problem(f"labels[{place}]", label, "must be a text") for place, label in wrong[:3]])
    return [str(label) for label in given]


def _without_interpolation(value: object) -> object:
    """Return a substitute without ``${`` or ``???``, which OmegaConf would interpret and has no escape for."""
    if isinstance(value, str):
        return "? ? ?" if value == "???" else value.replace("${", "$ {")
    if isinstance(value, Mapping):
        return {name: _without_interpolation(one) for name, one in value.items()}
    return [_without_interpolation(one) for one in value] if isinstance(value, list) else value


def _plain(value: object) -> object:
    """Return a path, a tuple, a NumPy number and the like as the value that a YAML file would hold."""
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
