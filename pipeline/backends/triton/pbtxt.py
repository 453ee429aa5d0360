"""Protobuf's text format, as far as a model's ``config.pbtxt`` needs it; nothing of protobuf is imported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


class Name(str):
    """The value of an enum, which stands without quotes."""

    __slots__ = ()


def to_text(message: Mapping[str, Any]) -> str:
    """The message as text: a mapping is a message, a list a repeated field, and what is None is left out.

    An entry of a protobuf map is a message of ``key`` and ``value``.
    """
    return "".join(f"{line}\n" for line in _lines(message, ""))


def _lines(message: Mapping[str, Any], indent: str) -> Iterator[str]:
    for name, value in message.items():
        for one in value if isinstance(value, list | tuple) else [value]:
            if isinstance(one, Mapping):
                yield f"{indent}{name} {{"
                yield from _lines(one, f"{indent}  ")
                yield f"{indent}}}"
            elif one is not None:
                yield f"{indent}{name}: {_scalar(one)}"


def _scalar(value: Name | str | bool | int) -> str:
    if isinstance(value, Name):
        return str(value)
    if isinstance(value, str):
        return f'"{_escaped(value)}"'
    return str(value).lower() if isinstance(value, bool) else str(value)


def _escaped(text: str) -> str:
    """In printable ASCII; every other byte of the text's UTF-8 by its octal number."""
    return "".join(chr(byte) if 32 <= byte < 127 and byte not in b'"\\' else f"\\{byte:03o}" for byte in text.encode())
