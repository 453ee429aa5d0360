"""Preparation of a job with an opened engine: its fingerprints, its plan, and the gates of backend and decoder."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from pipeline.backends import decoder_parity as decoder_gate
from pipeline.backends.base import ImageEncoder
from pipeline.backends.parity import Gate, pass_gate, record
from pipeline.config.schema import Config
from pipeline.core.failpoints import failpoint
from pipeline.core.machine import machine
from pipeline.core.processes import cores
from pipeline.core.records import Parity, TextBank
from pipeline.dataset import lease, parts, plan
from pipeline.engine.engine import Engine
from pipeline.engine.loop import Job
from pipeline.images.versions import fingerprint as decoding
from pipeline.storage.base import Storage
from pipeline.telemetry.tracing import span

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Prepared:
    """The plan and the figures of an engine that passed its gates; nothing of it is written yet."""

    config: Config
    plan: plan.Plan
    parity: Parity | None
    decoder_parity: Parity | None
    dim: int
    device: str
    precision: str
    streams: int
    machine: Mapping[str, object]


def prepare(engine: Engine, storage: Storage) -> Prepared:
    """Make the plan of an opened engine, compare it with the output's, and pass the gates.

    Raises:
        PlanMismatch: the output holds another dataset.
        ParityError: the engine is too far from fp32, or its decoder from ``exact``.
    """
    config, encoder, manifest, bank = engine.config, engine.encoder, engine.manifest, engine.bank()
    log.info("model %s with %s on %s in %s", config.model.name, encoder.name, encoder.device, encoder.precision)
    if encoder.device.type == "cuda":
        log.info("each batch is launched as %s", _launched(encoder))
    engine.check_ids()

    prints = fingerprints(engine)
    # Before the gates, which take time: the output may hold another dataset.
    wanted = plan.settle(storage, plan.new_plan(config, prints, rows=manifest.rows))
    gate = Gate(
        limits=config.parity,
        fingerprints=wanted.fingerprints,
        storage=storage,
        bank=bank,
        rows=manifest.rows,
        store=config.backend.artifacts,
    )
    with span("gates"):
        parity, decoded = _pass_gates(engine, gate)
    return Prepared(
        config=config,
        plan=wanted,
        parity=parity,
        decoder_parity=decoded,
        dim=encoder.dim,
        device=str(encoder.device),
        precision=encoder.precision,
        streams=encoder.streams,
        machine=_machine(encoder),
    )


def _pass_gates(engine: Engine, gate: Gate) -> tuple[Parity | None, Parity | None]:
    """The figures of the backend and of the decoder; the error of the former comes first."""
    encoder, decoder = engine.encoder, engine.config.images.decoder
    backends = partial(pass_gate, encoder, engine.checkpoint, engine.some_or_scenes, gate)
    decoders = partial(
        decoder_gate.pass_gate, encoder, decoder, engine.decoded_sample, engine.exactly_decoded_sample, gate
    )
    if decoder == "exact" or encoder.flexible or encoder.device.type != "cpu" or encoder.streams == 1:
        return backends(), decoders()
    # Each takes one full batch, which leaves the cores of the other streams idle.
    engine.decoded_sample()
    with ThreadPoolExecutor(1, thread_name_prefix="gate") as beside:
        decoded = beside.submit(decoders)
        return backends(), decoded.result()


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
    gate = Gate(limits=engine.config.parity, fingerprints=prepared.plan.fingerprints, storage=storage)
    if prepared.parity is not None:
        record(prepared.parity, engine.encoder, gate)
    if prepared.decoder_parity is not None:
        decoder_gate.record(prepared.decoder_parity, engine.encoder, gate)


def fingerprints(engine: Engine) -> dict[str, Any]:
    """Fingerprints of all inputs of the rows; two runs belong to one dataset if these are equal."""
    config, bank = engine.config, engine.bank()
    return {
        "model": engine.checkpoint.fingerprint,
        "images": decoding(config.images, engine.jpeg_engine),
        "backend": engine.encoder.fingerprint,
        "batch_size": config.loader.batch_size,
        "prompts": None if bank is None else prompts_fingerprint(config, bank),
        "manifest": engine.manifest.fingerprint,
        "output": {
            "dtype": config.output.dtype,
            "compression": config.output.compression,
            "layout": parts.LAYOUT,
        },
    }


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
