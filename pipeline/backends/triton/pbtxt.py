"""Protobuf text format for ``config.pbtxt``, without a dependency on protobuf."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


class Name(str):
    """Value of an enum, written without quotes."""

    __slots__ = ()


def to_text(message: Mapping[str, Any]) -> str:
    """Return a message as text: a mapping is a message, a list a repeated field, None is omitted.

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
    """Return the text in printable ASCII, other UTF-8 bytes as octal escapes."""
    return "".join(chr(byte) if 32 <= byte < 127 and byte not in b'"\\' else f"\\{byte:03o}" for byte in text.encode())
