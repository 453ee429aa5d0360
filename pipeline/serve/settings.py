"""Checks of a config for the service, and the config from the environment."""

from __future__ import annotations

import os
import shlex

from pipeline.config.compose import compose_config
from pipeline.config.ranges import AUTO
from pipeline.config.schema import Config
from pipeline.core.errors import ConfigError, PipelineError, Problem, install_hint

# Overrides for an app that gunicorn or uvicorn starts, in the syntax of the command line.
VARIABLE = "PIPELINE_SERVE_OVERRIDES"


class ExtraMissing(PipelineError):
    """The packages of the service are not installed."""

    exit_code = 2


def need_packages() -> None:
    """Check that the extra ``serve`` is installed.

    Raises:
        ExtraMissing: a package is missing.
    """
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ExtraMissing(f"the service needs the extra serve ({error}): {install_hint('serve')}") from error


def check_service(config: Config) -> list[Problem]:
    """Return the settings of a valid config that the service does not support."""
    problems = []
    if config.loader.batch_size == 0:
        allowed = "is measured for a job; the service needs a number"
        hint = "the _plan.json of a dataset has the size it was made with; smaller sizes have a lower latency"
        problems.append(Problem("loader.batch_size", AUTO, allowed, hint))
    if config.loader.isolation != "process":
        allowed = "must be process: untrusted images are not decoded in the process of the server"
        problems.append(Problem("loader.isolation", config.loader.isolation, allowed))
    if config.images.decoder == "gpu":
        allowed = "decodes batches of a job; the service decodes on the CPU"
        problems.append(Problem("images.decoder", "gpu", allowed, "take images=fast or images=exact"))
    for name in ("textfile", "pushgateway"):
        if place := getattr(config.metrics, name):
            hint = "leave it out, and let Prometheus scrape /metrics"
            problems.append(Problem(f"metrics.{name}", place, "is for the metrics of a job", hint))
    if config.cluster.name != "inline" or config.cluster.part is not None:
        allowed = "is for jobs; start one service for each GPU, for instance with gunicorn"
        problems.append(Problem("cluster", config.cluster.part or config.cluster.name, allowed, "leave it out"))
    return problems


def service_config(overrides: list[str]) -> Config:
    """Compose and check the config of the service.

    Raises:
        ConfigError: with every problem.
    """
    config = compose_config(overrides)
    if problems := check_service(config):
        raise ConfigError(problems)
    return config


def config_of_environment() -> Config:
    """Return the config of the overrides in the variable ``PIPELINE_SERVE_OVERRIDES``.

    Raises:
        ConfigError: with every problem.
    """
    text = os.environ.get(VARIABLE, "")
    try:
        overrides = shlex.split(text)
    except ValueError as error:
        raise ConfigError([Problem(VARIABLE, text, f"cannot be read: {error}")]) from error
    return service_config(overrides)
