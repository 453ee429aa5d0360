"""Phases: named seconds that add up to the time of a run."""

from __future__ import annotations

import threading

import pytest

from pipeline.core.phases import Phases, listed, phase


class Clock:
    """A clock that stands until it is moved on."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def pass_by(self, seconds: float) -> None:
        self.now += seconds


def test_a_phase_within_another_one_is_not_counted_in_it() -> None:
    clock = Clock()
    phases = Phases(98.0, clock=clock)
    phases.ended("interpreter")
    clock.pass_by(1)
    with phases.counting():
        with phase("prepare"):
            clock.pass_by(2)
            with phase("gates"):
                clock.pass_by(4)
            clock.pass_by(8)
        clock.pass_by(16)
    phases.ended("plan")
    assert phases.take() == {"interpreter": 2, "gates": 4, "prepare": 10, "plan": 17}
    clock.pass_by(1)
    phases.ended("batches")
    phases.ended("batches")
    assert phases.take() == {"batches": 1}


def test_a_phase_that_fails_is_counted_too() -> None:
    clock = Clock()
    phases = Phases(clock(), clock=clock)

    def fail() -> None:
        with phase("model"):
            clock.pass_by(3)
            raise ValueError("wrong")

    with phases.counting(), pytest.raises(ValueError, match="wrong"):
        fail()
    assert phases.take() == {"model": 3}


def test_what_another_thread_does_meanwhile_is_no_phase_of_its_own() -> None:
    clock = Clock()
    phases = Phases(clock(), clock=clock)

    def other() -> None:
        with phase("prompts"):
            clock.pass_by(5)

    with phases.counting():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        with phase("model"):
            clock.pass_by(1)
    with phase("later"):
        clock.pass_by(1)
    phases.ended("rest")
    assert phases.take() == {"model": 1, "rest": 6}


def test_a_clock_that_is_set_back_takes_no_time_away() -> None:
    clock = Clock()
    phases = Phases(clock(), clock=clock)
    clock.pass_by(-50)
    phases.ended("output")
    clock.pass_by(2)
    phases.ended("plan")
    assert phases.take() == {"output": 0, "plan": 2}


def test_phases_are_listed_with_all_their_seconds() -> None:
    seconds = {"config": 0.31, "imports": 2.04, "ids": 0.03, "plan": 0.04, "model": 0.5}
    assert listed(seconds) == "config 0.3 s, imports 2.0 s, model 0.5 s, other 0.1 s"
    assert listed(seconds, most=2) == "imports 2.0 s, model 0.5 s, other 0.4 s"
    assert listed({"plan": 0.01}) == ""
