"""``python -m tests.load``: load test of the service, compared with a service without batching.

    python -m tests.load --clients 1,8,64 --seconds 5 model=clip_vit_b32 model.weights=random backend=onnx_int8
    python -m tests.load --memory 10000

Both services are started with the given overrides and measured in turns, so that other load on the machine affects
both. Each client sends an image, waits for its embedding, and sends the next one. All embeddings of an image that are
read must be equal.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from pipeline.engine.demo.folder import jpeg
from pipeline.engine.demo.scenes import sample
from tests.conftest import ROOT
from tests.service import BOUNDARY, form

ALONE = ("loader.batch_size=1", "serve.shapes=1", "serve.wait_ms=0", "backend.streams=1")
IMAGES = 64
# One of so many answers is parsed; all are counted.
READ = 16
# Largest distance of two embeddings of one image, for backends whose rows depend slightly on their neighbours.
NEAR = 0.1


@dataclass
class Server:
    process: subprocess.Popen[bytes]
    port: int

    def rss(self) -> int:
        """Return the resident bytes of the process and its decoders; shared pages count for each."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        pids = [self.process.pid, *map(int, children.read_text().split())]
        pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
        return pages * os.sysconf("SC_PAGE_SIZE")


@dataclass
class Results:
    """Results of clients: seconds of each answer, errors, and the first embedding of each image."""

    seconds: list[float] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    first: dict[int, list[float]] = field(default_factory=dict)

    def take(self, number: int, body: bytes) -> None:
        vector = json.loads(body)["images"][0]["embedding"]
        first = self.first.setdefault(number, vector)
        if sum((a - b) ** 2 for a, b in zip(first, vector, strict=True)) > NEAR**2:
            self.bad.append(f"image {number} has a different embedding than before")


@contextmanager
def served(*overrides: str) -> Iterator[Server]:
    """Start a service in a child process and wait until it is ready."""
    command = [sys.executable, "-m", "pipeline.serve", "serve.port=0", *overrides]
    with tempfile.NamedTemporaryFile() as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        try:
            yield Server(process, asyncio.run(_ready(process, Path(log.name))))
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


async def _ready(process: subprocess.Popen[bytes], log: Path, seconds: float = 300) -> int:
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        found = re.search(r"listening on http://127\.0\.0\.1:(\d+)", log.read_text())
        if found and (await ask(int(found[1]), b"GET /readyz HTTP/1.1\r\nhost: a\r\n\r\n"))[0] == 200:
            return int(found[1])
        await asyncio.sleep(0.1)
    raise SystemExit(f"the service did not become ready: {log.read_text()[-2000:]}")


async def ask(port: int, request: bytes) -> tuple[int, bytes]:
    """Send one request on a new connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        return await _exchange(reader, writer, request)
    finally:
        writer.close()


async def _exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> tuple[int, bytes]:
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"(?i)content-length: (\d+)", head)
    assert length is not None, head
    return int(head.split()[1]), await reader.readexactly(int(length[1]))


async def _client(port: int, number: int, requests: list[bytes], results: Results, go_on: Iterator[bool]) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
    try:
        for _ in go_on:
            number = (number + 1) % len(requests)
            started = time.perf_counter()
            status, body = await _exchange(reader, writer, requests[number])
            results.seconds.append(time.perf_counter() - started)
            if status != 200:
                results.bad.append(f"{status}: {body[:200]!r}")
            elif len(results.seconds) % READ == 0:
                results.take(number, body)
    finally:
        writer.close()


async def load(port: int, clients: int, requests: list[bytes], go_on: Iterator[bool]) -> Results:
    """Run clients at once until the shared iterator ``go_on`` ends."""
    results = Results()
    await asyncio.gather(*(_client(port, 7 * each, requests, results, go_on) for each in range(clients)))
    return results


def until(seconds: float) -> Iterator[bool]:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        yield True


def images() -> list[bytes]:
    """Return requests for the embedding of one image each."""
    made = []
    for number in range(IMAGES):
        body = form([("images", f"{number}.jpg", jpeg(sample(5, number), 256, 256))])
        head = f"POST /embed HTTP/1.1\r\nhost: a\r\ncontent-type: multipart/form-data; boundary={BOUNDARY}\r\n"
        made.append(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
    return made


def batches(port: int) -> tuple[float, float]:
    """Return the number of batches and of their images so far."""
    text = asyncio.run(ask(port, b"GET /metrics HTTP/1.1\r\nhost: a\r\n\r\n"))[1].decode()
    found = {each.name: each.value for family in text_string_to_metric_families(text) for each in family.samples}
    return found["clip_service_batch_images_count"], found["clip_service_batch_images_sum"]


def compare(options: argparse.Namespace) -> None:
    """Print requests a second and latencies for each number of clients, of both services, median of the rounds."""
    requests, rows = images(), dict[tuple[int, str], list[tuple[float, float, float, float]]]()
    with ExitStack() as opened:
        both = {
            "shared batches": opened.enter_context(served(*options.overrides)),
            "one at a time": opened.enter_context(served(*options.overrides, *ALONE)),
        }
        for _ in range(options.rounds):
            for clients in options.clients:
                for name, server in both.items():
                    asyncio.run(load(server.port, clients, requests, until(min(1.0, options.seconds / 5))))
                    before, started = batches(server.port), time.monotonic()
                    results = asyncio.run(load(server.port, clients, requests, until(options.seconds)))
                    seconds, after = time.monotonic() - started, batches(server.port)
                    if results.bad:
                        raise SystemExit(f"{name}, {clients} clients: {len(results.bad)} bad answers: {results.bad[0]}")
                    cuts = (
                        statistics.quantiles(results.seconds, n=100)
                        if len(results.seconds) > 1
                        else results.seconds * 99
                    )
                    shared = (after[1] - before[1]) / max(1, after[0] - before[0])
                    row = (len(results.seconds) / seconds, 1000 * cuts[49], 1000 * cuts[98], shared)
                    rows.setdefault((clients, name), []).append(row)
    print("| clients | | requests/s | times | p50, ms | p99, ms | images in a batch |")
    print("| ---: | --- | ---: | ---: | ---: | ---: | ---: |")
    for (clients, name), found in rows.items():
        rate, p50, p99, shared = (statistics.median(column) for column in zip(*found, strict=True))
        times = rate / statistics.median(row[0] for row in rows[clients, "one at a time"])
        print(f"| {clients} | {name} | {rate:.1f} | {times:.2f} | {p50:.1f} | {p99:.1f} | {shared:.1f} |")


def memory(options: argparse.Namespace) -> None:
    """Print the memory of the service after each tenth of the requests."""
    requests, step = images(), max(1, options.memory // 10)
    with served(*options.overrides) as server:
        print("| requests | MiB |\n| ---: | ---: |")
        for done in range(0, options.memory + 1, step):
            print(f"| {done} | {server.rss() / 2**20:.1f} |", flush=True)
            if done < options.memory:
                count = iter([True] * step)
                results = asyncio.run(load(server.port, options.clients[-1], requests, count))
                if results.bad:
                    raise SystemExit(f"{len(results.bad)} bad answers: {results.bad[0]}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.load", description=__doc__.split("\n")[0])
    parser.add_argument("overrides", nargs="*", help="for both services")
    parser.add_argument("--clients", default="1,8,64", type=lambda text: [int(each) for each in text.split(",")])
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=1, help="measurements of each; the median is printed")
    parser.add_argument(
        "--memory", type=int, default=0, metavar="N", help="measure the memory after N requests instead"
    )
    options = parser.parse_intermixed_args()
    (memory if options.memory else compare)(options)


if __name__ == "__main__":
    main()
