"""Checks of the backends that this machine can run, with their precisions.

A backend checks its device, precision and packages before it reads the checkpoint. It is opened with a checkpoint that
stops it at that point, so that nothing is loaded or exported.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NoReturn

from pipeline.config.choices import BACKENDS
from pipeline.config.schema import BackendConfig, ParityConfig
from pipeline.core.errors import BackendUnavailable
from pipeline.doctor.check import Check, Status, Subject

GROUP = "backends"


class _RequirementsMet(BaseException):
    """A backend reads its checkpoint. No Exception, so that handlers of the backend do not catch it."""


class _NoCheckpoint:
    """Checkpoint that raises when it is read."""

    def __getattr__(self, name: str) -> NoReturn:
        raise _RequirementsMet


def look(subject: Subject) -> Iterator[Check]:
    """Check CUDA in torch, the compiler, then every backend."""
    config = subject.job.backend
    yield from _cuda()
    problem = compiler_problem()
    if problem:
        yield Check(GROUP, "torch.compile", Status.FAIL if config.compiles else Status.SKIP, problem)
    else:
        yield Check(GROUP, "torch.compile", Status.OK, "compiles for this machine")
    for name, info in BACKENDS.items():
        yield _backend(name, info.precisions, config, problem)


def can_run(config: BackendConfig) -> None:
    """Pass if this machine meets the requirements of a backend.

    Raises:
        BackendUnavailable: something is missing.
    """
    from pipeline.backends.base import factory

    checkpoint: Any = _NoCheckpoint()
    try:
        factory(config.name)(checkpoint, config, batch_size=1, sample=_no_sample, limits=ParityConfig())
    except _RequirementsMet:
        return


def compiler_problem() -> str:
    """Compile a small module, and return the reason why torch.compile cannot, or an empty string."""
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
    raise _RequirementsMet


def _cuda() -> Iterator[Check]:
    import torch

    if not torch.cuda.is_available():
        return
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        major, minor = torch.cuda.get_device_capability(index)
        memory = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
        fact = f"{torch.cuda.get_device_name(index)}, {memory}, compute capability {major}.{minor}"
        figures = {"free_bytes": float(free), "memory_bytes": float(total)}
        yield Check(GROUP, f"cuda:{index}", Status.OK, fact, figures=figures)


def _backend(name: str, precisions: tuple[str, ...], config: BackendConfig, compiler: str) -> Check:
    own = name == config.name
    if own and (problem := _problem(config)):
        return Check(GROUP, name, Status.FAIL, problem)
    # The device of the job, so that all lines are about one device.
    device = config.device if own or not config.device.startswith("cuda") else "auto"
    plain = replace(BackendConfig(), name=name, device=device, artifacts=config.artifacts)
    # Of a single precision "auto" is asked for, so that the message is about the backend.
    asked = {one: one if len(precisions) > 1 else "auto" for one in precisions}
    problems = {one: _problem(replace(plain, precision=precision)) for one, precision in asked.items()}
    runs = [one for one, problem in problems.items() if not problem]
    if BACKENDS[name].torch_compile and runs and compiler:
        return Check(GROUP, name, Status.FAIL if own else Status.SKIP, compiler)
    if not runs:
        return Check(GROUP, name, Status.FAIL if own else Status.SKIP, problems[precisions[0]])
    others = [one for one in precisions if one not in runs]
    without = f" (not {', '.join(others)})" if others else ""
    return Check(GROUP, name, Status.OK, f"{', '.join(runs)}{without}{', of this job' if own else ''}")


def _problem(config: BackendConfig) -> str:
    try:
        can_run(config)
    except BackendUnavailable as error:
        return str(error)
    return ""
