"""Refusal of settings of Hydra itself, from the command line and from config files.

Such settings can name code that Hydra imports and runs: callbacks, launchers and sweepers by ``_target_``, log handlers
by ``class`` and ``()``, the search path by a package. Everything is refused but folders, verbosity and the choice among
Hydra's own log formats.
"""

from __future__ import annotations

import os
from argparse import Namespace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.schema import conf_dir
from pipeline.core.errors import Problem

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

FREE = (
    *("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir", "hydra.output_subdir"),
    *("hydra.verbose", "hydra.job.chdir"),
)
LOGGING = ("hydra/job_logging", "hydra/hydra_logging")
# Hydra fills these in, or only prints them.
_FILLED = (
    *("hydra.overrides", "hydra.runtime", "hydra.help", "hydra.hydra_help"),
    *("hydra.job.override_dirname", "hydra.job.config_name"),
)
_REFUSED = "is refused: such settings of Hydra can run code"
_HINT = f"allowed are {', '.join((*FREE, *LOGGING))}"


def compose_once() -> None:
    """Keep Hydra from composing a config twice: the first time it looks for ``hydra.mode``, which is refused here."""
    from hydra._internal.hydra import Hydra

    def get_mode(self: Hydra, config_name: str | None, overrides: list[str]) -> None:
        """Leave the choice to ``--multirun``."""

    Hydra.get_mode = get_mode  # type: ignore[method-assign]


def check_setting(override: Override, argument: str) -> list[Problem]:
    """Return the problem of an override of Hydra's own settings, if it is one."""
    key, value = override.key_or_group, argument.partition("=")[2]
    plain = not override.is_delete() and not override.is_sweep_override() and override.package is None
    if plain and (key in FREE or (key in LOGGING and value in _shipped(key))):
        return []
    return [Problem(key, argument, _REFUSED, _HINT)]


def check_files(options: Namespace) -> list[Problem]:
    """Return the problems of the config files that options name, before Hydra acts on any of them."""
    if options.experimental_rerun is not None:
        allowed = "is not possible: it unpickles the file, and a pickle can run code"
        return [Problem("--experimental-rerun", options.experimental_rerun, allowed, "give the overrides again")]
    names = ("--config-path", "--config-name", "--config-dir")
    found = {name: getattr(options, name[2:].replace("-", "_")) for name in names}
    given = {name: value for name, value in found.items() if value is not None}
    if given and options.multirun:
        allowed = "cannot be given with --multirun: each run would have another config, and all must be checked"
        return [Problem(name, value, allowed) for name, value in given.items()]
    for name in ("--config-path", "--config-dir"):
        folder = given.get(name)
        if folder is not None and (not os.path.isdir(folder) or (name == "--config-path" and folder[0] != "/")):
            return [Problem(name, folder, "must be a folder", "an absolute path" if name == "--config-path" else "")]
    return _check_composed(options) if given else []


def _check_composed(options: Namespace) -> list[Problem]:
    """Compose as Hydra will, and compare Hydra's node with that of the package's own config."""
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    name = options.config_name or "config"
    loader = _loader(options.config_path or str(conf_dir()), options.config_dir)
    try:
        # Hydra imports a package on the search path to read from it, so this is refused before composing.
        primary = loader.repository.load_config(config_path=name)
        if primary is not None and OmegaConf.select(primary.config, "hydra.searchpath") is not None:
            return [Problem("hydra.searchpath", name, _REFUSED, _HINT)]
        composed, chosen = _hydra_node(loader, name, options.overrides)
    except (HydraException, OmegaConfBaseException, YAMLError, OSError, ValueError) as error:
        return [Problem("--config-name", name, f"cannot be composed: {' '.join(str(error).split())}")]
    own = _own_node(*(f"{group}={chosen[group]}" for group in LOGGING if chosen.get(group) in _shipped(group)))
    changed = [key for key, value in composed.items() if key not in own or own[key] != value]
    return [Problem(f"hydra.{key}", composed[key], _REFUSED, _HINT) for key in changed]


@cache
def _own_node(*logging: str) -> dict[str, Any]:
    """Return Hydra's node of the package's own config with these choices of log formats."""
    return _hydra_node(_loader(str(conf_dir()), None), "config", list(logging))[0]


def _loader(folder: str, extra: str | None) -> Any:
    """Return the config loader that ``hydra.main`` makes for these folders."""
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra._internal.utils import create_config_search_path
    from hydra.core.config_search_path import SearchPathQuery

    path: Any = create_config_search_path(folder)
    if extra is not None:
        url = f"file://{os.path.abspath(extra)}"
        path.prepend(provider="command-line", path=url, anchor=SearchPathQuery(provider="schema"))
    return ConfigLoaderImpl(path)


def _hydra_node(loader: Any, name: str, overrides: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Compose; return Hydra's node without interpolations resolved or free settings, and the option of every group."""
    from hydra.core.utils import JobRuntime
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    JobRuntime().set("name", "run")
    composed = loader.load_configuration(config_name=name, overrides=overrides, run_mode=RunMode.RUN).hydra
    node: Any = OmegaConf.to_container(composed, resolve=False)
    chosen = node["runtime"]["choices"]
    for key in (*FREE, *_FILLED):
        *parents, last = key.split(".")[1:]
        (node[parents[0]] if parents else node).pop(last, None)
    return node, chosen


def _shipped(group: str) -> list[str]:
    """Return the options of a group of Hydra that come with Hydra."""
    import hydra

    return [file.stem for file in (Path(hydra.__file__).parent / "conf" / group).glob("*.yaml")]
