"""The report of a benchmark of the pipeline: findings, the table of stages, notes."""

from __future__ import annotations

from statistics import median

from pipeline.bench.pipeline_records import PipelineBench, limit, rate, ratios, shares
from pipeline.bench.report import ABSENT, Report, Table, rate_range
from pipeline.core.records import Stage
from pipeline.report.bottleneck import in_words, verdict

# A stage with a smaller share of the core time is not worth a sentence.
WORTH = 0.02
NOTES = (
    "Each stage alone runs in one process with as many threads and decoder processes as in the job: rows reads the "
    "manifest, read the images' bytes, decode makes pixels of bytes in memory, copy fills a batch (and takes it to "
    "the GPU), encode is the image tower, label scores and sorts, write builds a part, flushes and commits it.",
    "The whole is the job in a process of its own. Its images/s count from the end of the first batch (of all that "
    "are encoded side by side) until the last byte was written; the whole command counts from the start of the process "
    "to its end.",
    "Bound on a CPU: the cores over the core seconds of an image, all stages together; with a GPU: the slowest of the "
    "GPU, the cores and the disks. Core seconds are user and system time, decoder processes included.",
    "Medians of the rounds, with the lowest and the highest; the ratio is taken in each round. Each round runs "
    "everything once, one at a time, and begins elsewhere. The images are in the page cache.",
    "Peak memory: of the main process, and of the largest decoder process.",
)


def to_report(bench: PipelineBench) -> Report:
    """The content of ``pipeline.md`` and ``pipeline.html``."""
    bound, job, ratio = limit(bench), bench.job, median(ratios(bench))
    steady = in_words(median(job.steady))
    binds = "all stages together" if bound.cores else f"the stage {bound.by}"
    decoders = f", {job.peak_decoder_mib:,.0f} MiB of a decoder process" if job.peak_decoder_mib else ""
    rounds = "round" if bench.repeats == 1 else "rounds"
    return Report(
        title=f"The pipeline: {bench.model}",
        headline=f"{steady} images/s, {ratio:.0%} of the bound of {binds}",
        findings=tuple(f"{text[:1].upper()}{text[1:]}" for text in findings(bench)),
        sample=(
            f"{bench.model}, {bench.backend} on {bench.machine['device']}, decoder {bench.decoder}, batches of "
            f"{bench.batch}, {bench.streams} side by side; {bench.images}, {bench.labels} labels; {bench.repeats} "
            f"{rounds}, about {bench.seconds:g} s a stage"
        ),
        tiles=(
            (steady, "images/s, once under way"),
            (f"{ratio:.0%}", f"of the bound, {in_words(bound.images_per_second)} images/s"),
            (in_words(median(job.command)), "images/s, the whole command"),
            (f"{median(job.startup):,.1f} s", "to the end of the first batch"),
            (f"{job.peak_mib:,.0f} MiB", f"peak memory of the job{decoders}"),
        ),
        tables=(stage_table(bench),),
        notes=NOTES,
        bench=bench,
    )


def stage_table(bench: PipelineBench) -> Table:
    """A line for each stage alone, then for other decoders, the bound, and the whole job."""
    part, rows = shares(bench), []
    for stage in (*bench.stages, *bench.decoders):
        decoder = stage.decoder or (bench.decoder if stage.name == Stage.DECODE else None)
        rows.append(
            (
                f"{stage.name} ({decoder})" if decoder else stage.name,
                str(stage.threads),
                in_words(rate(stage)),
                rate_range(stage.images_per_second),
                f"{1000 * median(stage.core_seconds):,.3f}",
                f"{part[stage.name]:.1%}" if stage.decoder is None else ABSENT,
            )
        )
    bound, whole = limit(bench).images_per_second, bench.job.steady
    every = [limit(bench, number=number).images_per_second for number in range(bench.repeats)]
    cores = 1000 * sum(median(stage.core_seconds) for stage in bench.stages)
    rows.append(("the bound", str(bench.cores), in_words(bound), rate_range(every), f"{cores:,.3f}", "100%"))
    rows.append(("the whole", ABSENT, in_words(median(whole)), rate_range(whole), ABSENT, ABSENT))
    heads = ("stage alone", "threads", "images/s", "min - max", "core ms an image", "share of core time")
    return Table("The stages alone, and the whole", heads, tuple(rows), len(rows) - 1)


def findings(bench: PipelineBench) -> list[str]:
    """The conclusions as sentences, the most important one first."""
    bound, part, ratio, job = limit(bench), shares(bench), ratios(bench), bench.job
    found = [
        verdict(bound, part, rate=median(job.steady), cores=bench.cores, device=bench.device)
        + f"; the ratio is {median(ratio):.3f} ({min(ratio):.3f} - {max(ratio):.3f})"
    ]
    decode = next(stage for stage in bench.stages if stage.name == Stage.DECODE)
    for other in bench.decoders:
        moved = limit(bench, decoder=other).images_per_second
        faster = median(decode.core_seconds) / median(other.core_seconds)
        found.append(
            f"the decoder {other.decoder} does {faster:.2f} times as many images a core as {bench.decoder}; "
            f"images.decoder={other.decoder} moves the bound to {in_words(moved)} images/s "
            f"({moved / bound.images_per_second - 1:+.1%})"
        )
    if bench.padding > 0.01:
        found.append(
            f"{bench.padding:.1%} of the encoder's rows were padding, as the images do not fill the last batch of "
            "each shard: another loader.batch_size or manifest.shard_rows wastes less"
        )
    largest = max(part, key=lambda name: part[name])
    for name, share in sorted(part.items(), key=lambda pair: -pair[1]):
        if share >= WORTH and name != largest:
            without = limit(bench, without=name).images_per_second
            found.append(
                f"the most that a faster {name} could give is {in_words(without)} images/s "
                f"({without / bound.images_per_second - 1:+.1%})"
            )
    found.append(
        f"the whole command did {in_words(median(job.command))} images/s ({rate_range(job.command)}), with "
        f"{median(job.startup):,.1f} s of start-up and {1000 * median(job.core_seconds):,.1f} core ms an image"
    )
    return found
