"""The same work for many things: in their order, bounded, and never waited for by whoever leaves early."""

from __future__ import annotations

import threading
import time

import pytest

from pipeline.core.concurrency import AHEAD, in_order


def test_results_come_in_the_items_order_and_few_are_begun_ahead() -> None:
    begun: list[int] = []

    def work(item: int) -> int:
        begun.append(item)
        time.sleep(0.01 if item % 2 else 0)
        return item * item

    results = in_order(work, range(100), threads=2)
    assert next(results) == 0
    assert len(begun) <= AHEAD * 2 + 2
    assert list(results) == [item * item for item in range(1, 100)]


def test_the_first_error_in_order_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        list(in_order(lambda item: 1 // (3 - item), range(10), threads=3))


def test_who_leaves_in_the_middle_waits_for_nothing() -> None:
    held = threading.Event()
    results = in_order(lambda item: held.wait(10) if item else item, range(4), threads=2)
    # More items than may be ahead are never asked for, so that the first result is there at the end of them.
    assert next(results) == 0
    began = time.monotonic()
    results.close()
    assert time.monotonic() - began < 1
    held.set()
