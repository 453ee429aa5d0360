"""Comparison of estimates with the jobs themselves: ``python -m tests.estimate_check [--rounds 3] [CASE ...]``.

Each round estimates a case and then runs it, so that both meet the machine in the same state; the table shows medians.
``--overrides`` runs a job of your own instead: ``--overrides manifest.path=photos.parquet model=clip_vit_b32``. The
photos lie beside the checkout (see tests/conftest.py); without them, cases that need them are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.engine.demo.folder import render_folder
from tests.conftest import DATA, ROOT

SCENES = 20_000
LABELS = "prompts.labels=[dress,hat,shirt,shoes,skirt]"


def cases(folder: Path) -> dict[str, list[str]]:
    """Return the overrides of every case; the names of cases that are killed half-way begin with ``half``."""
    found = {
        "demo": [f"manifest.demo_scenes={SCENES}"],
        "half of demo": [f"manifest.demo_scenes={SCENES}", "manifest.shard_rows=1024"],
    }
    photos = DATA / "clothing"
    if not photos.is_dir():
        print(f"no photos at {photos}: their cases are left out", file=sys.stderr)
        return found
    once, often = _photos(folder, photos, 1), _photos(folder, photos, 4)
    found["photos, ViT-B/32 in bf16"] = [
        *(f"manifest.path={once}", f"manifest.root={photos}", LABELS, "model=clip_vit_b32", "model.weights=random"),
        *("images=fast", "backend.precision=bf16", "loader.batch_size=32"),
    ]
    found["photos, demo model in ONNX"] = [
        *(f"manifest.path={often}", f"manifest.root={photos}", "backend=onnx", "images=exact", "images.repeats=each")
    ]
    return found


def _photos(folder: Path, photos: Path, times: int) -> Path:
    """Write a manifest that lists every photo ``times`` times."""
    paths = sorted(str(path) for path in photos.rglob("*.jpg")) * times
    manifest = folder / f"photos-{times}.parquet"
    pq.write_table(pa.table({"id": [f"{n}" for n in range(len(paths))], "path": paths}), manifest)
    return manifest


def measured(overrides: Sequence[str], output: Path, half: Path | None) -> dict[str, Any]:
    """Return seconds, bytes and MiB of one estimate and of one run."""
    shutil.rmtree(output, ignore_errors=True)
    if half is not None:
        shutil.copytree(half, output)
    before = _bytes(output)
    given = [*overrides, f"output.dir={output}"]
    load = os.getloadavg()[0]
    estimate = _estimate(given)
    began = time.perf_counter()
    command = _command("report.progress=none", *given)
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - began
    if ran.returncode:
        raise SystemExit(f"the run ended with {ran.returncode}:\n{ran.stderr}")
    report = json.loads((output / "_report.json").read_text())
    return {
        "load": load,
        "estimated s": estimate["seconds"],
        "low": estimate["low"],
        "high": estimate["high"],
        "real s": report["wall_seconds"],
        "with report s": seconds,
        "ratio": estimate["seconds"] / report["wall_seconds"],
        "estimated start": estimate["startup_seconds"],
        "real start": report["startup_seconds"],
        "estimated img/s": estimate["images_per_second"],
        "real img/s": report["steady_images_per_second"],
        # The core seconds of an image depend least on the load of the machine.
        "ratio of core s": estimate["cores_busy"] / estimate["images_per_second"] / _core_seconds(report),
        "estimated MB": estimate["output_bytes"] / 1e6,
        "real MB": (_bytes(output) - before) / 1e6,
        "estimated MiB": estimate["memory"]["peak_rss_mib"],
        "real MiB": report["memory"]["peak_rss_mib"],
    }


def _estimate(given: Sequence[str]) -> dict[str, Any]:
    command = _command("run.dry=true", "run.json=true", *given)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the estimate ended with {done.returncode}:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _core_seconds(report: dict[str, Any]) -> float:
    """Return the core seconds of an image, in the processes that embed and those that decode."""
    spent = sum(each["own_core_seconds"] + each["child_core_seconds"] for each in report["workers"])
    return float(spent / report["images"])


def _command(*overrides: str) -> list[str]:
    return [sys.executable, "-m", "pipeline.run", *overrides]


def _bytes(output: Path) -> int:
    return sum(path.stat().st_size for path in output.glob("*.parquet"))


def half_done(overrides: Sequence[str], output: Path, kept: Path) -> Path:
    """Return the output of a run that is killed when half of its shards are committed."""
    shutil.rmtree(output, ignore_errors=True)
    command = _command(*overrides, f"output.dir={output}", "report.progress=none")
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True) as process:
        while process.poll() is None:
            plan, commits = output / "_plan.json", output / "_commits"
            wanted = json.loads(plan.read_text())["shards"] if plan.exists() else 2
            if len(list(commits.glob("*.json"))) * 2 >= wanted:
                os.killpg(process.pid, signal.SIGKILL)
                break
            time.sleep(0.05)
    shutil.copytree(output, kept)
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help="which; all by default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where scenes and outputs lie; a temporary folder by default")
    parser.add_argument("--overrides", nargs="+", default=[], help="a job of your own")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = (options.folder or Path(scratch)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        output = folder / "output"
        chosen = {"own": options.overrides} if options.overrides else cases(folder)
        if unknown := set(options.cases) - set(chosen):
            parser.error(f"no such case: {', '.join(sorted(unknown))}; there are: {', '.join(chosen)}")
        rows = {}
        for name, overrides in chosen.items():
            if options.cases and name not in options.cases:
                continue
            # Scenes, text features and exported models are made once, before anything is measured.
            if "demo" in name:
                render_folder(folder / "scenes", SCENES)
            shutil.rmtree(output, ignore_errors=True)
            _estimate([*overrides, f"output.dir={output}"])
            half = half_done(overrides, output, Path(scratch) / name) if name.startswith("half") else None
            found = [measured(overrides, output, half) for _ in range(options.rounds)]
            for each in found:
                print(name, {key: round(value, 2) for key, value in each.items()}, file=sys.stderr)
            rows[name] = {key: statistics.median(each[key] for each in found) for key in found[0]}
        print("| case | " + " | ".join(next(iter(rows.values()))) + " |")
        print("| --- |" + " --- |" * len(next(iter(rows.values()))))
        for name, row in rows.items():
            print(f"| {name} | " + " | ".join(f"{value:,.2f}" for value in row.values()) + " |")


if __name__ == "__main__":
    main()
