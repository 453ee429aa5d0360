"""Check a job's addresses: the root of the images, and the overlap of manifest and output."""

from __future__ import annotations

from pathlib import Path

from pipeline.config.schema import Config
from pipeline.core.errors import ManifestError
from pipeline.manifest.manifest import Manifest
from pipeline.storage.urls import is_local, local_file, local_path


def check_places(config: Config, manifest: Manifest) -> None:
    """Refuse a root that does not exist, and an output that overlaps with the manifest.

    Raises:
        ManifestError: every row would fail, or the next run would read its own parts as manifest files.
    """
    root, output = manifest.root, config.output.dir
    if manifest.image_kind not in ("", "bytes") and is_local(root) and not Path(local_path(root)).is_dir():
        raise ManifestError(f"manifest.root={root}: no such folder; is a disk not mounted? manifest.root sets another")
    given_path = config.manifest.path or ""
    if not is_local(output) or not is_local(manifest.files[0].url):
        above, below = f"{given_path.rstrip('/')}/", f"{output.rstrip('/')}/"
        if below.startswith(above) or any(file.url.startswith(below) for file in manifest.files):
            raise _in_one_another(config)
        return
    folder = Path(local_path(output)).resolve()
    given = local_file(given_path).resolve()
    inside = [file.url for file in manifest.files if folder in Path(local_path(file.url)).resolve().parents]
    if inside or (given.is_dir() and (given == folder or given in folder.parents)):
        raise _in_one_another(config)


def _in_one_another(config: Config) -> ManifestError:
    return ManifestError(
        f"output.dir={config.output.dir} and manifest.path={config.manifest.path} lie in one another, so that readers "
        "would mix the rows of both; choose an output.dir beside the manifest"
    )
