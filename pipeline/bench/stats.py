"""Figures of a benchmark of backends: medians, percentiles, ratios, parity, and the advised row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from pipeline.bench.records import Bench, Measurement, Result
from pipeline.config.schema import ParityConfig
from pipeline.report.bottleneck import in_words

# A distance to torch fp32 below this is rounding in float32.
EXACT = 1e-6


@dataclass(frozen=True, slots=True)
class Advice:
    """The advised row: its title, a sentence, a remark (or empty), and the overrides that choose it."""

    title: str
    text: str
    remark: str
    overrides: str


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


def ranked(bench: Bench) -> list[tuple[Result, Measurement]]:
    """The measured rows at their best batch sizes, fastest first."""
    found = [(result, one) for result in bench.results if (one := best(result))]
    return sorted(found, key=lambda pair: -rate(pair[1]))


def at_batch(result: Result, batch: int) -> Measurement | None:
    """The measurement at one batch size, or None where there is none."""
    return next((one for one in result.at if one.batch == batch), None)


def speed(result: Result, reference: Result) -> float | None:
    """The ratio to the reference's rate, each at its own best batch size."""
    mine, other = best(result), best(reference)
    return rate(mine) / rate(other) if mine and other else None


def speed_at_same_batch(result: Result, reference: Result) -> float | None:
    """The ratio to the reference's rate, both at the best batch size of ``result``."""
    mine = best(result)
    other = at_batch(reference, mine.batch) if mine else None
    return rate(mine) / rate(other) if mine and other else None


def misses(measurement: Measurement, precision: str, parity: ParityConfig) -> list[str]:
    """The thresholds that a backend of ``precision`` misses, in words."""
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
    """The fastest row within the thresholds of the config; the remark names a faster one that misses them."""
    rows, reference = ranked(bench), bench.results[0]
    # torch fp32 is compared with itself, so at least one row is within the thresholds.
    result, one = next(row for row in rows if not misses(row[1], row[0].precision, bench.parity))
    words = f"{in_words(rate(one))} images/s at batch {one.batch}"
    if result is reference:
        text = f"{result.title}: {words}; nothing that holds the parity thresholds is faster"
    else:
        times = speed(result, reference) or 0
        text = f"{result.title}: {times:.1f} times torch fp32 ({words}), lowest cosine {floored(one.lowest_cosine, 4)}"
    faster, fast = rows[0]
    remark = ""
    if faster is not result:
        miss = misses(fast, faster.precision, bench.parity)[0]
        remark = f"{faster.title} is faster ({in_words(rate(fast))} images/s), but its {miss}"
    overrides = " ".join([*result.row.overrides(result.precision), f"loader.batch_size={one.batch}"])
    return Advice(title=result.title, text=text, remark=remark, overrides=overrides)


def floored(cosine: float, digits: int) -> str:
    """The cosine with ``digits`` decimals, never rounded up to 1, unless only the rounding of float32 is missing."""
    step = 10**digits
    value = 1.0 if cosine > 1 - EXACT else math.floor(cosine * step + 1e-6) / step
    return f"{value:.{digits}f}"
