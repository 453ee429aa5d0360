"""New prompts over the embeddings of a finished dataset: another dataset, with no image read."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from pipeline.config.schema import Config
from pipeline.core.concurrency import in_order
from pipeline.core.errors import PromptsError
from pipeline.core.failpoints import failpoint
from pipeline.core.processes import cores, spent
from pipeline.core.records import OK, Embeddings, Failure, Shard, ShardReport, ShardRows, Stage, TextBank
from pipeline.dataset import commits, lease, plan
from pipeline.dataset.commits import Commit
from pipeline.dataset.dataset import Dataset, vectors_of
from pipeline.dataset.parts import LAYOUT, PartFormat, ShardResult, build_table, count_statuses, format_of
from pipeline.engine.prepare import prompts_fingerprint
from pipeline.engine.query import labels_of, open_model
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.labels import label
from pipeline.models.text import build_bank
from pipeline.report import summary
from pipeline.report.render import PAGE, redraw, try_to_publish
from pipeline.storage.base import Storage
from pipeline.storage.factory import open_storage
from pipeline.telemetry.clocks import StageClocks
from pipeline.telemetry.logs import log_to, log_to_terminal
from pipeline.telemetry.progress import Progress

# Rows are scored in the batches of the source's job, so that even rounding is the same, but in no larger ones.
MOST = 1024
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Work:
    """Inputs of every shard."""

    source: Dataset
    storage: Storage
    form: PartFormat
    bank: TextBank
    features: torch.Tensor
    config: Config
    clocks: StageClocks


def relabel(source: Dataset, config: Config, *, began: float | None = None) -> RelabelReport:
    """Label the source's embeddings with ``config``'s prompts, into the dataset ``config.output.dir``.

    Ids, kept columns, embeddings, statuses and errors are the source's; shards are too, so that it resumes like any
    job. ``config`` is the source's with other ``model`` (the same checkpoint, elsewhere), ``prompts``, ``labels`` and
    ``output.dir``.

    Raises:
        PipelineError: one of :mod:`pipeline.core.errors`, each with its exit code.
    """
    storage = open_storage(config.output.dir)
    config = config.changed({"output.dir": storage.url})
    began = began or time.time()
    with ExitStack() as opened:
        with log_to_terminal(config.log):
            held = opened.enter_context(lease.take(storage, seconds=config.output.lease_seconds))
        opened.enter_context(log_to(storage, form=config.log))
        if held.taken_over:
            log.warning("took over from %s", held.taken_over)
        torch.set_num_threads(cores())
        bank = read_bank(open_model(source, config.model), config)
        features = "from the cache" if bank.cached else "embedded and cached"
        log.info("%s: %d rows; %d labels, text features %s", source.url, source.plan.rows, len(bank.names), features)
        wanted = _plan(source, config, bank)
        plan.compare(storage, wanted)
        held.confirm()
        plan.settle(storage, wanted)
        failpoint("plan.settled")
        return _run(source, config, bank, wanted, storage, held, began)


def read_bank(checkpoint: Checkpoint, config: Config) -> TextBank:
    """The embedded label set of a config, the demo's own for the demo model.

    Raises:
        PromptsError: it names no labels.
    """
    labels = labels_of(config)
    if not labels.names:
        raise PromptsError("no labels: give some, as with 'prompts.labels=[cat,dog]' or prompts.path=labels.csv")
    return build_bank(checkpoint, labels, config.prompts, config.labels)


def _plan(source: Dataset, config: Config, bank: TextBank) -> plan.Plan:
    prints = {
        **source.plan.fingerprints,
        "prompts": prompts_fingerprint(config, bank),
        # The parts are written in this version's layout, whichever version wrote the source.
        "output": {**source.plan.fingerprints["output"], "layout": LAYOUT},
        "source": source.fingerprint,
    }
    about = {**source.plan.about, "model": config.model.name, "source": source.address}
    return plan.new_plan(config, prints, rows=source.plan.rows, about=about)


def _run(
    source: Dataset,
    config: Config,
    bank: TextBank,
    wanted: plan.Plan,
    storage: Storage,
    held: lease.Lease,
    began: float,
) -> RelabelReport:
    done = commits.find_done(storage, wanted, held.confirm)
    resumed = sum(commit.rows for commit in done.values())
    if done:
        log.info("%d of %d shards (%d rows) are done already", len(done), wanted.shards, resumed)
    columns = [source.id, *source.kept]
    form = format_of(wanted, pa.schema([source.schema.field(name) for name in columns]), source.dim)
    clocks, rows, vectors, changed = StageClocks(), 0, 0, 0
    work = _Work(source, storage, form, bank, torch.from_numpy(bank.features), config, clocks)
    before, looped = spent(), time.time()
    todo = (commit for commit in source.commits if commit.shard not in done)
    with (
        Progress(source.plan.rows, done=resumed, mode=config.report.progress) as progress,
        closing(in_order(partial(_relabel, work), todo, threads=source.threads)) as results,
    ):
        for report, moved in results:
            held.check()
            progress.embedded(report.rows)
            if report.committed:
                rows, vectors = rows + report.rows, vectors + report.counts[OK]
                changed += moved
    core = (spent() - before).own
    settled = commits.read_commits(storage, wanted, known=done)
    counts = commits.finalize(storage, wanted, settled, held.confirm)
    parts = [(commit.part, int(start)) for commit, start in zip(settled, source.starts, strict=True)]
    content = summary.summarize(config.output.dir, parts, id=source.id, examples=0)
    result = RelabelReport(
        source={"dataset": source.address, **source.fingerprint},
        started=datetime.fromtimestamp(began, UTC).isoformat(timespec="seconds"),
        rows=rows,
        vectors=vectors,
        changed=changed,
        resumed_rows=resumed,
        total_rows=source.plan.rows,
        wall_seconds=round(time.time() - began, 3),
        startup_seconds=round(looped - began, 3),
        core_seconds=round(core, 3),
        rows_per_core_second=round(rows / core, 1) if rows else 0.0,
        stages={name: round(seconds, 3) for name, seconds in clocks.total().cores.items()},
        counts={OK: counts.pop(OK, 0), **dict(sorted(counts.items()))},
        labels=content.labels,
        prompts={"labels": len(bank.names), "cached": bank.cached},
        memory=summary.memory(),
        machine=summary.machine("cpu", cores()),
        versions=summary.versions(),
        fingerprints=wanted.fingerprints,
        config=asdict(config),
    )
    held.confirm()
    if rows or storage.read(REPORT) is None:
        storage.write(REPORT, (json.dumps(asdict(result), indent=2, ensure_ascii=False) + "\n").encode())
        failpoint("report.written")
        storage.remove(PAGE)
    if config.report.html and storage.size(PAGE) is None:
        # No image is read for new labels, and none for the page of them: python -m pipeline.report shows pictures.
        try_to_publish(storage, partial(redraw, config.output.dir, examples=0))
    say(result, config.output.dir)
    return result


def _relabel(work: _Work, commit: Commit) -> tuple[ShardReport, int]:
    """One shard, from the source's part to the commit; and how many labels are not those of the source."""
    # Every thread has a part of its own, and so one core.
    torch.set_num_threads(1)
    columns = [work.source.id, *work.source.kept]
    with work.clocks.time(Stage.READ):
        table = work.source.read(commit, [*columns, "embedding", "label", "status", "error"], proven=True)
    with work.clocks.time(Stage.LABEL):
        failpoint("label")
        result = _label(work, commit, table, columns)
    with work.clocks.time(Stage.WRITE):
        failpoint("part.build")
        made = build_table(result, work.form)
        changed = _count_changed(table["label"], made["label"])
        report = commits.commit_part(work.storage, commit.shard, made, work.form, count_statuses(result.rows))
    return report, changed


def _label(work: _Work, commit: Commit, table: pa.Table, columns: list[str]) -> ShardResult:
    stored, rows = vectors_of(table["embedding"])
    shard = Shard(index=commit.shard, rows=commit.rows, pieces=())
    failures, vectors = dict[int, Failure](), stored
    if len(rows) < shard.rows:
        failures = _failures(table, rows)
        vectors = np.zeros((shard.rows, stored.shape[1]), dtype=stored.dtype)
        vectors[rows] = stored
    k = min(work.config.labels.top_k, len(work.bank.names))
    top, scores = torch.zeros((shard.rows, k), dtype=torch.int64), torch.zeros((shard.rows, k))
    size = min(MOST, int(work.source.plan.fingerprints["batch_size"]))
    for start in range(0, len(rows), size):
        places = torch.from_numpy(rows[start : start + size])
        # Copied: Arrow's memory is read-only, of which torch warns.
        batch = torch.from_numpy(stored[start : start + size].astype(np.float32))
        found = label(Embeddings(batch), work.bank, work.features, top_k=k)
        top[places], scores[places] = found.indices, found.scores
    return ShardResult(
        rows=ShardRows(shard=shard, table=table.select(columns), failures=failures),
        vectors=vectors,
        top=top.numpy(),
        scores=scores.numpy(),
        names=work.bank.names,
        threshold=work.config.labels.threshold,
    )


def _failures(table: pa.Table, rows: NDArray[np.int64]) -> dict[int, Failure]:
    """Why the rows other than these have no embedding, by position."""
    failed = np.ones(table.num_rows, dtype=bool)
    failed[rows] = False
    places = np.flatnonzero(failed)
    told = table.select(["status", "error"]).take(pa.array(places)).to_pylist()
    return {
        int(place): Failure(status=row["status"], error=row["error"]) for place, row in zip(places, told, strict=True)
    }


def _count_changed(before: pa.ChunkedArray, after: pa.ChunkedArray) -> int:
    same = pc.fill_null(pc.equal(before, after), False)
    neither = pc.and_(pc.is_null(before), pc.is_null(after))
    return len(before) - int(pc.sum(pc.or_(same, neither)).as_py())


REPORT = "_report.json"
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RelabelReport:
    """Content of the ``_report.json`` of a relabelled dataset; times are seconds, ``stages`` are core seconds.

    ``rows`` counts what this run committed, ``vectors`` those of them that have an embedding, ``changed`` those whose
    label is another than in the source. ``core_seconds`` are of the whole loop, ``rows_per_core_second`` follows.
    """

    source: Mapping[str, str]
    started: str
    rows: int
    vectors: int
    changed: int
    resumed_rows: int
    total_rows: int
    wall_seconds: float
    startup_seconds: float
    core_seconds: float
    rows_per_core_second: float
    stages: Mapping[str, float]
    counts: Mapping[str, int]
    labels: Mapping[str, int]
    prompts: Mapping[str, object]
    memory: Mapping[str, float]
    machine: Mapping[str, object]
    versions: Mapping[str, str]
    fingerprints: Mapping[str, object]
    config: Mapping[str, object]
    exit_code: int = 0


def say(result: RelabelReport, output: str) -> None:
    """The same for the log, in a few lines."""
    if not result.rows:
        log.info("%s is complete: %d rows; nothing to do", output, result.total_rows)
        return
    log.info(
        "%s rows labelled in %.1f s, %s rows a second of a core; %s have another label than in the source",
        f"{result.rows:,}",
        result.wall_seconds,
        f"{result.rows_per_core_second:,.0f}",
        f"{result.changed:,}",
    )
    log.info("dataset: %s   report: %s/_report.html", output, output)
