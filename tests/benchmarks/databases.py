"""Rows a second into databases, and memory: ``python -m tests.benchmarks.databases --rows 100000``.

A dataset of random float16 embeddings of length 512 is converted by the command: into PostgreSQL with pgvector, without
fsync, and into the embedded mode of Qdrant.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

from tests.postgres import postgres


def measure(dataset: str, rows: int, *more: str) -> dict[str, Any]:
    """Seconds, rows a second and peak memory of one conversion in a process of its own."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "pipeline.convert", dataset, "--table", "t", *more]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return {
        "to": more[1],
        "seconds": round(seconds, 1),
        "rows_per_second": round(rows / seconds),
        "core_seconds": round(used.ru_utime + used.ru_stime, 1),
        "peak_mib": round(used.ru_maxrss / 1024),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--to", nargs="*", default=["pgvector", "qdrant"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        made = f"{folder}/dataset"
        # In a process of its own: the peak memory of a child begins with that of its parent.
        code = "import sys; from pathlib import Path; from tests.relabel_cost import made_dataset; "
        code += "made_dataset(Path(sys.argv[1]), int(sys.argv[2]), dtype=sys.argv[3])"
        subprocess.run([sys.executable, "-c", code, made, str(options.rows), options.dtype], check=True)
        if "pgvector" in options.to:
            with postgres() as environment:
                os.environ.update(environment)
                out = ["--out", "postgresql:///postgres"]
                print(json.dumps(measure(made, options.rows, "--to", "pgvector", *out)), flush=True)
        if "qdrant" in options.to:
            out = ["--out", f"{folder}/qdrant"]
            print(json.dumps(measure(made, options.rows, "--to", "qdrant", *out)), flush=True)


if __name__ == "__main__":
    main()
