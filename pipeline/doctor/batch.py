"""One batch of the job's model on the job's backend, with images of the job; nothing of it stays.

Exported models come from the store where they lie there; others are made in the scratch folder.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.schema import DEMO_MODEL, Config, LoaderConfig
from pipeline.core.errors import ManifestError, ModelError, ParityError, PipelineError, PromptsError
from pipeline.doctor import golden
from pipeline.doctor.check import Check, Status, Subject
from pipeline.doctor.hub import as_cached
from pipeline.doctor.manifest import first_file

if TYPE_CHECKING:
    from pipeline.backends.base import ImageEncoder
    from pipeline.core.records import Sample, TextBank
    from pipeline.doctor.sample import Drawn
    from pipeline.manifest.manifest import Manifest
    from pipeline.models.checkpoint import Checkpoint

GROUP = golden.GROUP
# Images that are drawn of the manifest, and labels that are embedded: enough to see that they can be.
IMAGES, LABELS = 16, 64
# On a CPU a larger batch shows nothing more, and takes a while with a large model.
CPU_BATCH = 16
# What a line about an error is called.
NAMES = {ParityError: "parity", ModelError: "model", PromptsError: "prompts", ManifestError: "manifest"}


def look(subject: Subject) -> Iterator[Check]:
    """The golden figures, images of the manifest, the embeddings of one batch, its speed, its distance from fp32."""
    from pipeline.models.checkpoint import open_checkpoint

    config = subject.job
    if subject.scratch is None:
        yield Check(GROUP, "batch", Status.SKIP, "there is no folder for temporary files")
        return
    demo = open_checkpoint(dataclasses.replace(config.model, name=DEMO_MODEL, weights="pretrained", revision=None))
    yield from golden.look(demo)
    model = as_cached(config.model)
    if model is None:
        fact = f"{config.model.name} is not on this machine, and nothing is downloaded here"
        yield Check(GROUP, "batch", Status.SKIP, fact, "once a job has downloaded it, this runs a batch of it")
        return
    own = model.name == DEMO_MODEL and model.weights == "pretrained"
    try:
        checkpoint = demo if own else open_checkpoint(model)
        with ExitStack() as opened:
            config, damaged = _kept_apart(config, checkpoint, Path(subject.scratch))
            if damaged:
                way_out = "the next job makes them anew; python -m pipeline.artifacts verify looks at all"
                yield Check(GROUP, "exports", Status.WARN, f"damaged: {'; '.join(damaged)}", way_out)
            yield from _run(config, checkpoint, subject.scratch, opened)
    except PipelineError as error:
        yield Check(GROUP, NAMES.get(type(error), "batch"), Status.FAIL, str(error))


def _run(config: Config, checkpoint: Checkpoint, scratch: str, opened: ExitStack) -> Iterator[Check]:
    from pipeline.backends import decoder_parity
    from pipeline.backends.compare import in_words
    from pipeline.backends.devices import choose_device
    from pipeline.backends.parity import embed_sample, pass_gate
    from pipeline.doctor.sample import draw, repeated
    from pipeline.engine.demo.folder import rendered_sample
    from pipeline.engine.forward import UNIT_TOLERANCE
    from pipeline.engine.loop import open_for_job, open_reader
    from pipeline.manifest.manifest import open_manifest
    from pipeline.storage.local import LocalStorage

    spec = dataclasses.replace(checkpoint.spec, corner=config.images.crop_corner)
    drawn, reader = None, None
    if config.manifest.path is not None:
        manifest = open_manifest(first_file(config)[0])
        reader = opened.enter_context(open_reader(config, manifest, spec))
        drawn = draw(manifest, reader, IMAGES)
        yield _images(drawn, manifest, config)
    sample = (drawn and drawn.sample) or rendered_sample(spec, IMAGES)
    bank = _bank(config, checkpoint)
    device = choose_device(config.backend.device)
    size = config.loader.batch_size or LoaderConfig().batch_size
    size = min(size, CPU_BATCH) if device.type == "cpu" else size
    config = dataclasses.replace(config, loader=dataclasses.replace(config.loader, batch_size=size))
    began = time.perf_counter()
    encoder = open_for_job(config, checkpoint, lambda: sample, lambda: bank)
    opening = time.perf_counter() - began
    batch = repeated(sample, size * encoder.streams)
    vectors = embed_sample(encoder, batch)
    rate = _rate(encoder, batch)
    lengths = vectors.norm(dim=1)
    # NaN is within no tolerance.
    healthy = bool(((lengths - 1).abs() < UNIT_TOLERANCE).all())
    where = f"{checkpoint.family} on backend={encoder.name} {encoder.precision}, {encoder.device}"
    if tuple(vectors.shape) != (len(batch.ids), checkpoint.dim) or not healthy:
        fact = f"{where}: NaN, infinity or vectors that are not of length 1"
        yield Check(GROUP, "embeddings", Status.FAIL, fact, "take backend.precision=fp32; check the checkpoint's files")
        return
    fact = f"{where}: {len(vectors)} vectors of {checkpoint.dim} numbers, finite and of length 1"
    yield Check(GROUP, "embeddings", Status.OK, fact, figures={"dim": float(checkpoint.dim)})
    pace = f"{rate:,.1f} images/s, encoding alone, batches of {size}; opened in {opening:.1f} s"
    said = {"images_per_second": rate, "opening_seconds": opening}
    halved = encoder.batch_sizes[-1]
    if halved != size:
        pace += f"; the device has no memory for {size} at a time, and takes {halved}"
        yield Check(GROUP, "speed", Status.WARN, pace, f"take loader.batch_size={halved}", said)
    else:
        yield Check(GROUP, "speed", Status.OK, pace, figures=said)
    books = LocalStorage(scratch)
    gate = partial(pass_gate, encoder, checkpoint, bank=bank, limits=config.parity, fingerprints={}, storage=books)
    parity = gate(lambda: sample)
    if parity is None:
        yield Check(GROUP, "parity", Status.OK, "this is fp32 itself, with which the other backends are compared")
    else:
        said = {"lowest_cosine": parity.lowest_cosine, "mean_cosine": parity.mean_cosine}
        yield Check(GROUP, "parity", Status.OK, in_words(parity), figures=said)
    if reader is None or drawn is None or drawn.sample is None:
        return
    with reader.exact() as exact:
        decoded = decoder_parity.pass_gate(
            encoder,
            config.images.decoder,
            lambda: drawn.sample,
            lambda: draw(manifest, exact, IMAGES).sample,
            bank=bank,
            limits=config.parity,
            fingerprints={},
            storage=books,
        )
    if decoded is not None:
        said = {"lowest_cosine": decoded.lowest_cosine}
        yield Check(GROUP, "decoder", Status.OK, in_words(decoded, than="exact"), figures=said)


def _kept_apart(config: Config, checkpoint: Checkpoint, scratch: Path) -> tuple[Config, list[str]]:
    """The config with a store of exports in the scratch folder, which holds what the real one has of this model.

    And what of that is damaged, in words.
    """
    from pipeline.backends.artifacts.metadata import plain
    from pipeline.backends.artifacts.store import ArtifactStore
    from pipeline.backends.tensorrt import ENGINES

    store, copy = ArtifactStore(config.backend.artifacts), scratch / "artifacts"
    copy.mkdir()
    wanted, damaged = plain(checkpoint.fingerprint, "the model"), []
    for artifact in store.artifacts():
        if artifact.card.get("model", {}).get("fingerprint") != wanted:
            continue
        if problems := store.problems(artifact):
            damaged.append(f"{artifact.path}: {problems[0]}")
            continue
        shutil.copytree(artifact.path, copy / artifact.fingerprint, copy_function=_link)
        for engines in (store.root / ENGINES / artifact.fingerprint).glob("*/"):
            shutil.copytree(engines, copy / ENGINES / artifact.fingerprint / engines.name)
    backend = dataclasses.replace(config.backend, artifacts=str(copy))
    return dataclasses.replace(config, backend=backend), damaged


def _link(source: str, target: str) -> None:
    """A second name for a file that nobody writes to; a copy where it lies on another disk."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _images(drawn: Drawn, manifest: Manifest, config: Config) -> Check:
    """Whether the images of the manifest's first rows can be read."""
    said = {"tried": float(drawn.tried), "failed": float(len(drawn.failures))}
    good = f"{drawn.tried - len(drawn.failures)} of the first {drawn.tried} rows can be read"
    if not drawn.failures:
        return Check(GROUP, "images", Status.OK, good, figures=said)
    id, failure = drawn.failures[0]
    fact = f"{good}; {id}: {failure.status}: {failure.error}"
    if drawn.sample is None and config.errors.max_fraction < 1:
        way_out = f"paths start from {manifest.root}: set manifest.root to another folder, or look at the files"
        way_out = "look at these images" if manifest.image_kind == "bytes" else way_out
        return Check(GROUP, "images", Status.FAIL, fact, way_out, said)
    way_out = "such rows get a status; too many end the job with exit code 3 (errors.max_fraction)"
    return Check(GROUP, "images", Status.WARN, fact, way_out, said)


def _bank(config: Config, checkpoint: Checkpoint) -> TextBank | None:
    """Some of the labels, embedded; no cache is asked and none is written."""
    from pipeline.core.records import TextBank
    from pipeline.engine.demo.folder import prompts_of
    from pipeline.models.text import embed_prompts, read_labels

    labels = read_labels(prompts_of(config))
    if not labels.names:
        return None
    features = embed_prompts(checkpoint, labels.prompts[:LABELS])
    return TextBank(
        names=labels.names[:LABELS],
        features=features,
        scoring=checkpoint.scoring,
        scale=checkpoint.scale,
        bias=checkpoint.bias,
        fingerprint="",
    )


def _rate(encoder: ImageEncoder, sample: Sample) -> float:
    """Images a second, once warm."""
    from pipeline.backends.parity import embed_sample

    embed_sample(encoder, sample)
    began = time.perf_counter()
    embed_sample(encoder, sample)
    return len(sample.ids) / (time.perf_counter() - began)
