"""The files of a benchmark of backends, from known figures."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from pipeline.bench import backends, backends_report, plots, report, stats
from pipeline.bench.records import Bench, Measurement, Result, Row
from pipeline.config.schema import ParityConfig
from pipeline.report.bottleneck import in_words


def measured(
    batch: int, rates: tuple[float, ...], *, lowest: float = 1.0, start: float = 1.0, device: float = 0.0
) -> Measurement:
    return Measurement(
        batch=batch,
        startup_seconds=start,
        images_per_second=rates,
        latencies=tuple(1 / rate for rate in rates for _ in range(4)) if batch == 1 else (),
        rss=912.0 + batch,
        device=device,
        lowest_cosine=lowest,
        mean_cosine=(1 + lowest) / 2,
        top1=1.0 if lowest > 0.99 else 0.953,
    )


# Backend, precision, mode, quantization, images/s of the fastest batch, lowest cosine, MiB of weights.
LINES = [
    ("torch", "fp32", "none", "dynamic", 14.4, 1.0, 335.2),
    ("torch", "fp32", "default", "dynamic", 15.2, 0.9999999999, 335.2),
    ("torch", "bf16", "none", "dynamic", 30.1, 0.99994, 167.6),
    ("torch", "bf16", "default", "dynamic", 36.3, 0.99993, 167.6),
    ("torchscript", "fp32", "none", "dynamic", 16.6, 1.0, 335.2),
    ("torch_int8", "int8", "none", "dynamic", 56.2, 0.99987, 96.1),
    ("onnx", "fp32", "none", "dynamic", 19.1, 0.9999999997, 335.0),
    ("onnx_int8", "int8", "none", "dynamic", 58.8, 0.99986, 91.6),
    ("onnx_int8", "int8", "none", "static", 61.6, 0.967, 91.6),
]
FAILED = [
    (Row("torch", "fp16"), "backend.precision=fp16 needs CUDA, and the device is cpu: take bf16, int8 or fp32"),
    (Row("torch_fp8", "fp8"), "torch_fp8 needs a GPU of compute capability 8.9 or newer <b>"),
    (Row("tensorrt", "fp16"), "ModuleNotFoundError: No module named 'tensorrt'"),
]


def plausible() -> Bench:
    """A benchmark as a two-core machine might give it."""
    results = []
    for number, (backend, precision, mode, quantization, top, lowest, mib) in enumerate(LINES):
        sizes = []
        for size, share in ((1, 0.55), (8, 0.88), (32, 1.0), (64, 0.97)):
            rate = top * share * (1 + 0.02 * (number % 3) if size == 1 else 1)
            sizes.append(measured(size, (rate * 0.96, rate, rate * 1.03), lowest=lowest, start=1.5 * number + 0.8))
        row = Row(backend, precision, mode, quantization)
        results.append(Result(row, precision, int(mib * 2**20), {"name": backend}, tuple(sizes)))
    results += [Result(row, row.precision, failure=why) for row, why in FAILED]
    return Bench(
        started="2026-11-03T10:20:30+00:00",
        command="python -m pipeline.bench model=clip_vit_b32 model.weights=random",
        model="clip_vit_b32 (random weights)",
        sample="rendered scenes",
        images=64,
        labels=100,
        repeats=3,
        seconds=2.0,
        machine={"processor": "A fast one", "cores": 2, "system": "Linux", "device": "cpu", "instructions": "AVX512"},
        versions={"python": "3.11.7", "torch": "2.13.0"},
        parity=ParityConfig(),
        results=tuple(results),
    )


def many() -> Bench:
    """All rows of a GPU, crowded."""
    lines = [
        (Row("torch", "fp32"), 3900.0, 1.0),
        (Row("torch", "fp32", "reduce-overhead"), 4020.0, 0.9999999999),
        (Row("torch", "bf16"), 11800.0, 0.99991),
        (Row("torch", "bf16", "reduce-overhead"), 14900.0, 0.99990),
        (Row("torch", "fp16"), 11900.0, 0.999996),
        (Row("torch", "fp16", "reduce-overhead"), 15100.0, 0.999996),
        (Row("torchscript", "bf16"), 12100.0, 0.99991),
        (Row("torch_int8", "int8"), 13000.0, 0.9998),
        (Row("torch_fp8", "fp8"), 18200.0, 0.9991),
        (Row("onnx", "fp32"), 3800.0, 0.99999999),
        (Row("onnx", "fp16"), 15000.0, 0.999995),
        (Row("onnx_int8", "int8"), 2100.0, 0.9998),
        (Row("onnx_int8", "int8", quantization="static"), 2900.0, 0.987),
        (Row("tensorrt", "fp16"), 19800.0, 0.999994),
    ]
    results = []
    for row, top, lowest in lines:
        sizes = tuple(
            measured(size, (top * share, top * share * 1.01), lowest=lowest, device=800.0 + 9 * size)
            for size, share in ((1, 0.04), (8, 0.3), (32, 0.75), (64, 0.9), (128, 0.98), (256, 1.0))
        )
        results.append(Result(row, row.precision, 168 * 2**20, {}, sizes))
    machine = {"processor": "A fast one", "cores": 16, "system": "Linux", "device": "cuda:0", "gpu": "NVIDIA H100"}
    return dataclasses.replace(plausible(), results=tuple(results), machine=machine)


@pytest.mark.parametrize("bench", [plausible(), many()], ids=["cpu", "gpu"])
def test_markdown_json_and_page_hold_the_figures_and_the_reasons(bench: Bench, tmp_path: Path) -> None:
    shown = backends.write(bench, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["backends.html", "backends.json", "backends.md"]
    text = (tmp_path / "backends.md").read_text()
    assert text == shown
    html = (tmp_path / "backends.html").read_text()
    stored = json.loads((tmp_path / "backends.json").read_text())
    assert [result["row"]["backend"] for result in stored["results"]] == [r.row.backend for r in bench.results]
    for result, kept in zip(bench.results, stored["results"], strict=True):
        assert [tuple(one["images_per_second"]) for one in kept["at"]] == [one.images_per_second for one in result.at]
        one = stats.best(result)
        for shown_rate in [in_words(stats.rate(one))] if one else []:
            assert f" {shown_rate} " in text
            assert f">{shown_rate}<" in html
        if result.failure:
            assert f"- {result.title}: {result.failure}" in text
            assert result.failure.replace("'", "&#39;").replace("<b>", "&lt;b&gt;") in html
    assert bench.command in text
    assert bench.command in html
    assert ("GPU MiB" in text) == ("gpu" in bench.machine)


def test_the_table_holds_all_figures_of_a_row() -> None:
    table = backends_report.main_table(plausible(), stats.advise(plausible()))
    rows = {row[0] + " " + row[1]: dict(zip(table.heads, row, strict=True)) for row in table.rows}
    assert rows["onnx_int8 dynamic int8"] == {
        "backend": "onnx_int8 dynamic",
        "precision": "int8",
        "images/s": "58.8",
        "min - max": "56.4 - 60.6",
        "batch": "32",
        "x fp32": "4.08",
        "same batch": "4.08",
        "p50 ms": "30.3",
        "p99 ms": "31.6",
        "memory MiB": "944",
        "weights MiB": "91.6",
        "lowest cosine": "0.99986",
        "mean cosine": "0.99993",
        "top-1": "100.0%",
        "parity": "holds",
        "start-up s": "11.3",
    }
    assert rows["onnx_int8 static int8"]["parity"] == "misses"
    assert [row[0] for row in table.rows][:4] == [
        "onnx_int8 static",
        "onnx_int8 dynamic",
        "torch_int8",
        "torch compiled",
    ]
    assert table.marked == 1


def test_the_page_is_one_file_with_colours_for_light_and_dark() -> None:
    html = report.to_html(backends_report.to_report(plausible())).decode()
    assert "prefers-color-scheme: dark" in html
    # Namespaces of SVG are names, not addresses that are fetched.
    addresses = [found for found in re.findall(r'(?:src|href)="([^"]*)"', html) if not found.startswith("#")]
    assert addresses == []
    assert html.count("<svg ") == 2
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    for reference in re.findall(r'(?:url\(|href=")#([^")]+)', html):
        assert reference in ids
    # Every colour of the plots is a variable of the page, which has a value for light and one for dark.
    svg = html[html.index("<svg") : html.rindex("</svg>")]
    assert re.findall(r"(?:fill|stroke|color): ?#\w+", svg.partition("The figures")[0]) == []
    for variable in set(re.findall(r"var\((--[\w-]+)\)", svg)):
        assert html.count(f"{variable}: #") == 2


@pytest.mark.parametrize("bench", [plausible(), many()], ids=["cpu", "gpu"])
@pytest.mark.parametrize("plot", [plots.accuracy_plot, plots.batch_plot])
def test_names_in_a_plot_are_all_there_and_do_not_touch(bench: Bench, plot: object) -> None:
    svg = plot(bench, stats.advise(bench))  # type: ignore[operator]
    titles = [result.title for result in bench.results if result.at]
    boxes = []
    for style, place, name in re.findall(r'<text style="([^"]*)"([^>]*)>([^<]+)</text>', svg):
        if name not in titles:
            continue
        found = re.search(r'x="([-\d.]+)" y="([-\d.]+)"', place) or re.search(
            r"translate\(([-\d.]+) ([-\d.]+)\)", place
        )
        assert found is not None
        x, y = map(float, found.groups())
        width = 6.0 * len(name)
        left = x - width if "text-anchor: end" in style else x
        boxes.append((left, y, left + width, y + 10, name))
    assert sorted(box[4] for box in boxes) == sorted(titles)
    for number, one in enumerate(boxes):
        for other in boxes[number + 1 :]:
            apart = one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
            assert apart, (one, other)


def test_a_plot_of_one_row_at_one_batch_size_can_be_drawn() -> None:
    bench = plausible()
    alone = dataclasses.replace(
        bench, results=(dataclasses.replace(bench.results[0], at=(measured(8, (3.0,)),)), *bench.results[-1:])
    )
    advice = stats.advise(alone)
    assert ">torch fp32<" in plots.accuracy_plot(alone, advice)
    assert ">torch fp32<" in plots.batch_plot(alone, advice)


def test_heights_are_moved_apart_between_the_limits() -> None:
    assert plots.spread([50.0, 10.0, 90.0], 10, 0, 100) == [50.0, 10.0, 90.0]
    moved = plots.spread([50.0, 50.0, 51.0, 100.0], 10, 0, 100)
    assert all(abs(a - b) >= 10 - 1e-9 for i, a in enumerate(moved) for b in moved[:i])
    assert moved.index(max(moved)) == 3
    assert min(moved) >= 0
    assert max(moved) <= 100
    crowded = plots.spread([5.0] * 21, 10, 0, 100)
    assert [round(one) for one in crowded] == list(range(0, 101, 5))
