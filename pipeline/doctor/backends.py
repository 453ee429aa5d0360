"""Which backends this machine can run, in which precisions; the others' own errors say what they need.

Every backend proves its device, precision and packages before it touches the checkpoint. So it is opened with a
checkpoint that nobody has: what gets as far as that can run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NoReturn

from pipeline.config.ranges import PRECISIONS
from pipeline.config.schema import BackendConfig, ParityConfig
from pipeline.core.errors import BackendUnavailable
from pipeline.doctor.check import Check, Status, Subject

GROUP = "backends"
# What compiles always, whatever backend.compile says.
COMPILED = ("torch_int8", "torch_fp8")


class Reached(BaseException):
    """All that a backend wants of the machine is there. No Exception: none of its own handlers may take it."""


class Nobody:
    """A checkpoint that is not there."""

    def __getattr__(self, name: str) -> NoReturn:
        raise Reached


def look(subject: Subject) -> Iterator[Check]:
    """CUDA as torch sees it, the compiler, then every backend."""
    config = subject.job.backend
    yield from _cuda()
    problem = compiler_problem()
    compiles = config.compile != "none" or config.name in COMPILED
    if problem:
        yield Check(GROUP, "torch.compile", Status.FAIL if compiles else Status.SKIP, problem)
    else:
        yield Check(GROUP, "torch.compile", Status.OK, "compiles for this machine")
    for name, precisions in PRECISIONS.items():
        yield _backend(name, precisions, config, problem)


def can_run(config: BackendConfig) -> None:
    """Pass if the backend of ``config`` can run here as it asks.

    Raises:
        BackendUnavailable: what is missing, in the backend's own words.
    """
    from pipeline.backends import factory

    nobody: Any = Nobody()
    try:
        factory(config.name)(nobody, config, batch_size=1, sample=_no_sample, limits=ParityConfig())
    except Reached:
        return


def compiler_problem() -> str:
    """Why torch.compile cannot compile here, or an empty text; something small is compiled to know."""
    import torch

    from pipeline.backends.devices import choose_device
    from pipeline.backends.torch_module import compiled

    device = choose_device("auto")
    try:
        with torch.inference_mode():
            compiled(torch.nn.GELU(), mode="default", pixels=torch.zeros(64, 64, device=device))
    except BackendUnavailable as error:
        return str(error)
    return ""


def _no_sample() -> NoReturn:
    raise Reached


def _cuda() -> Iterator[Check]:
    import torch

    if not torch.cuda.is_available():
        return
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        major, minor = torch.cuda.get_device_capability(index)
        room = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
        fact = f"{torch.cuda.get_device_name(index)}, {room}, compute capability {major}.{minor}"
        figures = {"free_bytes": float(free), "memory_bytes": float(total)}
        yield Check(GROUP, f"cuda:{index}", Status.OK, fact, figures=figures)


def _backend(name: str, precisions: tuple[str, ...], config: BackendConfig, compiler: str) -> Check:
    own = name == config.name
    # The others are asked for the device of the job, so that all lines are about one device.
    device = config.device if own or not config.device.startswith("cuda") else "auto"
    runs, reasons = [], []
    for precision in precisions:
        # With one alone, what is missing is the backend's, not the precision's.
        asked = precision if len(precisions) > 1 else "auto"
        plain = replace(BackendConfig(), name=name, precision=asked, device=device, artifacts=config.artifacts)
        try:
            can_run(plain)
        except BackendUnavailable as error:
            reasons.append((precision, str(error)))
        else:
            runs.append(precision)
    if name in COMPILED and runs and compiler:
        runs, reasons = [], [(precisions[0], compiler)]
    wanted = ""
    if own:
        try:
            can_run(config)
        except BackendUnavailable as error:
            wanted = str(error)
    if wanted:
        return Check(GROUP, name, Status.FAIL, wanted)
    if runs:
        without = f" (not {', '.join(precision for precision, _ in reasons)})" if reasons else ""
        return Check(GROUP, name, Status.OK, f"{', '.join(runs)}{without}{', of this job' if own else ''}")
    return Check(GROUP, name, Status.FAIL if own else Status.SKIP, reasons[0][1])
