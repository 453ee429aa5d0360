"""Machines that come and go: parts of one job (``cluster.part=auto``) are killed, paused and replaced until it is done.

    python -m tests.benchmarks.elastic [--kills 200] [--parts 4] [--every 2] [--s3] [--seed 1] [--out elastic-cpu.json]

An encoder that sleeps makes batches last as long as on a small GPU, so that two cores have room for several parts. In
each round the parts run until the dataset is done. Every blow is a SIGKILL, a SIGTERM or a pause, which may outlast the
lease, and each part that ended too early is started anew. Then the dataset is compared, byte for byte, with that of one
run without blows. With ``--s3`` the output is in an S3 server behind a proxy in which one request of five fails. Exits
with 1 on any difference.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pipeline.config.schema import Config
from pipeline.core.machine import machine
from pipeline.core.records import ImageBatch
from pipeline.engine.forward import PendingBatch
from pipeline.storage.base import Storage
from pipeline.storage.factory import open_storage
from tests.crashes import at, small_job
from tests.forks import Child, forks
from tests.s3 import BUCKET, environment, moto_server, pointed_at, proxy_to

BATCH, SHARD = 8, 64
LEASE = 3.0
# Of the blows; the others are kills.
PAUSES, TERMINATIONS = 0.2, 0.1
TAKEN = re.compile(r"shard (\d+) was claimed by a process that is gone")


class Round:
    """One dataset, made by parts that come and go."""

    def __init__(self, options: argparse.Namespace, config: Config, output: str, failing: dict[str, str]) -> None:
        self.options, self.config, self.output, self.environment = options, config, output, failing
        self.counts = Path(str(config.output.dir)).parent / f"counts-{output.rpartition('/')[2]}"
        self.dice = random.Random(f"{options.seed} {output}")
        self.blows: Counter[str] = Counter()
        self.started = 0
        self._paused: list[tuple[Child, float]] = []

    def run(self, most: int) -> None:
        """Run until the dataset is done, with at most so many kills; no blow falls once a part has published it."""
        parts, published = [self._start() for _ in range(self.options.parts)], False
        blow = time.monotonic() + self._pause()
        while parts:
            time.sleep(0.02)
            now = time.monotonic()
            self._go_on(now)
            if now > blow:
                blow = now + self._pause()
                if self.blows["kill"] < most and not published:
                    self._strike(self.dice.choice(parts))
            for number, part in enumerate(parts):
                if not part.alive():
                    code = part.wait()
                    # A signal may arrive before the handler is there, or while the interpreter ends.
                    told = code == -signal.SIGTERM or (code == 1 and "KeyboardInterrupt" in part.said())
                    assert told or code in (0, 75, -signal.SIGKILL), f"exit code {code}: {part.said()[-3000:]}"
                    published |= code == 0
                    parts[number : number + 1] = [] if code == 0 else [self._start()]
                    break

    def _strike(self, part: Child) -> None:
        if any(part is paused for paused, _ in self._paused):
            return
        kind = self.dice.random()
        if kind < PAUSES:
            part.send(signal.SIGSTOP)
            self._paused.append((part, time.monotonic() + LEASE * self.dice.uniform(0.2, 2.5)))
            self.blows["pause"] += 1
        else:
            number = signal.SIGTERM if kind < PAUSES + TERMINATIONS else signal.SIGKILL
            part.send(number)
            self.blows["terminate" if number == signal.SIGTERM else "kill"] += 1

    def _go_on(self, now: float) -> None:
        for part, end in list(self._paused):
            if now > end:
                part.send(signal.SIGCONT)
                self._paused.remove((part, end))

    def _pause(self) -> float:
        return float(self.options.every * self.dice.uniform(0.5, 1.5))

    def _start(self) -> Child:
        self.started += 1
        config = self.config.changed({"cluster.part": "auto"})
        return start(config, self.output, self.counts, delay=self.options.delay, environment=self.environment)


def start(config: Config, output: str, counts: Path, *, delay: float, environment: dict[str, str]) -> Child:
    """Start a process that embeds slowly, and writes the rows of each batch to ``counts``."""
    call = "tests.benchmarks.elastic:part"
    return forks().start(
        call, at(config, output), str(counts), failpoints=f"encode=delay:{delay}", environment=environment
    )


def part(groups: dict[str, dict[str, Any]], counts: str) -> int:
    """One part, which SIGTERM interrupts as it does the command."""
    from pipeline.engine.loop import _Encoding
    from tests.forks import job

    encode, file = _Encoding._encode, os.open(counts, os.O_CREAT | os.O_WRONLY | os.O_APPEND)

    def counted(self: _Encoding, batch: ImageBatch, number: int) -> PendingBatch:
        os.write(file, f"{len(batch.rows)}\n".encode())
        return encode(self, batch, number)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    _Encoding._encode = counted  # type: ignore[method-assign]
    signal.signal(signal.SIGTERM, interrupt)
    try:
        return job(groups)
    except KeyboardInterrupt:
        return 75
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def embedded(counts: Path) -> int:
    """Rows of all batches so far."""
    return sum(map(int, counts.read_text().split()))


def content(storage: Storage) -> dict[str, str | None]:
    """Digests of the files that must be equal, by name."""
    names = [name for name in storage.sizes() if not name.startswith(("_report", "_run", "_ids"))]
    names += [f"_commits/{name}" for name in storage.sizes("_commits")]
    return {name: storage.digest(name) for name in sorted(names)}


def taken_over(storage: Storage) -> int:
    """Shards that a part took over from one that was gone."""
    logs = [name for name in storage.sizes("_parts") if name.endswith(".log")]
    return sum(len(TAKEN.findall((storage.read(f"_parts/{name}") or b"").decode())) for name in logs)


def main(arguments: list[str] | None = None) -> int:
    """Run rounds until the wanted kills are reached; 1 on any difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--parts", type=int, default=4)
    parser.add_argument("--every", type=float, default=2.0, help="seconds between blows, about (default: 2)")
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--delay", type=float, default=0.2, help="seconds that a batch of 8 takes (default: 0.2)")
    parser.add_argument("--share", type=float, default=0.2, help="of requests to S3 that fail (default: 0.2)")
    parser.add_argument("--s3", action="store_true")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="elastic-")))
        config = small_job(
            folder,
            options.rows,
            manifest={"shard_rows": SHARD},
            loader={"batch_size": BATCH, "prefetch": 1},
            report={"html": False},
            output={"lease_seconds": LEASE},
        )
        failing: dict[str, str] = {}
        if options.s3:
            proxy = stack.enter_context(proxy_to(stack.enter_context(moto_server(folder / "moto.log"))))
            proxy.throw_dice(options.share, options.seed)
            failing = environment(proxy.url)
            stack.enter_context(pointed_at(proxy.url))
        unbroken = start(config, str(folder / "unbroken"), folder / "once", delay=0, environment={})
        assert unbroken.wait() == 0, unbroken.said()
        once = embedded(folder / "once")
        expected = content(open_storage(str(folder / "unbroken")))
        print(f"{options.rows} rows in shards of {SHARD}, seed {options.seed}", flush=True)
        figures: Counter[str] = Counter()
        began = time.monotonic()
        while figures["kill"] < options.kills:
            output = (
                f"s3://{BUCKET}/round-{figures['rounds']}" if options.s3 else str(folder / f"round-{figures['rounds']}")
            )
            each = Round(options, config, output, failing)
            each.run(options.kills - figures["kill"])
            if options.s3:
                proxy.share = 0.0
            storage = open_storage(output)
            found = content(storage)
            different = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
            assert not different, f"{output} differs from the unbroken dataset in {different}"
            ids = [id for name in found if name.startswith("part-") for id in _ids(storage, name)]
            assert ids == pq.read_table(str(config.manifest.path))["id"].to_pylist(), "rows are missing, or there twice"
            figures += each.blows
            figures["rounds"] += 1
            figures["parts started"] += each.started
            figures["shards taken over"] += taken_over(storage)
            figures["rows embedded twice"] += embedded(each.counts) - once
            print(dict(figures), flush=True)
            if options.s3:
                proxy.share = options.share
        result = {
            "machine": machine("cpu", 2),
            "options": {name: str(value) for name, value in vars(options).items() if name != "out"},
            "seconds": round(time.monotonic() - began, 1),
            **figures,
        }
        print(json.dumps(result, indent=2))
        if options.out:
            options.out.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def _ids(storage: Storage, name: str) -> list[str]:
    return list(pq.read_table(io.BytesIO(storage.read(name) or b""), columns=["id"])["id"].to_pylist())


if __name__ == "__main__":
    sys.exit(main())
