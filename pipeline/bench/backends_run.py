"""The order of a benchmark: one child for each row, opened and measured in turn, batch size by batch size.

All rows at one batch size are open together, each in its process, and the rounds go over all of them, so that a
machine that slows down for a while slows all rows. Batch sizes are the outer loop: a child holds one encoder at a
time and no checkpoint while it waits, or the idle children would fill the memory.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.bench.records import Measurement, Result, Row
from pipeline.bench.selection import BATCHES, REFERENCE, for_device
from pipeline.bench.worker_process import Child, Died, Refused
from pipeline.config.schema import Config
from pipeline.core.errors import PipelineError
from pipeline.core.records import Parity

# What the reference's child leaves for the others.
SAMPLE, BANK = "sample.npz", "bank.npz"


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure: rows and batch sizes (None: by device), rounds, seconds for each, and the limit of an answer."""

    rows: Sequence[Row]
    batches: Sequence[int] | None
    repeats: int
    seconds: float
    timeout: float


class _Entry:
    """A row on its way: its child while it can still be measured, and what is known by now."""

    def __init__(self, row: Row, child: Child, timeout: float) -> None:
        self.row, self._child, self._timeout = row, child, timeout
        self.error: PipelineError | None = None
        self.facts: dict[str, Any] = {}
        self.done: list[Measurement] = []

    def send(self, request: Mapping[str, object]) -> None:
        """Send a request, unless the row has failed."""
        if self.error is None:
            try:
                self._child.send(request)
            except Died as error:
                self._fail(error)

    def receive(self) -> dict[str, Any] | None:
        """The answer, or None where the row has failed."""
        if self.error is None:
            try:
                return self._child.receive(timeout=self._timeout)
            except (Refused, Died) as error:
                self._fail(error)
        return None

    def ask(self, request: Mapping[str, object]) -> dict[str, Any] | None:
        """Send and receive."""
        self.send(request)
        return self.receive()

    def result(self) -> Result:
        """What came of the row."""
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

    def _fail(self, error: PipelineError) -> None:
        self.error = error
        self._child.close()


def start_child(row: Row, work: Path) -> Child:
    """A process for the row, with compiler caches of its own in ``work``, so that start-up means start-up."""
    folder = work / row.file_name
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "TRITON_CACHE_DIR": str(folder / "triton")}
    command = [sys.executable, "-m", "pipeline.bench.worker"]
    return Child(command, complaints=work / f"{row.file_name}.log", environment=caches)


def run(
    config: Config,
    plan: Plan,
    work: Path,
    *,
    say: Callable[[str], None],
    start: Callable[[Row, Path], Child] = start_child,
) -> tuple[list[Result], dict[str, Any]]:
    """Measure every row; the results, the reference first, and what the reference's child told of the machine.

    Raises:
        PipelineError: the reference itself cannot run, so that there is nothing to compare with.
    """
    with ExitStack() as stack:

        def enter(row: Row) -> _Entry:
            child = start(row, work)
            stack.callback(child.close)
            entry = _Entry(row, child, plan.timeout)
            entry.send(_set_up(row, config, work))
            return entry

        say("opening the model, drawing the sample, embedding the labels")
        reference = enter(REFERENCE)
        reference.receive()
        facts = reference.ask({"do": "prepare"})
        if facts is None:
            raise _no_reference(reference)
        # The others load their libraries side by side; from then on only one child works at a time.
        rows = for_device(plan.rows, facts["device"])[1:]
        say(f"starting {len(rows)} more processes")
        entries = [reference, *map(enter, rows)]
        for entry in entries[1:]:
            entry.receive()
        batches = plan.batches or BATCHES[facts["device"]]
        for number, batch in enumerate(batches, start=1):
            _measure(entries, batch, plan, work, say, place=f"batch {batch} ({number} of {len(batches)})")
            if not reference.done:
                raise _no_reference(reference)
        return [entry.result() for entry in entries], facts


def _measure(
    entries: list[_Entry], batch: int, plan: Plan, work: Path, say: Callable[[str], None], *, place: str
) -> None:
    """Open every row that is left at one batch size, then measure them in turn, round by round."""
    opened: dict[Row, dict[str, Any]] = {}
    for entry in [entry for entry in entries if entry.error is None]:
        vectors = str(_vectors(work, entry.row, batch))
        answer = entry.ask({"do": "open", "batch": batch, "vectors": vectors, "seconds": plan.seconds})
        if answer is not None:
            opened[entry.row], entry.facts = answer, answer
            say(f"{place}: {entry.result().title} opened in {answer['startup_seconds']:.1f} s")
        else:
            say(f"{place}: {entry.result().title} cannot run: {entry.error}")
        if entry is entries[0] and answer is None and not entry.done:
            return
    rounds: dict[Row, list[dict[str, Any]]] = {row: [] for row in opened}
    for number in range(plan.repeats):
        said = []
        turn = number % len(entries)
        # Each round begins with another row, so that none always follows the same one.
        for entry in entries[turn:] + entries[:turn]:
            answer = entry.ask({"do": "measure", "seconds": plan.seconds}) if entry.row in opened else None
            if answer is not None:
                rounds[entry.row].append(answer)
                said.append(f"{entry.result().title} {answer['images_per_second']:.1f}")
            elif entry.row in opened and len(rounds[entry.row]) == number:
                said.append(f"{entry.result().title} died")
        say(f"{place}, round {number + 1} of {plan.repeats}, images/s: {', '.join(said)}")
    origin = entries[0].done[0].batch if entries[0].done else batch
    for entry in entries:
        answers = rounds.get(entry.row, [])
        if len(answers) == plan.repeats:
            parity = _parity(work, _vectors(work, entry.row, batch), _vectors(work, REFERENCE, origin))
            entry.done.append(_measurement(batch, opened[entry.row], answers, parity))


def _measurement(batch: int, opened: dict[str, Any], answers: list[dict[str, Any]], parity: Parity) -> Measurement:
    return Measurement(
        batch=batch,
        startup_seconds=opened["startup_seconds"],
        images_per_second=tuple(answer["images_per_second"] for answer in answers),
        latencies=tuple(seconds for answer in answers for seconds in answer["latencies"]),
        start_rss=opened["start_rss"],
        rss=max(answer["rss"] for answer in answers),
        device=max(answer["device"] for answer in answers),
        lowest_cosine=parity.lowest_cosine,
        mean_cosine=parity.mean_cosine,
        top1=1.0 if parity.top1 is None else parity.top1,
    )


def _parity(work: Path, vectors: Path, reference: Path) -> Parity:
    """How far the vectors of one file are from those of the other."""
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
    if config.backend.artifacts is None:
        # A store of its own for each row, empty at first: the first start then shows what exporting takes. Nothing
        # in it is used for a job, so that what misses the thresholds may come into the table, with its figures.
        values["backend"]["artifacts"] = str(work / row.file_name / "artifacts")
        for name in ("lowest_cosine", "mean_cosine", "top1"):
            values["parity"][name] = dict.fromkeys(values["parity"][name], 0.0)
    return {"config": values, "row": asdict(row), "work": str(work)}


def _vectors(work: Path, row: Row, batch: int) -> Path:
    return work / f"{row.file_name}-{batch}.npy"


def _no_reference(entry: _Entry) -> PipelineError:
    """The reference's own error, which knows its exit code."""
    return entry.error or PipelineError("torch fp32, which all rows are compared with, could not be measured")
