"""Rows in a shard, where ``manifest.shard_rows=auto`` leaves them open.

The number is the plan's where the output has a plan, whatever the rule gives by now. Otherwise :func:`choose_rows`
takes it from facts that all parts of a job share: the manifest, the model, the form of the output, the kind of device
(a fingerprint of the plan) and the number of parts (a part of a job that is split otherwise is refused while one is at
work). So parts that start together, before there is a plan, agree; nothing of it is measured.
"""

from __future__ import annotations

import logging

from pipeline.backends.devices import choose_device
from pipeline.config.schema import Config
from pipeline.config.validate import part_of
from pipeline.core.errors import ConfigError, Problem
from pipeline.dataset import plan
from pipeline.dataset.vectors import VectorFormat
from pipeline.manifest.manifest import Manifest
from pipeline.models.checkpoint import Checkpoint
from pipeline.storage.base import Storage

# Rows in a shard: at least, at most, and the number that they are a multiple of, as batches mostly divide it.
LEAST, MOST, STEP = 4096, 999_424, 1024
# Seconds of work of one device: about what is lost where a loader feeds it; each feeder has a shard of its own in hand.
SECONDS = 120
# Shards for each worker, where the rows are enough: feeders have two each, and the last ones are not embedded side by
# side by all.
SHARDS = 256
# Shards of a dataset: each makes two files, and a folder is listed at every start.
MOST_SHARDS = 50_000
# Bytes of a shard's embeddings in fp32, of which a process holds three and one more for each feeder; bytes of a part.
HELD, WRITTEN = 1 << 28, 10**9
# Operations in a second, and images that are read and decoded, of the machines that the seconds are for: 16 cores, and
# a GPU of a data center in half precision beside as many.
OPERATIONS = {"cpu": 1e12, "cuda": 2e14}
IMAGES = {"cpu": 500, "cuda": 5000}
# Workers where only a scheduler or the machine knows their number, or where parts join as they like.
MANY = 64
# Bytes of a row of the output besides embeddings and kept columns; of a kept column beside images in the manifest.
OTHER, KEPT = 100, 64
log = logging.getLogger(__name__)


def choose_rows(rows: int, *, workers: int, pace: float, held: int, written: int) -> tuple[int, str]:
    """Rows in a shard of a job, and the reason in words.

    The largest number within all of these limits, as readers and stores like few, large files::

        pace * SECONDS             minutes of work, which a kill may lose
        rows / (workers * SHARDS)  all workers are busy to the end
        HELD / held                results are in memory until they are committed
        WRITTEN / written          parts of 1 GB at most

    rounded down to a multiple of ``STEP``; but ``LEAST`` where that is less, and never so few that there are more than
    ``MOST_SHARDS`` shards, up to ``MOST``.

    Args:
        rows: of the manifest.
        workers: processes that embed.
        pace: rows that one of them embeds in a second.
        held: bytes of a row's embeddings in memory.
        written: bytes of a row in a part.
    """
    limits = {
        f"{SECONDS // 60} minutes of work each": pace * SECONDS,
        f"{SHARDS} or more for each worker": rows / (workers * SHARDS),
        f"{HELD >> 20} MiB of embeddings each": HELD / held,
        "parts of 1 GB": WRITTEN / written,
    }
    reason = min(limits, key=limits.__getitem__)
    size = int(limits[reason]) // STEP * STEP
    if size <= LEAST:
        size, reason = LEAST, "the fewest"
    fewest = -(-rows // (MOST_SHARDS * STEP)) * STEP
    if fewest > size:
        size, reason = fewest, f"at most {MOST_SHARDS:,} shards"
    return min(size, MOST), reason


def with_shard_rows(config: Config, checkpoint: Checkpoint, manifest: Manifest, storage: Storage) -> Config:
    """The config with a number of rows in a shard: where it is ``auto``, the plan's, or else by :func:`choose_rows`.

    Args:
        config: of the job.
        checkpoint: its model.
        manifest: its rows.
        storage: the output, which may hold a plan.

    Raises:
        PlanMismatch: the output holds something that cannot be read as a plan.
        ConfigError: the rows are in tars, and the config gives a number.
    """
    if not manifest.counted:
        return _with_rows_of_tars(config, manifest)
    if config.manifest.shard_rows:
        return config
    found = plan.read(storage)
    if found is not None:
        log.info("shards of %s rows, as %s/%s says", f"{found.shard_rows:,}", storage.url, plan.NAME)
        return config.changed({"manifest.shard_rows": found.shard_rows})
    names = [("image", config.manifest.image), ("text", config.manifest.text)]
    towers = [checkpoint.tower(name).sizes for name, column in names if column is not None]
    operations = sum(2.0 * each.tokens * each.parameters for each in towers)
    kind = "cuda" if asks_for_gpus(config) else choose_device(config.backend.device).type
    dim = config.output.dims or checkpoint.dim
    size, reason = choose_rows(
        manifest.rows,
        workers=count_workers(config),
        pace=min(IMAGES[kind], OPERATIONS[kind] / max(1.0, operations)),
        held=4 * dim * len(towers),
        written=OTHER + _kept_bytes(manifest) + VectorFormat(config.output.dtype, dim).size * len(towers),
    )
    shards = plan.count_shards(manifest.rows, size)
    log.info("manifest.shard_rows=auto: %s of up to %s rows (%s)", _count(shards), f"{size:,}", reason)
    return config.changed({"manifest.shard_rows": size})


def most_rows(config: Config, manifest: Manifest) -> int:
    """Rows of the manifest; those of tars are estimated, and one tar may have as many as the config has by now."""
    return manifest.rows if manifest.counted else max(manifest.rows, config.manifest.shard_rows)


def _with_rows_of_tars(config: Config, manifest: Manifest) -> Config:
    """The config with the most rows that a tar may be expected to have; each tar is a shard whatever it has.

    Batches need not be larger, and the next power of two leaves room for an estimate.
    """
    if config.manifest.shard_rows:
        allowed = "is not for tars, each of which is a shard"
        hint = "leave it out, or make a manifest of them: python -m pipeline.manifest tar"
        raise ConfigError([Problem("manifest.shard_rows", config.manifest.shard_rows, allowed, hint)])
    most = max(file.rows for file in manifest.files)
    log.info("%s, one for each tar, of about %s rows in all", _count(len(manifest.files)), f"{manifest.rows:,}")
    return config.changed({"manifest.shard_rows": min(MOST, 1 << (most + most // 4).bit_length())})


def asks_for_gpus(config: Config) -> bool:
    """True if the config asks for GPUs, which the driver of a cluster need not have."""
    gpus = {"cuda": 1, "slurm": config.cluster.slurm_gpus, "kubernetes": config.cluster.kubernetes_gpus}
    return bool(gpus.get(config.cluster.name)) or config.backend.device.startswith("cuda")


def count_workers(config: Config) -> int:
    """Processes that embed, those of the other parts too; ``MANY`` where the config does not tell."""
    cluster = config.cluster
    if cluster.part is not None:
        part = part_of(cluster.part)
        return MANY if part is None else part[1]
    if cluster.name == "inline":
        return 1
    return cluster.max_workers or cluster.workers or {"local": 2, "slurm": 1, "kubernetes": 1}.get(cluster.name, MANY)


def _kept_bytes(manifest: Manifest) -> int:
    """Bytes of a row's kept columns: those of the manifest, which has them all, unless it has images."""
    kept = len(manifest.schema) - 1
    if kept and manifest.image_kind in ("path", ""):
        return sum(file.size for file in manifest.files) // max(1, manifest.rows)
    return KEPT * kept


def _count(shards: int) -> str:
    return f"{shards:,} shard{'' if shards == 1 else 's'}"
