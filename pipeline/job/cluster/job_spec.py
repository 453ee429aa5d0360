"""Specification of a job, sent once to each worker, also to those that join later."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pipeline.config.schema import Config
from pipeline.manifest.manifest import Manifest

if TYPE_CHECKING:
    from pipeline.engine.loop import Job


@dataclass(frozen=True, slots=True)
class JobSpec:
    """A job as workers get it: no model, no pixels.

    ``token`` tells jobs of one cluster apart. ``model`` is the fingerprint of the checkpoint as the driver found it.
    ``job`` is there once the plan is written, with the ``schema`` of its parts as Arrow writes it; its config has a
    batch size, which that of the spec may leave open.
    """

    token: str
    config: Config
    manifest: Manifest
    model: Mapping[str, Any]
    job: Job | None = None
    schema: bytes = b""

    def with_job(self, job: Job) -> JobSpec:
        """The same with the job, once the plan is written."""
        return replace(self, job=job, schema=job.form.schema.serialize().to_pybytes())

    @property
    def exact_job(self) -> Job | None:
        """The job, whose parts come out byte for byte as where it was made.

        A schema of Arrow that was pickled says the same, but lies otherwise in a file's metadata (measured with
        Arrow 26); one that was sent as Arrow writes it does not.
        """
        if self.job is None:
            return None
        schema = pa.ipc.read_schema(pa.py_buffer(self.schema))
        return replace(self.job, form=replace(self.job.form, schema=schema))

    @property
    def topic(self) -> str:
        """Topic of the events of its workers."""
        return f"pipeline-{self.token}"
