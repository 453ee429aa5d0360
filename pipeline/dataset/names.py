"""Names of columns that readers of a dataset take for others: in another case, or as a part of its address."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from urllib.parse import unquote

from pipeline.config.schema import OUTPUT_COLUMNS, Config
from pipeline.core.errors import ConfigError, Problem
from pipeline.dataset.plan import NAME
from pipeline.storage.factory import open_storage
from pipeline.storage.urls import is_local, local_path

log = logging.getLogger(__name__)


def check_columns(config: Config, heads: Sequence[str] = ()) -> None:
    """Check the names of a job's columns, those of ``heads`` among them, see :func:`check_names`.

    Raises:
        ConfigError: readers would take one for another, or for a part of the output's address.
    """
    output, columns = config.output.dir, [config.manifest.id, *config.manifest.keep]
    own = [*config.manifest.output_columns, *heads]
    check_names(output, [*differing_in_case(columns, own), *named_like_folders(columns, output, own)])


def check_names(output: str, problems: Sequence[Problem]) -> None:
    """Refuse names that readers mix up, or log them if an earlier version began the dataset, which can be finished.

    Raises:
        ConfigError: the output holds no dataset yet.
    """
    if problems and open_storage(output).size(NAME) is None:
        raise ConfigError(problems)
    for problem in problems:
        log.warning("%s", problem)


def differing_in_case(columns: Sequence[str], own: Sequence[str] = OUTPUT_COLUMNS) -> Iterator[Problem]:
    """The columns from the manifest, the id first, named as another column of the dataset, or differing in case only.

    DuckDB, Spark and others ignore the case of names, and read one column where another was meant.
    """
    taken = {name: "the output" for name in own}
    for place, name in enumerate(columns):
        same = next((other for other in taken if other.casefold() == name.casefold()), None)
        if same == name:
            yield Problem(
                _key(place), name, f"is already a column of {taken[name]}", "rename the column in the manifest"
            )
        elif same is not None:
            allowed = f"differs in case only from the column {same} of {taken[same]}, and DuckDB, Spark and others "
            allowed += "ignore case, so that they would read one for the other"
            yield Problem(_key(place), name, allowed, "rename the column in the manifest")
        taken.setdefault(name, _key(place))


def named_like_folders(columns: Sequence[str], address: str, own: Sequence[str] = OUTPUT_COLUMNS) -> Iterator[Problem]:
    """The columns, the id first, named like a partition such as ``date=2026-11-22`` in the address of a dataset.

    Readers of partitioned folders show the value of the folder in place of that of each row.
    """
    place = os.path.abspath(os.path.expanduser(local_path(address))) if is_local(address) else address
    folders = {unquote(folder.partition("=")[0]).casefold(): folder for folder in place.split("/") if "=" in folder}
    for number, name in enumerate([*columns, *own]):
        folder = folders.get(name.casefold())
        if folder is None:
            continue
        allowed = f"is named like the folder {folder} of {address}, whose value readers would show in every row"
        if number < len(columns):
            yield Problem(_key(number), name, allowed, "rename the column in the manifest, or take another folder")
        else:
            yield Problem("output.dir", address, f"its column {name} {allowed}", "take another folder")


def _key(place: int) -> str:
    return "manifest.keep" if place else "manifest.id"
