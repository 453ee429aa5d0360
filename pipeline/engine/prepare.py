"""All that a run opens before its first shard: manifest, model, prompts; reader, encoder; plan.

The first three need no accelerator, the next two are opened in every process that embeds, the plan is made once.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch

from pipeline.backends import decoder_parity as decoder_gate
from pipeline.backends.base import Draw, ImageEncoder
from pipeline.backends.oom import HalvingEncoder
from pipeline.backends.parity import Gate, pass_gate, record
from pipeline.config.schema import Config
from pipeline.core.concurrency import aside
from pipeline.core.failpoints import failpoint
from pipeline.core.processes import cores
from pipeline.core.records import Parity, PreprocessSpec, Sample, TextBank
from pipeline.dataset import lease, parts, plan
from pipeline.engine.batch_size import Benchmark, settle_batch_size
from pipeline.engine.demo import folder as demo
from pipeline.engine.loop import Job, open_at, open_for_job, open_reader
from pipeline.engine.sample import draw_sample
from pipeline.images.pool.pool import Decoders
from pipeline.images.reader import PixelReader
from pipeline.images.versions import library
from pipeline.manifest.ids import check_ids
from pipeline.manifest.manifest import Manifest, open_manifest
from pipeline.manifest.overlap import check_places
from pipeline.models.checkpoint import Checkpoint, open_checkpoint
from pipeline.models.text import build_bank, read_labels
from pipeline.report.summary import machine
from pipeline.storage.base import Storage
from pipeline.telemetry.tracing import span

# So long nothing else begins while the ids are checked; millions of rows are checked in that time.
IDS_SECONDS = 0.5
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Inputs:
    """Inputs of a job that need no accelerator: opened once, wherever its shards run.

    ``bank`` waits for the embedded labels, ``unique`` for the end of the check of the ids; both raise what went wrong.
    """

    manifest: Manifest
    checkpoint: Checkpoint
    bank: Callable[[], TextBank | None]
    unique: Callable[[], object]


@dataclass(frozen=True, slots=True)
class Engine:
    """The opened reader and encoder, once per process that embeds. The batch size of ``config`` is settled."""

    config: Config
    checkpoint: Checkpoint
    reader: PixelReader
    encoder: HalvingEncoder
    drawn: Callable[[], Sample | None]
    sample: Draw


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


def open_inputs(config: Config) -> Inputs:
    """Open the manifest and the model, and embed the prompts aside.

    Raises:
        PipelineError: one of :mod:`pipeline.core.errors`; nothing was written then.
    """
    with span("manifest"):
        manifest = open_manifest(config.manifest)
        check_places(config, manifest)
        unique = aside(partial(check_ids, manifest), name="ids")
        with suppress(TimeoutError):
            # A wrong manifest of ordinary size is reported before a model is opened.
            unique.result(IDS_SECONDS)
    log.info("%s: %d rows in %d files", config.manifest.path, manifest.rows, len(manifest.files))

    with span("model"):
        checkpoint = open_checkpoint(config.model)
    embedded = aside(partial(bank_of, config, checkpoint), name="prompts")
    return Inputs(manifest=manifest, checkpoint=checkpoint, bank=embedded.result, unique=unique.result)


def spec_of(config: Config, checkpoint: Checkpoint) -> PreprocessSpec:
    """Preprocessing of the job's images."""
    return dataclasses.replace(checkpoint.spec, corner=config.images.crop_corner)


def open_engine(
    config: Config, inputs: Inputs, storage: Storage, opened: ExitStack, decoders: Decoders | None = None
) -> Engine:
    """Open the reader and the encoder, and measure the batch size if that is left open.

    ``decoders`` are processes that were started before; what must be closed is left to ``opened``.

    Raises:
        PipelineError: one of :mod:`pipeline.core.errors`; nothing was written then.
    """
    manifest, checkpoint = inputs.manifest, inputs.checkpoint
    spec = spec_of(config, checkpoint)
    reader = opened.enter_context(open_reader(config, manifest, spec, decoders))
    drawn = cache(partial(_draw, config, manifest, reader))
    sample = cache(partial(_or_scenes, drawn, config, spec))

    def alone() -> None:
        # Nothing else may run while speeds are compared.
        inputs.bank()
        inputs.unique()

    opener = partial(open_at, config, checkpoint, sample)
    benchmark = Benchmark(config.backend, checkpoint, opener, wait=alone)
    size = settle_batch_size(config, benchmark, rows=manifest.rows, storage=storage)
    config = dataclasses.replace(config, loader=dataclasses.replace(config.loader, batch_size=size))
    with span("backend", {"name": config.backend.name}):
        encoder = open_for_job(config, checkpoint, sample, inputs.bank, size)
    return Engine(config=config, checkpoint=checkpoint, reader=reader, encoder=encoder, drawn=drawn, sample=sample)


def prepare(engine: Engine, inputs: Inputs, storage: Storage) -> Prepared:
    """Make the plan, compare it with the output's, and let the engine pass its gates.

    Raises:
        PlanMismatch: the output holds another dataset.
        ParityError: the engine is too far from fp32, or its decoder from ``exact``.
    """
    config, encoder, manifest, bank = engine.config, engine.encoder, inputs.manifest, inputs.bank()
    log.info("model %s with %s on %s in %s", config.model.name, encoder.name, encoder.device, encoder.precision)
    inputs.unique()

    prints = fingerprints(config, manifest, engine.checkpoint, encoder, bank)
    wanted = plan.new_plan(config, prints, rows=manifest.rows)
    # A wrong output.dir is reported at once; a backend that misses the gate leaves no plan.
    plan.compare(storage, wanted)
    gate = Gate(limits=config.parity, fingerprints=prints, storage=storage, bank=bank)
    exact = partial(_draw_exact, config, manifest, engine.reader)
    with span("gates"):
        parity = pass_gate(encoder, engine.checkpoint, engine.sample, gate)
        decoded = decoder_gate.pass_gate(encoder, config.images.decoder, engine.drawn, exact, gate)
    return Prepared(
        config=config,
        plan=wanted,
        parity=parity,
        decoder_parity=decoded,
        dim=encoder.dim,
        device=str(encoder.device),
        precision=encoder.precision,
        streams=encoder.streams,
        machine=machine(str(encoder.device), cores()),
    )


def job_of(inputs: Inputs, prepared: Prepared) -> Job:
    """The job as the processes that embed get it."""
    return Job(
        config=prepared.config,
        manifest=inputs.manifest,
        form=parts.format_of(prepared.plan, inputs.manifest.schema, prepared.dim),
        bank=inputs.bank(),
    )


def settle(prepared: Prepared, storage: Storage, held: lease.Lease) -> None:
    """Write the plan, unless it is there.

    Raises:
        PlanMismatch: the output holds another dataset by now.
    """
    held.confirm()
    plan.settle(storage, prepared.plan)
    failpoint("plan.settled")


def note(engine: Engine, prepared: Prepared, storage: Storage) -> None:
    """Write what the gates measured into the output, whose plan is settled."""
    gate = Gate(limits=engine.config.parity, fingerprints=prepared.plan.fingerprints, storage=storage)
    if prepared.parity is not None:
        record(prepared.parity, engine.encoder, gate)
    if prepared.decoder_parity is not None:
        decoder_gate.record(prepared.decoder_parity, engine.encoder, gate)


def fingerprints(
    config: Config, manifest: Manifest, checkpoint: Checkpoint, encoder: ImageEncoder, bank: TextBank | None
) -> dict[str, Any]:
    """Fingerprints of all inputs of the rows; two runs belong to one dataset if these are equal."""
    return {
        "model": checkpoint.fingerprint,
        "images": {**dataclasses.asdict(config.images), "library": library(config.images.decoder)},
        "backend": encoder.fingerprint,
        "batch_size": config.loader.batch_size,
        "prompts": None if bank is None else prompts_fingerprint(config, bank),
        "manifest": manifest.fingerprint,
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


def bank_of(config: Config, checkpoint: Checkpoint) -> TextBank | None:
    """The job's labels; None where it has none."""
    # A new thread may have fewer of torch's threads than the machine has cores.
    torch.set_num_threads(cores())
    prompts = demo.prompts_of(config)
    with span("prompts"):
        labels = read_labels(prompts)
        return build_bank(checkpoint, labels, prompts, config.labels) if labels.names else None


def images_compared(config: Config) -> int:
    """Images that a backend is compared on; twice as many where one half is for calibration."""
    return config.parity.images * (2 if config.backend.quantization == "static" else 1)


def _draw(config: Config, manifest: Manifest, reader: PixelReader) -> Sample | None:
    """Images of the job for its backend and its decoder to be compared on; None where none can be read."""
    return draw_sample(manifest, reader, images_compared(config))


def _draw_exact(config: Config, manifest: Manifest, reader: PixelReader) -> Sample | None:
    """The same by the decoder with which the others are compared."""
    with reader.exact() as exact:
        return _draw(config, manifest, exact)


def _or_scenes(drawn: Callable[[], Sample | None], config: Config, spec: PreprocessSpec) -> Sample:
    """The drawn images, or else rendered scenes: backends can be compared on those, decoders cannot."""
    sample = drawn()
    if sample is None:
        log.warning("none of the images that were tried can be read; the backend is compared on rendered scenes")
        return demo.rendered_sample(spec, images_compared(config))
    return sample
