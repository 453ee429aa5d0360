"""The probes, in the order in which they are run and printed; each is imported where it runs, and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module

from pipeline.doctor.check import Probe


@dataclass(frozen=True, slots=True)
class Entry:
    """A probe: its heading, its module in this room, and the seconds after which it counts as hung.

    A ``slow`` one is left out by ``--quick``. One that is ``general`` needs no config.
    """

    group: str
    module: str
    seconds: float
    slow: bool = False
    general: bool = False

    def load(self) -> Probe:
        """The module's function ``look``."""
        look: Probe = import_module(f"pipeline.doctor.{self.module}").look
        return look


PROBES = (
    Entry("versions", "versions", 20, general=True),
    Entry("extras", "extras", 20),
    Entry("processor and memory", "cpu", 20, general=True),
    Entry("GPUs", "gpu", 30, general=True),
    Entry("limits", "limits", 20, general=True),
    Entry("hub and model", "hub", 30),
    Entry("manifest", "manifest", 60),
    Entry("output", "output", 60),
    Entry("disks", "disk", 120),
    Entry("decoders", "decoders", 120, slow=True),
    Entry("backends", "backends", 300, slow=True),
    Entry("one batch", "batch", 1800, slow=True),
)


def entry(module: str) -> Entry:
    """The probe of that module."""
    return next(entry for entry in PROBES if entry.module == module)
