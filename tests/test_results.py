"""The table of backends in the README: its figures are the committed measurements."""

from __future__ import annotations

import json
import re
from statistics import median
from typing import Any

import pytest

from tests.conftest import ROOT

RESULTS = ROOT / "jobs" / "results"
MEASURED = ["vit-b32-cpu", "demo-cpu"]


def measured(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((RESULTS / f"backends-{name}.json").read_text())
    return content


def best(result: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = max(result["at"], key=lambda one: median(one["images_per_second"]))
    return found


def overrides(row: dict[str, str], precision: str) -> str:
    words = [f"backend={row['backend']}"]
    if row["backend"] in ("torch", "torchscript", "onnx"):
        words.append(f"backend.precision={precision}")
    if row["compile"] != "none":
        words.append(f"backend.compile={row['compile']}")
    if row["backend"] == "onnx_int8":
        words.append(f"backend.quantization={row['quantization']}")
    return " ".join(words)


def test_the_table_of_the_readme_is_the_bench_s() -> None:
    results = [result for result in measured("vit-b32-cpu")["results"] if result["at"]]
    fp32 = median(best(results[0])["images_per_second"])
    expected = {}
    for result in results:
        one = best(result)
        speed = median(one["images_per_second"])
        # Cosines are cut, not rounded: 0.99999 must not become 1.
        expected[overrides(result["row"], result["precision"])] = [
            f"{speed:.1f}",
            f"{speed / fp32:.2f}",
            f"{result['weight_bytes'] / 2**20:.0f}",
            f"{int(one['lowest_cosine'] * 1e5 + 1e-6) / 1e5:.5f}",
        ]
    lines = re.findall(r"^\| `(backend=[^`]*)` \| (.*) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert {name: cells.split(" | ") for name, cells in lines} == expected
    speeds = [float(cells.split(" | ")[0]) for _, cells in lines]
    assert speeds == sorted(speeds, reverse=True)


@pytest.mark.parametrize("name", MEASURED)
def test_committed_results_name_machine_versions_and_command(name: str) -> None:
    content = measured(name)
    page = (RESULTS / f"backends-{name}.md").read_text()
    assert content["command"] in page
    assert str(content["machine"]["processor"]) in page
    for package in ("torch", "onnxruntime-gpu", "torchao"):
        assert content["versions"][package] in page
    # Rows that could not run stand there with their reason.
    for result in content["results"]:
        if result["failure"]:
            assert " ".join(result["failure"].split()) in page
    assert content["results"][0]["row"]["backend"] == "torch"
    assert len(content["results"]) >= 13
