"""Changes of a folder of images since its manifest was written."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.core.errors import ManifestError
from pipeline.manifest.manifest import ROOT_KEY
from pipeline.storage.base import Storage
from pipeline.storage.factory import open_storage
from pipeline.storage.urls import explained, is_local, open_arrow

# The columns of a manifest that is made of a folder.
COLUMNS = ["id", "path", "size", "modified"]


def changes_of(manifest: str, fresh: Path, *, folder: str, output: str) -> str | None:
    """The changes of the folder since the manifest was written, in words; empty for none, None without a manifest.

    Args:
        manifest: the address of the manifest that an earlier run wrote.
        fresh: a manifest of the folder as it is.
        folder: the folder, for messages.
        output: the dataset that was made of the manifest, for messages.

    Raises:
        ManifestError: the manifest is another one's.
    """
    storage, name = _place(manifest)
    if storage.size(name) is None:
        return None
    try:
        with explained(manifest), open_arrow(manifest) as file:
            old = pq.read_table(file)
    except pa.ArrowException as error:
        raise ManifestError(f"{manifest}: not readable as Parquet ({error}); choose another output.dir") from error
    new = pq.read_table(fresh)
    was, now = ((table.schema.metadata or {}).get(ROOT_KEY, b"").decode() for table in (old, new))
    if old.column_names != COLUMNS:
        was = ""
    else:
        added, changed, removed, same = _counts(old, new)
        # A folder that was moved has images in common with the one that is no more.
        moved = was != now and same > 0 and is_local(was) and is_local(now) and not Path(was).exists()
        if moved or was == now:
            counts = {"new": added, "changed": changed, "removed": removed}
            parts = [f"{count:,} {what}" for what, count in counts.items() if count]
            return ", ".join([*parts, f"moved from {was}"] if moved else parts)
    raise ManifestError(
        f"output.dir={output} is of the images in {was or 'another manifest'} ({manifest}), not of those in {folder}; "
        "choose another output.dir"
    )


def _counts(old: pa.Table, new: pa.Table) -> tuple[int, int, int, int]:
    """The rows that are new, changed, removed and unchanged."""
    both = new.join(old, "id", join_type="full outer", right_suffix="_old").combine_chunks()
    added, removed = (both[name].null_count for name in ("path_old", "path"))
    there = both.filter(pc.and_(both["path"].is_valid(), both["path_old"].is_valid()))
    same = [
        pc.equal(*(pc.fill_null(there[each].cast(pa.int64()), -1) for each in (name, f"{name}_old")))
        for name in ("size", "modified")
    ]
    unchanged = pc.sum(pc.and_(*same)).as_py() or 0
    return added, there.num_rows - unchanged, removed, unchanged


def publish_manifest(file: Path, manifest: str) -> None:
    """Publish a local file as the manifest at an address."""
    storage, name = _place(manifest)
    storage.write(name, file.read_bytes())


def _place(address: str) -> tuple[Storage, str]:
    """The storage and the name of a file."""
    folder, slash, name = address.rpartition("/")
    return open_storage(folder or slash or "."), name
