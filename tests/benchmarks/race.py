"""Whole commands in turn: jobs against a plain DataLoader loop, and the short commands of a newcomer.

``python -m tests.benchmarks.race PHOTOS --out race-cpu.json [--images 372,32] [--rounds 3] [--only REGEX]`` makes a
ViT-B/32 with random weights in a folder, as ``save_pretrained`` writes it, embeds the photos by each entrant, and
writes JSON and a page beside it: seconds from the command to its exit, medians, and ratios within each round. Every
entrant runs once before that, so that exports are made and files are in memory; ``backend=auto`` is measured by
``run.dry=true`` then.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

LABELS = "dress,hat,shirt"
LOOP = {"loop fp32": "float32", "loop bf16": "bfloat16"}
JOB = {
    "job fp32": ["backend.precision=fp32"],
    "job fp32 fast": ["backend.precision=fp32", "images.decoder=fast"],
    "job bf16 fast": ["backend.precision=bf16", "images.decoder=fast"],
    "job onnx_int8 fast": ["backend=onnx_int8", "images.decoder=fast"],
    "job auto fast": ["backend=auto", "images.decoder=fast"],
}
# One entrant over another, and the ratio of their seconds that is wanted at most.
TARGETS = [
    (372, "job fp32", "loop fp32", 0.95),
    (372, "job bf16 fast", "loop bf16", 0.90),
    (372, "job auto fast", "loop bf16", 0.60),
    (32, "job fp32", "loop fp32", 1.0),
    (32, "job bf16 fast", "loop bf16", 1.0),
]


@dataclass(frozen=True, slots=True)
class Entrant:
    """A command; ``images`` is 0 where it takes no photos. The service is ended once it is ready."""

    name: str
    images: int
    command: list[str]
    out: Path

    def run(self, environment: dict[str, str]) -> dict[str, float]:
        """Seconds of the command, and its images/s under way where it tells."""
        if self.name != "search":
            remove(self.out)
        if self.command[0] == "pipeline.serve":
            return {"seconds": round(self._until_ready(environment), 2)}
        began = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", *self.command], capture_output=True, text=True, env=environment)
        seconds = time.perf_counter() - began
        if done.returncode:
            raise SystemExit(f"{self.name}: exit code {done.returncode}\n{done.stderr[-2000:]}")
        found = {"seconds": round(seconds, 2)}
        report = self.out / "_report.json"
        if self.command[0] == "pipeline.run" and report.exists():
            content = json.loads(report.read_text())
            found["startup_seconds"] = content["startup_seconds"]
            found["steady_images_per_second"] = content["steady_images_per_second"]
        elif "loop" in self.command[0]:
            steady = json.loads(done.stdout)
            if steady["images"]:
                found["steady_images_per_second"] = round(steady["images"] / steady["seconds"], 2)
        return found

    def _until_ready(self, environment: dict[str, str]) -> float:
        began, lines = time.perf_counter(), []
        with subprocess.Popen(
            [sys.executable, "-m", *self.command], stderr=subprocess.PIPE, text=True, env=environment
        ) as process:
            assert process.stderr is not None
            for line in process.stderr:
                lines.append(line)
                if line.startswith("ready: "):
                    seconds = time.perf_counter() - began
                    process.terminate()
                    process.stderr.read()
                    return seconds
        raise SystemExit(f"{self.name}: ended before it was ready\n{''.join(lines)[-2000:]}")


def main() -> None:
    """Run all, and write the page after every round."""
    options = _options()
    with tempfile.TemporaryDirectory(prefix="race-") as folder:
        environment = {**os.environ, "XDG_CACHE_HOME": f"{folder}/cache", "HF_HUB_OFFLINE": "1"}
        entrants = [
            one for one in _entrants(options, Path(folder)) if re.search(options.only, _key(one.name, one.images))
        ]
        rounds: list[dict[str, Any]] = []
        for one in entrants:
            # All backends are exported and measured before; a job of this size would not pay for that.
            if "backend=auto" in one.command:
                replace(one, command=[*one.command, "run.dry=true"]).run(environment)
        for number in range(-1, options.rounds):
            measured = {}
            for one in entrants:
                measured[_key(one.name, one.images)] = found = one.run(environment)
                print("warm-up" if number < 0 else f"round {number + 1}", _key(one.name, one.images), found, flush=True)
            if number >= 0:
                rounds.append(measured)
                _write(options.out, rounds)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, help="a folder of JPEGs")
    parser.add_argument("--out", type=Path, required=True, help="a .json file; a .md file is written beside it")
    parser.add_argument("--images", default="372,32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", metavar="REGEX", help="entrants whose name and number of photos match")
    return parser.parse_args()


def _entrants(options: argparse.Namespace, folder: Path) -> Iterator[Entrant]:
    model = _model(folder / "model")
    photos = sorted(path for path in options.photos.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    for count in map(int, options.images.split(",")):
        some = [str(path.resolve()) for path in photos[:count]]
        if len(some) < count:
            raise SystemExit(f"{options.photos} has {len(some)} JPEGs, fewer than {count}")
        listed, manifest = folder / f"{count}.txt", folder / f"{count}.parquet"
        listed.write_text("\n".join(some))
        pq.write_table(pa.table({"id": some, "path": some}), manifest)
        for name, dtype in LOOP.items():
            out = folder / "loop.parquet"
            command = ["tests.benchmarks.loop", str(listed), model, str(out), "--dtype", dtype, "--labels", LABELS]
            yield Entrant(name, count, command, out)
        for name, overrides in JOB.items():
            out = folder / name.replace(" ", "-")
            job = ["model=hub", f"model.name={model}", f"manifest.path={manifest}", "manifest.root=/"]
            job += [f"prompts.labels=[{LABELS}]", f"output.dir={out}", *overrides]
            yield Entrant(name, count, ["pipeline.run", *job], out)
    service = ["model=hub", f"model.name={model}", f"prompts.labels=[{LABELS}]", "backend.precision=fp32"]
    yield Entrant("service until it is ready", 0, ["pipeline.serve", "serve.port=0", *service], folder / "none")
    demo = folder / "demo"
    yield Entrant("demo job", 0, ["pipeline.run", f"output.dir={demo}"], demo)
    yield Entrant("search", 0, ["pipeline.search", str(demo), "a red circle"], demo)


def _model(folder: Path) -> str:
    """A ViT-B/32 with random weights, and the demo's tokenizer: no hub is needed."""
    import torch
    from transformers import CLIPConfig, CLIPModel

    from pipeline.models.hub import DEMO_FOLDER

    shutil.copytree(DEMO_FOLDER, folder, ignore=shutil.ignore_patterns("config.json", "*.safetensors"))
    torch.manual_seed(0)
    config = CLIPConfig(projection_dim=512)
    demo = json.loads((DEMO_FOLDER / "config.json").read_text())
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config.text_config, name, demo["text_config"][name])
    CLIPModel(config).save_pretrained(folder)
    preprocessor = json.loads((folder / "preprocessor_config.json").read_text())
    preprocessor |= {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return str(folder)


def _key(name: str, images: int) -> str:
    return f"{name}, {images} photos" if images else name


def _write(out: Path, rounds: list[dict[str, Any]]) -> None:
    from pipeline.core.machine import machine, versions
    from pipeline.core.processes import cores

    medians = {
        key: {name: statistics.median(one[key][name] for one in rounds) for name in rounds[0][key]} for key in rounds[0]
    }
    ratios = []
    for images, one, other, target in TARGETS:
        keys = _key(one, images), _key(other, images)
        if all(key in medians for key in keys):
            each = [run[keys[0]]["seconds"] / run[keys[1]]["seconds"] for run in rounds]
            ratios.append({"over": list(keys), "ratio": round(statistics.median(each), 2), "target": target})
    content = {
        "command": f"python -m tests.benchmarks.race {' '.join(Path(a).name if '/' in a else a for a in sys.argv[1:])}",
        "machine": machine("cpu", cores()),
        "versions": versions(),
        "medians": medians,
        "ratios": ratios,
        "rounds": rounds,
    }
    out.write_text(json.dumps(content, indent=2) + "\n")
    out.with_suffix(".md").write_text(_page(content))


def _page(content: dict[str, Any]) -> str:
    about, rounds = content["machine"], len(content["rounds"])
    lines = [
        "# Whole commands, in turn",
        "",
        f"`{content['command']}`: medians of {rounds} rounds. {about['processor']}, {about['cores']} cores.",
        "",
        "| | command to exit, s | of it to the first batch | then, images/s |",
        "| --- | ---: | ---: | ---: |",
    ]
    for key, found in content["medians"].items():
        start, steady = (found.get(name) for name in ("startup_seconds", "steady_images_per_second"))
        cells = [f"{value:.1f}" if value else "" for value in (found["seconds"], start, steady)]
        lines.append(f"| {key} | {' | '.join(cells)} |")
    lines += ["", "| one over the other, in the same round | ratio | wanted |", "| --- | ---: | ---: |"]
    lines += [f"| {' / '.join(one['over'])} | {one['ratio']:.2f} | <= {one['target']} |" for one in content["ratios"]]
    return "\n".join(lines) + "\n"


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
