"""Batches side by side on a CPU: the same rows, in the same order, whatever finishes first."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from pipeline.backends.streams import MOST, Streams, count_streams
from pipeline.config.schema import Config
from pipeline.core.errors import NumericalError
from pipeline.core.processes import cores
from pipeline.core.records import ShardRows
from pipeline.engine.loop import _in_order, _Step
from pipeline.job.main import run_job
from pipeline.models.hub import DEMO_FOLDER
from tests.jobs import StubEncoder, config_for, content, scenes_manifest, stub_backend

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def small_job(where: Path, **groups: Any) -> Config:
    return config_for(scenes_manifest(where / "m.parquet", 100), where / "none", **groups)


def unlabelled(where: Path) -> Config:
    """A job for stub encoders, whose embeddings are too short for the demo's prompts."""
    config = small_job(where, prompts={"labels": []})
    return config.changed({"model.name": str(DEMO_FOLDER)})


def test_a_cpu_gets_a_stream_for_each_core_and_a_gpu_one() -> None:
    assert count_streams(0, CPU) == min(cores(), MOST)
    assert count_streams(3, CPU) == 3
    assert count_streams(3, CUDA) == count_streams(0, CUDA) == 1


def test_streams_share_the_cores() -> None:
    seen = torch.get_num_threads()
    for count in (1, 2, 64):
        with Streams(CPU, count) as streams:
            assert streams.submit(torch.get_num_threads).result() == max(1, cores() // count)
    assert torch.get_num_threads() == seen


def test_on_a_gpu_work_is_queued_by_the_thread_that_asks() -> None:
    with Streams(CUDA, 1) as streams:
        work = streams.submit(threading.get_ident)
        assert work.done()
        assert work.result() == threading.get_ident()


def test_the_rows_do_not_depend_on_how_many_batches_are_encoded_at_once(tmp_path: Path) -> None:
    config = small_job(tmp_path)
    many = 2 * cores()
    for count in (cores(), many):
        run_job(config.changed({"backend.streams": count, "output.dir": str(tmp_path / str(count))}))
    assert content(tmp_path / str(cores())) == content(tmp_path / str(many))


def test_batches_that_end_out_of_turn_are_written_in_turn(tmp_path: Path) -> None:
    class Uneven(StubEncoder):
        calls = 0
        most = busy = 0
        lock = threading.Lock()

        def spoil(self, vectors: torch.Tensor) -> torch.Tensor:
            with self.lock:
                Uneven.calls += 1
                number = Uneven.calls
                Uneven.busy += 1
                Uneven.most = max(Uneven.most, Uneven.busy)
            time.sleep(0.05 if number % 3 == 0 else 0.001)
            with self.lock:
                Uneven.busy -= 1
            return vectors

    config = unlabelled(tmp_path)
    with stub_backend(StubEncoder):
        run_job(config.changed({"backend.streams": 1, "output.dir": str(tmp_path / "even")}))
    with stub_backend(Uneven):
        run_job(config.changed({"backend.streams": 3, "output.dir": str(tmp_path / "uneven")}))
    assert Uneven.most == 3
    assert content(tmp_path / "uneven") == content(tmp_path / "even")


@pytest.mark.parametrize("good", [0, 1, 3])
def test_an_error_in_one_stream_ends_the_run_and_names_its_batch(tmp_path: Path, good: int) -> None:
    class Broken(StubEncoder):
        calls = 0

        def encode(self, pixels: torch.Tensor) -> torch.Tensor:
            vectors = super().encode(pixels)
            Broken.calls += 1
            return vectors[:, :-1] if Broken.calls > good else vectors

    config = unlabelled(tmp_path)
    with stub_backend(Broken), pytest.raises(NumericalError, match=r"shard \d, batch \d: "):
        run_job(config.changed({"backend.streams": 3, "output.dir": str(tmp_path / "out")}))
    assert not (tmp_path / "out" / "_SUCCESS").exists()


def rows() -> ShardRows:
    return cast(ShardRows, object.__new__(ShardRows))


def taken(kinds: str, ahead: int) -> list[str]:
    """The order in which batches (b) and ends of shards (e) are submitted (+) and handed out (-)."""
    events: list[str] = []

    def submitted() -> Iterator[_Step]:
        for number, kind in enumerate(kinds):
            events.append(f"+{kind}{number}")
            name: Any = f"{kind}{number}"
            yield _Step(name, batch=Future()) if kind == "b" else _Step(name, rows=rows())

    for step in _in_order(submitted(), ahead):
        events.append(f"-{step.results}")
    return events


def test_the_next_shard_begins_before_the_last_batch_of_this_one_is_waited_for() -> None:
    assert taken("bbebe", 2) == ["+b0", "+b1", "-b0", "+e2", "+b3", "-b1", "-e2", "+e4", "-b3", "-e4"]


def test_shards_without_a_single_image_do_not_pile_up_behind_a_slow_batch() -> None:
    events = taken("b" + "e" * 100, 2)
    assert events.index("-b0") <= 6
    assert events[-1] == "-e100"
