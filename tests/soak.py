"""Kill a job at random moments for as long as you like: ``python -m tests.soak --minutes 10`` (or ``--kills 200``).

A round is one dataset: the job runs, is struck (SIGKILL or SIGTERM at a random moment, or a random failpoint) and
runs again, until it ends by itself; then the dataset is compared, byte for byte, with that of an unbroken run. After
every blow, what was committed must be whole. Exits with 1 on any difference.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq

from pipeline.config.schema import Config
from tests.crashes import PLACES, at, check_dataset, leftovers, small_job
from tests.forks import Child, Forks, forks
from tests.jobs import content, overrides_of, start

# Of every run that is struck.
FAILPOINT, TERMINATE = 0.2, 0.1
# What a run may answer: done, failed by a failpoint, held by another, interrupted, killed.
CODES = {0, 1, 75, -signal.SIGKILL}


class Process:
    """``python -m pipeline.run`` as a process of its own, with the methods of :class:`tests.forks.Child`."""

    def __init__(self, overrides: list[str]) -> None:
        self._process = start(*overrides)
        self._said = ""

    def alive(self, seconds: float) -> bool:
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return True
        return False

    def send(self, number: int) -> None:
        self._process.send_signal(number)

    def wait(self, seconds: float = 120) -> int:
        self._said += self._process.communicate(timeout=seconds)[1]
        return self._process.returncode

    def said(self) -> str:
        return self._said


class Soak:
    """Rounds of one job until a number of kills, or a time, is reached."""

    def __init__(self, options: argparse.Namespace, folder: Path, forks: Forks) -> None:
        self.dice = random.Random(options.seed)
        self.options, self.folder, self.forks = options, folder, forks
        self.config = small_job(folder, options.rows, loader={"isolation": options.isolation})
        self.ids = pq.read_table(str(self.config.manifest.path))["id"].to_pylist()
        self.blows: Counter[str] = Counter()
        self.states: Counter[str] = Counter()
        self.kills = self.rounds = self.runs = 0
        self.began = time.monotonic()

    def run(self) -> None:
        """Run all rounds; raises an ``AssertionError`` at the first difference."""
        whole = Path(self.config.output.dir)
        first = self._start(whole, "")
        assert first.wait() == 0, first.said()
        self._took = time.monotonic()
        second = self._start(whole.parent / "timed", "")
        assert second.wait() == 0, second.said()
        self._took = time.monotonic() - self._took
        self.expected = content(whole)
        assert content(whole.parent / "timed") == self.expected, "two unbroken runs differ"
        print(f"{len(self.ids)} rows; an unbroken run takes {self._took:.2f} s; seed {self.options.seed}", flush=True)
        self.began = time.monotonic()
        while not self._over():
            self._round(self.folder / f"round-{self.rounds}")
            self.rounds += 1
        strays = self.forks.strays()
        assert not strays, f"processes that outlived their jobs: {strays}"

    def _over(self) -> bool:
        if self.options.kills:
            return self.kills >= self.options.kills
        return time.monotonic() - self.began > 60 * self.options.minutes

    def _round(self, output: Path) -> None:
        while True:
            code = 0 if self._over() else self._strike(output)
            if code == 0:
                # Ended before the blow, or there is none any more: this run is the one that mends.
                last = self._start(output, "")
                assert last.wait() == 0, last.said()
                break
            rows = check_dataset(output, self.ids)
            if self.options.verbose:
                print(f"round {self.rounds}: exit code {code}, {rows} rows committed", flush=True)
        assert check_dataset(output, self.ids) == len(self.ids), "rows are missing"
        found = content(output)
        different = sorted(name for name in {*found, *self.expected} if found.get(name) != self.expected.get(name))
        assert not different, f"{output} differs from the unbroken dataset in {different}"
        assert not leftovers(output), f"{output} holds {leftovers(output)}"
        shutil.rmtree(output)

    def _strike(self, output: Path) -> int:
        """One run with one blow; its exit code."""
        rule = ""
        if self.dice.random() < FAILPOINT and not self.options.processes:
            action = self.dice.choice(["kill", "raise:EIO", "raise:ENOSPC", "delay:0.3"])
            rule = f"{self.dice.choice(PLACES)}={action}@{self.dice.randint(1, 6)}"
        number = signal.SIGTERM if self.dice.random() < TERMINATE else signal.SIGKILL
        # The command handles signals.
        job = self._start(output, rule, as_command=number == signal.SIGTERM)
        self.runs += 1
        try:
            # Later than a run takes, too: some blows fall on its last files, and some miss.
            if job.alive(self.dice.uniform(0, 1.1 * self._took)):
                job.send(number)
        finally:
            code = job.wait()
        assert code in CODES, f"exit code {code}: {job.said()}"
        assert code != 1 or rule, f"failed by itself: {job.said()}"
        self.kills += code == -signal.SIGKILL
        kind = {0: "missed", 1: "an error raised", 75: "SIGTERM"}.get(code, "SIGKILL")
        self.blows[kind] += 1
        if code:
            self.states[state(output, len(self.ids))] += 1
        return code

    def _start(self, output: Path, rule: str, *, as_command: bool = False) -> Child | Process:
        if self.options.processes:
            return Process(command(self.config, output))
        if as_command:
            return self.forks.start("tests.forks:run_command", *command(self.config, output), failpoints=rule)
        return self.forks.start("tests.forks:job", at(self.config, output), failpoints=rule)

    def table(self) -> str:
        """The figures of the soak."""
        seconds = time.monotonic() - self.began
        lines = [f"{self.rounds} rounds, {self.runs} runs struck, {self.kills} killed, {seconds:.0f} s", ""]
        for title, counts in (("blows", self.blows), ("what existed then", self.states)):
            lines += [f"| {title} | times |", "| --- | ---: |"]
            lines += [f"| {name} | {count} |" for name, count in sorted(counts.items())] + [""]
        return "\n".join(lines)


def command(config: Config, output: Path) -> list[str]:
    """The command line of the job with another output."""
    words = [word for word in overrides_of(config) if not word.startswith("output.dir=")]
    more = {"output.dir": output, "prompts.cache": config.prompts.cache, "loader.isolation": config.loader.isolation}
    return [*words, *(f"{key}={value}" for key, value in more.items())]


def state(output: Path, rows: int) -> str:
    """The progress of a run, by its files."""
    names = {path.name for path in output.iterdir()} if output.exists() else set()
    commits = len(list(output.glob("_commits/*.json")))
    parts = len([name for name in names if name.startswith("part-")])
    half = ", a half-written file" if any(name.startswith("_tmp") for name in names) else ""
    if "_report.html" in names:
        return f"7 everything{half}"
    if "_SUCCESS" in names:
        return f"6 _SUCCESS, no whole report{half}"
    if commits and commits * 2 >= rows:
        return f"5 every commit, no _SUCCESS{half}"
    if parts > commits:
        return f"4 commits, and a part without one{half}"
    if commits:
        return f"3 some commits{half}"
    return f"{'2 the plan' if '_plan.json' in names else '1 no plan'}{half}"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0, help="how long, unless --kills is given (default: 1)")
    parser.add_argument("--kills", type=int, default=0, help="stop after so many killed runs")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the random moments (default: the time)")
    parser.add_argument("--rows", type=int, default=80, help="images of the job (default: 80)")
    parser.add_argument("--isolation", choices=["process", "none"], default="process", help="loader.isolation")
    parser.add_argument("--processes", action="store_true", help="start Python anew for each run: slower by far")
    parser.add_argument("--verbose", action="store_true", help="a line for each blow")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the soak; 1 on any difference."""
    options = parse(arguments)
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    soak = Soak(options, folder, forks())
    try:
        soak.run()
    except AssertionError as error:
        print(soak.table())
        print(f"FAILED: {error}\nseed {options.seed}; the files stay in {folder}")
        return 1
    print(soak.table())
    print("every dataset is byte for byte the unbroken one; no row lost, none twice")
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
