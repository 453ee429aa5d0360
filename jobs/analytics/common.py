"""Functions that the scripts of this folder share: rows, embeddings, thumbnails, a contact sheet."""

from __future__ import annotations

import argparse
import inspect
import io
import json
import os
import re
import sys
import textwrap
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import fsspec
import numpy as np
import pandas as pd
import pyarrow.dataset as ds
from PIL import Image, ImageOps

try:
    import duckdb
    from matplotlib import font_manager, rcParams
    from matplotlib.figure import Figure
except ImportError as error:
    way_out = "pip install -c constraints.txt -e '.[analytics]'"
    raise SystemExit(f"{error.name} is not installed; these scripts need: {way_out}") from None

# The colours of Okabe and Ito, which colour-blind people can distinguish (jfly.uni-koeln.de/color), strongest first.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#F0E442", "#000000")
BLUE, ORANGE, RED, GREY = COLOURS[0], COLOURS[1], COLOURS[3], "#B8B8B8"
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
_CJK = {"Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "Hiragino Sans GB", "Microsoft YaHei"}
rcParams.update(
    {
        "font.family": ["DejaVu Sans", *sorted(_CJK & {font.name for font in font_manager.fontManager.ttflist})],
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "figure.titlesize": 12,
        "legend.frameon": False,
        "savefig.dpi": 130,
        # A label may hold dollar signs.
        "text.parse_math": False,
    }
)


def parts(address: str, *, nights: bool = False) -> list[str]:
    """Return the Parquet files of a dataset, or with ``nights`` of every night ``date=YYYY-MM-DD`` of a store.

    Without ``nights`` the newest night of a store is used. An unfinished night is left out. Both cases print a message.

    Raises:
        SystemExit: nothing to read there.
    """
    system, root = fsspec.core.url_to_fs(address)
    if not system.exists(root):
        raise SystemExit(f"{address}: nothing there; give a dataset's folder, or a store of nights (date=YYYY-MM-DD)")
    if system.isfile(root):
        return [system.unstrip_protocol(root).removeprefix("file://")]
    found: dict[str, list[str]] = {}
    inside = sorted(entry.rstrip("/") for entry in system.ls(root, detail=False))
    # Files of analyses lie beside the nights that they are of.
    nights_there = [entry for entry in inside if re.fullmatch(r"date=[\d-]+", _name(entry))]
    for folder in nights_there or [root]:
        files = sorted(system.ls(folder, detail=False))
        if {"_plan.json"} <= set(map(_name, files)) and "_SUCCESS" not in map(_name, files):
            print(f"left out, since it is not finished: {folder}", file=sys.stderr)
            continue
        rows = [file for file in files if file.endswith(".parquet") and not _name(file).startswith(("_", "."))]
        found[folder] = [system.unstrip_protocol(file).removeprefix("file://") for file in rows]
    if not any(found.values()):
        raise SystemExit(f"{address}: no finished dataset there (Parquet files, with _SUCCESS where _plan.json is)")
    if len(found) > 1 and not nights:
        print(f"{address}: the newest of {len(found)} nights, {_name(list(found)[-1])}", file=sys.stderr)
        found = dict([list(found.items())[-1]])
    return [file for files in found.values() for file in files]


def database(**views: list[str]) -> duckdb.DuckDBPyConnection:
    """Return DuckDB with a view for each list of Parquet files; column ``night`` is the date, or the folder's name."""
    connection = duckdb.connect()
    for name, files in views.items():
        if "://" in files[0]:
            connection.register_filesystem(fsspec.core.url_to_fs(files[0])[0])
        quoted = ", ".join("'" + file.replace("'", "''") + "'" for file in files)
        rows = f"read_parquet([{quoted}], filename='_file', hive_partitioning=false, union_by_name=true)"
        date, folder = r"'date=([^/\\]+)'", r"'([^/\\]+)[/\\][^/\\]*$'"
        night = f"coalesce(nullif(regexp_extract(_file, {date}, 1), ''), regexp_extract(_file, {folder}, 1))"
        connection.execute(f"create view {name} as select * exclude (_file), {night} as night from {rows}")
    return connection


def identifier(files: list[str]) -> str:
    """Return the name of the id column: ``id``, or else the first column, which is the manifest's id."""
    names = _open(files).schema.names
    return "id" if "id" in names else names[0]


def vectors(
    files: list[str], columns: Sequence[str], *, dtype: Any = np.float32, empty: bool = False
) -> tuple[pd.DataFrame, np.ndarray, int]:
    """Return ``columns`` and embeddings [N, D] of the rows with an embedding, and the number of rows without one.

    Takes N * D * 4 bytes, and temporarily twice as much. With ``dtype`` None embeddings keep their stored type, and
    those of int8 have other lengths than 1; bits are always read as the numbers that they stand for. Arrow's lists are
    converted to NumPy without Python lists.

    Raises:
        SystemExit: no row has an embedding, without ``empty``.
    """
    tables, blocks, left_out = [], [], 0
    decode = _decoder(files, stored=dtype is None)
    # Of a job of texts alone, those of the texts.
    name = "embedding" if "embedding" in _open(files).schema.names else "text_embedding"
    for batch in _open(files).to_batches(columns=[*columns, name]):
        whole = batch.filter(batch[name].is_valid())
        left_out += batch.num_rows - whole.num_rows
        if whole.num_rows:
            flat = whole[name].flatten().to_numpy(zero_copy_only=False)
            flat = decode(flat.reshape(whole.num_rows, -1))
            blocks.append(flat if dtype is None else flat.astype(dtype, copy=False))
            tables.append(whole.select(list(columns)).to_pandas())
    if not blocks and empty:
        return pd.DataFrame(columns=list(columns)), np.zeros((0, 0), np.float32), left_out
    if not blocks:
        raise SystemExit(f"{files[0]}: none of {left_out} rows has an embedding")
    return pd.concat(tables, ignore_index=True), np.concatenate(blocks), left_out


@contextmanager
def workers(cluster: str | None) -> Iterator[Callable[..., list[Any]]]:
    """Yield a function that calls another one for every file, and returns the results in their order.

    Its arguments are the function, the files, and a second argument for all calls. It works in this process, or on a
    Dask cluster: ``local`` starts one here, else it is the address of a scheduler whose workers can read the files.

    Raises:
        SystemExit: distributed is not installed, or there is no such scheduler.
    """
    if cluster is None:
        yield lambda work, files, shared=None: [work(file, shared) for file in files]
        return
    try:
        import cloudpickle
        from distributed import Client, LocalCluster
    except ImportError:
        way_out = "pip install -c constraints.txt -e '.[dask]'"
        raise SystemExit(f"--cluster: distributed is not installed; this needs: {way_out}") from None
    with ExitStack() as stack:
        place = stack.enter_context(LocalCluster(dashboard_address=None)) if cluster == "local" else cluster
        try:
            client = stack.enter_context(Client(place, timeout=30, set_as_default=False))
        except (OSError, ValueError) as error:
            raise SystemExit(f"--cluster {cluster}: no scheduler answers there ({error})") from None

        def each(work: Callable[..., Any], files: list[str], shared: Any = None) -> list[Any]:
            # These modules are not installed where the workers are, so their functions travel with the calls.
            for module in {sys.modules[__name__], inspect.getmodule(work)}:
                cloudpickle.register_pickle_by_value(module)
            everywhere = client.scatter(shared, broadcast=True) if shared is not None else None
            return list(client.gather(client.map(work, files, [everywhere] * len(files), pure=False)))

        yield each


def picture_arguments(parser: argparse.ArgumentParser) -> None:
    """Add options for the location of images."""
    group = parser.add_argument_group("images for the picture")
    group.add_argument("--manifest", help="the job's manifest (Parquet); default: the one that _plan.json names")
    group.add_argument("--image", help="its column of paths, bytes or structs; default: as in the job's config")
    group.add_argument("--root", help="folder of relative paths; default: as in the job's config or in the manifest")


def thumbnails(ids: Iterable[Hashable], files: list[str], args: argparse.Namespace, side: int = 160) -> dict[Any, Any]:
    """Return small pictures by id, without images that cannot be opened or lie outside of the root."""
    job = {} if args.manifest else _job(files)
    manifest = args.manifest or job.get("path")
    try:
        source = ds.dataset(manifest) if manifest else _open(files)
    except (OSError, ValueError) as error:
        print(f"no images: {manifest} cannot be read ({error}); give --manifest", file=sys.stderr)
        return {}
    names, key = source.schema.names, identifier(files)
    column = args.image or job.get("image") or next((name for name in ("path", "image") if name in names), None)
    if column not in names or key not in names:
        print(f"no images: columns {key} and {column or 'path'} are needed; see --manifest, --image", file=sys.stderr)
        return {}
    root = args.root or job.get("root") or (source.schema.metadata or {}).get(b"pipeline.root", b"").decode()
    rows = source.to_table(columns=[key, column], filter=ds.field(key).isin(list(ids))).to_pylist()
    found = {}
    for row in rows:
        cell = row[column] if not isinstance(row[column], dict) else row[column]["bytes"] or row[column]["path"]
        try:
            with io.BytesIO(cell) if isinstance(cell, bytes) else fsspec.open(_inside(root, cell)) as file:
                image = Image.open(file, formats=FORMATS)
                image.draft("RGB", (side, side))
                found[row[key]] = ImageOps.fit(ImageOps.exif_transpose(image).convert("RGB"), (side, side))
        except (OSError, ValueError, TypeError, Image.DecompressionBombError):
            continue
    return found


def contact_sheet(title: str, blocks: list[tuple[str, list[tuple[str, Any]]]], path: str, width: int = 8) -> None:
    """Draw blocks of pictures with captions and a heading; a missing picture (None) is a grey box.

    Blocks are placed side by side as long as they fit into ``width`` pictures, so no block may have more.
    """
    places, column, line = [], 0.0, 0
    for _, cells in blocks:
        if column and column + len(cells) > width + 0.61:
            column, line = 0.0, line + 1
        places.append((0.1 + 1.35 * column, 0.5 + 2.1 * line))
        column += len(cells) + 0.2
    size = (1.35 * (width + 0.6 if len(places) > line + 1 else width) + 0.1, 0.5 + 2.1 * (line + 1))
    figure = Figure(figsize=size, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.text(0.1, 0.12, title, va="top", fontsize=12)
    for (left, top), (heading, cells) in zip(places, blocks, strict=True):
        axes.text(left, top + 0.05, heading, va="top", weight="bold")
        for number, (caption, image) in enumerate(cells):
            x = left + 1.35 * number
            box = (x, x + 1.25, top + 1.5, top + 0.25)
            axes.imshow(np.full((1, 1, 3), 225, np.uint8) if image is None else image, extent=box, aspect="auto")
            if image is None:
                axes.text(x + 0.62, top + 0.87, "no picture", ha="center", va="center", color="#555555")
            text = "\n".join(textwrap.shorten(line, 22, placeholder="…") for line in caption.splitlines())
            axes.text(x, top + 1.54, text, va="top", fontsize=7.5)
    axes.set(xlim=(0, size[0]), ylim=(size[1], 0))
    save(figure, path)


def save(figure: Figure, path: str) -> None:
    """Write a PNG, SVG or PDF file, by the extension of its name."""
    figure.savefig(path)
    print(f"picture: {path}")


def start(main: Callable[[], object]) -> None:
    """Run a script; end silently if its output is closed, as with ``| head``."""
    try:
        try:
            main()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes again at exit and would print an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None


def show(heading: str, table: pd.DataFrame, rows: int = 15) -> None:
    """Print the first rows of a table and the number of the others."""
    print(f"\n{heading}")
    text = table.head(rows).to_string(index=False, float_format="{:.4g}".format, na_rep="-") if len(table) else "none"
    # Ids and columns are untrusted input and must not control a terminal.
    print("".join(letter if letter.isprintable() or letter == "\n" else ascii(letter)[1:-1] for letter in text))
    if len(table) > rows:
        print(f"... {len(table) - rows:,} more")


def _decoder(files: list[str], *, stored: bool) -> Callable[[np.ndarray], np.ndarray]:
    """Return what makes numbers of embeddings as they are stored, by the metadata of the dataset's parts."""
    metadata = _open(files).schema.metadata or {}
    output = json.loads(metadata.get(b"pipeline", b"{}")).get("output", {})
    if output.get("dtype") not in ("int8", "binary") or (stored and output["dtype"] == "int8"):
        return lambda flat: flat
    from pipeline.dataset.vectors import VectorFormat

    return VectorFormat.of(output, 0).decode


def _open(files: list[str]) -> Any:
    system = fsspec.core.url_to_fs(files[0])[0]
    local = "://" not in files[0]
    return ds.dataset(
        files if local else [system._strip_protocol(f) for f in files], filesystem=None if local else system
    )


def _job(files: list[str]) -> dict[str, Any]:
    """Return the manifest's path, image column and root from the dataset's plan; empty without a plan."""
    try:
        with fsspec.open(f"{files[0].rpartition('/')[0]}/_plan.json") as file:
            return dict(json.load(file)["config"]["manifest"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _name(path: str) -> str:
    return path.rstrip("/").rsplit("/", 1)[-1]


def _inside(root: str, path: str | None) -> str:
    """Return the address of an image below its root; rows of a manifest are untrusted input."""
    below = (path or "/").removeprefix(root.rstrip("/") + "/")
    if not root or "://" in below or below.startswith("/") or ".." in below.split("/"):
        raise ValueError(f"{path} does not lie below {root or 'a root'}")
    return f"{root.rstrip('/')}/{below}"
