"""Images a second of the models of ``conf/model`` at full size, with random weights, in fp32 on this machine.

``python -m tests.benchmarks.families --out families-cpu.json [--only REGEX] [--batch 8]`` opens one after the other,
each in a process of its own, embeds batches for a few seconds, and writes JSON and a page beside it.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pipeline.config.schema import conf_dir
from pipeline.core.machine import machine, versions
from pipeline.core.processes import cores

SECONDS, BATCHES = 3.0, 2


def main() -> None:
    """Measure each model, and write after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", default="", metavar="REGEX")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.model:
        print(json.dumps(_measure(options.model, options.batch)))
        return
    names = sorted(path.stem for path in (conf_dir() / "model").glob("*.yaml") if path.stem not in ("demo", "hub"))
    found: dict[str, Any] = {}
    for name in (name for name in names if re.search(options.only, name)):
        command = [sys.executable, "-m", "tests.benchmarks.families", "--model", name, "--batch", str(options.batch)]
        done = subprocess.run(command, capture_output=True, text=True)
        last = (done.stderr.strip().splitlines() or [""])[-1]
        found[name] = {"error": last} if done.returncode else json.loads(done.stdout.splitlines()[-1])
        print(name, found[name], flush=True)
        _write(options.out, options.batch, found)


def _measure(option: str, batch: int) -> dict[str, Any]:
    import torch

    from pipeline.config.compose import compose_config
    from pipeline.models.checkpoint import open_checkpoint

    config = compose_config([f"model={option}", "model.weights=random"])
    torch.set_num_threads(cores())
    began = time.perf_counter()
    checkpoint = open_checkpoint(config.model)
    opened = time.perf_counter() - began
    pixels, times = torch.zeros(batch, 3, *checkpoint.spec.size), list[float]()
    with torch.inference_mode():
        checkpoint.image(pixels[:1])
        while len(times) < BATCHES or sum(times) < SECONDS:
            start = time.perf_counter()
            checkpoint.image(pixels)
            times.append(time.perf_counter() - start)
    return {
        "name": config.model.name,
        "family": checkpoint.family,
        "side": checkpoint.spec.size[0],
        "dim": checkpoint.dim,
        "million": round(sum(each.numel() for each in checkpoint.image.parameters()) / 1e6, 1),
        "open_seconds": round(opened, 1),
        "images_per_second": round(batch / statistics.median(times), 2),
    }


def _write(out: Path, batch: int, found: dict[str, Any]) -> None:
    about = machine("cpu", cores())
    command = f"python -m tests.benchmarks.families {' '.join(Path(a).name if '/' in a else a for a in sys.argv[1:])}"
    content = {"command": command, "machine": about, "versions": versions(("open-clip-torch", "timm")), "found": found}
    out.write_text(json.dumps(content, indent=2) + "\n")
    lines = [
        "# Models at full size",
        "",
        f"`{command}`: random weights, fp32, batches of {batch}, the image tower alone. {about['processor']}, "
        f"{about['cores']} cores.",
        "",
        "| model= | family | pixels | numbers | million parameters | images/s |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for option, row in found.items():
        cells = "| | | | |" if "error" in row else ""
        lines.append(
            f"| `{option}` | {row['error']} {cells}"
            if cells
            else f"| `{option}` | {row['family']} | {row['side']} | {row['dim']} | {row['million']} "
            f"| {row['images_per_second']} |"
        )
    out.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
