"""Check of one batch: a short dry run of the job (``run.dry=true``), of which nothing stays.

Exported models are taken from the job's store if they exist there; others are made in the scratch folder.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.ranges import AUTO
from pipeline.config.schema import ClusterConfig, Config, LoaderConfig, PromptsConfig
from pipeline.core.errors import ManifestError, ModelError, NumericalError, ParityError, PipelineError, PromptsError
from pipeline.core.records import OK
from pipeline.doctor.check import Check, Status, Subject
from pipeline.doctor.hub import as_cached
from pipeline.doctor.manifest import first_file

if TYPE_CHECKING:
    from pipeline.job.estimate.estimate import Rehearsal
    from pipeline.job.estimate.trial import Trial

GROUP = "one batch"
# Images that a backend is compared on, scenes of the demo, and labels: enough to see that they work.
IMAGES, SCENES, LABELS = 16, 64, 64
# A larger batch of a large model takes long on a CPU.
CPU_BATCH = 16
# The check that an error is about.
NAMES = {
    ParityError: "parity",
    ModelError: "model",
    PromptsError: "prompts",
    ManifestError: "manifest",
    NumericalError: "embeddings",
}


def look(subject: Subject) -> Iterator[Check]:
    """Check images of the manifest, the embeddings of a few batches, their throughput, and the parity gates."""
    from pipeline.job.estimate.estimate import rehearse
    from pipeline.job.estimate.trial import Limits

    if subject.scratch is None:
        yield Check(GROUP, "batch", Status.SKIP, "there is no folder for temporary files")
        return
    model = as_cached(subject.job.model)
    if model is None:
        fact = f"{subject.job.model.name} is not on this machine, and nothing is downloaded here"
        yield Check(GROUP, "batch", Status.SKIP, fact, "run this again after a job has downloaded the model")
        return
    try:
        config = _shortened(_with_backend(replace(subject.job, model=model)), Path(subject.scratch))
        if damaged := _link_exports(subject.job, config):
            way_out = "the next job makes them again; python -m pipeline.artifacts verify checks all of them"
            yield Check(GROUP, "exports", Status.WARN, f"damaged: {'; '.join(damaged)}", way_out)
        # Two batches of every stream: one to warm up, one that is measured.
        limits = Limits(warm_seconds=0, seconds=0, batches=1)
        yield from _checks(subject.job, config, rehearse(config, time.time(), limits))
    except PipelineError as error:
        yield Check(GROUP, NAMES.get(type(error), "batch"), Status.FAIL, str(error))


def _shortened(config: Config, scratch: Path) -> Config:
    """Return the config of a short job that writes to the scratch folder alone: one file, one process, few labels."""
    from pipeline.backends.devices import choose_device

    manifest = config.manifest
    if manifest.path is None:
        manifest = replace(manifest, demo_scenes=min(manifest.demo_scenes, SCENES))
    else:
        manifest = first_file(config)[0]
    size = config.loader.batch_size or LoaderConfig().batch_size
    if choose_device(config.backend.device).type == "cpu":
        size = min(size, CPU_BATCH)
    return config.changed(
        {
            "manifest": manifest,
            "loader.batch_size": size,
            "prompts": replace(_few_labels(config), cache=str(scratch / "text")),
            "parity.images": min(config.parity.images, IMAGES),
            "backend.artifacts": str(scratch / "artifacts"),
            "cluster": ClusterConfig(),
            "output.dir": str(scratch / "output"),
        }
    )


def _with_backend(config: Config) -> Config:
    """Return the config with a backend: for ``backend=auto`` the plan's, or the fastest that is remembered."""
    if config.backend.name != AUTO:
        return config
    from pipeline.engine.backend_choice import settle_backend
    from pipeline.models.checkpoint import open_checkpoint
    from pipeline.storage.factory import open_storage

    return settle_backend(config, open_checkpoint(config.model), storage=open_storage(config.output.dir))


def _few_labels(config: Config) -> PromptsConfig:
    from pipeline.engine.demo.folder import prompts_of
    from pipeline.models.label_files import read_labels

    prompts = prompts_of(config)
    names = list(read_labels(prompts).names)
    return replace(prompts, labels=names[:LABELS], path=None) if len(names) > LABELS else prompts


def _link_exports(config: Config, short: Config) -> list[str]:
    """Link the exports of the model into the store of the short job, and return messages about damaged ones."""
    from pipeline.backends.artifacts.metadata import plain
    from pipeline.backends.artifacts.store import ArtifactStore
    from pipeline.backends.tensorrt import ENGINES
    from pipeline.models.checkpoint import open_checkpoint

    store, copy = ArtifactStore(config.backend.artifacts), Path(str(short.backend.artifacts))
    copy.mkdir()
    artifacts, damaged = store.artifacts(), list[str]()
    wanted = plain(open_checkpoint(short.model).fingerprint, "the model") if artifacts else None
    for artifact in artifacts:
        if artifact.card.get("model", {}).get("fingerprint") != wanted:
            continue
        if problems := store.problems(artifact):
            damaged.append(f"{artifact.path}: {problems[0]}")
            continue
        shutil.copytree(artifact.path, copy / artifact.fingerprint, copy_function=_link)
        for engines in (store.root / ENGINES / artifact.fingerprint).glob("*/"):
            shutil.copytree(engines, copy / ENGINES / artifact.fingerprint / engines.name)
    return damaged


def _link(source: str, target: str) -> None:
    """Link a file that is never changed; copy it where it lies on another disk."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _checks(job: Config, config: Config, rehearsal: Rehearsal) -> Iterator[Check]:
    from pipeline.backends.compare import in_words

    trial, prepared = rehearsal.trial, rehearsal.prepared
    if trial is None:
        yield Check(GROUP, "batch", Status.SKIP, "the manifest has no rows")
        return
    if job.manifest.path is not None:
        yield _images(job, rehearsal, trial)
    if trial.images:
        yield _embeddings(job, rehearsal, trial)
        yield _speed(config, rehearsal, trial)
    if prepared.parity is None:
        yield Check(GROUP, "parity", Status.OK, "this is fp32 itself, with which the other backends are compared")
    else:
        figures = {"lowest_cosine": prepared.parity.lowest_cosine, "mean_cosine": prepared.parity.mean_cosine}
        yield Check(GROUP, "parity", Status.OK, in_words(prepared.parity), figures=figures)
    if prepared.decoder_parity is not None:
        figures = {"lowest_cosine": prepared.decoder_parity.lowest_cosine}
        yield Check(GROUP, "decoder", Status.OK, in_words(prepared.decoder_parity, than="exact"), figures=figures)


def _images(job: Config, rehearsal: Rehearsal, trial: Trial) -> Check:
    """Report the share of the rows whose image can be read."""
    failed = trial.rows - trial.counts[OK]
    figures = {"tried": float(trial.rows), "failed": float(failed)}
    fact = f"{trial.counts[OK]} of {trial.rows} rows can be read"
    if not failed:
        return Check(GROUP, "images", Status.OK, fact, figures=figures)
    kinds = ", ".join(f"{name} {count}" for name, count in trial.counts.items() if name != OK)
    fact = f"{fact}; {kinds}; such as: {trial.error_example}"
    if not trial.images and job.errors.max_fraction < 1:
        manifest = rehearsal.manifest
        way_out = f"paths start from {manifest.root}: set manifest.root to another folder, or look at the files"
        way_out = "look at these images" if manifest.image_kind == "bytes" else way_out
        return Check(GROUP, "images", Status.FAIL, fact, way_out, figures)
    way_out = "such rows get a status; too many end the job with exit code 3 (errors.max_fraction)"
    return Check(GROUP, "images", Status.WARN, fact, way_out, figures)


def _embeddings(job: Config, rehearsal: Rehearsal, trial: Trial) -> Check:
    """Report the embeddings, which the job itself has checked for NaN, infinity and their length."""
    prepared = rehearsal.prepared
    name = prepared.config.backend.name
    engine = f"{job.model.name} on backend={name} {prepared.precision}, {prepared.device}"
    fact = f"{engine}: {sum(trial.images)} vectors of {prepared.dim} numbers, finite and of length 1"
    return Check(GROUP, "embeddings", Status.OK, fact, figures={"dim": float(prepared.dim)})


def _speed(config: Config, rehearsal: Rehearsal, trial: Trial) -> Check:
    # A sample of one batch has no second one to be measured.
    rate = trial.images_per_second or sum(trial.images) / trial.seconds
    opening, size = rehearsal.estimate.startup_seconds, config.loader.batch_size
    fact = f"{rate:,.1f} images/s in {len(trial.images)} batches of {size}; opened in {opening:.1f} s"
    figures = {"images_per_second": rate, "opening_seconds": opening}
    halved = trial.worker.batch_sizes[-1]
    if halved != size:
        fact += f"; the device has no memory for {size} at a time, and takes {halved}"
        return Check(GROUP, "speed", Status.WARN, fact, f"take loader.batch_size={halved}", figures)
    return Check(GROUP, "speed", Status.OK, fact, figures=figures)
