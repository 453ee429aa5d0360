"""What may be set of Hydra itself. The rest of its settings can name code, which it would import and run.

Callbacks, launchers and sweepers are named by ``_target_``, handlers of logging by ``class`` and ``()``, and a
search path by a package. So everything is refused but a short list, from the command line as from YAML files.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.schema import conf_dir
from pipeline.core.errors import Problem

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig

FREE = (
    *("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir", "hydra.output_subdir"),
    *("hydra.verbose", "hydra.job.chdir"),
)
# Chosen among the files that come with Hydra.
LOGGING = ("hydra/job_logging", "hydra/hydra_logging")
# What Hydra fills in by itself, or only prints.
_FILLED = (
    *("hydra.overrides.", "hydra.runtime.", "hydra.help.", "hydra.hydra_help."),
    *("hydra.job.override_dirname", "hydra.job.config_name"),
)
_REFUSED = "is refused: such settings of Hydra can run code"
_HINT = f"free are {', '.join((*FREE, *LOGGING))}"


def check_setting(override: Override, argument: str) -> list[Problem]:
    """What is wrong with an override of Hydra's own settings."""
    key, value = override.key_or_group, argument.partition("=")[2]
    plain = not override.is_delete() and not override.is_sweep_override() and override.package is None
    if plain and (key in FREE or (key in LOGGING and value in _shipped(key))):
        return []
    return [Problem(key, argument, _REFUSED, _HINT)]


def check_files(options: Namespace) -> list[Problem]:
    """What is wrong with the config files that options of the command line name, before Hydra acts on any.

    Without such options there is nothing to check: the package's own files are what they are.
    """
    if options.experimental_rerun is not None:
        allowed = "is not possible: it unpickles the file, and a pickle can run code"
        return [Problem("--experimental-rerun", options.experimental_rerun, allowed, "give the overrides again")]
    named = {"--config-path": options.config_path, "--config-name": options.config_name}
    given = {name: value for name, value in {**named, "--config-dir": options.config_dir}.items() if value is not None}
    if not given:
        return []
    if options.multirun:
        allowed = "cannot stand beside --multirun: each run would be another config, and all must be checked"
        return [Problem(name, value, allowed) for name, value in given.items()]
    for name in ("--config-path", "--config-dir"):
        folder = given.get(name)
        if folder is not None and (not os.path.isdir(folder) or (name == "--config-path" and folder[0] != "/")):
            hint = "an absolute path" if name == "--config-path" else ""
            return [Problem(name, folder, "must be a folder", hint)]
    return _check_composed(options)


def _check_composed(options: Namespace) -> list[Problem]:
    """Compose as Hydra will, and compare its node with the one of the package's own config."""
    from hydra.core.utils import JobRuntime
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    JobRuntime().set("name", "run")
    name = options.config_name or "config"
    loader = _loader(options.config_path or str(conf_dir()), options.config_dir)
    try:
        # Of the primary config alone, and looked at first: a package on the path is imported to read from it.
        primary = loader.repository.load_config(config_path=name)
        if primary is not None and OmegaConf.select(primary.config, "hydra.searchpath") is not None:
            return [Problem("hydra.searchpath", name, _REFUSED, _HINT)]
        composed = _flat(_compose(loader, name, options.overrides))
    except (HydraException, OmegaConfBaseException, YAMLError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        return [Problem("--config-name", name, f"cannot be composed: {reason}")]
    own = dict(_own())
    for group in LOGGING:
        _adopt(composed, own, group)
    changed = [key for key, value in composed.items() if key not in own or own[key] != value]
    changed = [key for key in changed if key not in FREE and not key.startswith(_FILLED)]
    # Said once; a callback alone has several keys.
    hints = [_HINT, *("" for _ in changed)]
    return [Problem(key, composed[key], _REFUSED, hint) for key, hint in zip(changed, hints, strict=False)]


@cache
def _own() -> dict[str, Any]:
    """The node of the package's own config."""
    return _flat(_compose(_loader(str(conf_dir()), None), "config", []))


def _loader(folder: str, extra: str | None) -> Any:
    """Hydra's own, as ``hydra.main`` makes it for these folders."""
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra._internal.utils import create_config_search_path
    from hydra.core.config_search_path import SearchPathQuery

    path: Any = create_config_search_path(folder)
    if extra is not None:
        url = f"file://{os.path.abspath(extra)}"
        path.prepend(provider="command-line", path=url, anchor=SearchPathQuery(provider="schema"))
    return ConfigLoaderImpl(path)


def _compose(loader: Any, name: str, overrides: Sequence[str]) -> DictConfig:
    from hydra.types import RunMode

    composed: DictConfig = loader.load_configuration(
        config_name=name, overrides=list(overrides), run_mode=RunMode.RUN
    ).hydra
    return composed


def _flat(node: DictConfig) -> dict[str, Any]:
    """Every value below ``hydra`` by its dotted key; interpolations stay text."""
    from omegaconf import OmegaConf

    return dict(_leaves("hydra", OmegaConf.to_container(node, resolve=False)))


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for name, one in value.items():
            yield from _leaves(f"{key}.{name}", one)
    else:
        yield key, value


def _shipped(group: str) -> list[str]:
    return sorted(file.stem for file in _folder(group).glob("*.yaml"))


def _folder(group: str) -> Path:
    import hydra

    return Path(hydra.__file__).parent / "conf" / group


def _adopt(composed: dict[str, Any], own: dict[str, Any], group: str) -> None:
    """Take a whole group out of the comparison where it is, word for word, one of the files that come with Hydra."""
    import yaml

    prefix = group.replace("/", ".")
    found = {key: value for key, value in composed.items() if f"{key}.".startswith(f"{prefix}.")}
    shipped = [
        dict(_leaves(prefix, yaml.safe_load((_folder(group) / f"{name}.yaml").read_text()) or {}))
        for name in _shipped(group)
    ]
    if found in shipped:
        for flat in (composed, own):
            for key in [key for key in flat if f"{key}.".startswith(f"{prefix}.")]:
                del flat[key]
