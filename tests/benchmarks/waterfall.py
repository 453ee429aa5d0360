"""A waterfall of a command, of one or more checkouts: what its main thread does from its start to its end.

``python -m tests.benchmarks.waterfall --out FILE.png before=/old now=. -- pipeline.run /photos output.dir=/out`` runs
the command once with each checkout, looks at the stack of the main thread a hundred times a second, and draws a panel
for each. Before each run ``output.dir`` is removed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from itertools import groupby
from pathlib import Path
from types import FrameType

SECONDS = 0.01
# Functions of the package, and the phase that they belong to; the innermost one counts.
PHASES = {
    "config": ("check_overrides", "check_files", "to_config", "compose_once", "register", "read_options", "compose"),
    "manifest": ("folder_job", "open_manifest", "check_ids", "_with_manifest"),
    "model": ("open_checkpoint",),
    "prompts": ("bank", "bank_of", "build_bank"),
    "backend": ("open_at", "open_encoder", "settle_batch_size"),
    "gates": ("pass_gate", "_pass_gates", "settle", "embed_reference", "exactly_decoded_sample", "decoded_sample"),
    "batches": ("embed", "_embed"),
    "report": ("_finalize", "publish", "report_of"),
    "end": ("quick_end",),
}
ORDER = ("interpreter", "import torch", "import transformers", "import others", *PHASES, "other")
_PHASE_OF = {name: phase for phase, names in PHASES.items() for name in names}


def main() -> None:
    """Run the command with each checkout, and draw."""
    if sys.argv[1] == "--sample":
        _run_sampled(Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
        return
    at = sys.argv.index("--")
    out, checkouts, command = Path(sys.argv[2]), sys.argv[3:at], sys.argv[at + 1 :]
    found = {}
    for each in checkouts:
        name, _, folder = each.partition("=")
        found[name] = _measure(Path(folder).resolve(), command)
        print(name, {phase: round(sum(stop - start for start, stop in bars), 2) for phase, bars in found[name].items()})
    _draw(found, out)


def _measure(folder: Path, command: list[str]) -> dict[str, list[tuple[float, float]]]:
    """Begin and end of the bars of each phase, in seconds after the start of the process."""
    for argument in command:
        if argument.startswith("output.dir="):
            shutil.rmtree(argument.partition("=")[2], ignore_errors=True)
    with tempfile.TemporaryDirectory() as scratch:
        samples = Path(scratch, "samples")
        began = time.time()
        done = subprocess.run(
            [sys.executable, __file__, "--sample", str(samples), *command],
            env={**os.environ, "PYTHONPATH": str(folder)},
            cwd=scratch,
            capture_output=True,
            text=True,
        )
        ended = time.time() - began
        if done.returncode:
            raise SystemExit(f"{folder}: exit code {done.returncode}\n{done.stderr[-2000:]}")
        points = [
            (float(at) - began, phase)
            for at, phase in (line.split("\t") for line in samples.read_text().split("\n")[:-1])
        ]
    bars: dict[str, list[tuple[float, float]]] = {"interpreter": [(0.0, points[0][0])]}
    runs = [(phase, next(group)[0]) for phase, group in groupby(points, key=lambda point: point[1])]
    for (phase, start), (_, stop) in zip(runs, [*runs[1:], ("", ended)], strict=True):
        bars.setdefault(phase, []).append((start, stop))
    return bars


def _run_sampled(samples: Path, module: str, arguments: list[str]) -> None:
    """Run a module as a command, with a thread that writes what the main thread does."""
    import runpy

    # Not this file's folder, but the checkout's.
    sys.path.pop(0)
    thread = threading.main_thread().ident
    assert thread is not None

    def sample() -> None:
        with samples.open("w", buffering=1) as file:
            while True:
                frame = sys._current_frames().get(thread)
                file.write(f"{time.time()}\t{_phase(frame)}\n")
                time.sleep(SECONDS)

    threading.Thread(target=sample, daemon=True).start()
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _phase(frame: FrameType | None) -> str:
    imported, importing = "others", False
    while frame is not None:
        name, file = frame.f_code.co_name, frame.f_code.co_filename
        importing = importing or "importlib._bootstrap" in file
        if name == "<module>" and "site-packages" in file:
            imported = file.partition("site-packages/")[2].partition("/")[0]
        elif not importing and "/pipeline/" in file and name in _PHASE_OF:
            return _PHASE_OF[name]
        frame = frame.f_back
    if importing:
        return f"import {imported}" if imported in ("torch", "transformers") else "import others"
    return "other"


def _draw(found: dict[str, dict[str, list[tuple[float, float]]]], out: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2 * len(found)), layout="constrained")
    last = max(stop for bars in found.values() for each in bars.values() for _, stop in each)
    for place, (name, bars) in enumerate(found.items()):
        axes = figure.add_subplot(len(found), 1, place + 1)
        rows = [phase for phase in ORDER if phase in bars]
        for row, phase in enumerate(rows):
            axes.broken_barh(
                [(start, stop - start) for start, stop in bars[phase]],
                (row - 0.4, 0.8),
                color=f"C{ORDER.index(phase) % 10}",
            )
            spent = sum(stop - start for start, stop in bars[phase])
            axes.text(bars[phase][-1][1], row, f" {spent:.1f} s", va="center", fontsize=8)
        axes.set_yticks(range(len(rows)), rows, fontsize=8)
        axes.invert_yaxis()
        axes.set_xlim(0, last * 1.07)
        total = max(stop for each in bars.values() for _, stop in each)
        axes.set_title(f"{name}: {total:.1f} s from the command to its exit", loc="left", fontsize=10)
    axes.set_xlabel("seconds; what the main thread does")
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main()
