"""An opened manifest: its Parquet files or tars, its columns, and their checks."""

from __future__ import annotations

import hashlib
import json
import os.path
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config.schema import ManifestConfig, nearest
from pipeline.core.concurrency import in_order
from pipeline.core.errors import ConfigError, ManifestError, Problem, short
from pipeline.core.plain import plain_fields, plain_type
from pipeline.core.processes import cores
from pipeline.manifest import tars
from pipeline.manifest.files import common_folder, find_files
from pipeline.manifest.hints import for_missing, refuse_text
from pipeline.manifest.root import find_root
from pipeline.manifest.tar_stream import etag_of
from pipeline.manifest.tars import is_tar
from pipeline.storage.urls import filesystem, is_local, local_path, open_arrow, open_file

ROOT_KEY = b"pipeline.root"
# Above these sizes, of one file or of all, a digest of every byte would take too long; the footer (offsets, sizes and
# statistics of every column chunk) and the modification time identify the content instead.
WHOLE_DIGEST_BYTES, WHOLE_DIGEST_ALL_BYTES = 1 << 30, 1 << 35
# The names of parts and commits have five digits.
MOST_SHARDS = 100_000
# Requests to a store are slow, and run side by side.
FILES_AT_A_TIME = 16
# Bytes at the end of a tar that identify it, with its time, where it is too large for a digest of all.
TAIL = 1 << 20


@dataclass(frozen=True, slots=True)
class ManifestFile:
    """One Parquet file: address, rows of each row group, size in bytes, and a digest of its content.

    A tar is one row group, whose rows are estimated until they are counted.
    """

    url: str
    row_groups: tuple[int, ...]
    size: int
    digest: str

    @property
    def rows(self) -> int:
        """Rows in the file."""
        return sum(self.row_groups)


@dataclass(frozen=True, slots=True)
class Manifest:
    """The opened manifest; ``image_kind`` is ``path``, ``bytes`` or ``struct``.

    ``image`` and ``image_kind`` are empty in a job of texts alone, ``text`` in a job of images alone. ``schema`` holds
    the fields of the id and the kept columns, in the order of the output, with plain types. If it is not ``counted``,
    the files are tars, each of them a shard, and their rows are estimated.
    """

    files: tuple[ManifestFile, ...]
    schema: pa.Schema
    id: str
    image: str
    image_kind: str
    root: str
    text: str = ""
    counted: bool = True

    @property
    def rows(self) -> int:
        """Rows in all files."""
        return sum(file.rows for file in self.files)

    @property
    def about(self) -> str:
        """The word before the number of rows in messages: ``about`` if it is an estimate."""
        return "" if self.counted else "about "

    def shards(self, shard_rows: int) -> int:
        """Number of shards of ``shard_rows`` rows, or of tars."""
        return -(-self.rows // shard_rows) if self.counted else len(self.files)

    def with_rows(self, rows: Sequence[int]) -> Manifest:
        """The same with the rows of each tar, if they are known of all of them; Parquet files have theirs."""
        if self.counted or len(rows) != len(self.files):
            return self
        counted = zip(self.files, rows, strict=True)
        return replace(self, files=tuple(replace(file, row_groups=(count,)) for file, count in counted))

    @property
    def fingerprint(self) -> dict[str, Any]:
        """The facts that two runs of one dataset have in common."""
        content = [[file.digest, file.size, file.rows] for file in self.files]
        if not self.counted:
            # Ids begin with the names of tars.
            content = [[file.digest, file.size, file.url.rpartition("/")[2]] for file in self.files]
        return {
            "files": len(self.files),
            "rows": self.rows if self.counted else None,
            "digest": hashlib.sha256(json.dumps(content).encode()).hexdigest(),
            "columns": [self.id, self.image or None, *self.schema.names[1:]],
            "root": None if self.image_kind in ("", "bytes") else self.root,
            **({"text": self.text} if self.text else {}),
        }

    def has_rows_of(self, fingerprint: object) -> bool:
        """True for the fingerprint of a manifest with the same files and columns; images may be in another folder."""
        return isinstance(fingerprint, dict) and {**fingerprint, "root": 0} == {**self.fingerprint, "root": 0}


def open_manifest(config: ManifestConfig) -> Manifest:
    """Find the files and check every schema; of rows, a few images are looked at.

    Raises:
        ManifestError: no file, not Parquet, a column that is missing or of the wrong type, or text for images.
    """
    if config.path is None:
        raise ManifestError("manifest.path is null; give a Parquet file, a folder of them, or a glob")
    urls = find_files(config.path)
    if any(map(is_tar, urls)):
        return _open_tars(urls, config)
    files, first, roots, mixed = [], None, set(), set[str]()
    local = is_local(config.path)
    # A store has digests of its own.
    total = sum(_size(url) for url in urls) if local else 0
    inspect = partial(_inspect, whole=WHOLE_DIGEST_BYTES if total <= WHOLE_DIGEST_ALL_BYTES else 0)
    found = in_order(inspect, urls, threads=cores() if local else FILES_AT_A_TIME)
    for url, (schema, file) in zip(urls, found, strict=True):
        _check_columns(url, schema, config)
        if first is None:
            first = schema
        for name in config.columns:
            one, other = schema.field(name).type, first.field(name).type
            if plain_type(one, kept=True) != plain_type(other, kept=True):
                mixed.add(name)
            if plain_type(one) != plain_type(other):
                raise ManifestError(
                    f"{url}: column {name!r} is {schema.field(name).type}, but {first.field(name).type} in "
                    f"{urls[0]}; write all files of a manifest with one schema"
                )
        files.append(file)
        roots.add((schema.metadata or {}).get(ROOT_KEY, b"").decode())
    if first is None or not any(file.rows for file in files):
        raise ManifestError(
            f"manifest.path={config.path}: the manifest has no rows, so there is nothing to embed; see what wrote it"
        )
    image_kind = "" if config.image is None else _image_kind(plain_type(first.field(config.image).type))
    if config.image is not None and image_kind != "path":
        refuse_text(next(file.url for file in files if file.rows), config.image)
    _check_count(sum(file.rows for file in files), config)
    if config.root is None and len(roots) > 1:
        places = ", ".join(sorted(root or "none" for root in roots))
        raise ManifestError(
            f"manifest.path={config.path}: its files were built with different roots ({places}); build them from one "
            f"folder, or set manifest.root"
        )
    kept = [first.field(name) for name in (config.id, *config.keep)]
    # A dictionary in one file, and its values in another.
    kept = [field.with_type(plain_type(field.type)) if field.name in mixed else field for field in kept]
    root = config.root
    if root and is_local(root):
        # A relative path would mean another folder in a process with another working directory.
        root = os.path.abspath(os.path.expanduser(local_path(root)))
    return Manifest(
        files=tuple(files),
        # One schema for all files, though one may promise that a column has no nulls and another not.
        schema=plain_fields(pa.schema([field.remove_metadata().with_nullable(True) for field in kept])),
        id=config.id,
        image=config.image or "",
        image_kind=image_kind,
        root=root or (config.image and find_root(roots.pop(), urls[0], config.image)) or common_folder(urls) or "/",
        text=config.text or "",
    )


def _open_tars(urls: Sequence[str], config: ManifestConfig) -> Manifest:
    tars.check_columns(config)
    other = next((url for url in urls if not is_tar(url)), None)
    if other is not None or len(urls) > MOST_SHARDS:
        reason = f"{len(urls):,} tars, more than {MOST_SHARDS:,}; embed them in several jobs"
        raise ManifestError(f"manifest.path={config.path}: {f'tars, and {other} is none' if other else reason}")
    tars.refuse_repeated(urls)
    infos = tars.find_infos(urls)
    sizes = [int(info["size"]) for info in infos]
    per_row, local = tars.bytes_per_row(urls, sizes), is_local(urls[0])
    whole = WHOLE_DIGEST_BYTES if sum(sizes) <= WHOLE_DIGEST_ALL_BYTES else 0

    def file_of(place: tuple[str, dict[str, Any]]) -> ManifestFile:
        url, info = place
        size = int(info["size"])
        # A store without tags says when a file was written; to read it for a digest would be to read it twice.
        digest = _digest(url, info, TAIL, whole) if local else etag_of(info) or f"written:{info.get('mtime', '')}"
        return ManifestFile(url, row_groups=(max(1, round(size / per_row)),), size=size, digest=digest)

    kept = dict.fromkeys([*config.keep, *([config.text] if config.text else [])])
    return Manifest(
        files=tuple(in_order(file_of, zip(urls, infos, strict=True), threads=cores())),
        schema=pa.schema([(name, pa.string()) for name in (config.id, *kept)]),
        id=config.id,
        image=config.image or "",
        image_kind="bytes",
        root=common_folder(urls) or "/",
        text=config.text or "",
        counted=False,
    )


def _check_count(rows: int, config: ManifestConfig) -> None:
    """Refuse more shards than the names of parts have digits for: readers sort parts by name."""
    if config.shard_rows and -(-rows // config.shard_rows) > MOST_SHARDS:
        allowed = f"{rows:,} rows would be more than {MOST_SHARDS:,} parts, the most that a dataset may have"
        hint = f"take manifest.shard_rows={-(-rows // MOST_SHARDS)} or more"
        raise ConfigError([Problem("manifest.shard_rows", config.shard_rows, allowed, hint)])


def _size(url: str) -> int:
    try:
        return os.path.getsize(local_path(url))
    except OSError:
        # Opening the file reports the reason.
        return 0


def _inspect(url: str, *, whole: int) -> tuple[pa.Schema, ManifestFile]:
    fs, path = filesystem(url)
    try:
        with open_arrow(url) as handle:
            parquet = pq.ParquetFile(handle)
            groups = tuple(parquet.metadata.row_group(index).num_rows for index in range(parquet.num_row_groups))
            schema = parquet.schema_arrow
            footer = parquet.metadata.serialized_size
    except (pa.ArrowException, OSError) as error:
        if url.lower().endswith((".csv", ".tsv")):
            hint = f"make a manifest of a CSV with: python -m pipeline.manifest csv {url} manifest.parquet"
            raise ManifestError(f"{url}: not a readable Parquet file; {hint}") from error
        hint = "write it again, or give another manifest.path"
        raise ManifestError(f"{url}: not a readable Parquet file ({error}); {hint}") from error
    info = fs.info(path)
    size = int(info["size"])
    return schema, ManifestFile(url=url, row_groups=groups, size=size, digest=_digest(url, info, footer, whole))


def _digest(url: str, info: dict[str, Any], footer: int, whole: int) -> str:
    """A digest of a file's content: the store's tag, or the SHA-256 of a local file of up to ``whole`` bytes."""
    size, tag = int(info["size"]), etag_of(info)
    if tag:
        return tag
    with open_file(url) as handle:
        if size <= whole:
            return f"sha256:{hashlib.file_digest(handle, 'sha256').hexdigest()}"
        handle.seek(max(0, size - footer - 8))
        tail = hashlib.sha256(handle.read()).hexdigest()
    return f"footer:{tail}:{info.get('mtime', '')}"


def _check_columns(url: str, schema: pa.Schema, config: ManifestConfig) -> None:
    listing = ", ".join(f"{field.name} ({field.type})" for field in schema)
    twice = [name for name in config.columns if schema.names.count(name) > 1]
    if twice:
        raise ManifestError(f"{url}: there are two columns {twice[0]!r}; its columns are: {listing}")
    wanted = [("manifest.id", config.id), ("manifest.image", config.image), ("manifest.text", config.text)]
    wanted += [("manifest.keep", name) for name in config.keep]
    missing = [(key, name) for key, name in wanted if name is not None and name not in schema.names]
    if missing:
        parts = [f"{key}={name}" + _hint(name, schema.names) for key, name in missing]
        ways_out = "".join(dict.fromkeys(for_missing(url, schema, key, name) for key, name in missing))
        raise ManifestError(
            f"{url}: no column for {', '.join(parts)}; name one of its columns: {listing}"
            f"{example_row(url, 0)}{ways_out}"
        )
    id_type = schema.field(config.id).type
    if not (pa.types.is_integer(plain_type(id_type)) or _is_text(plain_type(id_type))):
        raise ManifestError(
            f"{url}: manifest.id={config.id} is {id_type}; ids are strings or integers: name another column, or write "
            f"this one as text; its columns are: {listing}{example_row(url, 0)}"
        )
    if config.text is not None and not _is_text(plain_type(schema.field(config.text).type)):
        raise ManifestError(
            f"{url}: manifest.text={config.text} is {schema.field(config.text).type}; wanted a string: name another "
            f"column, or write this one as text; its columns are: {listing}{example_row(url, 0)}"
        )
    if config.image is not None and not _image_kind(plain_type(schema.field(config.image).type)):
        raise ManifestError(
            f"{url}: manifest.image={config.image} is {schema.field(config.image).type}; wanted a string (path or "
            f"URL), binary (encoded image), or struct<bytes, path>; its columns are: {listing}{example_row(url, 0)}"
        )


def example_row(url: str, row: int) -> str:
    """Row ``row`` of a file as text for an error message, without columns that may be large."""
    with open_arrow(url) as handle:
        parquet = pq.ParquetFile(handle, pre_buffer=False)
        schema, group = parquet.schema_arrow, 0
        kinds = {f.name: plain_type(f.type) for f in schema}
        small = [name for name, kind in kinds.items() if not (_is_bytes(kind) or pa.types.is_nested(kind))]
        while group < parquet.num_row_groups and row >= parquet.metadata.row_group(group).num_rows:
            row -= parquet.metadata.row_group(group).num_rows
            group += 1
        if not small or group == parquet.num_row_groups:
            return ""
        for batch in parquet.iter_batches(row_groups=[group], columns=small, use_threads=False):
            if row < batch.num_rows:
                values = zip(batch.schema.names, (column[row].as_py() for column in batch.columns), strict=True)
                return "; the row: " + ", ".join(f"{name}={short(repr(value))}" for name, value in values)
            row -= batch.num_rows
    return ""


def _hint(name: str, known: Sequence[str]) -> str:
    near = nearest(name, known)
    return f" ({near})" if near else ""


def _is_text(kind: Any) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_bytes(kind: Any) -> bool:
    types = pa.types
    return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind))


def _image_kind(kind: pa.DataType) -> str:
    if _is_text(kind):
        return "path"
    if _is_bytes(kind):
        return "bytes"
    if pa.types.is_struct(kind):
        names = {kind.field(index).name: kind.field(index).type for index in range(kind.num_fields)}
        if "bytes" in names and _is_bytes(names["bytes"]) and ("path" not in names or _is_text(names["path"])):
            return "struct"
    return ""
