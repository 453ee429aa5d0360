"""What a command line may hold besides good overrides, and what to say of it.

Hydra's own words for these mistakes speak of tokens and grammars, and its options are not what people look for.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Collection, Sequence

from pipeline.config.schema import nearest
from pipeline.core.errors import Problem

PROGRAM = "python -m pipeline.run"


def read_options(names: Sequence[str]) -> tuple[Namespace, list[Problem]]:
    """The command line as Hydra's own parser reads it, and a problem for every option that there is not.

    Its own parser, so that the values of its options (``--cfg job``, ``--config-dir DIR``) are not overrides.

    Args:
        names: the keys and groups that an option may have been meant for.
    """
    from hydra._internal.utils import get_args_parser

    parser = get_args_parser()
    parser.prog, parser.usage = PROGRAM, f"{PROGRAM} [GROUP=OPTION ...] [KEY=VALUE ...] [--help] [--cfg job]"
    options, rest = parser.parse_known_args()
    unknown = [text for text in rest if text.startswith("-")]
    problems = [_no_option(text, sys.argv[1:], names) for text in unknown]
    if unknown:
        # The values of options that there are not would be told as mistakes of their own.
        options.overrides = [text for text in options.overrides if "=" in text]
    return options, problems


def unread(argument: str, names: Collection[str]) -> Problem:
    """What is wrong with an argument that Hydra's grammar does not take."""
    key, equals, value = argument.partition("=")
    if not equals or not key:
        allowed = "has no key or no =; write GROUP=OPTION or KEY=VALUE"
        hint = f"{argument}=..." if argument in names else "no spaces around the =, and quotes where a text has some"
        return Problem("the argument", argument, allowed, hint)
    if value.count("[") != value.count("]"):
        allowed = "its brackets do not close; the shell parts a list at its spaces"
        return Problem(key, value, allowed, f"quote the whole: '{key}=[a cat,a dog]'")
    # Hydra reads bare words of ASCII alone; the outer quotes are for the shell.
    typed = value if value and not set(value) & set("\"'") else "..."
    quoted = '["...","..."]' if value.startswith("[") else f'"{typed}"'
    return Problem(key, value, "cannot be read: some of its characters want quotes", f"write '{key}={quoted}'")


def _no_option(text: str, arguments: Sequence[str], names: Sequence[str]) -> Problem:
    """An option that is none; what it was meant for is told where a key or a group has its name."""
    flag, equals, value = text.partition("=")
    name = flag.lstrip("-").replace("-", "_")
    if not equals:
        after = arguments[arguments.index(text) + 1 :][:1]
        value = "".join(word for word in after if not word.startswith("-") and "=" not in word)
    meant = [known for known in names if known == name or known.partition(".")[2] == name]
    hint = nearest(name, names)
    if meant:
        hint = f"write {meant[0]}={value or '...'}"
    allowed = "there is no such option; overrides have no dashes: GROUP=OPTION or KEY=VALUE"
    return Problem(flag, value or None, allowed, hint or f"{PROGRAM} --help shows them")


def showable(text: str) -> str:
    """The text with what standard output cannot show escaped, as in the names of files."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)
