"""The benchmark of the pipeline as Markdown and as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from jinja2 import Environment, PackageLoader

from pipeline.bench.backends_report import ABSENT, Table, markdown
from pipeline.bench.pipeline_records import (
    PipelineBench,
    RunRounds,
    best_tool,
    limit,
    limit_without,
    rate,
    ratios,
    shares,
    times,
)
from pipeline.core.records import Stage
from pipeline.report.throughput import in_words, verdict

# A stage that takes less than this share is not worth a sentence.
WORTH = 0.02
NOTES = (
    "Each stage alone runs in one process with as many threads and decoder processes as in the job: rows reads the "
    "manifest, read the images' bytes, decode makes pixels of bytes in memory, copy fills a batch (and takes it to "
    "the GPU), encode is the image tower, label scores and sorts, write builds a part, flushes and commits it.",
    "The whole is the job in a process of its own. Its images/s and those of the other tools count from the end of the "
    "first batch (of all that are encoded side by side) until the last byte was written; the whole command counts from "
    "the start of the process to its end.",
    "Bound on a CPU: the cores over the core seconds of an image, all stages together; with a GPU: the slowest of what "
    "the GPU, the cores and the disks do. Core seconds are user and system time, decoder processes included.",
    "Medians of the rounds, with the lowest and the highest; the ratio is taken in each round. Each round runs "
    "everything once, one at a time, and begins elsewhere. The images are in the page cache.",
    "Peak memory: of the main process; of the other tools without their workers.",
)


def stage_table(bench: PipelineBench) -> Table:
    """One line for each stage alone, then for other decoders, the bound, and the whole."""
    part, rows = shares(bench), []
    for stage in (*bench.stages, *bench.decoders):
        name = f"{stage.name} ({stage.decoder})" if stage.decoder else stage.name
        if stage.name == Stage.DECODE and stage.decoder is None:
            name = f"{stage.name} ({bench.decoder})"
        rows.append(
            (
                name,
                str(stage.threads),
                in_words(rate(stage)),
                _spread(stage.images_per_second),
                f"{1000 * median(stage.core_seconds):,.3f}",
                f"{part[stage.name]:.1%}" if stage.decoder is None else ABSENT,
            )
        )
    bound, whole = limit(bench), bench.ours[0]
    every = [limit(bench, number=number).images_per_second for number in range(bench.repeats)]
    cores = 1000 * sum(median(stage.core_seconds) for stage in bench.stages)
    rows.append(
        ("**the bound**", str(bench.cores), in_words(bound.images_per_second), _spread(every), f"{cores:,.3f}", "100%")
    )
    rows.append(("**the whole**", ABSENT, in_words(median(whole.steady)), _spread(whole.steady), ABSENT, ABSENT))
    heads = ("stage alone", "threads", "images/s", "min - max", "core ms an image", "share of core time")
    return Table(heads, tuple(tuple(cell.replace("**", "") for cell in row) for row in rows), len(rows) - 1)


def run_table(bench: PipelineBench) -> Table:
    """The job beside other tools."""
    rows = []
    for run in (*bench.ours, *bench.tools):
        if not run.steady:
            continue
        memory = f"{run.peak_mib:,.0f}" + (f" + {run.peak_decoder_mib:,.0f} each" if run.peak_decoder_mib else "")
        rows.append(
            (
                run.title,
                in_words(median(run.steady)),
                _spread(run.steady),
                _times(times(bench, run, steady=True)),
                in_words(median(run.command)),
                _spread(run.command),
                _times(times(bench, run, steady=False)),
                f"{median(run.startup):,.1f}",
                f"{1000 * median(run.core_seconds):,.1f}",
                memory,
            )
        )
    heads = (
        *("from files to a dataset", "images/s", "min - max", "x best tool", "whole command", "min - max"),
        *("x best tool", "start-up s", "core ms an image", "peak MiB"),
    )
    return Table(heads, tuple(rows), 0)


def findings(bench: PipelineBench) -> list[str]:
    """The verdict: sentences, the most important one first."""
    bound, part, ratio = limit(bench), shares(bench), ratios(bench)
    found = [
        verdict(bound, part, rate=median(bench.ours[0].steady), cores=bench.cores, device=bench.device)
        + f"; the ratio is {median(ratio):.3f} ({min(ratio):.3f} - {max(ratio):.3f})"
    ]
    for other in bench.decoders:
        lifted = limit(bench, decoder=other).images_per_second
        gain = lifted / bound.images_per_second - 1
        decode = next(stage for stage in bench.stages if stage.name == Stage.DECODE)
        faster = median(decode.core_seconds) / median(other.core_seconds)
        found.append(
            f"the decoder {other.decoder} does {faster:.2f} times as many images a core as {bench.decoder}; "
            f"images.decoder={other.decoder} moves the bound to {in_words(lifted)} images/s ({gain:+.1%})"
        )
    if bench.padding > 0.01:
        found.append(
            f"{bench.padding:.1%} of the encoder's places were filled up, as the images do not fill the last batch of "
            "each shard: another loader.batch_size or manifest.shard_rows wastes less"
        )
    largest = max(part, key=lambda name: part[name])
    for name, share in sorted(part.items(), key=lambda pair: -pair[1]):
        if share < WORTH or name == largest:
            continue
        without = limit_without(bench, name).images_per_second
        found.append(
            f"the most that a faster {name} could give is {in_words(without)} images/s "
            f"({without / bound.images_per_second - 1:+.1%})"
        )
    for run in bench.ours:
        best, whole = best_tool(bench, steady=True), best_tool(bench, steady=False)
        if best is None or whole is None or not run.steady:
            continue
        found.append(
            f"{run.title}: {median(times(bench, run, steady=True)):.2f} times as fast as {best.title} once under way, "
            f"{median(times(bench, run, steady=False)):.2f} times as fast as {whole.title} for the whole command"
        )
    return found


def failures(bench: PipelineBench) -> list[tuple[str, str]]:
    """Runs without figures, with the reason."""
    return [(run.title, " ".join(run.failure.split())) for run in (*bench.ours, *bench.tools) if run.failure]


def sample_line(bench: PipelineBench) -> str:
    """What was measured, in one line."""
    return (
        f"{bench.model}, {bench.backend} on {bench.machine['device']}, decoder {bench.decoder}, batches of "
        f"{bench.batch}, {bench.streams} side by side; {bench.images}, {bench.labels} labels; {bench.repeats} "
        f"{'round' if bench.repeats == 1 else 'rounds'}, "
        f"about {bench.seconds:g} s a stage"
    )


def machine_line(bench: PipelineBench) -> str:
    """Where and with what, in one line."""
    facts = bench.machine
    gpu = f"{facts['gpu']}, " if "gpu" in facts else ""
    packages = ", ".join(f"{name.replace('python', 'Python')} {version}" for name, version in bench.versions.items())
    return f"{gpu}{facts['processor']} ({facts['instructions']}), {facts['cores']} cores, {facts['system']}; {packages}"


def to_markdown(bench: PipelineBench) -> str:
    """The content of ``pipeline.md``."""
    parts = [
        f"# The pipeline: {bench.model}",
        "\n".join(f"- {_sentence(text)}" for text in findings(bench)),
        "## The stages alone, and the whole",
        markdown(stage_table(bench)),
        "## Beside what people use today" if bench.tools else "## The job",
        markdown(run_table(bench)),
    ]
    if failures(bench):
        parts += ["## Without figures", "\n".join(f"- {name}: {why}" for name, why in failures(bench))]
    parts += [
        "## How it was measured",
        f"{sample_line(bench)}; {bench.started}.\n\n{machine_line(bench)}.",
        f"    {bench.command}",
        "\n".join(f"- {note}" for note in notes(bench)),
    ]
    return "\n\n".join(parts) + "\n"


def notes(bench: PipelineBench) -> list[str]:
    """How it was measured, and how each tool was used."""
    return [*NOTES, *(f"{tool.title}: {tool.note}." for tool in bench.tools if tool.steady)]


def to_html(bench: PipelineBench) -> bytes:
    """The content of ``pipeline.html``."""
    environment = Environment(loader=PackageLoader("pipeline.bench", "."), autoescape=True, trim_blocks=True)
    part, ratio, whole = shares(bench), ratios(bench), bench.ours[0]
    ahead = times(bench, whole, steady=True)
    binds = "all stages together" if limit(bench).cores else f"the stage {limit(bench).by}"
    page = environment.get_template("pipeline.html.j2").render(
        bench=bench,
        headline=f"{in_words(median(whole.steady))} images/s, {median(ratio):.0%} of what {binds} would allow",
        findings=[_sentence(text) for text in findings(bench)],
        tiles=[
            (in_words(median(whole.steady)), "images/s, once under way"),
            (f"{median(ratio):.0%}", f"of the bound, {in_words(limit(bench).images_per_second)} images/s"),
            (in_words(median(whole.command)), "images/s, the whole command"),
            *([(f"{median(ahead):.2f} x", "as fast as the best other tool")] if ahead else []),
            (_memory(whole), "peak memory of the job"),
        ],
        shares=[(name, 100 * share) for name, share in sorted(part.items(), key=lambda pair: -pair[1])],
        bars=_bars(bench),
        stages=stage_table(bench),
        runs=run_table(bench),
        failures=failures(bench),
        sample=sample_line(bench),
        notes=notes(bench),
    )
    return page.encode()


def _bars(bench: PipelineBench) -> list[tuple[str, str, float, bool]]:
    """Title, images/s and width in percent of each run, and whether it is ours."""
    runs = [run for run in (*bench.ours, *bench.tools) if run.steady]
    most = max(median(run.steady) for run in runs)
    return [
        (run.title, in_words(median(run.steady)), 100 * median(run.steady) / most, run in bench.ours) for run in runs
    ]


def _memory(run: RunRounds) -> str:
    return f"{run.peak_mib:,.0f} MiB"


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _spread(values: Sequence[float]) -> str:
    return f"{in_words(min(values))} - {in_words(max(values))}"


def _times(values: Sequence[float]) -> str:
    return f"{median(values):.2f}" if values else ABSENT
