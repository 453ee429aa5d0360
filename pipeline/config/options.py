"""Messages for arguments of ``python -m pipeline.run`` that are neither overrides nor options.

Hydra's own messages for them are about tokens of its grammar.
"""

from __future__ import annotations

import os
import re
import sys
from argparse import Namespace
from collections.abc import Collection, Sequence

from pipeline.config.schema import nearest
from pipeline.core.errors import Problem

PROGRAM = "python -m pipeline.run"
_RANGE = re.compile(r"""manifest\.path=([^'"]*\{\d+\.\.\d+\}[^'"]*)""")


def read_options(names: Sequence[str]) -> tuple[Namespace, list[Problem]]:
    """Parse the command line with Hydra's own parser; return a problem for every unknown option.

    Only Hydra's parser separates values of its options (``--cfg job``, ``--config-dir DIR``) from overrides.

    Args:
        names: the keys and groups that an option may have been meant for.
    """
    from hydra._internal.utils import get_args_parser

    parser = get_args_parser()
    parser.prog, parser.usage = PROGRAM, f"{PROGRAM} [FOLDER] [GROUP=OPTION ...] [KEY=VALUE ...] [--help] [--cfg job]"
    options, rest = parser.parse_known_args()
    unknown = [text for text in rest if text.startswith("-")]
    if unknown:
        # The value of an unknown option is no mistake of its own.
        options.overrides = [text for text in options.overrides if "=" in text]
    return options, [_no_option(text, sys.argv[1:], names) for text in unknown]


def take_folder(options: Namespace) -> list[Problem]:
    """Put ``manifest.path=FOLDER`` in the place of an argument that is a folder, or an address, of images.

    Without another ``output.dir``, the output is ``outputs/`` and the name of the folder. Hydra reads the command line
    itself, so the change is made there. Return the problem of a second manifest.
    """
    folders = [text for text in options.overrides if _is_folder(text)]
    if not folders:
        return []
    named = [text for text in options.overrides if text.startswith("manifest.path=")]
    if named or len(folders) > 1:
        options.overrides = [text for text in options.overrides if text not in folders]
        allowed = f"names the images, and so does {named[0] if named else folders[1]}; a job has one manifest"
        return [Problem("the argument", folders[0], allowed, "leave one out")]
    folder = os.path.expanduser(folders[0])
    settings = [f"manifest.path={_quoted(folder)}"]
    last = os.path.basename(folder.rstrip("/") if "://" in folder else os.path.abspath(folder))
    name = re.sub(r"[^\w.-]+", "_", last)
    own = options.config_name or options.config_dir or options.config_path
    if name and not own and not any(text.startswith(("output.dir=", "output=")) for text in options.overrides):
        settings.append(f"output.dir={_quoted(f'outputs/{name}')}")
    for arguments in (sys.argv, options.overrides):
        at = len(arguments) - 1 - arguments[::-1].index(folders[0])
        arguments[at : at + 1] = settings
    return []


def with_quotes(arguments: Sequence[str]) -> list[str]:
    """The arguments with quotes around a ``manifest.path`` that has a range in braces: Hydra's grammar wants them."""
    found = [(text, _RANGE.fullmatch(text)) for text in arguments]
    return [text if match is None else f"manifest.path={_quoted(match[1])}" for text, match in found]


def _is_folder(argument: str) -> bool:
    """True for an argument that is no override, but an existing folder or an address."""
    if "=" in argument.partition("/")[0] or argument.startswith("-"):
        return False
    return "://" in argument or argument.startswith("file:/") or os.path.isdir(os.path.expanduser(argument))


def _quoted(text: str) -> str:
    """A text as a value that Hydra's grammar reads unchanged."""
    text = re.sub(r'(\\*)"', r'\1\1\\"', text)
    text = re.sub(r"(\\+)$", r"\1\1", text).replace("${", "\\${")
    return f'"{text}"'


def unread(argument: str, names: Collection[str]) -> Problem:
    """Return the problem of an argument that Hydra's grammar does not accept."""
    key, equals, value = argument.partition("=")
    if not equals or not key:
        allowed = "has no key or no =; write GROUP=OPTION or KEY=VALUE"
        hint = "there is no such folder" if "/" in argument else ""
        hint = hint or "no spaces around the =, and quotes where a text has some"
        hint = f"{argument}=..." if argument in names else hint
        return Problem("the argument", argument, allowed, hint)
    if value.count("[") != value.count("]"):
        allowed = "its brackets do not close; the shell splits a list at its spaces"
        return Problem(key, value, allowed, f"quote the whole: '{key}=[a cat,a dog]'")
    # Hydra reads unquoted words of ASCII only; the outer quotes are for the shell.
    typed = value if value and not set(value) & set("\"'") else "..."
    quoted = '["...","..."]' if value.startswith("[") else f'"{typed}"'
    return Problem(key, value, "cannot be read: some of its characters need quotes", f"write '{key}={quoted}'")


def _no_option(text: str, arguments: Sequence[str], names: Sequence[str]) -> Problem:
    """Return the problem of an unknown option, with the key or group of that name as a hint."""
    flag, equals, value = text.partition("=")
    name = flag.lstrip("-").replace("-", "_")
    if not equals:
        after = arguments[arguments.index(text) + 1 :][:1]
        value = "".join(word for word in after if not word.startswith("-") and "=" not in word)
    meant = [known for known in names if known == name or known.partition(".")[2] == name]
    hint = f"write {meant[0]}={value or '...'}" if meant else nearest(name, names)
    allowed = "there is no such option; overrides have no dashes: GROUP=OPTION or KEY=VALUE"
    return Problem(flag, value or None, allowed, hint or f"{PROGRAM} --help lists them")
