"""From clocks and a finished dataset to a :class:`~pipeline.records.RunReport`."""

from __future__ import annotations

import platform
import resource
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.addresses import open_arrow
from pipeline.records import OK, Clocks, Stage
from pipeline.storage.opening import open_storage
from pipeline.threads import in_order

PACKAGES = ("torch", "transformers", "tokenizers", "pillow", "pyarrow", "numpy", "hydra-core", "fsspec")
# The encoder waits for images more than this share of its time: then the loader sets the pace.
WAITING = 0.25


@dataclass(frozen=True, slots=True)
class DatasetSummary:
    """What the whole dataset holds: label counts, and the first failures of each status."""

    labels: Mapping[str, int]
    failures: tuple[Mapping[str, object], ...]


def summarize(folder: str, parts: Sequence[str], *, id: str, examples: int) -> DatasetSummary:
    """Read the small columns of every part, several parts at a time."""

    def read(part: str) -> pa.Table:
        with open_arrow(f"{folder.rstrip('/')}/{part}") as file:
            return pq.read_table(file, columns=[id, "label", "status", "error"], use_threads=False)

    labels: Counter[str] = Counter()
    failures: list[Mapping[str, object]] = []
    seen: Counter[str] = Counter()
    for table in in_order(read, parts, threads=open_storage(folder).threads):
        for pair in pc.value_counts(table["label"].drop_null()).to_pylist():
            labels[pair["values"]] += pair["counts"]
        failed = table.filter(pc.field("status") != OK)
        for row in failed.select([id, "status", "error"]).to_pylist():
            seen[row["status"]] += 1
            # A few of each kind say more than many of one.
            if len(failures) < examples and seen[row["status"]] <= max(3, examples // 8):
                failures.append({"id": row[id], "status": row["status"], "error": row["error"]})
    return DatasetSummary(labels=dict(labels.most_common()), failures=tuple(failures))


def find_bound(
    clocks: Clocks,
    *,
    startup: float,
    wall: float,
    workers: int,
    decoder: str,
    streams: int,
    device: str,
    precision: str,
    cores: int,
) -> tuple[str, str]:
    """What set the pace, and what to change about it, in words; ``startup`` and ``wall`` are seconds."""
    seconds = clocks.seconds
    wait_in, wait_out = seconds.get(Stage.WAIT_INPUT, 0.0), seconds.get(Stage.WAIT_OUTPUT, 0.0)
    # Batches that are encoded side by side take their time together.
    encoding = (seconds.get(Stage.ENCODE, 0.0) + seconds.get(Stage.LABEL, 0.0)) / streams
    loop = wait_in + wait_out + encoding
    if loop == 0:
        return "nothing", "every shard was done already"
    if startup > wall / 2:
        return "start-up", (
            f"{startup:.1f} of {wall:.1f} s went by before the first batch was done: importing, opening the model, "
            "embedding the prompts; a longer job hardly notices"
        )
    if wait_out / loop > WAITING:
        return "writing", "write to a faster disk, or raise manifest.shard_rows so that parts are fewer"
    if wait_in / loop > WAITING:
        if seconds.get(Stage.READ, 0.0) > seconds.get(Stage.DECODE, 0.0):
            return "reading", f"raise loader.workers (now {workers}): reading waits, so more threads than cores help"
        if workers < cores:
            return "decoding", f"raise loader.workers from {workers} to {cores}, one for each core"
        if decoder == "exact":
            return "decoding", "images.decoder=fast decodes JPEGs two to three times as fast (README, Decoders)"
        return "decoding", f"all {cores} cores decode; smaller images or more cores would help"
    if device == "cpu" and precision == "fp32":
        return "encoding", (
            "the model sets the pace: a GPU (backend.device=cuda), or backend.precision=bf16 on a processor with "
            "AVX512_BF16 or AMX"
        )
    if device == "cpu":
        return "encoding", "the model sets the pace: a GPU (backend.device=cuda) or more cores"
    return "encoding", "the GPU sets the pace: it is well used; raise loader.batch_size until images/s stops rising"


def memory() -> dict[str, float]:
    """Peak memory of this process in MiB: resident, and on the GPU if one was used."""
    figures = {"peak_rss_mib": round(_peak_rss() / 2**20, 1)}
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        figures["peak_gpu_mib"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
    return figures


def _peak_rss() -> int:
    """Bytes; getrusage would count what the process that started this one held at the time."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def machine(device: str, cores: int) -> dict[str, object]:
    """Where the run took place."""
    facts: dict[str, object] = {
        "processor": _processor(),
        "cores": cores,
        "system": f"{platform.system()} {platform.machine()}",
        "device": device,
    }
    torch: Any = sys.modules.get("torch")
    if device.startswith("cuda") and torch is not None:
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts


def versions(more: Sequence[str] = ()) -> dict[str, str]:
    """Versions of Python, of the packages that decide numbers and speed, and of ``more`` where they are installed."""
    found = {"python": platform.python_version()}
    for name in (*PACKAGES, *more):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def headline(images: int, wall: float, rate: float, bound: str) -> str:
    """The report in one sentence."""
    minutes, seconds = divmod(round(wall), 60)
    took = f"{minutes} min {seconds} s" if minutes else f"{wall:.1f} s"
    return f"{images:,} images in {took}: {rate:,.1f} images/s, bound by {bound}"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(
                (line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), platform.machine()
            )
    except OSError:
        return platform.processor() or platform.machine()
