"""The doors that people type, for tests of what is written about them: their parsers, and whether a command is good."""

from __future__ import annotations

import argparse
import importlib

from pipeline.config.compose import check_overrides, compose_config
from pipeline.core.errors import ConfigError

PARSERS = {
    "pipeline.manifest": "pipeline.manifest.__main__",
    "pipeline.bench": "pipeline.bench.backends",
    "pipeline.bench pipeline": "pipeline.bench.pipeline",
    "pipeline.export": "pipeline.export",
    "pipeline.artifacts": "pipeline.artifacts",
    "pipeline.verify": "pipeline.verify",
    "pipeline.report": "pipeline.report.__main__",
    "pipeline.relabel": "pipeline.relabel",
    "pipeline.search": "pipeline.search",
    "pipeline.convert": "pipeline.convert",
    "pipeline.doctor": "pipeline.doctor.__main__",
    "pipeline.serve": "pipeline.serve.__main__",
    "jobs/nightly.py": "pipeline.nightly.cli",
}


def parser_of(door: str) -> argparse.ArgumentParser:
    """The parser of a door, by what follows ``python -m``, or by its script."""
    parser: argparse.ArgumentParser = importlib.import_module(PARSERS[door])._parser()
    return parser


def prove(words: list[str]) -> None:
    """Pass if a command could begin: its options parse, and its overrides make a config. ``words`` begin with the door.

    Raises:
        SystemExit: an option that there is not.
        ConfigError: a wrong override.
    """
    door, *rest = words
    if door == "pipeline.run":
        if problems := check_overrides([word for word in rest if not word.startswith("-")]):
            raise ConfigError(problems)
        return
    if door == "pipeline.bench" and rest[:1] in (["pipeline"], ["backends"]):
        door, rest = (door if rest[0] == "backends" else "pipeline.bench pipeline"), rest[1:]
    parser = parser_of(door)
    whole = any(isinstance(action, argparse._SubParsersAction) for action in parser._actions)
    (parser.parse_args if whole or door == "pipeline.search" else parser.parse_intermixed_args)(rest)
    # The nightly job puts the date in before the config is read.
    rest = [word.replace("{date}", "2026-11-22") for word in rest]
    compose_config(
        [word for word in rest if "=" in word and not word.startswith("-") and " " not in word.split("=")[0]]
    )
