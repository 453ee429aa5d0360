"""``python -m pipeline.run [FOLDER] [GROUP=OPTION ...] [KEY=VALUE ...]``: embed and label the images of a manifest."""

from __future__ import annotations

import gc
import os
import sys
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

from pipeline.config.compose import check_overrides, groups, register, to_config
from pipeline.config.hydra_guard import check_files, compose_once
from pipeline.config.options import read_options, take_folder, with_quotes
from pipeline.config.schema import conf_dir
from pipeline.config.validate import known_keys
from pipeline.core.cli import (
    ErrorOutput,
    FolderGone,
    check_folder,
    interrupt_within,
    on_signals,
    own_exit_code,
    provide_streams,
    quick_end,
    run_command,
)
from pipeline.core.errors import ConfigError
from pipeline.core.log_format import JsonLines, new_run
from pipeline.core.phases import Phases
from pipeline.core.processes import give_home
from pipeline.models.lean import import_transformers, load_torch_aside

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from pipeline.config.schema import Config

# Of the first job of a process, which began with it. A process may be older, if a shell became it, so its core time
# says how long the interpreter took.
_phases = Phases(time.time() - time.process_time())
_phases.ended("interpreter")
_first = iter([_phases])
INTERRUPTED = "interrupted; what was committed stays, and the same command goes on from there"
DRY = "interrupted; nothing was written to the output"
# The arguments of Hydra's --shell-completion, which look like overrides.
COMPLETION = ("install", "uninstall", "query")


def main() -> None:
    """Parse the command line, run the job, exit with a code of :mod:`pipeline.core.errors`."""
    errors = ErrorOutput(INTERRUPTED)
    # An exception out of a signal handler may get lost among the imports; until they are done, leave at once.
    on_signals(errors.leave)
    provide_streams()
    try:
        check_folder()
    except FolderGone as error:
        raise SystemExit(errors.print(error)) from error
    # Imports make a million objects that are no garbage; fewer collections save a tenth of the start-up.
    gc.set_threshold(100_000, 20, 50)
    import hydra

    give_home()
    options, problems = read_options([*groups(conf_dir()), *known_keys()])
    problems += take_folder(options)
    sys.argv[:] = with_quotes(sys.argv)
    register()
    if options.shell_completion:
        options.overrides = [text for text in options.overrides if text.partition("=")[0] not in COMPLETION]
    problems += check_overrides(options.overrides, sweep=options.multirun)
    # Config files are composed with the overrides, so the overrides must be good.
    problems = problems or check_files(options)
    if problems:
        raise SystemExit(errors.print(ConfigError(problems)))

    if not any((options.help, options.hydra_help, options.cfg, options.info, options.shell_completion)):
        load_torch_aside()

    def task(composed: DictConfig) -> None:
        run_task(composed, errors)

    compose_once()
    with own_exit_code():
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(task)()


def run_task(composed: DictConfig, errors: ErrorOutput) -> None:
    """Run the job of a composed config; exit unless it is done, as Hydra would turn an error into exit code 1."""
    try:
        with ExitStack() as opened:
            if code := run_command(lambda: _run(composed, errors, opened), errors):
                sys.exit(code)
    finally:
        _replace_closed_stderr()


def _run(composed: DictConfig, errors: ErrorOutput, opened: ExitStack) -> int:
    """Run the job, or its estimate; return the exit code."""
    phases = next(_first, None) or Phases(time.time())
    config, run = to_config(composed), new_run()
    phases.ended("config")
    errors.formatter = JsonLines(run) if config.log.format == "json" else None
    errors.interrupted = DRY if config.run.dry else INTERRUPTED
    from pipeline.telemetry.logs import library_messages

    opened.enter_context(library_messages(config.log, run))
    from pipeline.images.factory import SAMPLE_THREADS, open_decoders

    with phases.within("manifest"):
        config = _with_manifest(config, run, errors, opened)
    # The decoders start while this process imports torch, which takes seconds.
    images = config.manifest.image is not None
    decoders = open_decoders(config) if images and config.cluster.name == "inline" else None
    if decoders is not None:
        # The others, where the job itself reads its images, when its device is known.
        decoders.start(SAMPLE_THREADS)
    import_transformers()
    from pipeline.core.plain import leave_out_pandas

    leave_out_pandas()
    if config.run.dry:
        from pipeline.job.estimate.estimate import estimate_job

        interrupt_within(config.errors.grace_seconds, errors.leave)
        return estimate_job(config, began=phases.began, decoders=decoders, run=run).exit_code
    from pipeline.job.main import RunOptions, run_job

    interrupt_within(config.errors.grace_seconds, errors.leave)
    phases.ended("imports")
    run_job(config, RunOptions(phases=phases, decoders=decoders, run=run))
    return 0


def _with_manifest(config: Config, run: str, errors: ErrorOutput, opened: ExitStack) -> Config:
    """Return the config with a manifest of the images in place of a folder that ``manifest.path`` names."""
    from pipeline.manifest.files import holds_images

    if config.manifest.path is None or not holds_images(config.manifest.path):
        return config
    from pipeline.nightly.folder import folder_job
    from pipeline.storage.local import temporary_folder

    interrupt_within(config.errors.grace_seconds, errors.leave)
    return folder_job(config, opened.enter_context(temporary_folder()), run=run)


def _replace_closed_stderr() -> None:
    """Replace a closed standard error: Python would fail to flush it at its end, with exit code 120."""
    try:
        sys.stderr.flush()
    except (OSError, ValueError, AttributeError):
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - for what is left of the process


if __name__ == "__main__":
    with quick_end():
        main()
