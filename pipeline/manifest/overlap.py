"""Check a job's addresses: the root of the images, the overlap of manifest and output, and names in the output."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from pipeline.config.schema import Config
from pipeline.core.errors import ConfigError, ManifestError, Problem
from pipeline.manifest.manifest import Manifest
from pipeline.manifest.names import differing_in_case, named_like_folders
from pipeline.storage.factory import open_storage
from pipeline.storage.urls import is_local, local_file, local_path

# The plan of a dataset, see pipeline.dataset.plan.
PLAN = "_plan.json"
log = logging.getLogger(__name__)


def check_places(config: Config, manifest: Manifest) -> None:
    """Refuse a root that does not exist, an output that overlaps with the manifest, and names that readers mix up.

    Raises:
        ManifestError: every row would fail, or the next run would read its own parts as manifest files.
        ConfigError: readers would take a column for another, or for a part of the output's address.
    """
    output, columns = config.output.dir, [config.manifest.id, *config.manifest.keep]
    check_names(output, [*differing_in_case(columns), *named_like_folders(columns, output)])
    root = manifest.root
    if manifest.image_kind != "bytes" and is_local(root) and not Path(local_path(root)).is_dir():
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


def check_names(output: str, problems: Sequence[Problem]) -> None:
    """Refuse names that readers mix up, or log them if an earlier version began the dataset, which can be finished.

    Raises:
        ConfigError: the output holds no dataset yet.
    """
    if problems and open_storage(output).size(PLAN) is None:
        raise ConfigError(problems)
    for problem in problems:
        log.warning("%s", problem)


def _in_one_another(config: Config) -> ManifestError:
    return ManifestError(
        f"output.dir={config.output.dir} and manifest.path={config.manifest.path} lie in one another, so that readers "
        "would mix the rows of both; choose an output.dir beside the manifest"
    )
