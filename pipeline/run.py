"""The main door: ``python -m pipeline.run [GROUP=OPTION ...] [KEY=VALUE ...]``."""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import TYPE_CHECKING

from pipeline.config import conf_dir
from pipeline.errors import ConfigError, Interrupted, PipelineError
from pipeline.overrides import check_overrides, register, to_config

if TYPE_CHECKING:
    from omegaconf import DictConfig


def main() -> None:
    """Read the command line, run the job, exit with the code that :mod:`pipeline.errors` explains."""
    import hydra
    from hydra._internal.utils import get_args_parser

    # Hydra's own parser, so that the values of its options (--cfg job, --config-dir DIR) are not overrides.
    options = get_args_parser().parse_args()
    if not options.shell_completion:
        problems = check_overrides(options.overrides, conf_dir(), sweep=options.multirun)
        if problems:
            _exit(ConfigError(problems))
    register()
    hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(_task)()


def _task(composed: DictConfig) -> None:
    try:
        config = to_config(composed)
        signal.signal(signal.SIGTERM, _terminate)
        from pipeline.job import run_job

        run_job(config)
    except KeyboardInterrupt:
        _exit(Interrupted("interrupted; what was committed stays, and the same command goes on from there"))
    except PipelineError as error:
        _exit(error)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _exit(error: PipelineError) -> None:
    # Hydra turns exceptions into exit code 1; SystemExit passes through.
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(error.exit_code)


if __name__ == "__main__":
    main()
