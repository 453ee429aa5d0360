"""The errors that end a run, each with the exit code that a scheduler sees.

Codes: 0 done; 1 anything unforeseen; 2 the config, the manifest or the machine is not what the job
needs; 3 done, but more failed images than allowed, or all but shards that no worker survived; 4 a backend
missed its parity gate; 75 somebody else holds the output, or the run was interrupted and can go on.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


def install_hint(extra: str) -> str:
    """The command that installs an extra of this package: from the checkout that runs, or from the index."""
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / "constraints.txt").is_file():
        return f"pip install 'clip-pipeline[{extra}]'"
    if checkout == Path.cwd():
        return f"pip install -c constraints.txt -e '.[{extra}]'"
    return f"pip install -c {shlex.quote(str(checkout / 'constraints.txt'))} -e '{checkout}[{extra}]'"


class PipelineError(Exception):
    """A foreseen reason to stop; the message says what happened, where, and the way out."""

    exit_code = 1


def short(text: str, most: int = 80) -> str:
    """The beginning of a longer text, for a message."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with a config: the key, the value given, what is allowed, and a hint."""

    key: str
    value: object
    allowed: str
    hint: str = ""

    def __str__(self) -> str:
        text = f"{self.key} = {self.value!r}: {self.allowed}"
        return f"{text} ({self.hint})" if self.hint else text


class ConfigError(PipelineError):
    """The config is wrong; carries every problem, so that one round of fixing is enough."""

    exit_code = 2

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        count = len(self.problems)
        head = "the config has a problem:" if count == 1 else f"the config has {count} problems:"
        super().__init__("\n".join([head, *(f"  - {problem}" for problem in self.problems)]))

    def __reduce__(self) -> tuple[type[ConfigError], tuple[tuple[Problem, ...]]]:
        """Pickled by its problems, of which the message is made."""
        return type(self), (self.problems,)


class ManifestError(PipelineError):
    """The manifest cannot be read as the config says."""

    exit_code = 2


class ModelError(PipelineError):
    """The checkpoint cannot be found, read or used."""

    exit_code = 2


class PromptsError(PipelineError):
    """The label set cannot be read or holds nothing to embed."""

    exit_code = 2


class BackendUnavailable(PipelineError):
    """This machine cannot run the backend that was asked for; never answered by a quiet fallback."""

    exit_code = 2


class DecoderUnavailable(PipelineError):
    """This machine cannot start a process that decodes images, or kills it."""

    exit_code = 2


class PlanMismatch(PipelineError):
    """The output holds a dataset of another model, manifest, prompt set, ...; the message lists what differs."""

    exit_code = 2


class NoDataset(PipelineError):
    """There is no dataset at the address that was given."""

    exit_code = 2


class UnfinishedDataset(PipelineError):
    """The job of the dataset that was given has not ended; once it has, the same command works."""

    exit_code = 75


class StorageError(PipelineError):
    """A file or object could not be read or written."""


class NumericalError(PipelineError):
    """An encoder returned numbers that are not embeddings (NaN, infinite, zero, wrong shape)."""


class TooManyFailures(PipelineError):
    """The dataset is complete, but more rows failed than ``errors.max_fraction`` allows."""

    exit_code = 3


class ShardsGivenUp(PipelineError):
    """All is committed but a few shards that ended every process that embedded them; the next run tries them again."""

    exit_code = 3


class WorkerMismatch(PipelineError):
    """A worker of a cluster would make other rows than the rest; the message says which, and what differs."""

    exit_code = 2


class ClusterUnavailable(PipelineError):
    """A cluster cannot be started or reached, or has no worker."""

    exit_code = 2


class ClusterLost(PipelineError):
    """The scheduler of a cluster ended in mid-run; what was committed stays, and the same command goes on."""

    exit_code = 75


class Interrupted(PipelineError):
    """A signal ended the run; what was committed stays, and the same command goes on."""

    exit_code = 75


class OutputBusy(PipelineError):
    """Another run holds the output; the message says who, since when, and what to do."""

    exit_code = 75


class LeaseLost(PipelineError):
    """Another run took the output over while this one was silent; what was committed stays."""

    exit_code = 75


class ArtifactError(PipelineError):
    """An exported file cannot be made, found or trusted."""

    exit_code = 2


class ParityError(PipelineError):
    """A backend's embeddings are too far from fp32's; nothing is computed with it."""

    exit_code = 4


def exit_code_of(error: BaseException) -> int:
    """The exit code of a run that this error ends."""
    if isinstance(error, PipelineError):
        return error.exit_code
    return Interrupted.exit_code if isinstance(error, KeyboardInterrupt) else 1
