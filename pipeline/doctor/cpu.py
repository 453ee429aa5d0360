"""The processor and the memory, as far as a container leaves them to this process."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from pathlib import Path

from pipeline.config.schema import Config
from pipeline.core.processes import cores
from pipeline.doctor.check import Check, Status, Subject
from pipeline.doctor.gpu import has_driver

GROUP = "processor and memory"
CGROUPS = Path("/sys/fs/cgroup")
# Names of people, and the flags of Linux of which one is enough: x86 first, then ARM.
FEATURES = {
    "AVX2": ("avx2",),
    "AVX-512": ("avx512f",),
    "VNNI": ("avx512_vnni", "avx_vnni"),
    "BF16": ("avx512_bf16",),
    "AMX": ("amx_bf16", "amx_int8"),
    "NEON": ("asimd",),
    "SVE": ("sve",),
    "ARM bf16": ("bf16",),
    "ARM i8mm": ("i8mm",),
}
MULTIPLIES_BF16 = ("BF16", "AMX", "ARM bf16")
MULTIPLIES_INT8 = ("VNNI", "AMX", "ARM i8mm")
INT8 = ("torch_int8", "onnx_int8")
GIB = 2**30
# Below this a small model and its libraries hardly fit.
LITTLE_MEMORY = 2 * GIB


def look(subject: Subject) -> Iterator[Check]:
    """Cores, instructions and what they mean for this job, memory."""
    yield _cores()
    found = features()
    on_cpu = subject.config is not None and runs_on_cpu(subject.config)
    if not found:
        yield Check(GROUP, "instructions", Status.SKIP, f"{platform.machine()}: not told by this system")
    else:
        absent = [name for name in ("AVX2", "AVX-512", "VNNI", "BF16", "AMX") if name not in found]
        without = f"; without {', '.join(absent)}" if platform.machine() in ("x86_64", "AMD64") and absent else ""
        # What NEON is to ARM.
        old = platform.machine() in ("x86_64", "AMD64") and "AVX2" not in found
        status, way_out = Status.OK, ""
        if old and on_cpu:
            status, way_out = Status.WARN, "take a newer processor or a GPU: without AVX2 everything is slow"
        yield Check(GROUP, "instructions", status, f"{', '.join(found)}{without}", way_out)
        yield _bf16(found, subject.config if on_cpu else None)
        yield _int8(found, subject.config if on_cpu else None)
    yield _memory()


def features() -> list[str]:
    """The names of ``FEATURES`` that this processor has; none where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    listed = next((line.partition(":")[2] for line in lines if line.startswith(("flags", "Features"))), "")
    flags = set(listed.split())
    return [name for name, one_of in FEATURES.items() if flags & {*one_of}]


def runs_on_cpu(config: Config) -> bool:
    """Whether the job computes on the processor; where that is left open, whether there is no driver of a GPU."""
    return config.backend.device == "cpu" or (config.backend.device == "auto" and not has_driver())


def quota() -> float | None:
    """Cores' worth of time that the container may use; None for no limit."""
    for folder in _cgroup():
        words = _read(folder / "cpu.max").split()
        if len(words) == 2 and words[0].isdigit():
            return int(words[0]) / int(words[1])
    limit, period = _read(CGROUPS / "cpu/cpu.cfs_quota_us"), _read(CGROUPS / "cpu/cpu.cfs_period_us")
    return int(limit) / int(period) if limit.isdigit() and period.isdigit() and int(period) else None


def memory() -> tuple[int, int]:
    """Bytes of memory that this process may use, and of those that are available: the machine's or the container's."""
    lines = (line.split() for line in _read(Path("/proc/meminfo")).splitlines())
    known = {words[0]: int(words[1]) * 1024 for words in lines if len(words) > 1}
    total, available = known.get("MemTotal:", 0), known.get("MemAvailable:", 0)
    pairs = [(folder / "memory.max", folder / "memory.current", folder / "memory.stat") for folder in _cgroup()]
    old = CGROUPS / "memory"
    pairs.append((old / "memory.limit_in_bytes", old / "memory.usage_in_bytes", old / "memory.stat"))
    for limit, usage, stat in pairs:
        words, used = _read(limit), _read(usage)
        if words.isdigit() and used.isdigit() and int(words) < (total or 1 << 62):
            # Pages of files are given up when memory is wanted.
            cached = next((int(line.split()[1]) for line in _read(stat).splitlines() if "inactive_file" in line), 0)
            total, available = int(words), min(available, int(words) - int(used) + cached)
    return total, max(0, available)


def _cores() -> Check:
    usable, there, share = cores(), os.cpu_count() or 1, quota()
    figures = {"cores": float(usable), **({} if share is None else {"cores_quota": share})}
    fact = f"{usable} usable" if usable == there else f"{usable} of {there} usable"
    if share is not None and share < usable - 0.01:
        way_out = (
            f"the job would start work for {usable}: give it cores of its own (docker run --cpuset-cpus=0-"
            f"{max(1, round(share)) - 1}), or set loader.workers={max(1, round(share))} "
            f"backend.streams={max(1, round(share))}"
        )
        return Check(GROUP, "cores", Status.WARN, f"{fact}, but the container gets {share:g}", way_out, figures)
    return Check(GROUP, "cores", Status.OK, fact, figures=figures)


def _bf16(found: list[str], config: Config | None) -> Check:
    by = [name for name in MULTIPLIES_BF16 if name in found]
    if by:
        return Check(GROUP, "bf16", Status.OK, f"computed by the processor ({', '.join(by)})")
    fact = "not computed by this processor: slower than fp32 here"
    if config is not None and config.backend.precision == "bf16":
        return Check(GROUP, "bf16", Status.WARN, fact, "take backend.precision=fp32, or an int8 backend")
    return Check(GROUP, "bf16", Status.SKIP, fact)


def _int8(found: list[str], config: Config | None) -> Check:
    by = [name for name in MULTIPLIES_INT8 if name in found]
    if by:
        return Check(GROUP, "int8", Status.OK, f"multiplied by the processor ({', '.join(by)})")
    fact = "no int8 products (VNNI, AMX): torch_int8 packs the weights alone, onnx_int8 is slower and less exact"
    if config is not None and config.backend.name in INT8:
        return Check(GROUP, "int8", Status.WARN, fact, "take backend=onnx or backend=torch, and compare with the bench")
    return Check(GROUP, "int8", Status.SKIP, fact)


def _memory() -> Check:
    total, available = memory()
    if not total:
        return Check(GROUP, "memory", Status.SKIP, "not told by this system")
    figures = {"memory_bytes": float(total), "available_bytes": float(available)}
    fact = f"{available / GIB:,.1f} of {total / GIB:,.1f} GiB available"
    if available < LITTLE_MEMORY:
        way_out = "end other programs or raise the container's limit; a smaller loader.batch_size takes less too"
        return Check(GROUP, "memory", Status.WARN, fact, way_out, figures)
    return Check(GROUP, "memory", Status.OK, fact, figures=figures)


def _cgroup() -> list[Path]:
    """The folders of this process's cgroup (version 2), its own first: each may set a limit."""
    lines = _read(Path("/proc/self/cgroup")).splitlines()
    own = next((line[3:] for line in lines if line.startswith("0::")), None)
    if own is None:
        return []
    folder = CGROUPS / own.strip("/")
    return [one for one in (folder, *folder.parents) if one.is_relative_to(CGROUPS)]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""
