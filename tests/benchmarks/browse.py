"""Latency and memory of the page over datasets of rendered embeddings, without pictures.

    python -m tests.benchmarks.browse [--rows 10000 1000000 10000000] [--dim 512] [--folder FOLDER] [--index]

For each size it writes a dataset of random vectors with 100 labels, starts ``python -m pipeline.browse`` on it, and
takes the time of requests as a browser sends them, until the page shows no progress any more: the first page, a search
for rows like one (first and again, with other rows), a filter, the labels, the least certain rows of a label. Peak
memory is that of the server. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from http.cookiejar import CookieJar
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.vectors import write_dataset

AGAIN = 5


def ask(opener: Any, url: str) -> float:
    """Seconds until a page has its result."""
    started = time.perf_counter()
    while b'class="waiting"' in opener.open(url, timeout=600).read():
        time.sleep(0.05)
    return time.perf_counter() - started


def measure(folder: Path, rows: int, memory: float) -> dict[str, Any]:
    """Latencies in seconds, and peak memory in MiB."""
    command = [sys.executable, "-m", "pipeline.browse", str(folder), "--memory", str(memory)]
    began = time.perf_counter()
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        address = server.stdout.readline().strip()
        found: dict[str, Any] = {"rows": rows, "start": time.perf_counter() - began}
        opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(CookieJar()))
        base = address.split("/?")[0]
        found["first page"] = ask(opener, address)
        dice = np.random.default_rng(rows)
        numbers = dice.integers(0, rows, AGAIN + 1).tolist()
        found["search, first"] = ask(opener, f"{base}/0/?like={numbers[0]}&exact=1")
        found["search, again"] = statistics.median(
            ask(opener, f"{base}/0/?like={number}&exact=1") for number in numbers[1:]
        )
        if (folder / "_index").exists():
            ask(opener, f"{base}/0/?like={numbers[0]}")
            found["search, index"] = statistics.median(
                ask(opener, f"{base}/0/?like={number}") for number in numbers[1:]
            )
        found["filter"] = ask(opener, f"{base}/0/?column=score&op=lt&value=0.5")
        found["labels"] = ask(opener, f"{base}/0/labels")
        found["least certain of a label"] = ask(opener, f"{base}/0/?column=label&op=is&value=label-7&sort=-score")
        with open(f"/proc/{server.pid}/status") as status:
            peak = next(line for line in status if line.startswith("VmHWM"))
        found["peak_mib"] = int(peak.split()[1]) / 1024
    finally:
        server.terminate()
        server.wait(20)
    return {name: round(value, 3) for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.browse", description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 1_000_000, 10_000_000])
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--memory", type=float, default=2.0)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--index", action="store_true")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="browse-"))
    results = []
    for rows in options.rows:
        place = folder / f"rows-{rows}"
        if not (place / "_SUCCESS").exists():
            write_dataset(place, rows, options.dim)
        if options.index and not (place / "_index").exists():
            from pipeline.dataset.dataset import open_dataset
            from pipeline.dataset.index import build_index

            build_index(open_dataset(str(place)), lambda: None)
        results.append(measure(place, rows, options.memory))
        print(json.dumps(results[-1]), flush=True)
    if options.folder is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
