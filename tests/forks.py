"""Jobs in processes that cost little to start: forks of one process that has imported everything.

``Forks`` starts that process and speaks with it over a pipe; each job is a fork of it that lives and dies like
a process of its own: in a session of its own, with its own environment, failpoints, signals and exit code.
The parent runs no PyTorch operation and no thread, so that a fork begins clean.
"""

from __future__ import annotations

import atexit
import ctypes
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.conftest import ROOT, load_the_demo_once

if TYPE_CHECKING:
    from pipeline.config.schema import Config

WARM = (
    "hydra._internal.utils",
    "hydra._internal.hydra",
    "hydra._internal.config_loader_impl",
    "hydra.core.utils",
    "hydra._internal.core_plugins.basic_launcher",
    "jinja2",
    "matplotlib.backends.backend_svg",
    "matplotlib.figure",
    "pandas",
    "fsspec.implementations.local",
    "pyarrow.acero",
    "pyarrow.dataset",
    "pyarrow.parquet",
    "s3fs",
    "torch._dynamo",
    "torch.distributed.tensor",
    "transformers.models.auto",
    "transformers.models.clip.modeling_clip",
    "transformers.models.clip.tokenization_clip",
    "transformers.models.clip.image_processing_pil_clip",
    "pipeline.backends.torch",
    "pipeline.job.main",
    "pipeline.nightly.folder",
    "pipeline.report.page",
    "pipeline.report.plots",
    "pipeline.run",
    "tests.jobs",
)
SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER, of linux/prctl.h


class HangError(AssertionError):
    """A process did not end in its time."""


class Child:
    """One forked process; its standard output and error go to ``log``."""

    def __init__(self, forks: Forks, pid: int, log: Path) -> None:
        self.forks, self.pid, self.log = forks, pid, log
        self.returncode: int | None = None
        self._descriptor = os.pidfd_open(pid)

    def alive(self, seconds: float = 0) -> bool:
        """Whether it still runs after that time; returns as soon as it has ended."""
        return self.returncode is None and not select.select([self._descriptor], [], [], seconds)[0]

    def send(self, number: int) -> None:
        if self.returncode is None:
            signal.pidfd_send_signal(self._descriptor, number)

    def wait(self, seconds: float = 120) -> int:
        """The exit code, negative for a signal, as :class:`subprocess.Popen` counts.

        Raises:
            HangError: it had to be killed.
        """
        hung = self.alive(seconds)
        if hung:
            self.send(signal.SIGKILL)
            self.alive(60)
        if self.returncode is None:
            answer = self.forks.ask(do="reap", pid=self.pid)
            self.returncode = os.waitstatus_to_exitcode(answer["status"])
            os.close(self._descriptor)
        if hung:
            raise HangError(f"process {self.pid} did not end in {seconds} s; it said: {self.said()[-2000:]}")
        return self.returncode

    def said(self) -> str:
        """What it wrote to standard output and error."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""


class Forks:
    """The warm parent process; use from any thread."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.forks"]
        pipe = subprocess.PIPE
        self._lock = threading.Lock()
        self._logs = Path(tempfile.mkdtemp(prefix="forks-"))
        self._count = 0
        with (self._logs / "parent.txt").open("w") as log:
            self._process = subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=log, text=True)

    def ask(self, **request: Any) -> dict[str, Any]:
        with self._lock:
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        assert line, f"the parent of the forks has ended: {(self._logs / 'parent.txt').read_text()}"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def start(
        self, call: str, *arguments: Any, failpoints: str = "", environment: dict[str, str] | None = None
    ) -> Child:
        """Start ``call`` (``module:function``) in a process of its own; what it returns is the exit code."""
        with self._lock:
            self._count += 1
            log = self._logs / f"{self._count}.txt"
        wanted = {**(environment or {}), "PIPELINE_FAILPOINTS": failpoints}
        answer = self.ask(do="start", call=call, arguments=arguments, environment=wanted, log=str(log))
        return Child(self, answer["pid"], log)

    def strays(self, seconds: float = 10) -> list[str]:
        """Processes that outlived the jobs that started them, once they had that long to notice."""
        end = time.monotonic() + seconds
        while (found := self.ask(do="strays")["strays"]) and time.monotonic() < end:
            time.sleep(0.1)
        return list(found)

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.communicate()
        for log in self._logs.glob("*.txt"):
            log.unlink()
        self._logs.rmdir()


@cache
def forks() -> Forks:
    """The one parent of this test session."""
    made = Forks()
    atexit.register(made.close)
    return made


def run_command(*overrides: str) -> int:
    """``python -m pipeline.run OVERRIDES`` in this process."""
    from pipeline import run

    sys.argv = ["pipeline.run", *overrides]
    run.main()
    return 0


def config_from(groups: dict[str, dict[str, Any]]) -> Config:
    """The config that :func:`tests.crashes.at` took apart."""
    from dataclasses import replace

    from pipeline.config.schema import Config

    config = Config()
    for name, values in groups.items():
        config = replace(config, **{name: replace(getattr(config, name), **values)})
    return config


def job(groups: dict[str, dict[str, Any]], stub: bool = False) -> int:
    """A job by its config, without Hydra: a third of a second less; ends as the command does."""
    from contextlib import nullcontext

    from pipeline.core.errors import PipelineError
    from pipeline.job.main import run_job
    from tests.jobs import StubEncoder, stub_backend

    try:
        with stub_backend(StubEncoder) if stub else nullcontext():
            run_job(config_from(groups))
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _begin(request: dict[str, Any]) -> Any:
    """Become the process that was asked for; runs in the fork."""
    os.setsid()
    log = os.open(request["log"], os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for descriptor, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(descriptor, target)
    sys.stdin = open(0)  # noqa: SIM115 - the pipe to the parent is not for this process
    os.environ.update(request["environment"])
    _read_again(request["environment"])
    tempfile.tempdir = None
    from pipeline.core import failpoints

    failpoints.arm(os.environ["PIPELINE_FAILPOINTS"])
    module, name = request["call"].split(":")
    return getattr(importlib.import_module(module), name)(*request["arguments"])


def _read_again(environment: dict[str, str]) -> None:
    """Let libraries read what they read from the environment when they were imported in the parent."""
    if any(name.startswith("DASK_") for name in environment):
        import dask.config

        dask.config.refresh()
    if any(name.startswith("HF_") for name in environment):
        from huggingface_hub import constants, hf_api

        hf_api.api.endpoint = importlib.reload(constants).ENDPOINT


def _outcome(request: dict[str, Any]) -> int:
    try:
        code = _begin(request)
    except SystemExit as left:
        code = left.code
    except BaseException:
        traceback.print_exc()
        return 1
    return code if isinstance(code, int) else int(code is not None)


def _leave(code: int) -> None:
    """End as Python does, waiting for threads and calling exit handlers, but do not take every module apart.

    That would touch, and so copy, all the memory that this process shares with its parent.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    with suppress(OSError, ValueError):
        sys.stderr.flush()
    os._exit(code)


def _strays(own: set[int]) -> list[str]:
    """Live children of this process that it did not start itself; dead ones are reaped."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        for pid in map(int, (task / "children").read_text().split()):
            if pid in own:
                continue
            with suppress(ChildProcessError, FileNotFoundError):
                if os.waitpid(pid, os.WNOHANG) == (0, 0):
                    command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    found.append(f"{pid}: {command}")
    return found


def _serve() -> None:
    import torch

    torch.set_num_threads(1)
    for name in WARM:
        # s3fs comes with an extra.
        with suppress(ModuleNotFoundError):
            importlib.import_module(name)
    import gc

    from hydra.core.plugins import Plugins
    from PIL import Image
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.utils import logging

    from pipeline.models import transformers_form

    Image.init()
    Plugins.instance()
    # A thousand regular expressions, which transformers compiles when the first model is loaded and then keeps.
    get_checkpoint_conversion_mapping("clip")
    # Most jobs have this model, and each fork a copy of it. Its tokenizer would start threads here, as would a bar.
    load_the_demo_once()
    logging.disable_progress_bar()
    transformers_form.load_model(transformers_form.DEMO_FOLDER, transformers_form.DEMO_FOLDER)
    gc.freeze()
    # Orphans of killed jobs become children of this process, so that none goes unseen.
    ctypes.CDLL(None, use_errno=True).prctl(SUBREAPER, 1, 0, 0, 0)
    own: set[int] = set()
    answers = os.fdopen(os.dup(1), "w")
    while line := sys.stdin.readline():
        request = json.loads(line)
        if request["do"] == "start":
            pid = os.fork()
            if not pid:
                answers.close()
                _leave(_outcome(request))
            own.add(pid)
            answer: dict[str, Any] = {"pid": pid}
        elif request["do"] == "reap":
            answer = {"status": os.waitpid(request["pid"], 0)[1]}
            own.discard(request["pid"])
        else:
            answer = {"strays": _strays(own)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    for pid in own:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    _serve()
