"""Read the report of a dataset of the main job, of a night or of relabel: one schema for all of them."""

from __future__ import annotations

import json
from dataclasses import MISSING, Field, fields
from typing import Any

from pipeline.core.errors import StorageError
from pipeline.core.run_report import RunReport
from pipeline.storage.base import Storage

REPORT, NIGHT = "_report.json", "_night.json"


def report_of(storage: Storage) -> dict[str, Any]:
    """Return the report of the dataset at ``storage``, with every field of :class:`RunReport`.

    Raises:
        StorageError: the report is missing or cannot be read.
    """
    for name in (NIGHT, REPORT):
        data = storage.read(name)
        if data is None:
            continue
        try:
            # A night has the reports of its jobs too; its own has a key.
            return read_report(data, key="report" if name == NIGHT else None)
        except (ValueError, TypeError, KeyError) as error:
            raise StorageError(
                f"{storage.url}/{name}: not readable as a report ({type(error).__name__}: {error}); move it away and "
                "run the job again, which has nothing left to do but writes a new report"
            ) from error
    raise StorageError(f"{storage.url}: has no {REPORT}; run the job again, which writes a new one")


def read_report(data: bytes, key: str | None = None) -> dict[str, Any]:
    """Return a report from JSON, under ``key`` if it is given; fields that an older version lacked get their default.

    Raises:
        ValueError, TypeError, KeyError: it is not a report.
    """
    content = json.loads(data)
    report: dict[str, Any] = content if key is None else content[key]
    absent = [field for field in fields(RunReport) if field.name not in report]
    if missing := [field.name for field in absent if _default(field) is MISSING]:
        raise KeyError(", ".join(missing))
    return {**report, **{field.name: _default(field) for field in absent}}


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()
