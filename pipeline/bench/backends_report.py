"""The figures as words: the tables of the Markdown file and of the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from pipeline.bench.records import Bench, Result
from pipeline.bench.stats import (
    advise,
    at_batch,
    best,
    floored,
    in_words,
    misses,
    percentile,
    rate,
    speed,
    speed_at_same_batch,
)

ABSENT = "-"
NOTES = (
    "The encoder alone: uint8 pixels on the device in, embeddings out; no reading, no decoding, no copy to the GPU.",
    "Each row runs in a process of its own; rounds go over all rows in turn, and only one of them computes at a time.",
    "images/s: the median of the rounds at the row's best batch size, with the lowest and the highest round.",
    "x fp32: times as fast as torch fp32, medians of this run, each at its own best batch size; same batch: both at "
    "the row's.",
    "Latency: every single call at batch 1, from uint8 pixels until the device is done.",
    "Memory: the peak of the process while measuring at the best batch size (the libraries, torch among them, take a "
    "few hundred MiB of it); on the GPU what it holds there, without the CUDA context.",
    "Start-up: opening the backend and its first batch, with nothing exported or compiled before; loading the "
    "checkpoint and importing torch come on top for every row.",
    "Cosine and top-1: against torch fp32 on the same images, at the row's best batch size.",
)


@dataclass(frozen=True, slots=True)
class Table:
    """Heads and cells as text; ``marked`` is the row that is advised."""

    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    marked: int | None = None


def ranked(bench: Bench) -> list[Result]:
    """The rows that could be measured, fastest first."""
    rates = [(rate(one), result) for result in bench.results if (one := best(result))]
    return [result for _, result in sorted(rates, key=lambda pair: -pair[0])]


def main_table(bench: Bench) -> Table:
    """One line for each row that could be measured."""
    reference, results = bench.results[0], ranked(bench)
    gpu = str(bench.machine["device"]).startswith("cuda")
    heads = [
        "backend",
        "precision",
        "images/s",
        "min - max",
        "batch",
        "x fp32",
        "same batch",
        "p50 ms",
        "p99 ms",
    ]
    heads += ["memory MiB", *(["GPU MiB"] if gpu else []), "weights MiB"]
    heads += ["lowest cosine", "mean cosine", "top-1", "parity", "start-up s"]
    rows = []
    for result in results:
        one = best(result)
        if one is None:
            continue
        single = at_batch(result, 1)
        name = " ".join(word for word in result.title.split() if word != result.precision)
        cells = [
            name,
            result.precision,
            in_words(rate(one)),
            f"{in_words(min(one.images_per_second))} - {in_words(max(one.images_per_second))}",
            str(one.batch),
            _ratio(speed(result, reference)),
            _ratio(speed_at_same_batch(result, reference)),
            f"{1000 * median(single.latencies):,.1f}" if single else ABSENT,
            f"{1000 * percentile(single.latencies, 99):,.1f}" if single else ABSENT,
            f"{one.rss:,.0f}",
            *([f"{one.device:,.0f}"] if gpu else []),
            f"{result.weight_bytes / 2**20:,.1f}",
            floored(one.lowest_cosine, 5),
            floored(one.mean_cosine, 5),
            f"{one.top1:.1%}",
            "misses" if misses(one, result.precision, bench.parity) else "holds",
            f"{start:,.1f}" if (start := result.at[0].startup_seconds) >= 1 else f"{start:.2f}",
        ]
        rows.append(tuple(cells))
    titles = [result.title for result in results]
    return Table(tuple(heads), tuple(rows), titles.index(advise(bench).title))


def batch_table(bench: Bench) -> Table:
    """Images per second by batch size."""
    results = ranked(bench)
    sizes = sorted({one.batch for result in results for one in result.at})
    rows = []
    for result in results:
        found = [at_batch(result, size) for size in sizes]
        rows.append((result.title, *(in_words(rate(one)) if one else ABSENT for one in found)))
    titles = [result.title for result in results]
    return Table(("images/s at batch", *map(str, sizes)), tuple(rows), titles.index(advise(bench).title))


def failures(bench: Bench) -> list[tuple[str, str]]:
    """Rows that could not run, or not at all sizes, with the reason."""
    return [(result.title, " ".join(result.failure.split())) for result in bench.results if result.failure]


def machine_line(bench: Bench) -> str:
    """Where and with what, in one line."""
    facts = bench.machine
    place = f"{facts['gpu']}, " if "gpu" in facts else ""
    instructions = f" ({facts['instructions']})" if "instructions" in facts else ""
    packages = [f"{name.replace('python', 'Python')} {version}" for name, version in bench.versions.items()]
    return f"{place}{facts['processor']}{instructions}, {facts['cores']} cores, {facts['system']}; " + ", ".join(
        packages
    )


def sample_line(bench: Bench) -> str:
    """What was measured, in one line."""
    rounds = f"{bench.repeats} rounds of about {bench.seconds:g} s"
    return f"{bench.model} on {bench.machine['device']}; {bench.images} {bench.sample}, {bench.labels} labels; {rounds}"


def to_markdown(bench: Bench) -> str:
    """The content of ``backends.md``."""
    advice = advise(bench)
    parts = [
        f"# Backends: {bench.model}",
        f"**{advice.text}.**" + (f" {advice.beside}." if advice.beside else ""),
        f"    python -m pipeline.run {advice.overrides}",
        markdown(main_table(bench)),
        "## Images/s by batch size",
        markdown(batch_table(bench)),
    ]
    if failures(bench):
        parts += [
            "## Not in the table, or not at all sizes",
            "\n".join(f"- {name}: {why}" for name, why in failures(bench)),
        ]
    parts += [
        "## How it was measured",
        f"{sample_line(bench)}; {bench.started}.\n\n{machine_line(bench)}.",
        f"    {bench.command}",
        "\n".join(f"- {note}" for note in NOTES),
    ]
    return "\n\n".join(parts) + "\n"


def markdown(table: Table) -> str:
    """The table as Markdown."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    rule = line(["---", *["---:" for _ in table.heads[1:]]])
    rows = [
        line([f"**{cell}**" for cell in row[:1]] + list(row[1:])) if number == table.marked else line(row)
        for number, row in enumerate(table.rows)
    ]
    return "\n".join([line(table.heads), rule, *rows])


def _ratio(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.2f}"
