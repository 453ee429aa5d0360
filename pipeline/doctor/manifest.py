"""Check of the manifest and its columns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from pipeline.config.schema import Config, ManifestConfig
from pipeline.core.errors import PipelineError
from pipeline.doctor.check import Check, Status, Subject, unless_in

GROUP = "manifest"


def look(subject: Subject) -> Iterator[Check]:
    """Check the files, and the columns of the first one; no row is read."""
    config = subject.job
    if config.manifest.path is None:
        fact = f"{config.manifest.demo_scenes:,} rendered scenes (manifest.path=null)"
        yield Check(GROUP, "manifest", Status.OK, fact)
        return
    from pipeline.dataset.names import check_columns
    from pipeline.manifest.manifest import open_manifest
    from pipeline.manifest.overlap import check_places

    try:
        first, count = first_file(config)
        manifest = open_manifest(first)
        check_columns(config)
        check_places(config, manifest)
    except PipelineError as error:
        way_out = unless_in(error, "correct manifest.path, or the names of the columns")
        yield Check(GROUP, "manifest", Status.FAIL, str(error), way_out)
        return
    files = "1 file" if count == 1 else f"the first of {count:,} files"
    columns = ", ".join(f"{name} ({manifest.schema.field(name).type})" for name in manifest.schema.names)
    fact = f"{files}: {manifest.about}{manifest.rows:,} rows; {columns}"
    fact += f"; images in {manifest.image} ({manifest.image_kind})" if manifest.image else ""
    fact += f"; texts in {manifest.text}" if manifest.text else ""
    yield Check(GROUP, "manifest", Status.OK, fact, figures={"files": float(count), "rows": float(manifest.rows)})


def first_file(config: Config) -> tuple[ManifestConfig, int]:
    """Return the manifest reduced to its first file, with the root of the whole; and the number of files.

    Raises:
        ManifestError: no file exists.
    """
    import pyarrow.parquet as pq

    from pipeline.manifest.files import common_folder, find_files
    from pipeline.manifest.manifest import ROOT_KEY
    from pipeline.storage.urls import open_arrow

    manifest = config.manifest
    if manifest.path is None:
        raise ValueError("the rendered scenes have no file")
    urls = find_files(manifest.path)
    root = manifest.root
    if root is None and len(urls) > 1:
        try:
            with open_arrow(urls[0]) as file:
                built = ROOT_KEY in (pq.read_schema(file).metadata or {})
        except (ValueError, OSError):
            # The error is raised again where the file is opened.
            built = True
        if not built:
            # Relative paths start in the folder that all files have in common.
            root = common_folder(urls) or "/"
    return replace(manifest, path=urls[0], root=root), len(urls)
