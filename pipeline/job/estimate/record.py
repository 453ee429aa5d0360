"""Estimate of a job: the record, and its lines in the log."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from pipeline.core.records import OK


@dataclass(frozen=True, slots=True)
class Estimate:
    """Time, space and memory that a job still needs: seconds, bytes, and MiB of memory.

    Attributes:
        seconds: from the command to the last commit, ``startup_seconds`` included; between ``low`` and ``high`` if the
            machine stays as busy as it was during the measurement.
        scenes_seconds: rendering of the demo's scenes, on top of ``seconds``.
        cores_busy: cores that the sample used on average.
        shard_rows: rows of a shard, the last of which may have less; 0 where each is a tar, and ``rows`` are expected.
        output_bytes: bytes still to be written; ``done_bytes`` exist already.
        free_bytes: free bytes of the disk; None for an object store.
        memory: peaks by kind, as in the report of a run.
        shard_mib: part of ``memory`` by which whole shards exceed those of the sample.
        failed: expected share of failed rows, likely between ``failed_low`` and ``failed_high``.
        processes: processes that embed; None where the scheduler decides.
        notes: what a user of the rows must know, as in the report of a run.
        exit_code: expected exit code of the run; ``problems`` explain one that is not 0.
    """

    output: str
    rows: int
    shards: int
    done_rows: int
    done_shards: int
    damaged_shards: int
    left_rows: int
    left_shards: int
    startup_seconds: float
    seconds: float
    low: float
    high: float
    images: int = 0
    images_per_second: float = 0.0
    cores_busy: float = 0.0
    batch_size: int = 0
    shard_rows: int = 0
    sample: Mapping[str, float] = field(default_factory=dict)
    scenes_seconds: float = 0.0
    output_bytes: int = 0
    done_bytes: int = 0
    free_bytes: int | None = None
    stored: str = ""
    memory: Mapping[str, float] = field(default_factory=dict)
    shard_mib: float = 0.0
    decoders: int = 0
    failed: float = 0.0
    failed_low: float = 0.0
    failed_high: float = 0.0
    counts: Mapping[str, int] = field(default_factory=dict)
    error_example: str = ""
    repeats: float = 0.0
    bound: str = ""
    advice: str = ""
    pace: str = ""
    processes: int | None = 1
    about_processes: str = ""
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    exit_code: int = 0


def lines(estimate: Estimate) -> Iterator[str]:
    """Return the lines of the log, each with its name."""
    e = estimate
    size = f" of up to {e.shard_rows:,}" if e.shard_rows else ", one for each tar, counted as they are read"
    about = "" if e.shard_rows else "about "
    yield _line("rows", f"{about}{e.rows:,} in {_count(e.shards, 'shard')}{size}; {_done(e)}")
    if not e.left_rows:
        yield _line("time", f"nothing to do: a run would start and end within {span(e.seconds)}")
        return
    yield _line("time", _time(e))
    if e.scenes_seconds:
        yield _line("", f"the scenes must be rendered before that, once: about {span(e.scenes_seconds)}")
    if e.about_processes:
        yield _line("processes", e.about_processes)
    yield _line("output", _output(e))
    yield _line("memory", _memory(e))
    yield _line("failures", _failures(e))
    if e.repeats:
        yield _line("repeats", f"{e.repeats:.1%} of the sample have the image or the text of another row")
    yield _line("bound", f"{e.bound}: {e.advice}")
    if e.pace:
        yield _line("", e.pace)
    yield _line("sample", _sample(e))


def span(seconds: float) -> str:
    """Return a time with its unit, to two or three digits."""
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 20 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 5:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    if minutes < 120:
        return f"{minutes} min"
    hours = round(minutes / 60, 1)
    return f"{hours:g} h" if hours < 72 else f"{hours / 24:.1f} days"


def _line(name: str, text: str) -> str:
    return f"  {name:<10}{text}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _done(e: Estimate) -> str:
    text = f"{e.done_rows:,} in {_count(e.done_shards, 'shard')} are done already, {e.left_rows:,} are left"
    if not e.done_shards:
        text = "none are done" if e.left_rows == e.rows else f"none are done, {e.left_rows:,} belong to this part"
    if e.damaged_shards:
        text += f"; {_count(e.damaged_shards, 'shard')} must be done again, because their parts are missing or damaged"
    return text


def _time(e: Estimate) -> str:
    rate = f", then {e.images_per_second:,.1f} images/s" if e.images_per_second else ""
    return f"about {span(e.seconds)} ({span(e.low)} to {span(e.high)}): {e.startup_seconds:.1f} s to start{rate}"


def _output(e: Estimate) -> str:
    text = f"{_mb(e.output_bytes)} to be written ({e.stored}; {e.output_bytes / e.left_rows:,.0f} bytes a row)"
    if e.done_bytes:
        text += f", {_mb(e.done_bytes + e.output_bytes)} in all"
    free = "free space of the store is not known" if e.free_bytes is None else f"{_mb(e.free_bytes)} free"
    return f"{text}; {free}"


def _memory(e: Estimate) -> str:
    text = f"{e.memory.get('peak_rss_mib', 0):,.0f} MiB at most in a process"
    if e.shard_mib >= 1:
        text += f" ({e.shard_mib:,.0f} of them for a whole shard)"
    if decoder := e.memory.get("peak_decoder_mib"):
        text += f", {decoder:,.0f} MiB in each of its {_count(e.decoders, 'decoder')}"
    if gpu := e.memory.get("peak_gpu_mib"):
        text += f", {gpu:,.0f} MiB on the GPU"
    return text


def _failures(e: Estimate) -> str:
    seen = {name: count for name, count in e.counts.items() if name != OK}
    rows = f"{int(e.sample['rows']):,} rows"
    if not seen:
        return f"none in {rows}; fewer than {e.failed_high:.1%} are expected" if e.failed_high else "none"
    kinds = ", ".join(f"{name} {count}" for name, count in seen.items())
    likely = f" ({e.failed_low:.1%} to {e.failed_high:.1%})" if e.failed_low < e.failed_high else ""
    example = f"; such as: {e.error_example}" if e.error_example else ""
    return f"{e.failed:.1%}{likely}: {kinds} of {rows}{example}"


def _sample(e: Estimate) -> str:
    s = e.sample
    text = f"{s['images']:,.0f} images in {s['batches']:,.0f} batches of {e.batch_size}, {s['seconds']:.1f} s"
    return f"{text}; throughput measured over {s['counted_images']:,.0f} images in {s['counted_seconds']:.1f} s"


def _mb(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
