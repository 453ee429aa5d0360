"""Texts in the image column that are no paths: base64, a ``data:`` URL, hex digits, JSON."""

from __future__ import annotations

import base64
import binascii
import re

# Linux opens no longer path, and stores have no longer names; only web addresses may be longer.
LONGEST = 4096
# A path of up to so many characters is shown whole.
SHOWN = 400
# Names of files have at most as many bytes.
_NAME = 255
_URL = re.compile(r"data:(?:[\w.+-]+/[\w.+-]+)?(?:;[^,/]{0,100})*,", re.IGNORECASE)
_FORMATS = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n", "PNG"),
    (b"GIF8", "GIF"),
    (b"RIFF", "WebP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
)
_HEX = re.compile(r"(?:0x|\\x)?([0-9a-fA-F\s]+)")
_BASE64 = re.compile(r"[A-Za-z0-9+/_\s-]+=*\s*")
_OBJECTS = (('{"', "}"), ("{'", "}"), ('["', "]"), ("[{", "]"))
_WAY_OUT = "manifest.image takes a path, an address, or a binary column with the file's bytes"


def describe(text: str, *, missing: bool = False) -> str | None:
    """A sentence about a text that is certainly no path, or None.

    ``missing``: no file has this name. Only then a text that is short enough for a name is looked at.
    """
    if _URL.match(text):
        return _sentence(text, "a data: URL")
    if len(text) <= _NAME and not missing:
        return None
    form = _format_of(_first_bytes(text))
    if form:
        return _sentence(text, f"{_encoding(text)} of a {form} file")
    if text.startswith(("b'", 'b"')) or any(text.startswith(a) and text.rstrip().endswith(b) for a, b in _OBJECTS):
        return _sentence(text, _encoding(text))
    is_long = len(text) > LONGEST and not text.startswith(("http://", "https://"))
    return too_long(text) if is_long else None


def too_long(text: str) -> str:
    """A sentence about a text that is longer than any path."""
    return _sentence(text, f"{_encoding(text)}, longer than a path can be")


def _sentence(text: str, what: str) -> str:
    beginning = ascii(text[:24])
    return f"the manifest's cell holds {what} ({len(text):,} characters from {beginning} on); {_WAY_OUT}"


def _encoding(text: str) -> str:
    head = text[:LONGEST]
    if _HEX.fullmatch(head):
        return "hex digits"
    if text.startswith(("b'", 'b"')):
        return "bytes as Python prints them"
    if text.startswith("{'"):
        return "a dict as Python prints it"
    if text.lstrip()[:1] in ("{", "["):
        return "JSON text"
    return "base64 text" if _BASE64.fullmatch(head) else "text"


def _first_bytes(text: str) -> bytes:
    """The first bytes of what a text encodes as hex digits or base64; empty if it is neither."""
    digits = _HEX.fullmatch(text[:24])
    try:
        if digits is not None and len(digits[1]) % 2 == 0:
            return bytes.fromhex(digits[1])
        return base64.b64decode(text[:24].translate(str.maketrans("-_", "+/")), validate=True)
    except (ValueError, binascii.Error):
        return b""


def _format_of(data: bytes) -> str:
    return next((name for magic, name in _FORMATS if data.startswith(magic)), "")
