"""The GPUs that this process may use, for processes that never open CUDA, which would take memory of the first one."""

from __future__ import annotations

import os
import re
import subprocess

VISIBLE = "CUDA_VISIBLE_DEVICES"


def visible() -> list[str]:
    """The GPUs as ``CUDA_VISIBLE_DEVICES`` names them: by number, UUID or UUID of a MIG device.

    Without the variable, the driver's own tool lists them; none where it is absent or fails.
    """
    named = os.environ.get(VISIBLE)
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip() not in ("", "-1")]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return uuids(listed)


def uuids(listing: str) -> list[str]:
    """The UUIDs of ``nvidia-smi -L``; the MIG devices of a GPU replace the GPU itself, on which nothing else runs."""
    found: list[str] = []
    for uuid in re.findall(r"\(UUID: ([^)]+)\)", listing):
        if uuid.startswith("MIG-") and found and found[-1].startswith("GPU-"):
            found.pop()
        found.append(uuid)
    return found
