"""Measure the backends: one child process for each row, batch size by batch size, round by round.

All rows are open at one batch size at a time, each in its process, and every round goes over all of them, so that a
machine that slows down for a while slows all rows. Batch sizes are the outer loop: a waiting child holds one encoder
and no checkpoint, as idle children would fill the memory otherwise.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.bench.command import progress, rotated
from pipeline.bench.records import Measurement, Result, Row
from pipeline.bench.selection import BATCHES, REFERENCE, for_device
from pipeline.config.schema import Config
from pipeline.core.child import Child, ChildEnded, ChildError
from pipeline.core.errors import PipelineError
from pipeline.core.records import Parity

# Files that the reference's child writes for the others.
SAMPLE, BANK = "sample.npz", "bank.npz"


@dataclass(frozen=True, slots=True)
class Plan:
    """Rows and batch sizes (None: by device), rounds, seconds of one measurement, and the timeout of an answer."""

    rows: Sequence[Row]
    batches: Sequence[int] | None
    repeats: int
    seconds: float
    timeout: float


class _Entry:
    """A row, its child until the first error, and its results so far."""

    def __init__(self, row: Row, child: Child, timeout: float) -> None:
        self.row, self._child, self._timeout = row, child, timeout
        self.error: PipelineError | None = None
        # The answers to opening the row and to each round, at one batch size.
        self.facts: dict[str, Any] = {}
        self.rounds: list[dict[str, Any]] = []
        self.done: list[Measurement] = []

    def send(self, request: Mapping[str, object]) -> None:
        """Send a request, unless the row has failed."""
        self._unless_failed(lambda: self._child.send(request))

    def receive(self) -> dict[str, Any]:
        """Return the answer; an empty one where the row has failed."""
        return self._unless_failed(lambda: self._child.receive(timeout=self._timeout)) or {}

    def ask(self, request: Mapping[str, object]) -> dict[str, Any]:
        """Send a request and return its answer; an empty one where the row has failed."""
        self.send(request)
        return self.receive()

    def result(self) -> Result:
        """Return the measurements and the failure of the row."""
        failure = str(self.error) if self.error else None
        if failure and self.done:
            failure = f"stopped after batch {self.done[-1].batch}: {failure}"
        return Result(
            row=self.row,
            precision=self.facts.get("precision", self.row.precision),
            weight_bytes=self.facts.get("weight_bytes", 0),
            fingerprint=self.facts.get("fingerprint", {}),
            at=tuple(self.done),
            failure=failure,
        )

    def _unless_failed(self, call: Callable[[], Any]) -> Any:
        if self.error is None:
            try:
                return call()
            except (ChildError, ChildEnded) as error:
                self.error = error
                self._child.close()
        return None


def start_child(row: Row, work: Path) -> Child:
    """Start the process of a row. Its compiler caches are its own and empty, so that start-up includes compiling."""
    folder = work / row.file_name
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "TRITON_CACHE_DIR": str(folder / "triton")}
    command = [sys.executable, "-m", "pipeline.bench.worker"]
    return Child(command, log=work / f"{row.file_name}.log", environment=caches)


def run(
    config: Config, plan: Plan, work: Path, *, start: Callable[[Row, Path], Child] = start_child
) -> tuple[list[Result], dict[str, Any]]:
    """Measure every row; return the results, the reference first, and the facts of the machine and the sample.

    Raises:
        PipelineError: the reference cannot run, so that there is nothing to compare with.
    """
    with ExitStack() as stack:

        def enter(row: Row) -> _Entry:
            entry = _Entry(row, stack.enter_context(start(row, work)), plan.timeout)
            entry.send(_set_up(row, config, work))
            return entry

        progress("opening the model, drawing the sample, embedding the labels")
        reference = enter(REFERENCE)
        reference.receive()
        facts = reference.ask({"do": "prepare"})
        _require(reference)
        # The others load their libraries side by side; from then on only one child works at a time.
        rows = for_device(plan.rows, facts["device"])[1:]
        progress(f"starting {len(rows)} more processes")
        entries = [reference, *map(enter, rows)]
        for entry in entries[1:]:
            entry.receive()
        batches = plan.batches or BATCHES[facts["device"]]
        for number, batch in enumerate(batches, start=1):
            place = f"batch {batch} ({number} of {len(batches)})"
            for entry in entries:
                _open(entry, batch, plan, work, place)
                _require(reference)
            _measure(entries, plan, place)
            _collect(entries, batch, work)
            _require(reference)
        return [entry.result() for entry in entries], facts


def _open(entry: _Entry, batch: int, plan: Plan, work: Path, place: str) -> None:
    """Open a row at one batch size, unless it has failed."""
    if entry.error is None:
        vectors = str(_vectors(work, entry.row, batch))
        facts = entry.ask({"do": "open", "batch": batch, "vectors": vectors, "seconds": plan.seconds})
        entry.facts, entry.rounds = facts or entry.facts, []
        words = f"opened in {facts['startup_seconds']:.1f} s" if facts else f"cannot run: {entry.error}"
        progress(f"{place}: {entry.result().title} {words}")


def _measure(entries: Sequence[_Entry], plan: Plan, place: str) -> None:
    """Measure the rows that have not failed in turn, round by round."""
    for number in range(plan.repeats):
        words = []
        for entry in rotated(entries, number):
            if entry.error is None:
                answer = entry.ask({"do": "measure", "seconds": plan.seconds})
                entry.rounds += [answer] if answer else []
                rate = f"{answer['images_per_second']:.1f}" if answer else "failed"
                words.append(f"{entry.result().title} {rate}")
        progress(f"{place}, round {number + 1} of {plan.repeats}, images/s: {', '.join(words)}")


def _collect(entries: Sequence[_Entry], batch: int, work: Path) -> None:
    """Add a measurement to every row that has not failed."""
    origin = entries[0].done[0].batch if entries[0].done else batch
    for entry in entries:
        if entry.error is None:
            parity = _parity(work, _vectors(work, entry.row, batch), _vectors(work, REFERENCE, origin))
            entry.done.append(
                Measurement(
                    batch=batch,
                    startup_seconds=entry.facts["startup_seconds"],
                    images_per_second=tuple(answer["images_per_second"] for answer in entry.rounds),
                    latencies=tuple(seconds for answer in entry.rounds for seconds in answer["latencies"]),
                    rss=max(answer["rss"] for answer in entry.rounds),
                    device=max(answer["device"] for answer in entry.rounds),
                    lowest_cosine=parity.lowest_cosine,
                    mean_cosine=parity.mean_cosine,
                    top1=1.0 if parity.top1 is None else parity.top1,
                )
            )


def _parity(work: Path, vectors: Path, reference: Path) -> Parity:
    """Compare the vectors of two files."""
    import numpy as np
    import torch

    from pipeline.backends.compare import compare
    from pipeline.core.records import TextBank

    with np.load(work / SAMPLE) as file:
        ids = tuple(map(str, file["ids"]))
    with np.load(work / BANK) as file:
        names, features = tuple(map(str, file["names"])), file["features"]
    bank = TextBank(names=names, features=features, scoring="softmax", scale=1.0, bias=0.0, fingerprint="")
    return compare(torch.from_numpy(np.load(vectors)), torch.from_numpy(np.load(reference)), ids=ids, bank=bank)


def _set_up(row: Row, config: Config, work: Path) -> dict[str, Any]:
    values = asdict(config)
    options = asdict(row)
    values["backend"] |= {"name": options.pop("backend"), **options}
    if config.backend.artifacts is None:
        # Each row has its own store, empty at first: the first start then includes exporting. No job uses what is in
        # it, so a backend that misses the thresholds may come into the table, with its figures.
        values["backend"]["artifacts"] = str(work / row.file_name / "artifacts")
        for name in ("lowest_cosine", "mean_cosine", "top1"):
            values["parity"][name] = dict.fromkeys(values["parity"][name], 0.0)
    return {"config": values, "work": str(work)}


def _vectors(work: Path, row: Row, batch: int) -> Path:
    return work / f"{row.file_name}-{batch}.npy"


def _require(reference: _Entry) -> None:
    """Raise the reference's own error, with its exit code, unless it was measured at a batch size before."""
    if reference.error is not None and not reference.done:
        raise reference.error
