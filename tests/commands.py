"""Parsers of the commands, and a check of command lines, for tests of what is documented."""

from __future__ import annotations

import argparse
import importlib

from pipeline.config.compose import check_overrides, compose_config
from pipeline.core.errors import ConfigError

PARSERS = {
    "pipeline.manifest": "pipeline.manifest.__main__",
    "pipeline.bench": "pipeline.bench.backends",
    "pipeline.bench pipeline": "pipeline.bench.pipeline",
    "pipeline.bench gpu": "pipeline.bench.gpu",
    "pipeline.bench feed": "pipeline.bench.feed",
    "pipeline.export": "pipeline.export",
    "pipeline.artifacts": "pipeline.artifacts",
    "pipeline.verify": "pipeline.verify",
    "pipeline.report": "pipeline.report.__main__",
    "pipeline.relabel": "pipeline.relabel",
    "pipeline.search": "pipeline.search",
    "pipeline.browse": "pipeline.browse.__main__",
    "pipeline.convert": "pipeline.convert",
    "pipeline.dedup": "pipeline.dedup",
    "pipeline.sample": "pipeline.sample",
    "pipeline.doctor": "pipeline.doctor.__main__",
    "pipeline.serve": "pipeline.serve.__main__",
    "jobs/nightly.py": "pipeline.nightly.cli",
}


def parser_of(command: str) -> argparse.ArgumentParser:
    """The parser of a command: what follows ``python -m``, or its script."""
    parser: argparse.ArgumentParser = importlib.import_module(PARSERS[command])._parser()
    return parser


def prove(words: list[str]) -> None:
    """Check that options parse and overrides make a config; ``words`` begin with the command.

    Raises:
        SystemExit: an option does not exist.
        ConfigError: an override is wrong.
    """
    command, *rest = words
    if command == "pipeline.run":
        # A folder of images is any folder of the user.
        if problems := check_overrides([word for word in rest if not word.startswith(("-", "~/"))]):
            raise ConfigError(problems)
        return
    if command == "pipeline.bench" and rest[:1] == ["backends"]:
        rest = rest[1:]
    elif rest and f"{command} {rest[0]}" in PARSERS:
        command, rest = f"{command} {rest[0]}", rest[1:]
    parser = parser_of(command)
    whole = any(isinstance(action, argparse._SubParsersAction) for action in parser._actions)
    (parser.parse_args if whole or command == "pipeline.search" else parser.parse_intermixed_args)(rest)
    # The nightly job puts the date in before the config is read.
    rest = [word.replace("{date}", "2026-11-22") for word in rest]
    # A selection of the page is no override.
    named = [word for word in rest if "=" in word and not word.startswith("-") and "&" not in word]
    compose_config([word for word in named if " " not in word.split("=")[0]])
