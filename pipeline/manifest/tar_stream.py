"""Tars as streams: the bytes of a file in order, unzipped where gzip made them, and the regular files among them.

Nothing is unpacked. Links, devices and folders are passed over, and a name is a text and never a path. Memory is
bounded: a member is read up to a limit, and headers and zipped bytes a piece at a time.
"""

from __future__ import annotations

import zlib
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn, Self

from pipeline.core.errors import ManifestError
from pipeline.storage.retry import retried
from pipeline.storage.urls import explained, filesystem, is_local, open_file

BLOCK = 512
# Bytes that are read, or unzipped, at a time. A request to a store takes time whatever its size; one is made ahead.
LOCAL_PIECE, REMOTE_PIECE = 1 << 20, 16 << 20
# Bytes of a header of a long name, and of zeros behind the end of a tar, at most: writers fill up a tape's record.
LONG_HEADER, PADDING = 1 << 20, 64 << 20
# Kinds of members: regular files, those of which a header says more, those without data. All others have data.
_REGULAR, _MORE, _EMPTY = b"\x000\x37", b"xXgLK", b"123456"
_COMPRESSED = {b"BZh": "bzip2", b"\xfd7z": "xz", b"\x28\xb5\x2f": "zstd", b"\x1f\x9d": "compress"}


class DamagedTar(ManifestError):
    """A tar is not whole: what stands behind the damage is unknown."""


class TarStream:
    """The members of one tar, from its first byte to its last; use it as a context manager.

    Args:
        url: address of the tar.
        size: its bytes when the job began.
        digest: its digest then, see :class:`~pipeline.manifest.manifest.ManifestFile`; without one, a file that has
            changed is not noticed.
        piece: bytes of a request to a store; fewer than the default to look at the beginning alone.
    """

    def __init__(self, url: str, size: int, digest: str = "", *, piece: int = REMOTE_PIECE) -> None:
        self._url, self._size, self._digest = url, size, digest
        self._pieces = _pieces(url, size, piece)
        self._unzipped: Iterator[bytes] = self._unzip()
        # Bytes of the tar that were taken, of the member that are left, and of the zipped file that were unzipped.
        self._offset = self._left = self._zipped = 0
        self._data, self._at = b"", 0

    @property
    def position(self) -> int:
        """About so many bytes of the file were used."""
        return self._zipped or self._offset

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pieces.close()

    def members(self) -> Iterator[tuple[str, int]]:
        """Name and size of every regular file; :meth:`read` gives its bytes until the next one is asked for.

        Raises:
            DamagedTar: the tar is damaged, or ends before its end.
            ManifestError: it is another one than when the job began.
            StorageError: it cannot be read.
        """
        more = dict[str, str]()
        while True:
            header = self._take(BLOCK)
            if len(header) < BLOCK:
                self._refuse("it ends without the blocks of zeros that end a tar")
            if header[0] == 0 and not header.strip(b"\0"):
                self._check_end()
                return
            try:
                kind, size = header[156:157], _check_header(header)
                if kind in _MORE:
                    self._left = size
                    _add(more, kind, self._whole(size) if size <= LONG_HEADER else self._refuse("a name is too long"))
                else:
                    size = int(more.get("size", size))
                    if size < 0:
                        raise ValueError("negative")  # noqa: TRY301
            except ValueError:
                self._refuse("a header is not one of a tar")
            if kind not in _MORE:
                name = more.get("path") or _name_of(header)
                sparse = kind == b"S" or any(key.startswith("GNU.sparse") for key in more)
                self._left, more = 0 if kind in _EMPTY else size, {}
                at = 482
                while kind == b"S" and header[at]:
                    # Further blocks that say where the holes are.
                    header, at = self._take(BLOCK).ljust(BLOCK, b"\0"), 504
                if kind in _REGULAR and not sparse and not name.endswith("/"):
                    yield name, size
                else:
                    size = self._left
            self._skip(self._left + -size % BLOCK)

    def read(self, count: int) -> bytes:
        """Up to ``count`` bytes of the member, at most all that are left of it."""
        return self._whole(min(count, self._left))

    def check_unchanged(self) -> None:
        """Compare the file with that of the beginning of the job.

        Raises:
            ManifestError: it is another one.
        """
        fs, path = filesystem(self._url)
        with explained(self._url):
            info = fs.info(path) if self._digest else {"size": self._size}
        if int(info["size"]) != self._size or etag_of(info) not in ("", self._digest):
            raise ManifestError(f"{self._url}: has changed since the job began; run the command again")

    def _whole(self, count: int) -> bytes:
        data = self._take(count)
        self._left -= count
        if len(data) < count:
            self._refuse("it is cut off")
        return data

    def _skip(self, count: int) -> None:
        while count > 0:
            some = min(count, LOCAL_PIECE)
            if len(self._take(some)) < some:
                self._refuse("it is cut off")
            count -= some

    def _take(self, count: int) -> bytes:
        """The next bytes, fewer at the end."""
        data = self._data[self._at : self._at + count]
        self._at += count
        if len(data) < count:
            parts, missing = [data], count - len(data)
            while missing:
                self._data = self._next()
                if not self._data:
                    break
                parts.append(self._data[:missing])
                self._at = len(parts[-1])
                missing -= self._at
            data = b"".join(parts)
        self._offset += len(data)
        return data

    def _next(self) -> bytes:
        with explained(self._url):
            return next(self._unzipped, b"")

    def _check_end(self) -> None:
        """Read on to the end of the file: its last bytes may be missing, and another tar may stand there."""
        left = PADDING
        while data := self._take(LOCAL_PIECE):
            left -= len(data)
            if left < 0 or data.count(0) < len(data):
                self._refuse("something stands behind its end, as where tars were joined")
        self.check_unchanged()

    def _unzip(self) -> Iterator[bytes]:
        """The bytes of the tar, which gzip may have made smaller: in one stream, or several one behind the other."""
        first, inflate, taken = True, None, 0
        for piece in self._pieces:
            taken += len(piece)
            if first:
                first = False
                if piece[257:262] != b"ustar":
                    self._refuse_others(piece)
                inflate = zlib.decompressobj(wbits=31) if piece.startswith(b"\x1f\x8b") else None
            if inflate is None:
                yield piece
                continue
            full = False
            while piece or full:
                if inflate.eof:
                    piece = piece.lstrip(b"\0")
                    if not piece:
                        break
                    inflate = zlib.decompressobj(wbits=31)
                try:
                    data = inflate.decompress(piece, LOCAL_PIECE)
                except zlib.error as error:
                    self._refuse(f"its gzip data are damaged ({error})")
                full = len(data) == LOCAL_PIECE and not inflate.eof
                piece = inflate.unused_data if inflate.eof else inflate.unconsumed_tail
                self._zipped = taken - len(piece)
                if data:
                    yield data
        if inflate is not None and not inflate.eof:
            self._refuse("its gzip data are cut off")

    def _refuse_others(self, piece: bytes) -> None:
        found = next((name for magic, name in _COMPRESSED.items() if piece.startswith(magic)), None)
        if found is not None:
            self._refuse(f"but compressed by {found}, and gzip alone is read")

    def _refuse(self, reason: str) -> NoReturn:
        raise DamagedTar(
            f"{self._url}: not a sound tar, {reason} (at byte {self._offset:,} of the tar); its images behind that "
            "have no rows. Write or copy it again"
        )


def _pieces(url: str, size: int, piece: int) -> Generator[bytes]:
    """The bytes of a file in order; of a store one piece is read ahead."""
    if is_local(url):
        with open_file(url) as file:
            while data := file.read(LOCAL_PIECE):
                yield data
        return
    fs, path = filesystem(url)

    def get(start: int) -> Any:
        return retried(url, lambda: fs.cat_file(path, start=start, end=min(size, start + piece)))

    with ThreadPoolExecutor(1, "tar") as thread:
        ahead = thread.submit(get, 0) if size else None
        for start in (*range(piece, size, piece), None):
            data = ahead.result() if ahead is not None else b""
            ahead = thread.submit(get, start) if start is not None else None
            yield data


def etag_of(info: Mapping[str, Any]) -> str:
    """The store's tag of a file's content; empty if it has none."""
    tag = info.get("ETag") or info.get("etag")
    return f"etag:{tag}" if tag else ""


def _check_header(header: bytes) -> int:
    """The size in a header whose sum of bytes is right.

    Raises:
        ValueError: it is not a header.
    """
    field = header[148:156]
    found, others = _number(field), header[:148] + header[156:]
    if found != 256 + sum(others) and found != 256 + sum(others) - 256 * sum(byte > 127 for byte in others):
        raise ValueError
    size = _number(header[124:136])
    if size < 0:
        raise ValueError
    return size


def _number(field: bytes) -> int:
    """A number in octal digits, or in binary behind a first bit."""
    if field[0] & 0x80:
        return int.from_bytes(field, "big", signed=True) + (1 << (8 * len(field) - 1))
    return int(field.partition(b"\0")[0].strip() or b"0", 8)


def _name_of(header: bytes) -> str:
    name = header[:100].partition(b"\0")[0]
    if header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].partition(b"\0")[0] + b"/" + name
    return _text(name)


def _text(data: bytes) -> str:
    # Names need not be UTF-8; ids are, and different names stay different.
    return data.decode(errors="backslashreplace")


def _add(more: dict[str, str], kind: bytes, data: bytes) -> None:
    """Take what a header says of the next member: its name, of GNU's tar, or the records of POSIX's."""
    if kind == b"L":
        more["path"] = _text(data.partition(b"\0")[0])
    at, end = 0, len(data.rstrip(b"\0")) if kind in b"xX" else 0
    while at < end:
        space = data.index(b" ", at, at + 20)
        stop = at + int(data[at:space])
        key, equals, value = data[space + 1 : stop - 1].partition(b"=")
        if not space < stop <= len(data) or not equals:
            raise ValueError
        more[_text(key)] = _text(value)
        at = stop
