"""The benchmark as one self-contained HTML page: no script, no network, light and dark."""

from __future__ import annotations

import json
from dataclasses import asdict

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from pipeline.bench import backends_report, plots
from pipeline.bench.records import Bench
from pipeline.bench.stats import advise, best, floored, in_words, rate, speed


def to_html(bench: Bench) -> bytes:
    """The content of ``backends.html``."""
    environment = Environment(loader=PackageLoader("pipeline.bench", "."), autoescape=True, trim_blocks=True)
    advice = advise(bench)
    reference = bench.results[0]
    chosen = next(result for result in bench.results if result.title == advice.title)
    one = best(chosen)
    page = environment.get_template("bench.html.j2").render(
        bench=bench,
        advice=advice,
        tiles=[
            (in_words(rate(one)) if one else backends_report.ABSENT, f"images/s, {chosen.title}"),
            (f"{speed(chosen, reference) or 0:.1f} x", "as fast as torch fp32"),
            (floored(one.lowest_cosine, 4) if one else backends_report.ABSENT, "its lowest cosine to torch fp32"),
            (f"{chosen.weight_bytes / 2**20:,.0f} MiB", f"of weights; torch fp32 {_mib(reference.weight_bytes)}"),
        ],
        accuracy=Markup(plots.accuracy_plot(bench, advice)),
        batches=Markup(plots.batch_plot(bench, advice)),
        main=backends_report.main_table(bench),
        by_batch=backends_report.batch_table(bench),
        failures=backends_report.failures(bench),
        sample=backends_report.sample_line(bench),
        notes=backends_report.NOTES,
        parity=json.dumps(asdict(bench.parity), indent=2),
    )
    return page.encode()


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"
