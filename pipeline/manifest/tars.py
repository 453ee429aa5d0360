"""WebDataset tars as a manifest: the files that an address names, and the images in them with texts of the same key.

A tar's images are not counted before it is embedded: that would read all tars twice.
"""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from pipeline.config.extensions import EXTENSIONS, extension_of
from pipeline.config.schema import ManifestConfig
from pipeline.core.concurrency import in_order
from pipeline.core.errors import ManifestError
from pipeline.manifest.tar_stream import DamagedTar, TarStream
from pipeline.storage.urls import explained, filesystem, is_local

SUFFIXES = (".tar", ".tar.gz", ".tgz")
SIDECARS = ("txt", "json", "cls")
# Bytes of a text beside an image, and of all members of one key, at most.
TEXT_BYTES, SAMPLE_BYTES = 16 << 20, 512 << 20
# Approximate bytes of memory that a member takes besides its own.
MEMBER_BYTES = 1 << 10
# Tars whose beginnings are looked at, and bytes of these.
LOOKED_AT, BEGINNING = 8, 1 << 20
# Files of a folder in a store about which it is asked one by one.
FEW = 8
# A range of numbers in the names of WebDataset.
_NUMBERS = re.compile(r"\{(\d+)\.\.(\d+)\}")
log = logging.getLogger(__name__)


class TarRow(NamedTuple):
    """One image of a tar: its id, its bytes, and the texts of its key by kind; bytes that nobody wants are None.

    The last row of a damaged tar stands for all behind the ``damage``, and its id is the name of the tar alone.
    """

    id: str
    image: bytes | None
    texts: dict[str, str]
    damage: str = ""


def is_tar(name: str) -> bool:
    """True for the name of a tar, which gzip may have made smaller."""
    return name.lower().endswith(SUFFIXES)


def is_range(path: str) -> bool:
    """True for the names of tars with a range of numbers in them, such as ``{000..999}.tar``."""
    return is_tar(path) and _NUMBERS.search(path) is not None


def expanded(path: str) -> list[str]:
    """The files of a glob or a range of numbers, sorted; a file that is there is one whatever its name is.

    Raises:
        ManifestError: none is there.
    """
    fs, plain = filesystem(path)
    match = _NUMBERS.search(path)
    if (match is None and not any(mark in path for mark in "*?[")) or (is_local(path) and os.path.exists(plain)):
        return [path]
    if match is not None:
        first, last = int(match[1]), int(match[2])
        numbers = range(first, last + 1)
        found = [f"{path[: match.start()]}{n:0{len(match[1])}}{path[match.end() :]}" for n in numbers]
    else:
        with explained(path):
            found = [name if is_local(path) else fs.unstrip_protocol(name) for name in sorted(fs.glob(plain))]
    if not found:
        raise ManifestError(f"{path}: no tar is there; see the folder and the pattern")
    return found


def refuse_repeated(names: Sequence[str]) -> None:
    """Refuse two tars of one name, with which ids begin.

    Raises:
        ManifestError: there are two.
    """
    repeated = [stem for stem, count in Counter(map(stem_of, names)).items() if count > 1]
    if repeated:
        one, other, *_ = (name for name in names if stem_of(name) == repeated[0])
        raise ManifestError(
            f"two tars have the same name, {PurePosixPath(one).name}, and ids begin with it: {one} and {other}; rename "
            "one, or embed each folder into an output.dir of its own"
        )


def stem_of(name: str) -> str:
    """The name of a tar without its folder and its suffix."""
    base = PurePosixPath(name).name
    suffix = next((each for each in SUFFIXES if base.lower().endswith(each)), "")
    return base[: len(base) - len(suffix)]


def key_of(name: str) -> tuple[str, str]:
    """WebDataset's rule: the key ends at the first dot of the base name, the rest is the kind.

    Names that begin with a dot have no key and are skipped; macOS adds such metadata files.
    """
    folder, _, base = name.rpartition("/")
    stem, _, kind = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), kind.lower()


@lru_cache(1024)
def is_image_kind(kind: str) -> bool:
    """True for the kind of an image's member, such as ``jpg`` or ``left.jpg``."""
    return extension_of(f"x.{kind}") in EXTENSIONS


class TarRows:
    """The images of a tar in order, each with the texts that stand next to it.

    An id is ``<tar>/<key>``, with the kind behind it where a key has several images. If one comes again, ``#2`` and so
    on tell the further rows apart, so that no row is lost.

    Args:
        url: address of the tar.
        stream: its members.
        sidecars: kinds of the texts that are wanted.
        limit: bytes of an image that are read, at most; 0 if none is wanted.
    """

    def __init__(self, url: str, stream: TarStream, sidecars: Sequence[str], limit: int) -> None:
        self._url, self._stream, self._sidecars, self._limit = url, stream, sidecars, limit
        self._stem, self._seen, self._warned = stem_of(url), dict[str, int](), set[str]()

    def __iter__(self) -> Iterator[TarRow]:
        """The rows.

        Raises:
            ManifestError: it is another tar than when the job began.
        """
        last, images, texts, held, damage = "", list[tuple[str, bytes | None]](), dict[str, str](), 0, ""
        try:
            for name, size in self._stream.members():
                if name.rpartition("/")[2].startswith("."):
                    continue
                key, kind = key_of(name)
                if key != last:
                    yield from self._sample(last, images, texts)
                    last, images, texts, held = key, [], {}, 0
                held += MEMBER_BYTES
                if is_image_kind(kind):
                    images.append((kind, self._stream.read(self._limit) if self._limit else None))
                    held += len(images[-1][1] or b"")
                elif kind in self._sidecars:
                    self._check_bytes(name, size, TEXT_BYTES)
                    texts[kind] = self._stream.read(size).decode(errors="replace")
                    held += size
                self._check_bytes(f"the key {key}", held, SAMPLE_BYTES)
        except DamagedTar as error:
            # Half of one file and half of another are no damage of either.
            self._stream.check_unchanged()
            damage = str(error)
        yield from self._sample(last, images, texts)
        if damage:
            log.warning("%s", damage)
            yield TarRow(self._stem, None, {}, damage)

    def _check_bytes(self, name: str, size: int, most: int) -> None:
        if size > most:
            raise DamagedTar(
                f"{self._url}: {name} has {size:,} bytes, more than the {most:,} of a text, or of all members of a "
                "key; its images behind that have no rows. Write it again"
            )

    def _sample(self, key: str, images: list[tuple[str, bytes | None]], texts: dict[str, str]) -> Iterator[TarRow]:
        for kind, data in images:
            name = f"{self._stem}/{key}" if len(images) == 1 else f"{self._stem}/{key}.{kind}"
            count = self._seen[name] = self._seen.get(name, 0) + 1
            if count > 1:
                self._warn("the key %r comes again; the further rows are told apart by #2 and so on", key)
                while (again := f"{name}#{count}") in self._seen:
                    count += 1
                self._seen[name], self._seen[again] = count, 1
                name = again
            yield TarRow(name, data, texts)
        if texts and not images and f"{self._stem}/{key}" in self._seen:
            self._warn("the texts of the key %r do not stand next to its image, and are not read", key)

    def _warn(self, text: str, key: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            log.warning(f"%s: {text}", self._url, key)


def check_columns(config: ManifestConfig) -> None:
    """Check the names of the columns: those of the id and the image are free, texts have the names of their kinds.

    Raises:
        ManifestError: a column is not one of a tar.
    """
    listing = f"{config.id} (string), {config.image} (binary), {', '.join(f'{kind} (string)' for kind in SIDECARS)}"
    if config.image is None:
        raise ManifestError(
            "manifest.image=null: the rows of a tar are its images; for a job of its texts alone make a manifest of "
            "it: python -m pipeline.manifest tar"
        )
    for key, own in (("id", config.id), ("image", config.image)):
        if own in SIDECARS:
            raise ManifestError(f"manifest.{key}={own}: the texts of a tar have this name; take another one")
    for key, name in [("text", config.text), *(("keep", name) for name in config.keep)]:
        if name is not None and name not in SIDECARS:
            raise ManifestError(f"manifest.{key}: no column {name!r}; name one of the columns of a tar: {listing}")
    if config.id == config.image:
        raise ManifestError(f"manifest.id={config.id}: manifest.image has the same name; take another one")


def find_infos(urls: Sequence[str]) -> list[dict[str, Any]]:
    """Facts that a store or a disk has of some files: size, and tag or time; a folder of many in a store is listed.

    Raises:
        ManifestError: a file is not there.
        StorageError: the store does not answer.
    """
    fs, _ = filesystem(urls[0])
    paths = [filesystem(url)[1] for url in urls]
    listed = dict[str, dict[str, Any]]()
    for folder, count in Counter(path.rpartition("/")[0] for path in paths).items():
        if count > FEW and not is_local(urls[0]):
            with explained(folder):
                listed |= {info["name"]: info for info in fs.ls(folder, detail=True)}

    def info_of(place: tuple[str, str]) -> dict[str, Any]:
        url, path = place
        with explained(url):
            try:
                info: dict[str, Any] = listed.get(path) or fs.info(path)
            except FileNotFoundError as error:
                raise ManifestError(f"{url}: no such file; see manifest.path") from error
        if info["type"] == "directory":
            raise ManifestError(f"{url}: a folder and no tar; see manifest.path")
        return info

    return list(in_order(info_of, zip(urls, paths, strict=True), threads=LOOKED_AT))


def bytes_per_row(urls: Sequence[str], sizes: Sequence[int]) -> float:
    """Bytes of a tar for each image in it, from the beginnings of a few tars.

    Raises:
        ManifestError: none of these is a tar.
    """
    count = min(LOOKED_AT, len(urls))
    chosen = [place * len(urls) // count for place in range(count)]

    def look(place: int) -> tuple[int, int, DamagedTar | None]:
        rows = end = 0
        with TarStream(urls[place], sizes[place], piece=BEGINNING) as stream:
            try:
                for name, size in stream.members():
                    rows += is_image_kind(key_of(name)[1])
                    end = stream.position + size
                    if end > BEGINNING:
                        break
            except DamagedTar as error:
                return rows, end, error
        return rows, end, None

    found = list(in_order(look, chosen, threads=LOOKED_AT))
    rows, size = sum(rows for rows, *_ in found), sum(size for _, size, _ in found)
    if not size and found[0][2] is not None:
        raise found[0][2]
    return size / rows if rows else float(BEGINNING)
