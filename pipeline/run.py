"""``python -m pipeline.run [GROUP=OPTION ...] [KEY=VALUE ...]``: embed and label the images of a manifest."""

from __future__ import annotations

import gc
import os
import sys
import time
from contextlib import ExitStack, suppress
from types import FrameType
from typing import TYPE_CHECKING

from pipeline.config.compose import check_overrides, groups, known_keys, register, to_config
from pipeline.config.hydra_guard import check_files
from pipeline.config.options import read_options
from pipeline.config.schema import Config, conf_dir
from pipeline.core.cli import error_line, interrupt_within, on_signals, own_exit_code
from pipeline.core.errors import ConfigError, Interrupted, PipelineError, exit_code_of
from pipeline.core.log_format import JsonLines, new_run

if TYPE_CHECKING:
    from omegaconf import DictConfig

# For the first job of a process, which began with it; the process itself may be older, if a shell became it.
_began = iter([time.time()])
INTERRUPTED = "interrupted; what was committed stays, and the same command goes on from there"
DRY = "interrupted; nothing was written to the output"
# The arguments of Hydra's --shell-completion, which look like overrides.
COMPLETION = ("install", "uninstall", "query")
# The message for an interruption, and the formatter of errors with log.format=json.
_interrupted = INTERRUPTED
_formatter: JsonLines | None = None


def main() -> None:
    """Parse the command line, run the job, exit with a code of :mod:`pipeline.core.errors`."""
    # An exception out of a signal handler may get lost among the imports; until they are done, leave at once.
    on_signals(_leave)
    # Imports make a million objects that are no garbage; fewer collections save a tenth of the start-up.
    gc.set_threshold(100_000, 20, 50)
    import hydra

    options, problems = read_options([*groups(conf_dir()), *known_keys()])
    register()
    if options.shell_completion:
        options.overrides = [text for text in options.overrides if text.partition("=")[0] not in COMPLETION]
    problems += check_overrides(options.overrides, sweep=options.multirun)
    # Config files are composed with the overrides, so the overrides must be good.
    problems = problems or check_files(options)
    if problems:
        _exit(ConfigError(problems))
    with own_exit_code():
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(_task)()


def _task(composed: DictConfig) -> None:
    opened = ExitStack()
    try:
        if code := _run(to_config(composed), opened):
            sys.exit(code)
    except KeyboardInterrupt:
        _exit(Interrupted(_interrupted))
    except PipelineError as error:
        _exit(error)
    except Exception as error:
        if _formatter is None:
            raise
        _exit(error)
    finally:
        opened.close()
        _replace_closed_stderr()


def _run(config: Config, opened: ExitStack) -> int:
    """Run the job, or its estimate; return the exit code."""
    global _formatter, _interrupted
    run = new_run()
    _formatter = JsonLines(run) if config.log.format == "json" else None
    from pipeline.telemetry.logs import library_messages

    opened.enter_context(library_messages(config.log, run))
    from pipeline.images.factory import open_decoders

    # The decoders start while this process imports torch, which takes seconds.
    decoders = open_decoders(config) if config.cluster.name == "inline" else None
    if decoders is not None:
        decoders.start()
    if config.run.dry:
        from pipeline.job.estimate.estimate import estimate_job

        _interrupted = DRY
        interrupt_within(config.errors.grace_seconds, _leave)
        return estimate_job(config, began=next(_began, None), decoders=decoders, run=run).exit_code
    from pipeline.job.main import RunOptions, run_job

    interrupt_within(config.errors.grace_seconds, _leave)
    run_job(config, RunOptions(began=next(_began, None), decoders=decoders, run=run))
    return 0


def _replace_closed_stderr() -> None:
    """Replace a closed standard error: Python would fail to flush it at its end, with exit code 120."""
    try:
        sys.stderr.flush()
    except (OSError, ValueError, AttributeError):
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - for what is left of the process


def _leave(number: int = 0, frame: FrameType | None = None) -> None:
    """End the process at once, as interrupted."""
    with suppress(OSError):
        os.write(2, f"{error_line(Interrupted(_interrupted), _formatter)}\n".encode())
    os._exit(Interrupted.exit_code)


def _exit(error: BaseException) -> None:
    """Exit with the code of an error; Hydra would turn the error itself into exit code 1."""
    with suppress(OSError, ValueError):
        print(error_line(error, _formatter), file=sys.stderr)
    raise SystemExit(exit_code_of(error))


if __name__ == "__main__":
    main()
