"""New prompts over the embeddings of a finished dataset: another dataset, with no image read."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from pipeline.config.schema import Config
from pipeline.core.concurrency import in_order
from pipeline.core.errors import ConfigError, Problem, PromptsError
from pipeline.core.failpoints import failpoint
from pipeline.core.machine import machine, memory, versions
from pipeline.core.processes import cores, spent
from pipeline.core.records import OK, Embeddings, Failure, Shard, ShardReport, ShardRows, Stage, TextBank, by_status
from pipeline.core.run_report import RunReport
from pipeline.dataset import commits, lease, plan
from pipeline.dataset.commits import Commit
from pipeline.dataset.dataset import Dataset, text_vectors_of
from pipeline.dataset.names import check_names, differing_in_case, named_like_folders
from pipeline.dataset.parts import LAYOUT, PartFormat, ShardResult, build_table, count_statuses, format_of
from pipeline.dataset.vectors import check_heads, cut, vectors_of
from pipeline.engine.demo.notes import log_notes, notes_of
from pipeline.engine.prepare import log_labels, prompts_fingerprint, with_heads
from pipeline.engine.query import labels_of, open_model
from pipeline.models.heads import Head, columns_of, read_heads, values_of
from pipeline.models.labels import label
from pipeline.models.numbers import check_scores
from pipeline.models.text import build_bank
from pipeline.report.load import REPORT
from pipeline.report.render import PAGE, redraw, try_to_publish
from pipeline.report.summary import summarize
from pipeline.storage.base import Storage
from pipeline.storage.factory import open_storage
from pipeline.telemetry.clocks import StageClocks
from pipeline.telemetry.logs import log_to, log_to_terminal
from pipeline.telemetry.progress import Progress

# Rows are scored in the batches of the source's job, so that even rounding is the same, but in no larger ones.
MOST = 1024
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RelabelReport(RunReport):
    """Content of the ``_report.json`` of a relabelled dataset; ``stages`` are core seconds.

    ``rows`` counts what this run committed, ``vectors`` and ``images`` those of them that have an embedding,
    ``changed`` those whose label is another than in the source. ``core_seconds`` are of the whole loop,
    ``rows_per_core_second`` follows.
    """

    source: Mapping[str, str]
    vectors: int
    changed: int
    core_seconds: float
    rows_per_core_second: float


@dataclass(frozen=True, slots=True)
class _Work:
    """Inputs of every shard."""

    source: Dataset
    storage: Storage
    form: PartFormat
    bank: TextBank | None
    heads: tuple[Head, ...]
    features: torch.Tensor | None
    config: Config
    plan: plan.Plan
    clocks: StageClocks


def relabel(source: Dataset, config: Config, *, began: float | None = None, notes: bool = True) -> RelabelReport:
    """Label the source's embeddings with ``config``'s prompts, into the dataset ``config.output.dir``.

    Ids, kept columns, embeddings, statuses and errors are the source's; shards are too, so that it resumes like any
    job. ``config`` is the source's with other ``model`` (the same checkpoint, elsewhere), ``prompts``, ``labels`` and
    ``output.dir``. ``notes`` logs what the readers of the rows must know, unless the caller says it.

    Raises:
        PipelineError: one of :mod:`pipeline.core.errors`, each with its exit code.
    """
    if source.column != "embedding":
        problem = Problem("dataset", source.url, "holds texts alone, and labels are of images", "name one of images")
        raise ConfigError([problem])
    storage = open_storage(config.output.dir)
    config = config.changed({"output.dir": storage.url})
    check_names(storage.url, list(named_like_folders([source.id, *source.kept], storage.url, source.own_columns)))
    began = began or time.time()
    with ExitStack() as opened:
        with log_to_terminal(config.log):
            held = opened.enter_context(lease.take(storage, seconds=config.output.lease_seconds))
        opened.enter_context(log_to(storage, form=config.log))
        if held.taken_over:
            log.warning("took over from %s", held.taken_over)
        if notes:
            log_notes(config)
        torch.set_num_threads(cores())
        check_heads(source.form, config.labels.heads)
        heads = read_heads(config.labels.heads, source.plan.fingerprints["model"], source.dim)
        check_names(
            storage.url,
            list(differing_in_case([source.id, *source.kept], [*config.manifest.output_columns, *columns_of(heads)])),
        )
        bank = read_bank(source, config)
        log.info("%s: %d rows", source.url, source.plan.rows)
        log_labels(bank)
        wanted = plan.settle(storage, _plan(source, config, bank, heads))
        held.confirm()
        plan.write_once(storage, wanted)
        failpoint("plan.settled")
        columns = [source.id, *source.kept]
        form = format_of(wanted, pa.schema([source.schema.field(name) for name in columns]), source.dim)
        features = None if bank is None else torch.from_numpy(bank.features)
        work = _Work(source, storage, form, bank, heads, features, config, wanted, StageClocks())
        done = commits.find_done(storage, wanted, held.confirm)
        resumed = sum(commit.rows for commit in done.values())
        if done:
            log.info("%d of %d shards (%d rows) are done already", len(done), wanted.shards, resumed)
        labelled = _run(work, done, held)
        committed = commits.read_commits(storage, wanted, known=done)
        commits.finalize(storage, wanted, committed, held.confirm)
        report = _report(work, labelled, committed, began)
        held.confirm()
        if report.rows or storage.read(REPORT) is None:
            storage.write(REPORT, report.to_json())
            failpoint("report.written")
            storage.remove(PAGE)
        if config.report.html and storage.size(PAGE) is None:
            # No image is read for new labels, and none for the page of them: python -m pipeline.report shows pictures.
            try_to_publish(storage, partial(redraw, config.output.dir, examples=0))
        say(report, config.output.dir)
        return report


def read_bank(source: Dataset, config: Config) -> TextBank | None:
    """The embedded label set of a config, the demo's own for the demo model; None if it names heads alone.

    Raises:
        PromptsError: it names no labels and no heads.
        ModelError: the model that made the source is not there.
    """
    labels = labels_of(config)
    if labels.names:
        bank = build_bank(open_model(source, config.model), labels, config.prompts, config.labels)
        if source.form.dtype == "binary" or source.dim < bank.features.shape[1]:
            kept = f"{source.form.dtype} embeddings of {source.dim} of {bank.features.shape[1]} numbers"
            log.info("%s holds %s: labels and scores are near those of a job, not equal", source.url, kept)
        return replace(bank, features=cut(bank.features, source.dim))
    if not config.labels.heads:
        raise PromptsError(
            "no labels: give some, as with 'prompts.labels=[cat,dog]' or prompts.path=labels.csv, or heads, as with "
            "labels.heads=[aesthetic.json]"
        )
    return None


def _plan(source: Dataset, config: Config, bank: TextBank | None, heads: tuple[Head, ...]) -> plan.Plan:
    prints = {
        **source.plan.fingerprints,
        "prompts": None if bank is None else prompts_fingerprint(config, bank),
        # The parts are written in this version's layout, whichever version wrote the source.
        "output": {**source.plan.fingerprints["output"], "layout": LAYOUT},
        "source": source.fingerprint,
    }
    about = {**source.plan.about, "model": config.model.name, "source": source.address}
    prints = with_heads(prints, heads)
    rows = source.plan.rows if source.plan.counted else 0
    return plan.new_plan(config, prints, rows=rows, shards=source.plan.shards, about=about)


@dataclass(frozen=True, slots=True)
class _Labelled:
    """Counts of the loop, its start and its core seconds.

    ``rows`` were committed, ``vectors`` of them have an embedding, ``changed`` of them another label than in the
    source. ``resumed_rows`` were committed before.
    """

    rows: int
    resumed_rows: int
    vectors: int
    changed: int
    began: float
    core_seconds: float


def _run(work: _Work, done: Mapping[int, Commit], held: lease.Lease) -> _Labelled:
    """Label the shards that are not done, several at a time."""
    source, resumed = work.source, sum(commit.rows for commit in done.values())
    rows, vectors, changed, before, began = 0, 0, 0, spent(), time.time()
    todo = (commit for commit in source.commits if commit.shard not in done)
    with (
        Progress(source.plan.rows, done=resumed, mode=work.config.report.progress) as progress,
        closing(in_order(partial(_relabel, work), todo, threads=source.threads)) as results,
    ):
        for report, moved in results:
            held.check()
            progress.embedded(report.rows)
            if report.committed:
                rows, vectors = rows + report.rows, vectors + report.counts[OK]
                changed += moved
    return _Labelled(rows, resumed, vectors, changed, began, (spent() - before).own)


def _report(work: _Work, labelled: _Labelled, committed: Sequence[Commit], began: float) -> RelabelReport:
    source, config, bank, core = work.source, work.config, work.bank, labelled.core_seconds
    parts = [(commit.part, int(start)) for commit, start in zip(committed, source.starts, strict=True)]
    content = summarize(config.output.dir, parts, id=source.id, examples=0)
    counts = sum((Counter(commit.counts) for commit in committed), Counter[str]())
    wall = round(time.time() - began, 3)
    return RelabelReport(
        source={"dataset": source.address, **source.fingerprint},
        started=datetime.fromtimestamp(began, UTC).isoformat(timespec="seconds"),
        rows=labelled.rows,
        images=labelled.vectors,
        vectors=labelled.vectors,
        changed=labelled.changed,
        resumed_rows=labelled.resumed_rows,
        total_rows=source.plan.rows,
        wall_seconds=wall,
        startup_seconds=round(labelled.began - began, 3),
        images_per_second=round(labelled.vectors / wall, 2) if wall else 0.0,
        core_seconds=round(core, 3),
        rows_per_core_second=round(labelled.rows / core, 1) if labelled.rows else 0.0,
        stages={name: round(seconds, 3) for name, seconds in work.clocks.total().cores.items()},
        bound="labelling",
        advice=(
            f"{labelled.changed:,} rows have another label than in {source.address}, from whose embeddings these "
            "labels come; no image was read"
        ),
        counts=by_status(counts),
        labels=content.labels,
        scores=content.scores,
        similarity=content.similarity,
        prompts={} if bank is None else {"labels": len(bank.names), "cached": bank.cached},
        memory=memory(),
        machine=machine("cpu", cores()),
        versions=versions(),
        fingerprints=work.plan.fingerprints,
        config=asdict(config),
        notes=notes_of(config),
    )


def _relabel(work: _Work, commit: Commit) -> tuple[ShardReport, int]:
    """One shard, from the source's part to the commit; and how many labels are not those of the source."""
    # Every thread has a part of its own, and so one core.
    torch.set_num_threads(1)
    columns = [work.source.id, *work.source.kept]
    with work.clocks.time(Stage.READ):
        texts = [name for name in ("text_embedding",) if name in work.source.own_columns]
        table = work.source.read(commit, [*columns, "embedding", *texts, "label", "status", "error"], proven=True)
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
    form = work.form.stored
    stored, rows = vectors_of(table["embedding"], form.width)
    shard = Shard(index=commit.shard, rows=commit.rows, pieces=())
    failures, vectors = dict[int, Failure](), stored
    if len(rows) < shard.rows:
        failures = _failures(table, rows)
        vectors = np.zeros((shard.rows, stored.shape[1]), dtype=stored.dtype)
        vectors[rows] = stored
    top, scores = _score(work, form.decode(stored), rows, commit)
    return ShardResult(
        rows=ShardRows(shard=shard, table=table.select(columns), failures=failures),
        vectors=vectors,
        top=top,
        scores=scores,
        names=() if work.bank is None else work.bank.names,
        values=values_of(work.heads, form.decode(vectors)) if work.heads else {},
        threshold=work.config.labels.threshold,
        texts=text_vectors_of(table, vectors, work.source.own_columns),
    )


def _score(
    work: _Work, vectors: NDArray[np.float32], rows: NDArray[np.int64], commit: Commit
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The best labels and their scores of each row of the shard, ``[N, k]``; ``rows`` are those of ``vectors``."""
    bank, features = work.bank, work.features
    if bank is None or features is None:
        return np.zeros((commit.rows, 0), dtype=np.int64), np.zeros((commit.rows, 0), dtype=np.float32)
    k = min(work.config.labels.top_k, len(bank.names))
    top, scores = torch.zeros((commit.rows, k), dtype=torch.int64), torch.zeros((commit.rows, k))
    size = min(MOST, int(work.source.plan.fingerprints["batch_size"]))
    for start in range(0, len(rows), size):
        places = torch.from_numpy(rows[start : start + size])
        # Copied: Arrow's memory is read-only, of which torch warns.
        batch = torch.from_numpy(vectors[start : start + size].copy())
        found = label(Embeddings(batch), bank, features, top_k=k)
        check_scores(found.scores, f"shard {commit.shard}")
        top[places], scores[places] = found.indices, found.scores
    return top.numpy(), scores.numpy()


def _failures(table: pa.Table, rows: NDArray[np.int64]) -> dict[int, Failure]:
    """Why the rows other than these have no embedding, by position."""
    failed = np.ones(table.num_rows, dtype=bool)
    failed[rows] = False
    places = np.flatnonzero(failed)
    failed_rows = table.select(["status", "error"]).take(pa.array(places)).to_pylist()
    return {
        int(place): Failure(status=row["status"], error=row["error"])
        for place, row in zip(places, failed_rows, strict=True)
    }


def _count_changed(before: pa.ChunkedArray, after: pa.ChunkedArray) -> int:
    same = pc.fill_null(pc.equal(before, after), False)
    neither = pc.and_(pc.is_null(before), pc.is_null(after))
    return len(before) - int(pc.sum(pc.or_(same, neither), min_count=0).as_py())


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
