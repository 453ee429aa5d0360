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
            found = json.loads(data)
            # A night has the reports of its jobs too, of which the one on the whole night is this.
            report: dict[str, Any] = found["report"] if name == NIGHT else found
            # An older version may not have written every field.
            absent = [field for field in fields(RunReport) if field.name not in report]
            if missing := [field.name for field in absent if _default(field) is MISSING]:
                raise KeyError(", ".join(missing))  # noqa: TRY301
            report |= {field.name: _default(field) for field in absent}
        except (ValueError, TypeError, KeyError) as error:
            raise StorageError(
                f"{storage.url}/{name}: not readable as a report ({type(error).__name__}: {error}); move it away and "
                "run the job again, which has nothing left to do but writes a new report"
            ) from error
        return report
    raise StorageError(f"{storage.url}: has no {REPORT}; run the job again, which writes a new one")


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()
