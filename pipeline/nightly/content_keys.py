"""Keys for the content of rows: a digest, an etag, size and date, or a digest of the image bytes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.core.concurrency import in_order
from pipeline.core.plain import plain_array, plain_type, read_batches, text_bytes
from pipeline.core.processes import cores
from pipeline.manifest.manifest import Manifest
from pipeline.nightly.records import NightError
from pipeline.storage.urls import explained, is_local, local_path, open_arrow, scheme_of

AUTO, STAT, BYTES = "auto", "stat", "bytes"
# Columns that auto takes: the first of these that exist.
KNOWN = (("digest",), ("sha256",), ("md5",), ("etag",), ("size", "modified"))
# A column of such a name holds digests: rows with equal ones have the same bytes.
_DIGESTS = ("digest", "sha1", "sha256", "sha512", "md5", "blake", "hash")
# Rows read at a time; encoded images are large.
FEW_ROWS, MANY_ROWS = 32, 8192
SCHEMA_KEY = pa.field("key", pa.string())


@dataclass(frozen=True, slots=True)
class Content:
    """The source of a row's key: ``columns`` of the manifest, ``stat`` of local files, or ``bytes`` of the image.

    ``digest`` is True if equal keys mean equal bytes.
    """

    how: str
    columns: tuple[str, ...]
    digest: bool

    def __str__(self) -> str:
        return self.how if self.how != "columns" else ",".join(self.columns)


def find_content(manifest: Manifest, option: str) -> Content:
    """Resolve ``--content`` for a manifest.

    Raises:
        NightError: a column is missing, or there is no key for the content; the message lists the columns.
    """
    known = [(file.url, read_schema(file.url)) for file in manifest.files]
    url, schema = known[0]
    listing = ", ".join(f"{field.name} ({field.type})" for field in schema)
    if option == AUTO:
        if manifest.image_kind != "path":
            return Content(BYTES, (), digest=True)
        taken: tuple[str, ...] | None = next((names for names in KNOWN if set(names) <= set(schema.names)), None)
        if taken is None and is_local(manifest.root):
            return Content(STAT, (), digest=False)
        if taken is None:
            wanted = ", or ".join(" and ".join(names) for names in KNOWN)
            raise NightError(
                f"{url}: changed images cannot be found: there is no column {wanted}, and the images are "
                f"not local files; its columns are: {listing}. Add one, or name yours with --content COLUMNS"
            )
    elif option in (STAT, BYTES):
        if (option == BYTES) == (manifest.image_kind == "path"):
            allowed = f"--content {option}: {manifest.image} holds {manifest.image_kind}"
            raise NightError(f"{url}: {allowed}; name columns of the manifest, or take auto")
        if option == STAT and not is_local(manifest.root):
            raise NightError(
                f"--content stat: {manifest.root} is not a local folder; name columns that change with the content"
            )
        return Content(option, (), digest=option == BYTES)
    else:
        taken = tuple(name.strip() for name in option.split(",") if name.strip())
        if not taken:
            raise NightError("--content: must be auto, stat, bytes, or columns of the manifest such as size,modified")
    for place, each in known:
        missing = [name for name in taken if name not in each.names]
        if missing:
            raise NightError(f"{place}: --content names {', '.join(missing)}, but its columns are: {listing}")
        nested = [name for name in taken if pa.types.is_nested(each.field(name).type)]
        if nested:
            raise NightError(f"{place}: --content names {nested[0]}, which is {each.field(nested[0]).type}")
    digest = len(taken) == 1 and any(word in taken[0].lower() for word in _DIGESTS)
    return Content("columns", taken, digest=digest)


def id_type(manifest: Manifest) -> pa.DataType:
    """The type in which the ids of a manifest are stored: their own for integers, else string."""
    kind = manifest.schema.field(manifest.id).type
    return kind if pa.types.is_integer(kind) else pa.string()


def read_keys(manifest: Manifest, content: Content) -> Iterator[pa.RecordBatch]:
    """``id`` and ``key`` of every row, in order; a null key is unknown, and equals no other."""
    # Size, date and the like identify the content of one path only, so the path is part of the key.
    image = [] if content.how == "columns" and (content.digest or manifest.image_kind != "path") else [manifest.image]
    schema = pa.schema([("id", id_type(manifest)), SCHEMA_KEY])
    texts = [manifest.text] if manifest.text else []
    columns = list(dict.fromkeys([manifest.id, *content.columns, *image, *texts]))

    def keyed(batch: pa.RecordBatch) -> pa.RecordBatch:
        ids, keys = batch.column(manifest.id), _keys(batch, manifest, content, image)
        for name in texts:
            # A row with another text is another row, whatever its image.
            keys = pc.binary_join_element_wise(keys, _text_digests(batch.column(name)), "|")
        return pa.RecordBatch.from_arrays([ids.cast(schema.field("id").type), keys], schema=schema)

    rows = FEW_ROWS if content.how == BYTES else MANY_ROWS
    batches = (batch for _, batch in scan(manifest, columns, rows=rows))
    return in_order(keyed, batches, threads=cores())


def scan(
    manifest: Manifest, columns: Sequence[str], *, rows: int, wanted: Sequence[tuple[int, int]] | None = None
) -> Generator[tuple[int, pa.RecordBatch], None, None]:
    """Some columns of a manifest, up to ``rows`` rows at a time, each batch with the position of its first row.

    Row groups without a row in ``wanted``, ascending ranges of positions, are not read.
    """
    position, ranges = 0, iter(wanted or ())
    ahead = next(ranges, None)
    for file in manifest.files:
        with open_arrow(file.url) as handle:
            parquet = pq.ParquetFile(handle, buffer_size=1 << 20, pre_buffer=False)
            for group, count in enumerate(file.row_groups):
                while ahead is not None and ahead[1] <= position:
                    ahead = next(ranges, None)
                if wanted is not None and (ahead is None or ahead[0] >= position + count):
                    position += count
                    continue
                for batch in read_batches(parquet, group, columns, rows, manifest.schema):
                    yield position, batch
                    position += batch.num_rows


def read_schema(url: str) -> pa.Schema:
    """The schema of a Parquet file."""
    with explained(url), open_arrow(url) as file:
        return pq.read_schema(file)


def _keys(batch: pa.RecordBatch, manifest: Manifest, content: Content, image: Sequence[str]) -> pa.Array:
    if content.how == "columns":
        # A missing digest is often an empty text.
        texts = [_filled(_texts(batch.column(name))) for name in content.columns]
        texts += [_texts(batch.column(name)) for name in image]
        return texts[0] if len(texts) == 1 else pc.binary_join_element_wise(*texts, "|")
    cells = batch.column(manifest.image)
    if manifest.image_kind == "path":
        return pa.array([_stat(path, manifest.root) for path in _texts(cells).to_pylist()], pa.string())
    if manifest.image_kind == "bytes":
        return pa.array([_digest(cell) for cell in cells.to_pylist()], pa.string())
    # A struct may hold a path only.
    found = [
        _digest(cell.get("bytes")) or _stat(cell.get("path"), manifest.root) if cell is not None else None
        for cell in cells.to_pylist()
    ]
    return pa.array(found, pa.string())


def _text_digests(column: pa.Array) -> pa.Array:
    cells = text_bytes(plain_array(column, plain_type(column.type)))
    return pa.array([_digest(cell) or "" for cell in cells], pa.string())


def _texts(column: pa.Array) -> pa.Array:
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if isinstance(column.type, pa.BaseExtensionType):
        column = column.storage
    if pa.types.is_fixed_size_binary(column.type):
        return pa.array([None if cell is None else _decoded(cell) for cell in column.to_pylist()], pa.string())
    if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
        return pa.array([None if cell is None else cell.hex() for cell in column.to_pylist()], pa.string())
    texts = column.cast(pa.string())
    try:
        texts.validate(full=True)
    except pa.ArrowException:
        # Paths need not be UTF-8.
        raw = texts.cast(pa.binary()).to_pylist()
        texts = pa.array([None if cell is None else cell.decode(errors="backslashreplace") for cell in raw])
    return texts


def _decoded(cell: bytes) -> str:
    """A digest of a fixed size, which may be bytes or their hex digits."""
    try:
        return cell.decode()
    except UnicodeDecodeError:
        return cell.hex()


def _filled(texts: pa.Array) -> pa.Array:
    return pc.if_else(pc.equal(pc.binary_length(texts), 0), pa.scalar(None, pa.string()), texts)


def _digest(cell: bytes | None) -> str | None:
    return None if cell is None else hashlib.sha256(cell).hexdigest()[:32]


def _stat(path: str | None, root: str) -> str | None:
    """Size, date and address of a local file; of the whole file if the address has a byte range."""
    if not path or not is_local(path) or (scheme_of(root) and not is_local(root)):
        return None
    try:
        found = os.stat(os.path.join(local_path(root), local_path(path.partition("#bytes=")[0])))
    except (OSError, ValueError):
        return None
    return f"{found.st_size}|{found.st_mtime_ns}|{path}"
