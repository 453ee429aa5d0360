"""Preparation of a job with an opened engine: its fingerprints, its plan, and the gates of backend and decoder."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from pipeline.backends import decoder_parity as decoder_gate
from pipeline.backends.base import ImageEncoder
from pipeline.backends.parity import Gate, is_pending, open_reference, pass_gate, record
from pipeline.config.schema import OUTPUT_COLUMNS, Config
from pipeline.core.failpoints import failpoint
from pipeline.core.machine import machine
from pipeline.core.processes import cores
from pipeline.core.records import Parity, Sample, TextBank
from pipeline.dataset import lease, parts, plan
from pipeline.dataset.vectors import form_fingerprint
from pipeline.engine.engine import Engine
from pipeline.engine.loop import Job
from pipeline.engine.sample import FirstBatch, FirstImages, first_images
from pipeline.engine.text_tower import tower_parity
from pipeline.engine.texts import tokens_fingerprint
from pipeline.images.versions import fingerprint as decoding
from pipeline.models.heads import Head, columns_of
from pipeline.storage.base import Storage
from pipeline.telemetry.tracing import span

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Prepared:
    """The plan of an opened engine, and the figures of its gates; nothing of it is written yet.

    If ``pending``, the gates are still to be measured, by :func:`settle`; nothing may be written before.
    ``gate_seconds`` are those of the job's loop that this took.
    """

    config: Config
    plan: plan.Plan
    parity: Parity | None
    decoder_parity: Parity | None
    dim: int
    device: str
    precision: str
    streams: int
    machine: Mapping[str, object]
    pending: bool = False
    gate_seconds: float = 0.0
    text_parity: Parity | None = None


def prepare(engine: Engine, storage: Storage) -> Prepared:
    """Make the plan of an opened engine, and compare it with the output's; pass the gates whose figures this keeps.

    Raises:
        PlanMismatch: the output holds another dataset.
        ParityError: the engine is too far from fp32, or its decoder from ``exact``.
    """
    config, encoder, manifest = engine.config, engine.encoder, engine.manifest
    log.info("model %s with %s on %s in %s", config.model.name, encoder.name, encoder.device, encoder.precision)
    if encoder.device.type == "cuda":
        log.info("each batch is launched as %s", _launched(encoder))
    if config.output.dtype == "float16":
        log.info("output.dtype=float16: Trino does not read it, and other readers make float32 of it")
    engine.check_ids()

    prints = fingerprints(engine)
    rows = manifest.rows if manifest.counted else 0
    # Before the gates, which take time: the output may hold another dataset.
    wanted = plan.settle(storage, plan.new_plan(config, prints, rows=rows, shards=len(manifest.files)))
    prepared = Prepared(
        config=config,
        plan=wanted,
        parity=None,
        decoder_parity=None,
        dim=encoder.dim,
        device=str(encoder.device),
        precision=encoder.precision,
        streams=encoder.streams,
        machine=_machine(encoder),
        pending=True,
        text_parity=tower_parity(engine.text_tower, engine.checkpoint, manifest, config),
    )
    if not engine.has_images:
        return replace(prepared, pending=False)
    gate = _gate(engine, prepared, storage)
    if is_pending(encoder, gate) or decoder_gate.is_pending(encoder, config.images.decoder, gate):
        return prepared
    return settle(engine, prepared, storage)


def settle(engine: Engine, prepared: Prepared, storage: Storage, first: Sequence[FirstBatch] = ()) -> Prepared:
    """Pass the gates that are pending: on images of the first batches, or on some that are drawn from the manifest.

    Raises:
        ParityError: the engine is too far from fp32, or its decoder from ``exact``.
    """
    if not prepared.pending:
        return prepared
    with span("gates"):
        # Not those that the encoder was calibrated on.
        static = engine.encoder.fingerprint.get("quantization") == "static"
        images = None if static else first_images(engine.manifest, first)
        seconds = sum(batch.seconds for batch in first) / max(1, len(first))
        gate = replace(_gate(engine, prepared, storage), seconds=seconds)
        parity, decoded = _pass_gates(engine, gate, images)
    return replace(prepared, parity=parity, decoder_parity=decoded, pending=False)


def _gate(engine: Engine, prepared: Prepared, storage: Storage) -> Gate:
    return Gate(
        limits=prepared.config.parity,
        fingerprints=prepared.plan.fingerprints,
        storage=storage,
        bank=engine.bank(),
        rows=engine.manifest.rows,
        store=prepared.config.backend.artifacts,
    )


def _pass_gates(engine: Engine, gate: Gate, first: FirstImages | None) -> tuple[Parity | None, Parity | None]:
    """The figures of the backend and of the decoder."""
    encoder, decoder = engine.encoder, engine.config.images.decoder

    def some(count: int) -> Sample:
        return first.sample.spread(count) if first is not None and first.has(count) else engine.some_or_scenes(count)

    judge: ImageEncoder = encoder
    if decoder != "exact" and encoder.device.type == "cpu" and not encoder.flexible:
        # Of one shape, it takes as long for a few images as for a full batch; fp32 tells them apart as well.
        judge = open_reference(encoder, engine.checkpoint, 2 * decoder_gate.EMBEDDED)
    ours, exact = engine.decoded_sample, engine.exactly_decoded_sample
    if first is not None and first.has(decoder_gate.FEWEST):
        known = dict(zip(first.sample.ids, first.refs, strict=True))
        pictures = first.sample.spread(decoder_gate.PICTURES)
        pictures = pictures if judge is encoder else replace(pictures, vectors=None)
        ours, exact = lambda: pictures, partial(exact, [known[id] for id in pictures.ids])
    parity = pass_gate(encoder, engine.checkpoint, some, gate)
    return parity, decoder_gate.pass_gate(judge, decoder, ours, exact, gate)


def _launched(encoder: ImageEncoder) -> str:
    return "one CUDA graph" if encoder.graph else "single operations, without a CUDA graph"


def _machine(encoder: ImageEncoder) -> dict[str, object]:
    launched = {"launch": _launched(encoder)} if encoder.device.type == "cuda" else {}
    return {**machine(str(encoder.device), cores()), **launched}


def job_of(engine: Engine, prepared: Prepared) -> Job:
    """Return the specification of the job for the processes that embed."""
    return Job(
        config=prepared.config,
        manifest=engine.manifest,
        form=parts.format_of(prepared.plan, engine.manifest.schema, prepared.dim),
        bank=engine.bank(),
        heads=engine.heads,
    )


def write_plan(prepared: Prepared, storage: Storage, held: lease.Lease) -> None:
    """Write the plan, unless it is there.

    Raises:
        PlanMismatch: the output holds another dataset by now.
    """
    held.confirm()
    plan.write_once(storage, prepared.plan)
    failpoint("plan.settled")


def note(engine: Engine, prepared: Prepared, storage: Storage) -> None:
    """Write the figures of the gates into the output, whose plan is written."""
    gate = _gate(engine, prepared, storage)
    if prepared.parity is not None:
        record(prepared.parity, engine.encoder, gate)
    if prepared.decoder_parity is not None:
        decoder_gate.record(prepared.decoder_parity, engine.encoder, gate)


def fingerprints(engine: Engine) -> dict[str, Any]:
    """Fingerprints of all inputs of the rows; two runs belong to one dataset if these are equal."""
    config, bank, heads, tower = engine.config, engine.bank(), engine.heads, engine.text_tower
    prints: dict[str, Any] = {
        "model": engine.checkpoint.fingerprint,
        "images": decoding(config.images, engine.jpeg_engine) if engine.has_images else {},
        "backend": engine.encoder.fingerprint,
        "batch_size": config.loader.batch_size,
        "prompts": None if bank is None else prompts_fingerprint(config, bank),
        "manifest": engine.manifest.fingerprint,
        "output": {
            **form_fingerprint(config.output, engine.encoder.dim),
            "compression": config.output.compression,
            "layout": parts.LAYOUT,
        },
    }
    if tower is not None:
        prints["output"]["columns"] = list(config.manifest.output_columns)
        prints["texts"] = tower.fingerprint | tokens_fingerprint(engine.checkpoint.texts()[1])
    return with_heads(prints, heads)


def with_heads(fingerprints: Mapping[str, Any], heads: Sequence[Head]) -> dict[str, Any]:
    """The fingerprints of a dataset with the columns of ``heads``, and of no others."""
    prints = {name: value for name, value in fingerprints.items() if name != "heads"}
    usual = tuple(name for name in plan.own_columns(prints) if not name.startswith("head_"))
    prints["output"] = {name: value for name, value in prints["output"].items() if name != "columns"}
    if heads:
        prints["heads"] = {head.name: head.fingerprint for head in heads}
    if heads or usual != OUTPUT_COLUMNS:
        prints["output"]["columns"] = [*usual, *columns_of(heads)]
    return prints


def prompts_fingerprint(config: Config, bank: TextBank) -> dict[str, Any]:
    """Fingerprint of the labels and of how rows are labelled."""
    return {
        "text": bank.fingerprint,
        "count": len(bank.names),
        "scoring": bank.scoring,
        "top_k": config.labels.top_k,
        "threshold": config.labels.threshold,
    }


def log_labels(bank: TextBank | None) -> None:
    """Log the number of labels and the origin of their features."""
    if bank is None:
        log.warning(
            "no labels: the columns label and score stay null; prompts.labels=[cat,dog] or prompts.path fills them"
        )
    else:
        features = "from the cache" if bank.cached else "embedded and cached"
        log.info("%d labels, text features %s", len(bank.names), features)
