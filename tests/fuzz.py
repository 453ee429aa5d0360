"""Broken images by the thousand, through real jobs: ``python -m tests.fuzz --files 10000 --seed 1``.

The job must end, every file must come out as a row with a status that is known, the counts must add up, and memory
must stay under the bound. Exits with 1 otherwise. What crashed or hung a decoder, contained or not, is kept in
``--keep DIR``, named by its seed and number.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.forks import Forks, HangError, forks, job
from tests.mutations import mutant

# Every status that a row of bytes may have.
STATUSES = {
    "ok", "empty", "too_many_bytes", "not_an_image", "format_not_allowed", "truncated", "corrupt", "unsupported",
    "too_many_pixels", "out_of_memory", "decoder_timeout", "decoder_crashed",
}  # fmt: skip
CONTAINED = ("decoder_timeout", "decoder_crashed", "out_of_memory")
PIECE = 256
# Files of one job; an unbounded run is many jobs.
PER_JOB = 5_000
# What a job may hold besides what it holds when it starts, and what a decoder may hold, in MiB.
BOUND = 2_560
# What a job may take before it counts as hung, in seconds; a file may take its decode_seconds.
JOB_SECONDS, FILE_SECONDS = 120.0, 0.5


@dataclass
class Figures:
    """What came of the files so far; memory in MiB."""

    files: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    peak: float = 0.0
    start: float = 0.0
    decoders: float = 0.0
    problems: list[str] = field(default_factory=list)


def write_manifest(path: Path, seed: int, numbers: range) -> None:
    """A manifest of mutants in its own cells, piece by piece."""
    schema = pa.schema([("id", pa.int64()), ("image", pa.binary())])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(numbers.start, numbers.stop, PIECE):
            piece = range(start, min(start + PIECE, numbers.stop))
            writer.write_table(pa.table({"id": piece, "image": [mutant(seed, n) for n in piece]}, schema=schema))


def measured(groups: dict[str, dict[str, Any]], figures: str) -> int:
    """A job that writes down how much memory it and its decoders took; runs in a process of its own."""
    start = _status("VmRSS")
    code = job(groups, True)
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    Path(figures).write_text(json.dumps({"start": start, "peak": own, "decoders": children}))
    return code


def _status(name: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    return 0.0


class Fuzzer:
    """Jobs of mutants, one after the other."""

    def __init__(
        self, forks: Forks, folder: Path, *, seed: int, isolation: str, keep: Path | None, failpoints: str = ""
    ) -> None:
        self.forks, self.folder, self.seed, self.isolation, self.keep = forks, folder, seed, isolation, keep
        self.failpoints = failpoints
        self.figures = Figures()

    def run(self, numbers: range) -> None:
        """One job; what is wrong with it goes to the figures."""
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        write_manifest(folder / "mutants.parquet", self.seed, numbers)
        began = time.monotonic()
        figures = str(folder / "figures.json")
        child = self.forks.start("tests.fuzz:measured", self._config(folder), figures, failpoints=self.failpoints)
        try:
            code = child.wait(JOB_SECONDS + FILE_SECONDS * len(numbers))
        except HangError as error:
            code = None
            self.figures.problems.append(str(error))
        self.figures.seconds += time.monotonic() - began
        if code not in (0, None):
            self.figures.problems.append(f"the job ended with {code}: {child.said()[-2000:]}")
        self._count(folder, numbers)
        if code == 0:
            self._weigh(json.loads((folder / "figures.json").read_text()))
        shutil.rmtree(folder)

    def _config(self, folder: Path) -> dict[str, dict[str, Any]]:
        from pipeline.models.hub import DEMO_FOLDER

        return {
            "model": {"name": str(DEMO_FOLDER)},
            "manifest": {"path": str(folder / "mutants.parquet"), "image": "image", "shard_rows": PIECE},
            "loader": {"batch_size": 64, "workers": 2, "isolation": self.isolation},
            "output": {"dir": str(folder / "out")},
            "errors": {"max_fraction": 1.0},
            "backend": {"device": "cpu"},
            "report": {"progress": "none", "html": False},
        }

    def _count(self, folder: Path, numbers: range) -> None:
        """Hold the rows of the dataset against the files, and keep what a decoder died of."""
        parts = sorted((folder / "out").glob("part-*.parquet"))
        rows = [row for part in parts for row in pq.read_table(part, columns=["id", "status", "error"]).to_pylist()]
        statuses = Counter(row["status"] for row in rows)
        self.figures.files += len(numbers)
        self.figures.statuses += statuses
        problems = self.figures.problems
        if [row["id"] for row in rows] != list(numbers):
            problems.append(f"{len(rows)} rows came out of {len(numbers)} files")
            self._keep("lost", [number for number in numbers if number not in {row["id"] for row in rows}])
        problems += [f"unknown status {status}" for status in statuses if status not in STATUSES]
        problems += [f"{row['id']}: no error text" for row in rows if row["status"] != "ok" and not row["error"]]
        for status in CONTAINED:
            self._keep(status, [row["id"] for row in rows if row["status"] == status])
        report = folder / "out" / "_report.json"
        if report.exists() and json.loads(report.read_text())["counts"] != dict(statuses):
            problems.append("the report has other counts than the rows")

    def _weigh(self, memory: dict[str, float]) -> None:
        figures = self.figures
        figures.start = max(figures.start, memory["start"])
        figures.peak = max(figures.peak, memory["peak"])
        figures.decoders = max(figures.decoders, memory["decoders"])
        grown = memory["peak"] - memory["start"]
        if max(grown, memory["decoders"]) > BOUND:
            figures.problems.append(f"memory: {grown:.0f} MiB more, a decoder {memory['decoders']:.0f}, over {BOUND}")

    def _keep(self, why: str, numbers: list[int]) -> None:
        if self.keep is not None:
            self.keep.mkdir(parents=True, exist_ok=True)
            for number in numbers:
                (self.keep / f"{why}-{self.seed}-{number}.bin").write_bytes(mutant(self.seed, number))


def pieces(files: int, seconds: float) -> Iterator[range]:
    """The numbers of each job: up to ``files`` of them, or until ``seconds`` have passed."""
    end = time.monotonic() + seconds
    for start in range(0, sys.maxsize if seconds else files, PER_JOB):
        if seconds and time.monotonic() >= end:
            return
        yield range(start, start + PER_JOB if seconds else min(start + PER_JOB, files))


def table(figures: Figures) -> str:
    """The figures, for a person."""
    lines = [f"{figures.files:,} files in {figures.seconds:.1f} s: {figures.files / figures.seconds:.0f} files/s"]
    lines += [f"  {name:20}{count:8,}" for name, count in figures.statuses.most_common()]
    contained = sum(figures.statuses[status] for status in CONTAINED)
    lines.append(f"decoders that crashed, hung or ran out of memory, contained: {contained}")
    lines.append(
        f"peak memory: the job {figures.peak:.0f} MiB ({figures.start:.0f} MiB when it started), "
        f"the largest decoder {figures.decoders:.0f} MiB"
    )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run the fuzzer; 1 if anything was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--files", type=int, default=10_000, help="how many (default: 10000)")
    parser.add_argument("--seed", type=int, default=1, help="of the mutations (default: 1)")
    parser.add_argument("--seconds", type=float, default=0.0, help="go on for so long, instead of --files")
    parser.add_argument("--keep", type=Path, help="a folder for the files that crashed or hung a decoder")
    parser.add_argument("--isolation", choices=["process", "none"], default="process", help="loader.isolation")
    options = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    fuzzer = Fuzzer(forks(), folder, seed=options.seed, isolation=options.isolation, keep=options.keep)
    try:
        for numbers in pieces(options.files, options.seconds):
            fuzzer.run(numbers)
        strays = forks().strays()
    finally:
        shutil.rmtree(folder)
    print(table(fuzzer.figures))
    problems = fuzzer.figures.problems + [f"a process outlived its job: {stray}" for stray in strays]
    for problem in problems:
        print(f"PROBLEM: {problem}")
    print("nothing wrong" if not problems else f"{len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
