"""Result of a check, and what checks are given of the job."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from pipeline.config.schema import Config


class Status(StrEnum):
    """``ok``; ``warn``: the job runs, but not as well as it could; ``fail``: it does not run; ``skip``: not checked, or
    missing and not needed."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"
    SKIP = "skip"


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the report: its group and name, a status, a fact, and what to do where the status is not ok.

    ``figures`` are the numbers of the fact, each named with its unit.
    """

    group: str
    name: str
    status: Status
    fact: str
    way_out: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the check as plain JSON; figures that JSON cannot hold are left out."""
        figures = {name: round(value, 6) for name, value in self.figures.items() if math.isfinite(value)}
        return {**asdict(self), "figures": figures}


def from_json(content: Mapping[str, Any]) -> Check:
    """Return the check that :meth:`Check.to_json` wrote."""
    return Check(**{**content, "status": Status(content["status"])})


@dataclass(frozen=True, slots=True)
class Subject:
    """Job and machine that are checked.

    Attributes:
        config: config of the job; None where it has problems.
        quick: True for checks that take no more than seconds.
        temporary: folder for temporary files.
        scratch: folder for the files of a check, removed at the end; None where there can be none.
    """

    config: Config | None
    quick: bool
    temporary: str
    scratch: str | None

    @property
    def job(self) -> Config:
        """The config, for probes that do not run without one."""
        if self.config is None:
            raise ValueError("the config has problems")
        return self.config


def unless_in(error: Exception, way_out: str) -> str:
    """Return ``way_out``, or an empty string if the message of the error already has advice."""
    return "" if "; " in str(error) else way_out
