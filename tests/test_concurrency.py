"""The same work for many items by threads: in order, bounded, and not waited for by a caller that leaves early."""

from __future__ import annotations

import threading
import time
from itertools import count

import pytest

from pipeline.core.concurrency import AHEAD, in_order


def test_results_come_in_the_order_of_the_items_and_few_are_begun_ahead() -> None:
    begun, lock = [0], threading.Lock()

    def work(number: int) -> int:
        with lock:
            begun[0] += 1
        time.sleep(0.001 * (number % 3))
        return number * number

    # Items without an end: what is not asked for is not begun.
    found = in_order(work, count(), threads=3)
    for number in range(40):
        assert next(found) == number * number
        assert begun[0] <= number + 3 * AHEAD + 2
    found.close()
    assert list(in_order(work, range(10), threads=2)) == [number * number for number in range(10)]


def test_the_first_error_in_order_is_raised_and_ends_the_rest() -> None:
    begun = []

    def work(number: int) -> int:
        begun.append(number)
        if number >= 5:
            raise ValueError(number)
        return number

    with pytest.raises(ValueError, match="5"):
        list(in_order(work, range(10_000), threads=2))
    assert len(begun) < 30


def test_a_caller_that_leaves_in_the_middle_waits_for_nothing() -> None:
    held = threading.Event()
    results = in_order(lambda item: held.wait(10) if item else item, range(4), threads=2)
    # More items than may be ahead are never asked for, so that the first result is there at the end of them.
    assert next(results) == 0
    began = time.monotonic()
    results.close()
    assert time.monotonic() - began < 1
    held.set()
