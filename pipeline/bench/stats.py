"""From samples to the figures that people compare: medians, percentiles, ratios, and one piece of advice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from pipeline.bench.records import Bench, Measurement, Result
from pipeline.config.schema import ParityConfig

# Nearer than this to torch fp32 is what float32 itself rounds away.
EXACT = 1e-6


@dataclass(frozen=True, slots=True)
class Advice:
    """What to take: in words, and as overrides; ``title`` names the row, ``beside`` what else one should know."""

    text: str
    beside: str
    overrides: str
    title: str


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least ``percent`` of all values do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]


def rate(measurement: Measurement) -> float:
    """Images per second: the median of the rounds."""
    return median(measurement.images_per_second)


def best(result: Result) -> Measurement | None:
    """The measurement at the fastest batch size, or None where there is none."""
    return max(result.at, key=rate, default=None)


def at_batch(result: Result, batch: int) -> Measurement | None:
    """The measurement at one batch size, or None where there is none."""
    return next((one for one in result.at if one.batch == batch), None)


def speed(result: Result, reference: Result) -> float | None:
    """How many times as fast as the reference, each at its own best batch size."""
    mine, other = best(result), best(reference)
    return rate(mine) / rate(other) if mine and other else None


def speed_at_same_batch(result: Result, reference: Result) -> float | None:
    """How many times as fast as the reference, both at the best batch size of ``result``."""
    mine = best(result)
    other = at_batch(reference, mine.batch) if mine else None
    return rate(mine) / rate(other) if mine and other else None


def misses(measurement: Measurement, precision: str, parity: ParityConfig) -> list[str]:
    """Which thresholds a backend of ``precision`` does not hold, in words."""
    found = []
    for name, value, limits in (
        ("lowest cosine", measurement.lowest_cosine, parity.lowest_cosine),
        ("mean cosine", measurement.mean_cosine, parity.mean_cosine),
        ("top-1 agreement", measurement.top1, parity.top1),
    ):
        if not value >= limits[precision]:
            found.append(f"{name} {value:.4f} is below {limits[precision]}")
    return found


def advise(bench: Bench) -> Advice:
    """The fastest row that holds the thresholds of the config; names a faster one that does not."""
    ranked = sorted(
        ((rate(one), result, one) for result in bench.results if (one := best(result))), key=lambda r: -r[0]
    )
    faithful = [(fast, result, one) for fast, result, one in ranked if not misses(one, result.precision, bench.parity)]
    # torch fp32 is compared with itself, so that there always is one.
    fast, result, one = faithful[0]
    reference = bench.results[0]
    overrides = " ".join([*result.row.overrides(result.precision), f"loader.batch_size={one.batch}"])
    words = f"{in_words(fast)} images/s at batch {one.batch}"
    if result is reference:
        text = f"{result.title}: {words}; nothing that holds the parity thresholds is faster"
    else:
        text = (
            f"{result.title}: {speed(result, reference) or 0:.1f} times torch fp32 ({words}), "
            f"lowest cosine {floored(one.lowest_cosine, 4)}"
        )
    beside = ""
    if ranked[0][1] is not result:
        fast, faster, one = ranked[0]
        why = misses(one, faster.precision, bench.parity)[0]
        beside = f"{faster.title} is faster ({in_words(fast)} images/s), but its {why}"
    return Advice(text=text, beside=beside, overrides=overrides, title=result.title)


def in_words(value: float) -> str:
    """Images per second with the digits that mean something."""
    return f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def floored(cosine: float, digits: int) -> str:
    """The cosine with so many decimals, never rounded up to a perfect 1, unless float32's rounding is all it lacks."""
    step = 10**digits
    value = 1.0 if cosine > 1 - EXACT else math.floor(cosine * step + 1e-6) / step
    return f"{value:.{digits}f}"
