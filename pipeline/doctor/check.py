"""What a check finds, and what it is told of the job."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeAlias

from pipeline.config.schema import Config


class Status(StrEnum):
    """``ok``; ``warn``: the job runs, but not as it could; ``fail``: it does not; ``skip``: not looked at, or not there
    and not needed."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"
    SKIP = "skip"


@dataclass(frozen=True, slots=True)
class Check:
    """One line: what was looked at, how it is, a fact, and what to do about it where it is not ok.

    ``figures`` are the numbers of the fact for programs, each named with its unit.
    """

    group: str
    name: str
    status: Status
    fact: str
    way_out: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Subject:
    """What is looked at: the config of the job, or None where it has problems.

    ``temporary`` is the folder for temporary files, and ``scratch`` one within it that is removed in the end, or None
    where there can be none.
    """

    config: Config | None
    quick: bool
    temporary: str
    scratch: str | None

    @property
    def job(self) -> Config:
        """The config, for probes that are left out where there is none."""
        if self.config is None:
            raise ValueError("the config has problems")
        return self.config


def unless_said(error: Exception, way_out: str) -> str:
    """``way_out``, unless the error's own sentence goes on to one."""
    return "" if "; " in str(error) else way_out


# Looks at one thing after the other, and hands out each line as soon as it is known.
Probe: TypeAlias = "Callable[[Subject], Iterator[Check]]"
