"""All that a run opens before its first shard: manifest, model, prompts, reader, encoder, plan."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch

from pipeline.aside import aside
from pipeline.backends import decoders as decoder_gate
from pipeline.backends.base import ImageEncoder
from pipeline.backends.halving import HalvingEncoder
from pipeline.backends.parity import pass_gate, record
from pipeline.batch_size import settle_batch_size
from pipeline.config import DEMO_MODEL, Config
from pipeline.dataset import lease, plan
from pipeline.dataset.recipe import recipe_of
from pipeline.demo import folder as demo
from pipeline.failpoints import failpoint
from pipeline.images.decoders import Decoders
from pipeline.images.library import library
from pipeline.images.reader import PixelReader
from pipeline.images.sample import draw_sample
from pipeline.manifest.ids import check_ids
from pipeline.manifest.places import check_places
from pipeline.manifest.shards import count_shards
from pipeline.manifest.source import Manifest, open_manifest
from pipeline.models.checkpoint import Checkpoint, open_checkpoint
from pipeline.models.text import build_bank, read_labels
from pipeline.processes import cores
from pipeline.records import Parity, PreprocessSpec, Sample, TextBank
from pipeline.storage.base import Storage
from pipeline.worker import open_at, open_for_job, open_reader

# So long nothing else begins while the ids are checked; millions of rows are checked in that time.
IDS_SECONDS = 0.5
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Opened:
    """What a run works with; of all this only the plan and the parity figures are written down by now."""

    config: Config
    manifest: Manifest
    checkpoint: Checkpoint
    bank: TextBank | None
    spec: PreprocessSpec
    reader: PixelReader
    encoder: HalvingEncoder
    plan: plan.Plan
    parity: Parity | None
    decoder_parity: Parity | None


def open_run(
    config: Config, storage: Storage, held: lease.Lease, opened: ExitStack, decoders: Decoders | None
) -> Opened:
    """Open everything, side by side where one need not wait for the other, and settle the plan.

    ``decoders`` are processes that were started before; what must be closed is left to ``opened``.

    Raises:
        PipelineError: one of :mod:`pipeline.errors`; nothing was written then.
    """
    manifest = open_manifest(config.manifest)
    check_places(config, manifest)
    unique = aside(partial(check_ids, manifest), name="ids")
    with suppress(TimeoutError):
        # A wrong manifest of ordinary size is told before a model is opened.
        unique.result(IDS_SECONDS)
    log.info("%s: %d rows in %d files", config.manifest.path, manifest.rows, len(manifest.files))

    checkpoint = open_checkpoint(config.model)
    embedded = aside(partial(_bank, config, checkpoint), name="prompts")
    spec = dataclasses.replace(checkpoint.spec, corner=config.images.crop_corner)
    reader = opened.enter_context(open_reader(config, manifest, spec, decoders))
    drawn = cache(partial(_draw, config, manifest, reader))
    sample = cache(partial(_or_scenes, drawn, config, spec))

    def alone() -> None:
        # Nothing else may run while speeds are compared.
        embedded.result()
        unique.result()

    size = settle_batch_size(
        config,
        checkpoint,
        open_at=partial(open_at, config, checkpoint, sample),
        rows=manifest.rows,
        storage=storage,
        alone=alone,
    )
    config = dataclasses.replace(config, loader=dataclasses.replace(config.loader, batch_size=size))
    encoder = open_for_job(config, checkpoint, sample, embedded.result)
    bank = embedded.result()
    if bank is None:
        log.warning(
            "no labels: the columns label and score stay null; prompts.labels=[cat,dog] or prompts.path fills them"
        )
    else:
        features = "from the cache" if bank.cached else "embedded and cached"
        log.info("%d labels, text features %s", len(bank.names), features)
    log.info("model %s with %s on %s in %s", config.model.name, encoder.name, encoder.device, encoder.precision)
    unique.result()

    prints = fingerprints(config, manifest, checkpoint, encoder, bank)
    wanted = plan.Plan(
        rows=manifest.rows,
        shards=count_shards(manifest.rows, config.manifest.shard_rows),
        shard_rows=config.manifest.shard_rows,
        fingerprints=prints,
        about={"model": config.model.name, "manifest": config.manifest.path},
        config=recipe_of(config),
    )
    # A wrong output.dir is told at once, a backend that misses leaves no plan behind.
    plan.compare(storage, wanted)
    limits = config.parity
    parity = pass_gate(encoder, checkpoint, sample, bank=bank, limits=limits, fingerprints=prints, storage=storage)
    decoded = decoder_gate.pass_gate(
        encoder,
        config.images.decoder,
        drawn,
        partial(_draw_exact, config, manifest, reader),
        bank=bank,
        limits=limits,
        fingerprints=prints,
        storage=storage,
    )
    held.confirm()
    plan.settle(storage, wanted)
    failpoint("plan.settled")
    if parity is not None:
        record(parity, encoder, limits=limits, fingerprints=prints, storage=storage)
    if decoded is not None:
        decoder_gate.record(decoded, encoder, limits=limits, fingerprints=prints, storage=storage)
    return Opened(
        config=config,
        manifest=manifest,
        checkpoint=checkpoint,
        bank=bank,
        spec=spec,
        reader=reader,
        encoder=encoder,
        plan=wanted,
        parity=parity,
        decoder_parity=decoded,
    )


def fingerprints(
    config: Config, manifest: Manifest, checkpoint: Checkpoint, encoder: ImageEncoder, bank: TextBank | None
) -> dict[str, Any]:
    """Everything that the rows follow from; two runs belong to one dataset if these are equal."""
    labels = None
    if bank is not None:
        labels = {
            "text": bank.fingerprint,
            "count": len(bank.names),
            "scoring": bank.scoring,
            "top_k": config.labels.top_k,
            "threshold": config.labels.threshold,
        }
    return {
        "model": checkpoint.fingerprint,
        "images": {**dataclasses.asdict(config.images), "library": library(config.images.decoder)},
        "backend": encoder.fingerprint,
        "batch_size": config.loader.batch_size,
        "prompts": labels,
        "manifest": manifest.fingerprint,
        "output": {"dtype": config.output.dtype, "compression": config.output.compression},
    }


def _bank(config: Config, checkpoint: Checkpoint) -> TextBank | None:
    # A new thread may have fewer of torch's threads than the machine has cores.
    torch.set_num_threads(cores())
    prompts = config.prompts
    if not prompts.labels and prompts.path is None and config.model.name == DEMO_MODEL:
        prompts = dataclasses.replace(prompts, labels=demo.label_names())
    labels = read_labels(prompts)
    return build_bank(checkpoint, labels, prompts, config.labels) if labels.names else None


def _count(config: Config) -> int:
    """Images that a backend is compared on; twice as many where one half is for calibration."""
    return config.parity.images * (2 if config.backend.quantization == "static" else 1)


def _draw(config: Config, manifest: Manifest, reader: PixelReader) -> Sample | None:
    """Images of the job for its backend and its decoder to be compared on; None where none can be read."""
    return draw_sample(manifest, reader, _count(config))


def _draw_exact(config: Config, manifest: Manifest, reader: PixelReader) -> Sample | None:
    """The same by the decoder with which the others are compared."""
    with reader.exact() as exact:
        return _draw(config, manifest, exact)


def _or_scenes(drawn: Callable[[], Sample | None], config: Config, spec: PreprocessSpec) -> Sample:
    """What was drawn, or rendered scenes, on which backends can be compared too; decoders cannot."""
    sample = drawn()
    if sample is None:
        log.warning("none of the images that were tried can be read; the backend is compared on rendered scenes")
        return demo.rendered_sample(spec, _count(config))
    return sample
