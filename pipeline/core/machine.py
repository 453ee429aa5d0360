"""Facts about this machine and this process: processor, peak memory, versions of packages, its own addresses."""

from __future__ import annotations

import platform
import resource
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from ipaddress import ip_address
from typing import Any

PACKAGES = ("torch", "transformers", "tokenizers", "pillow", "pi-heif", "pyarrow", "numpy", "hydra-core", "fsspec")


def memory(device: str = "cpu") -> dict[str, float]:
    """Peak memory in MiB: resident of this process, and in use on ``device`` by now if that is a GPU."""
    figures = {"peak_rss_mib": round((peak_rss() or _peak_of_usage()) / 2**20, 1)}
    if in_use := gpu_memory(device):
        figures["peak_gpu_mib"] = in_use
    return figures


def gpu_memory(device: str) -> float:
    """MiB in use on a GPU as its driver counts, of all programs; 0 for a CPU, or if this process does not use CUDA.

    torch knows its own memory alone, and not that of ONNX Runtime, TensorRT, nvImageCodec and CUDA itself. Its peak
    counts where it is higher: a sample may miss it.
    """
    torch: Any = sys.modules.get("torch")
    if not device.startswith("cuda") or torch is None or not torch.cuda.is_initialized():
        return 0.0
    free, total = torch.cuda.mem_get_info(device)
    used: int = max(total - free, torch.cuda.max_memory_reserved(device))
    return round(used / 2**20, 1)


def peak_rss(process: int | str = "self") -> int:
    """Peak resident memory of a process in bytes; 0 where the system does not tell."""
    try:
        with open(f"/proc/{process}/status", encoding="ascii") as file:
            return next((int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:")), 0)
    except OSError:
        return 0


def _peak_of_usage() -> int:
    """The same of this process from getrusage, which includes the memory of the parent process at the fork."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def machine(device: str, cores: int) -> dict[str, object]:
    """Facts about the machine of a run."""
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
    """Versions of Python, of the packages that affect results and speed, and of ``more``, as far as installed."""
    found = {"python": platform.python_version()}
    for name in (*PACKAGES, *more):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def is_loopback(host: str) -> bool:
    """True for a name or an address that is reached from this machine alone, such as ``localhost``, ``::1``."""
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(
                (line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), platform.machine()
            )
    except OSError:
        return platform.processor() or platform.machine()
