from __future__ import annotations

import random
import time

import pytest

from pipeline.core.records import Timeline
from pipeline.telemetry.clocks import StageClocks
from pipeline.telemetry.timeline import FINEST, IMAGES, MOST, Slices, merge


def test_what_ended_now_lies_in_the_slices_that_it_touched() -> None:
    slices = Slices()
    slices._epoch = 1000.0
    slices.spend("read", 0.05, 0.10)
    slices.spend("read", 0.10, 0.30)
    slices.spend("decode", 1.0, 1.10)
    line = slices.total()
    assert (line.began, line.width) == (1000.0, FINEST)
    assert line.amounts["read"] == pytest.approx((0.10, 0.05, 0, 0, 0))
    assert line.amounts["decode"] == pytest.approx((0.15, 0.25, 0.25, 0.25, 0.10))


def test_a_long_run_has_wider_slices_and_loses_nothing() -> None:
    slices, spent, now = Slices(), 0.0, 0.0
    chance = random.Random(4)
    for _ in range(4000):
        seconds = chance.choice([0.001, 0.2, 3.0, 40.0]) * chance.random()
        now += chance.random() * 2
        slices.spend("encode", seconds, now)
        slices.add(IMAGES, 64, now)
        spent += seconds
    line = slices.total()
    assert MOST / 2 <= len(line.amounts["encode"]) <= MOST + 1
    assert len(line.amounts[IMAGES]) == len(line.amounts["encode"])
    assert sum(line.amounts["encode"]) == pytest.approx(spent, rel=1e-3)
    assert sum(line.amounts[IMAGES]) == 4000 * 64
    assert line.width in {FINEST * 2**power for power in range(12)}
    busiest = max(line.amounts["encode"]) / line.width
    assert busiest < 40


def test_processes_lie_over_one_another_whatever_their_slices() -> None:
    one = Timeline(began=100.0, width=1.0, amounts={"read": (1.0, 2.0, 3.0, 4.0)})
    other = Timeline(began=102.0, width=2.0, amounts={"read": (10.0, 20.0), "images": (5.0, 6.0)})
    both = merge([one, Timeline(), other])
    assert both is not None
    assert (both.began, both.width) == (100.0, 2.0)
    assert both.amounts == {"read": (3.0, 17.0, 20.0), "images": (0.0, 5.0, 6.0)}
    assert merge([Timeline(), Timeline()]) is None
    # Parts of a job that ran on different days.
    days = merge([one, Timeline(began=86_500.0, width=1.0, amounts={"read": (1.0,)})])
    assert days is not None
    assert len(days.amounts["read"]) <= MOST
    assert sum(days.amounts["read"]) == 11.0


def test_clocks_tell_the_same_by_time() -> None:
    clocks = StageClocks()
    with clocks.time("decode"):
        time.sleep(0.02)
    clocks.add("encode", 2.0)
    clocks.count(64)
    line = clocks.timeline()
    total = clocks.total().seconds
    assert sum(line.amounts["decode"]) == pytest.approx(total["decode"], abs=2e-3)
    assert sum(line.amounts["encode"]) == pytest.approx(2.0, abs=0.02)
    assert sum(line.amounts[IMAGES]) == 64
    assert abs(line.began + line.width * len(line.amounts["encode"]) - time.time()) < 1
