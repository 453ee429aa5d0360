"""Checks of the GPUs that the driver lists, and of the build of torch, which is not imported as that takes seconds."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.doctor.check import Check, Status, Subject

GROUP = "GPUs"
DRIVER = Path("/proc/driver/nvidia/version")
# WSL has no such file.
DEVICES = (Path("/dev/nvidiactl"), Path("/dev/dxg"))
FIELDS = ("index", "name", "driver_version", "memory.total", "memory.free", "compute_cap")
QUERY_SECONDS = 15
NO_TOOL = "nvidia-smi is not on the PATH (in a container: NVIDIA_DRIVER_CAPABILITIES=compute,utility,video)"


def look(subject: Subject) -> Iterator[Check]:
    """Check every GPU, and the build of torch."""
    wanted = _wanted(subject)
    gpus, problem = _gpus()
    for index, name, driver, total, free, capability in gpus:
        figures = {key: float(text) * 2**20 for key, text in (("memory_bytes", total), ("free_bytes", free))
                   if text.replace(".", "").isdigit()}  # fmt: skip
        fact = f"{name}, {free} of {total} MiB free, compute capability {capability}, driver {driver}"
        yield Check(GROUP, f"GPU {index}", Status.OK, fact, figures=figures)
    if not gpus:
        if wanted:
            way_out = "install the NVIDIA driver, start the container with --gpus all, or take backend.device=cpu"
            yield Check(GROUP, "GPU", Status.FAIL, f"{wanted}, and no GPU answers: {problem}", way_out)
        elif has_driver():
            way_out = "python -m pipeline.doctor without --quick opens it with torch"
            yield Check(GROUP, "GPU", Status.WARN, f"a driver is loaded, and {problem}", way_out)
        else:
            yield Check(GROUP, "GPU", Status.SKIP, f"none: {problem}")
    yield _build(wanted, bool(gpus))


def has_driver() -> bool:
    """Return True if the NVIDIA driver is loaded."""
    return DRIVER.exists() or any(path.exists() for path in DEVICES)


def _wanted(subject: Subject) -> str:
    """Return the setting that asks for a GPU, or an empty string."""
    config = subject.config
    if config is None:
        return ""
    if config.backend.device.startswith("cuda"):
        return f"backend.device={config.backend.device}"
    if config.backend.name in ("torch_fp8", "tensorrt"):
        return f"backend={config.backend.name}"
    if config.cluster.name == "cuda":
        return "cluster=cuda"
    return "images.decoder=gpu" if config.images.decoder == "gpu" else ""


def _gpus() -> tuple[list[list[str]], str]:
    """Return the fields of each GPU, and the reason where there are none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return [], NO_TOOL if has_driver() else "the NVIDIA driver is not loaded"
    command = [tool, f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=QUERY_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return [], f"nvidia-smi did not answer within {QUERY_SECONDS} s"
    except OSError as error:
        return [], f"{tool} cannot be started: {error.strerror}"
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
    rows = [row for row in rows if len(row) == len(FIELDS)]
    if done.returncode or not rows:
        said = (done.stdout + done.stderr).strip().splitlines() or ["no output"]
        return [], f"nvidia-smi: {said[-1]}"
    return rows, ""


def _build(wanted: str, gpus: bool) -> Check:
    facts = _torch()
    if facts is None:
        return Check(GROUP, "torch", Status.SKIP, "not installed")
    version, cuda = facts
    if cuda is None:
        fact = f"torch {version} was built without CUDA"
        way_out = "install the CUDA build of the same version: see https://pytorch.org/get-started/locally"
        if wanted:
            return Check(GROUP, "torch", Status.FAIL, f"{wanted}, and {fact}", way_out)
        # The job asks for no GPU, but could use the one of this machine.
        return Check(GROUP, "torch", Status.WARN, fact, way_out) if gpus else Check(GROUP, "torch", Status.OK, fact)
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if wanted and hidden in ("", "-1"):
        fact = f"{wanted}, and CUDA_VISIBLE_DEVICES={hidden!r} hides all GPUs"
        return Check(GROUP, "torch", Status.FAIL, fact, "unset CUDA_VISIBLE_DEVICES")
    return Check(GROUP, "torch", Status.OK, f"torch {version} was built with CUDA {cuda}")


def _torch() -> tuple[str, str | None] | None:
    """Return the versions of torch and of its CUDA, None for a build without; and None if torch is not installed."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return None
    spec = importlib.util.spec_from_file_location("_torch_version", Path(found.origin).with_name("version.py"))
    if spec is None or spec.loader is None:
        return None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return str(module.__version__), module.cuda
