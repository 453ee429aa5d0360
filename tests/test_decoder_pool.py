"""Decoding in processes of its own: the same pixels, and a crash, a hang or a want of memory costs one row."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.config.schema import FORMATS
from pipeline.core.errors import DecoderUnavailable, NumericalError
from pipeline.core.records import Failure, ImageBatch, ImageRef, Pixels, PreprocessSpec
from pipeline.core.run_report import RunReport
from pipeline.engine.loader import Loader, LoaderSpec
from pipeline.images.decode import Decoder, limit_pixels
from pipeline.images.pool import pool as module
from pipeline.images.pool import processes
from pipeline.images.pool import worker as child_module
from pipeline.images.pool.pool import Decoders
from pipeline.images.pool.protocol import CHUNK, TEXT, Answer, InvalidAnswer, State
from pipeline.images.pool.shared_memory import shared
from pipeline.images.preprocess import preprocess
from pipeline.images.reader import PixelReader
from pipeline.images.sources.source import Source
from pipeline.job.main import run_job
from pipeline.manifest.manifest import open_manifest
from pipeline.manifest.shards import cut
from pipeline.models.hub import DEMO_FOLDER
from tests.conftest import ROOT, data_folder
from tests.jobs import StubEncoder, config_for, stub_backend
from tests.pictures import saved
from tests.processes import is_running, loads, run_python, wait_until

SPEC = PreprocessSpec(resize=32, crop=(32, 32), resample=3, mean=(0, 0, 0), std=(1, 1, 1))
MIB = 2**20
DECODER = Decoder(formats=FORMATS, max_pixels=100_000_000)
Result = Pixels | Failure


@pytest.fixture(autouse=True)
def _nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    limit_pixels(DECODER.max_pixels)
    yield
    assert children() == []


def children(of: int | None = None) -> list[int]:
    """The decoder processes that were started by this process, or by ``of``."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            command = (entry / "cmdline").read_text()
        except (OSError, IndexError):
            continue
        if int(words[1]) == (of or os.getpid()) and "pipeline.images.pool.worker" in command:
            found.append(int(entry.name))
    return found


@contextmanager
def pool(**settings: Any) -> Iterator[Decoders]:
    given = {"processes": 2, "seconds": 60.0, "memory": 2048 * MIB, **settings}
    decoders = Decoders(given.pop("decoder", DECODER), **given)
    try:
        yield decoders
    finally:
        decoders.close()


def photo(number: int, *, mark: str = "", size: int = 48) -> bytes:
    """A JPEG file of one colour; ``mark`` stands in its comment."""
    colour = (number * 37 % 256, number * 11 % 256, 128)
    return saved(Image.new("RGB", (size, size), colour), "JPEG", quality=90, comment=mark.encode() or None)


def alike(one: Result, other: Result) -> bool:
    if isinstance(one, Pixels) and isinstance(other, Pixels):
        return np.array_equal(one.rgb, other.rgb)
    return one == other


def here(data: bytes, spec: PreprocessSpec = SPEC, decoder: Decoder = DECODER) -> Result:
    return decoder.apply(data, lambda image: preprocess(image, spec))


def there(decoders: Decoders, images: list[bytes], spec: PreprocessSpec = SPEC) -> list[Result]:
    """All of ``images``, a chunk at a time."""
    return [r for start in range(0, len(images), CHUNK) for r in decoders.decode(images[start : start + CHUNK], spec)]


def statuses(results: list[Result]) -> list[str]:
    return [result.status if isinstance(result, Failure) else "ok" for result in results]


# Pixels


@pytest.mark.parametrize(("folder", "count"), [("odd", 150), pytest.param("clothing", 100, marks=pytest.mark.slow)])
def test_pixels_and_failures_are_those_of_this_process(folder: str, count: int) -> None:
    files = [path for path in sorted(data_folder(folder).rglob("*.*")) if path.suffix not in (".csv", ".md")]
    images = [path.read_bytes() for path in files[: 2 * count] if path.stat().st_size]
    assert len(images) >= count
    with pool() as decoders:
        for path, one, other in zip(files, map(here, images), there(decoders, images), strict=False):
            assert alike(one, other), (path, one, other)


@pytest.mark.parametrize("kind", ["fast", "scaled"])
def test_processes_that_decode_otherwise_decode_exactly_on_demand(kind: str) -> None:
    files = [path for path in sorted(data_folder("odd").rglob("*.*")) if path.suffix not in (".csv", ".md")]
    images = [path.read_bytes() for path in files if path.stat().st_size]
    photos = [photo(number, size=300) for number in range(3)]
    spec = PreprocessSpec(224, (224, 224), 3, (0, 0, 0), (1, 1, 1))
    with pool(decoder=replace(DECODER, kind=kind)) as decoders:
        reader = PixelReader(Source(root="/", max_bytes=MIB), replace(DECODER, kind=kind), spec, decoders)
        with reader.exact() as exact:
            assert exact.decoders is decoders
            assert exact.decoder.kind == "exact"
        # Closed, it has not ended the processes of the other.
        for start in range(0, len(images), CHUNK):
            some = images[start : start + CHUNK]
            for one, other in zip(some, decoders.decode(list(some), SPEC, exact=True), strict=True):
                assert alike(here(one), other)
        rough, sharp = decoders.decode(list(photos), spec), decoders.decode(list(photos), spec, exact=True)
        assert all(alike(here(data, spec), result) for data, result in zip(photos, sharp, strict=True))
        assert statuses(rough) == ["ok"] * 3
        assert len(children()) <= 2


@pytest.mark.parametrize(
    ("rules", "spec"),
    [
        ({"transparency": "black", "exif": "ignore"}, SPEC),
        ({"transparency": "drop"}, PreprocessSpec((20, 44), None, 2, (0, 0, 0), (1, 1, 1))),
        ({"formats": ("PNG",), "max_pixels": 3000}, PreprocessSpec(30, (41, 17), 3, (0, 0, 0), (1, 1, 1), "round")),
    ],
)
def test_rules_and_preprocessing_are_carried_over(rules: dict[str, Any], spec: PreprocessSpec) -> None:
    decoder = Decoder(**{"formats": FORMATS, "max_pixels": 100_000, **rules})
    limit_pixels(decoder.max_pixels)
    images = []
    for number, (mode, size) in enumerate([("RGBA", (50, 31)), ("LA", (33, 50)), ("RGB", (90, 60)), ("I;16", (9, 9))]):
        exif = Image.Exif()
        exif[0x0112] = 1 + number * 2
        images.append(saved(Image.effect_noise(size, 80).convert(mode), "PNG", exif=exif))
    images.append(photo(3))
    with pool(decoder=decoder) as decoders:
        for one, other in zip(
            (here(data, spec, decoder) for data in images), there(decoders, images, spec), strict=True
        ):
            assert alike(one, other), (one, other)


def test_one_pool_serves_several_sizes_and_many_threads() -> None:
    images = [photo(number, size=20 + number) for number in range(40)]
    specs = [
        SPEC,
        PreprocessSpec(160, (160, 160), 3, (0, 0, 0), (1, 1, 1)),
        PreprocessSpec(8, (8, 8), 0, (0, 0, 0), (1, 1, 1)),
    ]
    with pool() as decoders, ThreadPoolExecutor(5) as threads:
        jobs = [(images[start : start + 3], specs[start % 3]) for start in range(0, 39, 3)]
        results = list(threads.map(lambda job: decoders.decode(list(job[0]), job[1]), jobs))
        assert len(children()) <= 2
        for (some, spec), found in zip(jobs, results, strict=True):
            assert all(alike(here(data, spec), result) for data, result in zip(some, found, strict=True))


def test_a_process_loads_nothing_heavy() -> None:
    heavy = ("torch", "pandas", "pyarrow", "fsspec", "asyncio", "multiprocessing")
    assert loads("import pipeline.images.pool.worker", *heavy) == []


@pytest.mark.slow
def test_large_lock_take_turns_and_the_wait_is_not_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    giant = saved(Image.new("L", (4100, 4100), 90), "PNG", compress_level=1)
    monkeypatch.setenv("PIPELINE_FAILPOINTS", "")
    with pool(processes=3, seconds=20.0) as decoders, ThreadPoolExecutor(3) as threads:
        # Held by this process: the decoders wait for longer than an image may take, and are not blamed.
        decoders.seconds = 1.0
        fcntl.lockf(decoders.children._large_lock, fcntl.LOCK_EX)
        waiting = [threads.submit(decoders.decode, [giant], SPEC) for _ in range(3)]
        time.sleep(1.5)
        assert not any(future.done() for future in waiting)
        decoders.seconds = 20.0
        fcntl.lockf(decoders.children._large_lock, fcntl.LOCK_UN)
        assert [statuses(future.result()) for future in waiting] == [["ok"]] * 3


# What goes wrong


CLEAN = [photo(number) for number in range(12)]


def marked(*rows: int) -> list[bytes]:
    return [photo(number, mark=f"MARK{number}") if number in rows else CLEAN[number] for number in range(len(CLEAN))]


@pytest.mark.parametrize(
    ("action", "settings", "status", "words"),
    [
        ("kill:SIGSEGV", {}, "decoder_crashed", "killed by SIGSEGV"),
        pytest.param("kill:SIGABRT", {}, "decoder_crashed", "killed by SIGABRT", marks=pytest.mark.slow),
        pytest.param("raise:EPERM", {}, "decoder_crashed", "PermissionError", marks=pytest.mark.slow),
        ("delay:100", {"seconds": 0.4}, "decoder_timeout", "not decoded in 0.4 s (loader.decode_seconds)"),
        ("grow:1e10", {}, "out_of_memory", "not enough memory"),
    ],
)
def test_trouble_costs_the_rows_that_make_it(
    monkeypatch: pytest.MonkeyPatch, action: str, settings: dict[str, Any], status: str, words: str
) -> None:
    monkeypatch.setenv("PIPELINE_FAILPOINTS", f"child.decode[MARK]={action}")
    images = marked(0, 3, 4)[: CHUNK + 1]
    with pool(**settings) as decoders:
        results = there(decoders, list(images))
    for number, result in enumerate(results):
        if number in (0, 3, 4):
            assert isinstance(result, Failure)
            assert result.status == status
            assert words in result.error
        else:
            assert alike(result, here(CLEAN[number]))


def test_an_image_is_blamed_only_if_it_crashes_alone_too(monkeypatch: pytest.MonkeyPatch) -> None:
    # The second image that a process meets crashes it, whichever it is.
    monkeypatch.setenv("PIPELINE_FAILPOINTS", "child.decode=kill:SIGSEGV@2")
    with pool(processes=1) as decoders:
        assert statuses(there(decoders, CLEAN[:4])) == ["ok"] * 4


def test_a_process_that_dies_between_two_requests_costs_no_row() -> None:
    with pool(processes=1) as decoders:
        assert statuses(decoders.decode([CLEAN[0]], SPEC)) == ["ok"]
        for pid in children():
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)
        assert statuses(there(decoders, list(CLEAN))) == ["ok"] * len(CLEAN)


def test_a_file_that_needs_more_memory_than_it_may_have() -> None:
    large = saved(Image.new("L", (9000, 9000), 3), "PNG", compress_level=1)
    with pool(processes=1, memory=64 * MIB) as decoders:
        results = decoders.decode([CLEAN[0], large, CLEAN[1]], SPEC)
    assert statuses(results) == ["ok", "out_of_memory", "ok"]


def test_a_file_that_takes_longer_than_it_may() -> None:
    noise = Image.effect_noise((2500, 2500), 90).convert("RGB")
    slow = saved(noise, "JPEG", quality=95, progressive=True)
    with pool(processes=1, seconds=0.1) as decoders:
        began = time.monotonic()
        assert statuses(decoders.decode([CLEAN[0], slow, CLEAN[1]], SPEC)) == ["ok", "decoder_timeout", "ok"]
        assert time.monotonic() - began < 20


def progressive(side: int) -> bytes:
    picture = Image.radial_gradient("L").resize((side, side)).convert("RGB")
    return saved(picture, "JPEG", progressive=True, subsampling="4:4:4", quality=60)


def webp(side: int) -> bytes:
    return saved(Image.new("RGB", (side, side), (1, 2, 3)), "WEBP", quality=20, method=0)


@pytest.mark.parametrize(
    ("make", "memory"),
    [
        (progressive, 64),
        pytest.param(progressive, 128, marks=pytest.mark.slow),
        pytest.param(webp, 64, marks=pytest.mark.slow),
    ],
)
def test_a_library_that_gets_no_memory_is_no_damage(make: Callable[[int], bytes], memory: int) -> None:
    data = make(3950)
    damaged = data[:-100]
    with pool(processes=1, memory=memory * MIB) as decoders:
        (result,) = decoders.decode([data], SPEC)
        assert statuses([result]) == ["out_of_memory"], result
        assert isinstance(result, Failure)
        assert "not enough memory to decode" in result.error
        # What is damaged is still said to be.
        assert statuses(decoders.decode([CLEAN[0], CLEAN[1][:300]], SPEC)) == ["ok", "truncated"]
    with pool(processes=1, memory=1024 * MIB) as decoders:
        assert statuses(decoders.decode([data, damaged], SPEC)) == ["ok", "truncated"]


def test_two_kills_from_outside_over_one_image_are_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPELINE_FAILPOINTS", "child.decode[MARK]=kill")
    with pool(processes=1) as decoders:
        with pytest.raises(DecoderUnavailable, match=r"SIGKILL.*memory.*loader\.workers or loader\.decode_memory"):
            decoders.decode(marked(1)[:3], SPEC)
        monkeypatch.setenv("PIPELINE_FAILPOINTS", "")
        assert statuses(decoders.decode(CLEAN[:3], SPEC)) == ["ok"] * 3


def test_a_process_is_told_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    with pool(processes=1) as decoders:
        decoders.decode([CLEAN[0]], SPEC)
        (pid,) = children()
        known = dict(pair.split("=", 1) for pair in Path(f"/proc/{pid}/environ").read_text().split("\0") if pair)
    assert "AWS_SECRET_ACCESS_KEY" not in known
    assert known["LC_ALL"] == "C.UTF-8"
    assert known["PATH"] == os.environ["PATH"]
    assert known["MALLOC_ARENA_MAX"] == "1"


RIGHTS = """
import os, resource
from pipeline.images.pool.worker import _give_up_rights
_give_up_rights(2**30)
os.close(0)
for path in ("/etc/passwd", "/proc/self/environ"):
    try:
        os.open(path, os.O_RDONLY)
    except OSError as error:
        print(error.strerror, flush=True)
try:
    os.execv("/bin/cat", ["cat", "/etc/passwd"])
except OSError as error:
    print(error.strerror)
"""


def test_a_process_opens_no_file_even_after_it_closed_one() -> None:
    done = run_python("-c", RIGHTS)
    assert done.stdout.splitlines()[:2] == ["Too many open files"] * 2
    assert "root:" not in done.stdout


def test_the_memory_limit_needs_no_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: Any, **__: Any) -> Any:
        raise FileNotFoundError

    monkeypatch.setattr("builtins.open", absent)
    assert child_module._own() == child_module.OWN


@pytest.mark.parametrize("call", ["socket.socketpair", "os.memfd_create", "os.pwritev", "os.ftruncate"])
def test_a_machine_without_files_or_room_is_an_error_and_nothing_leaks(
    monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def fails(*_: Any) -> Any:
        raise OSError(errno.EMFILE, "Too many open files")

    with pool(processes=1) as decoders:
        before = len(os.listdir("/proc/self/fd"))
        with monkeypatch.context() as patch:
            patch.setattr(call, fails)
            with pytest.raises(DecoderUnavailable, match=r"Too many open files.*loader\.isolation=none"):
                decoders.decode([CLEAN[0]], SPEC)
        # A place keeps its two files.
        assert len(os.listdir("/proc/self/fd")) - before in (0, 2)
        assert statuses(decoders.decode([CLEAN[0]], SPEC)) == ["ok"]


def test_an_image_whose_turn_never_comes_costs_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    giant = saved(Image.new("1", (4100, 4100)), "PNG")
    with pool(processes=1) as decoders:
        assert statuses(decoders.decode([CLEAN[0]], SPEC)) == ["ok"]
        decoders.seconds = 0.3
        fcntl.lockf(decoders.children._large_lock, fcntl.LOCK_EX)
        began = time.monotonic()
        small, large, other = decoders.decode([CLEAN[0], giant, CLEAN[1]], SPEC)
        assert statuses([small, large, other]) == ["ok", "decoder_timeout", "ok"]
        assert isinstance(large, Failure)
        assert "its turn among the large images did not come in 2 x 0.3 s" in large.error
        assert time.monotonic() - began < 8


def test_an_image_that_is_finished_at_the_last_moment_is_not_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPELINE_FAILPOINTS", "child.decode[MARK]=delay:100")
    end = module._Slot._end

    def late(slot: module._Slot, child: processes.Child, *, wait: bool) -> Failure:
        Answer(slot._outbox.fileno(), SPEC).put(1, Pixels(rgb=np.full((32, 32, 3), 9, np.uint8)))
        return end(slot, child, wait=wait)

    with pool(processes=1) as decoders:
        decoders.decode([CLEAN[0]], SPEC)
        decoders.seconds = 0.3
        monkeypatch.setattr(module._Slot, "_end", late)
        decoded = decoders.decode(marked(1)[:4], SPEC)
    assert statuses(decoded) == ["ok"] * 4
    assert isinstance(decoded[1], Pixels)
    assert (decoded[1].rgb == 9).all()


def test_abandoned_work_ends_at_once_and_the_decoders_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPELINE_FAILPOINTS", "child.decode[MARK]=delay:100")
    gone = threading.Event()
    with pool(processes=1) as decoders, ThreadPoolExecutor(2) as threads:
        decoders.decode([CLEAN[0]], SPEC)
        work = [threads.submit(decoders.decode, marked(*range(8))[:8], SPEC, gone.is_set) for _ in range(2)]
        time.sleep(0.5)
        assert not any(future.done() for future in work)
        gone.set()
        for future in work:
            with pytest.raises(processes.Abandoned):
                future.result(1)
        assert statuses(decoders.decode(CLEAN[:2], SPEC)) == ["ok", "ok"]


def test_a_machine_that_cannot_start_a_process_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pool() as decoders:
        monkeypatch.setattr(processes, "ROOT", tmp_path)
        monkeypatch.setenv("PYTHONPATH", "")
        monkeypatch.setattr(sys, "executable", "/bin/false")
        with pytest.raises(DecoderUnavailable, match=r"ended with code 1 while it started.*loader\.isolation=none"):
            decoders.decode([CLEAN[0]], SPEC)
        monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
        with pytest.raises(DecoderUnavailable, match="No such file"):
            decoders.decode([CLEAN[0]], SPEC)
        # The place is free again.
        monkeypatch.undo()
        assert statuses(decoders.decode([CLEAN[0]], SPEC)) == ["ok"]


def test_what_keeps_a_process_from_starting_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPELINE_FAILPOINTS", "no such thing")
    with (
        pool() as decoders,
        pytest.raises(DecoderUnavailable, match="ValueError: PIPELINE_FAILPOINTS: 'no such thing'"),
    ):
        decoders.decode([CLEAN[0]], SPEC)


def test_closed_decoders_say_so() -> None:
    with pool() as decoders:
        decoders.decode([CLEAN[0]], SPEC)
    decoders.close()
    with pytest.raises(RuntimeError, match="closed"):
        decoders.decode([CLEAN[0]], SPEC)


def test_processes_that_were_started_before_are_those_that_decode() -> None:
    with pool() as decoders:
        decoders.start()
        wait_until(lambda: len(children()) == 2)
        started = sorted(children())
        with ThreadPoolExecutor(2) as threads:
            found = list(threads.map(lambda data: decoders.decode([data], SPEC), CLEAN[:6]))
        assert all(alike(result, here(data)) for (result,), data in zip(found, CLEAN, strict=False))
        assert sorted(children()) == started


def test_a_few_processes_can_start_before_the_others_and_more_be_allowed_later() -> None:
    with pool(processes=3) as decoders:
        decoders.start(1)
        wait_until(lambda: len(children()) == 1)
        first = children()
        decoders.start()
        wait_until(lambda: len(children()) == 3)
        decoders.grow(4)
        decoders.grow(2)
        wait_until(lambda: len(children()) == 4)
        assert set(first) < set(children())
        assert decoders.processes == 4
    assert children() == []


@pytest.mark.parametrize("seconds", [0, 0.05, 0.3])
def test_closing_ends_processes_that_are_being_started(seconds: float) -> None:
    with ThreadPoolExecutor(1) as threads:
        with pool(processes=3) as decoders:
            decoders.start()
            asked = threads.submit(decoders.decode, [CLEAN[0]], SPEC)
            time.sleep(seconds)
            started = time.monotonic()
        assert time.monotonic() - started < 10
        assert children() == []
        assert asked.done() or isinstance(asked.exception(10), RuntimeError)


def test_closing_ends_a_process_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPELINE_FAILPOINTS", "child.decode=delay:100")
    with ThreadPoolExecutor(1) as threads:
        with pool() as decoders:
            hanging = threads.submit(decoders.decode, [CLEAN[0]], SPEC)
            while not children():
                time.sleep(0.01)
            time.sleep(0.5)
            began = time.monotonic()
        assert time.monotonic() - began < 5
        with pytest.raises(RuntimeError, match="closed"):
            hanging.result()


# Answers


def spoil_state(fd: int) -> None:
    os.pwrite(fd, b"\x63", 1)


def spoil_status(fd: int) -> None:
    os.pwrite(fd, bytes([State.FAILED]), 1)
    text = b"__import__('os')\nx"
    os.pwrite(fd, len(text).to_bytes(4, "little") + text, 2 * TEXT)


def spoil_length(fd: int) -> None:
    os.pwrite(fd, bytes([State.FAILED]), 1)
    os.pwrite(fd, b"\xff\xff\xff\xff", 2 * TEXT)


def spoil_size(fd: int) -> None:
    os.ftruncate(fd, TEXT)


SPOILERS = [spoil_state, spoil_status, spoil_length]


@pytest.mark.parametrize(
    ("spoil", "lasting"), [*((spoil, lasting) for spoil in SPOILERS for lasting in (False, True)), (spoil_size, False)]
)
def test_an_answer_that_makes_no_sense_is_an_error(spoil: Callable[[int], None], lasting: bool) -> None:
    with processes.nameless_file(lasting=lasting) as file:
        answer = Answer(file.fileno(), SPEC)
        answer.clear()
        for index in range(2):
            answer.put(index, Pixels(rgb=np.zeros((32, 32, 3), np.uint8)))
        assert len(answer.finished(3)) == 2
        spoil(file.fileno())
        with pytest.raises(InvalidAnswer):
            answer.finished(2)


def test_a_file_that_is_read_as_memory_cannot_be_shortened() -> None:
    with pool(processes=1) as decoders:
        decoders.decode([CLEAN[0]], SPEC)
        slot = decoders._slots.queue[-1]
        assert slot is not None
        fd = slot._outbox.fileno()
        size = os.fstat(fd).st_size
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size - 1)
        for seal in (fcntl.F_SEAL_GROW, fcntl.F_SEAL_WRITE):
            with pytest.raises(PermissionError):
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seal)
        # A larger answer still has room.
        larger = PreprocessSpec(64, (64, 64), 3, (0, 0, 0), (1, 1, 1))
        assert statuses(decoders.decode([CLEAN[0]], larger)) == ["ok"]
        assert os.fstat(fd).st_size > size


@pytest.mark.parametrize("lasting", [False, True])
def test_pixels_that_were_read_are_not_changed_any_more(lasting: bool) -> None:
    with processes.nameless_file(lasting=lasting) as file:
        answer = Answer(file.fileno(), SPEC)
        answer.clear()
        for value in (7, 8):
            answer.put(0, Pixels(rgb=np.full((32, 32, 3), value, np.uint8)))
            if value == 7:
                (found,) = answer.finished(1)
        assert isinstance(found, Pixels)
        assert (found.rgb == 7).all()
        answer.clear()
        assert answer.finished(1) == []


def test_pixels_of_another_size_or_kind_are_not_given() -> None:
    with processes.nameless_file(lasting=True) as file:
        answer = Answer(file.fileno(), SPEC)
        answer.clear()
        for wrong in (np.zeros((32, 31, 3), np.uint8), np.zeros((1, 1, 3), np.uint8)):
            with pytest.raises(ValueError, match="shape"):
                answer.put(0, Pixels(rgb=wrong))
        with pytest.raises(TypeError):
            answer.put(0, Pixels(rgb=np.zeros((32, 32, 3), np.float32)))  # type: ignore[arg-type]
        assert answer.finished(1) == []


def test_memory_of_a_file_lasts_as_long_as_a_view_of_it() -> None:
    def held() -> int:
        return Path("/proc/self/maps").read_text().count("memfd:decoder")

    before = held()
    with processes.nameless_file(lasting=True) as file:
        with pytest.raises(OSError, match=r"less than 8,192 bytes"):
            shared(file.fileno(), 8192)
        os.ftruncate(file.fileno(), 8192)
        view = shared(file.fileno(), 8192)[4096:].reshape(64, 64)[1:]
        os.pwrite(file.fileno(), b"x", 4096 + 64)
        assert held() == before + 1
    assert view[0, 0] == ord("x")
    del view
    assert held() == before


def test_a_process_that_answers_nonsense_costs_rows_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    finished = Answer.finished

    def spoiled(answer: Answer, count: int, *, copy: bool) -> list[Result]:
        if os.pread(answer._fd, 1, 0)[0] == State.PIXELS:
            spoil_state(answer._fd)
            os.pwrite(answer._fd, b"\x63", 0)
        return finished(answer, count, copy=copy)

    monkeypatch.setattr(Answer, "finished", spoiled)
    with pool(processes=1) as decoders:
        results = decoders.decode(CLEAN[:3], SPEC)
    assert statuses(results) == ["decoder_crashed"] * 3
    assert all(isinstance(result, Failure) and "no sense" in result.error for result in results)


def test_a_long_or_odd_text_is_carried_as_far_as_it_goes() -> None:
    with processes.nameless_file() as file:
        answer = Answer(file.fileno(), SPEC)
        answer.clear()
        answer.put(0, Failure("corrupt", "ä" * 10_000))
        answer.put(1, Failure("corrupt", "half \ud800 a pair\nand a line"))
        long, odd = answer.finished(2)
        assert isinstance(long, Failure)
        assert long.error.startswith("ä" * 2000)
        assert odd == Failure("corrupt", "half ? a pair\nand a line")


def test_lent_pixels_stay_as_they_are_until_they_are_given_back() -> None:
    given: list[Callable[[], None]] = []
    chunks = [[photo(number), CLEAN[0][:300], photo(number + 1)] for number in range(5)]
    with pool(processes=1) as decoders:
        decoders.lent = 3
        results = [decoders.decode(list(chunk), SPEC, give_back=given) for chunk in chunks]
        # The others are copies: a process has no further answer to lend.
        assert len(given) == 3
        for chunk, found in zip(chunks, results, strict=True):
            assert all(alike(one, here(data)) for one, data in zip(found, chunk, strict=True))
        for give_back in given:
            give_back()
        kept = [decoders.decode([photo(9)], SPEC, give_back=given) for _ in range(4)]
        assert len(given) == 6
        # Pixels of another size do not take the places of those that are lent.
        larger = PreprocessSpec(64, (64, 64), 3, (0, 0, 0), (1, 1, 1))
        assert alike(decoders.decode([photo(8)], larger)[0], here(photo(8), larger))
        assert alike(decoders.decode([photo(7)], larger, give_back=given)[0], here(photo(7), larger))
        assert all(alike(found, here(photo(9))) for [found] in kept)


def test_where_files_must_stay_small_pixels_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    grow = os.ftruncate

    def limited(fd: int, size: int) -> None:
        if size > Answer(fd, SPEC).size:
            raise OSError(errno.EFBIG, "File too large")
        grow(fd, size)

    monkeypatch.setattr("os.ftruncate", limited)
    given: list[Callable[[], None]] = []
    with pool(processes=1) as decoders:
        decoders.lent = 2
        for number in range(3):
            [found] = decoders.decode([photo(number)], SPEC, give_back=given)
            assert alike(found, here(photo(number)))
    assert given == []


def test_lent_pixels_survive_a_crash_of_their_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPELINE_FAILPOINTS", "child.decode[MARK]=kill:SIGSEGV")
    images = [photo(1), photo(2), photo(3, mark="MARK"), photo(4)]
    given: list[Callable[[], None]] = []
    with pool(processes=1) as decoders:
        decoders.lent = 1
        found = decoders.decode(list(images), SPEC, give_back=given)
        assert statuses(found) == ["ok", "ok", "decoder_crashed", "ok"]
        others = decoders.decode([photo(5)] * 4, SPEC)
        assert statuses(others) == ["ok"] * 4
        assert all(alike(one, here(data)) for one, data in zip(found, images, strict=True) if isinstance(one, Pixels))


@pytest.mark.parametrize("closed", [False, True])
def test_a_loader_gives_back_all_that_its_decoders_lent(tmp_path: Path, closed: bool) -> None:
    pq.write_table(pa.table({"id": range(160), "image": [photo(n) for n in range(160)]}), tmp_path / "rows.parquet")
    config = config_for(tmp_path / "rows.parquet", tmp_path / "out", manifest={"keep": []})
    manifest = open_manifest(config.manifest)
    decoders = Decoders(DECODER, processes=2, seconds=60.0, memory=2048 * MIB)
    with PixelReader(Source(root=str(tmp_path), max_bytes=MIB), DECODER, SPEC, decoders) as reader:
        spec = LoaderSpec(batch_size=16, workers=2, prefetch=1)
        with Loader(manifest, reader, spec, timer=lambda stage, seconds: None) as loader:
            for item in loader.stream(cut(manifest, 80)):
                if isinstance(item, ImageBatch):
                    assert all(
                        alike(
                            Pixels(item.pixels[i].permute(1, 2, 0).numpy()),
                            here(photo(int(row) + 80 * item.shard.index)),
                        )
                        for i, row in enumerate(item.rows)
                    )
                    loader.release(item)
                if closed:
                    break
        slots = [slot._answers for slot in decoders._slots.queue if slot is not None]
        assert any(answers._count for answers in slots)
        assert all(len(answers._idle) == answers._count for answers in slots)


def test_a_decoder_cannot_touch_the_answers_before_its_own() -> None:
    code = """
import os
from pipeline.images.pool.processes import nameless_file
from pipeline.images.pool.shared_memory import Window
file = nameless_file(lasting=True)
window = Window(file.fileno(), 2**20)
os.ftruncate(file.fileno(), 2**20)
first = window.part(0, 8192)
first[:] = 1
second = window.part(8192, 8192)
second[:] = 2
again = window.part(0, 8192)
print(again.sum(), flush=True)
second[0] = 3
"""
    ended = run_python("-c", code)
    assert ended.returncode == -signal.SIGSEGV
    assert ended.stdout.split() == ["8192"]


# Jobs


def job(
    tmp_path: Path, name: str, images: list[bytes], *, encoder: type[StubEncoder] = StubEncoder, **loader: Any
) -> tuple[RunReport, list[dict[str, Any]]]:
    manifest = tmp_path / f"{name}.parquet"
    pq.write_table(pa.table({"id": [f"row-{n}" for n in range(len(images))], "image": images}), manifest)
    loader = {"isolation": "process", **loader}
    model = {"name": str(DEMO_FOLDER)}
    config = config_for(manifest, tmp_path / name, manifest={"keep": []}, loader=loader, model=model)
    with stub_backend(encoder):
        report = run_job(config)
    parts = sorted((tmp_path / name).glob("part-*.parquet"))
    return report, pa.concat_tables(pq.read_table(part) for part in parts).to_pylist()


def test_a_job_names_the_rows_that_bring_decoders_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [photo(number) for number in range(30)]
    before = set(os.listdir("/dev/shm")) if Path("/dev/shm").is_dir() else set()
    clean, rows = job(tmp_path, "clean", images, isolation="none")
    assert clean.counts == {"ok": 30}
    monkeypatch.setenv(
        "PIPELINE_FAILPOINTS",
        "child.decode[SEGV]=kill:SIGSEGV; child.decode[ABRT]=kill:SIGABRT; child.decode[HANG]=delay:100; "
        "child.decode[GROW]=grow:1e10",
    )
    bad = {2: "SEGV", 7: "ABRT", 8: "HANG", 20: "GROW", 29: "SEGV"}
    spoiled = [photo(number, mark=bad.get(number, "")) for number in range(30)]
    report, found = job(tmp_path, "spoiled", spoiled, decode_seconds=0.5)
    assert report.exit_code == 0
    assert report.counts == {"ok": 25, "decoder_crashed": 3, "decoder_timeout": 1, "out_of_memory": 1}
    wanted = {"SEGV": "decoder_crashed", "ABRT": "decoder_crashed", "HANG": "decoder_timeout", "GROW": "out_of_memory"}
    for number, (row, other) in enumerate(zip(rows, found, strict=True)):
        if number in bad:
            assert (other["id"], other["status"]) == (f"row-{number}", wanted[bad[number]])
            assert other["embedding"] is None
        else:
            assert row == other
    assert {entry["id"] for entry in report.failures} <= {f"row-{number}" for number in bad}
    if before:
        # Semaphores are those of tests beside this one.
        assert all(name.startswith("sem.mp-") for name in set(os.listdir("/dev/shm")) - before)


def test_a_job_writes_the_same_rows_without_processes(tmp_path: Path) -> None:
    images = [photo(number) for number in range(10)] + [b"none", photo(3)[:60]]
    contained, rows = job(tmp_path, "process", images)
    plain, others = job(tmp_path, "none", images, isolation="none")
    assert rows == others
    assert contained.memory["peak_decoder_mib"] > 10
    assert contained.fingerprints == plain.fingerprints | {"manifest": contained.fingerprints["manifest"]}
    assert "peak_decoder_mib" not in plain.memory


def test_no_process_is_left_after_an_error(tmp_path: Path) -> None:
    class Broken(StubEncoder):
        def encode(self, pixels: Any) -> Any:
            assert children()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        job(tmp_path, "out", [photo(number) for number in range(20)], encoder=Broken)
    assert children() == []


def test_an_error_waits_for_no_image_in_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = []

    class Broken(StubEncoder):
        def encode(self, pixels: Any) -> Any:
            time.sleep(0.5)
            failed.append(time.monotonic())
            raise NumericalError("NaN")

    monkeypatch.setenv("PIPELINE_FAILPOINTS", "child.decode[HANG]=delay:100")
    images = [photo(number, mark="HANG" if number >= 8 else "") for number in range(16)]
    with pytest.raises(NumericalError):
        job(tmp_path, "out", images, encoder=Broken, decode_seconds=2.0, batch_size=8)
    assert time.monotonic() - failed[0] < 2
    assert children() == []


# Processes


LIGHT = """
import sys, time
from pipeline.config.schema import FORMATS
from pipeline.images.decode import Decoder
from pipeline.images.pool.pool import Decoders
from pipeline.core.records import PreprocessSpec
SPEC = PreprocessSpec(resize=32, crop=(32, 32), resample=3, mean=(0, 0, 0), std=(1, 1, 1))
decoders = Decoders(Decoder(formats=FORMATS, max_pixels=1000), processes=1, seconds=60, memory=2**31)
"""
PARENT = f"""{LIGHT}
decoders.decode([b"none"], SPEC)
print(*decoders.children._alive, flush=True)
if len(sys.argv) > 1:
    decoders.decode([b"none"], SPEC)
time.sleep(100)
"""
DAEMON = f"""{LIGHT}
import multiprocessing
def work():
    print([result.status for result in decoders.decode([b"none"], SPEC)], flush=True)
    decoders.close()
process = multiprocessing.get_context("fork").Process(target=work, daemon=True)
process.start()
process.join()
decoders.close()
sys.exit(process.exitcode)
"""


@pytest.mark.parametrize("busy", [False, True])
def test_a_process_dies_with_the_one_that_started_it(busy: bool) -> None:
    command = [sys.executable, "-c", PARENT, *(["busy"] if busy else [])]
    # The first image decodes, the second one hangs.
    env = {**os.environ, "PIPELINE_FAILPOINTS": "child.decode=delay:100@2" if busy else ""}
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert Path(f"/proc/{pid}").exists()
        parent.kill()
    wait_until(lambda: not is_running(pid), 5)


def test_a_process_outlives_the_thread_that_first_needed_it() -> None:
    with pool(processes=1) as decoders:
        seen = []
        for _ in range(3):
            with ThreadPoolExecutor(1) as threads:
                assert statuses(threads.submit(decoders.decode, [CLEAN[0]], SPEC).result()) == ["ok"]
            time.sleep(0.05)
            seen.append(children())
        assert seen == [seen[0]] * 3


def test_ctrl_c_and_sigterm_are_for_the_job_to_answer() -> None:
    with pool(processes=1) as decoders:
        decoders.decode([CLEAN[0]], SPEC)
        (pid,) = children()
        assert os.getpgid(pid) != os.getpgid(0)
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGTERM)
        time.sleep(0.1)
        assert statuses(decoders.decode([CLEAN[0]], SPEC)) == ["ok"]
        assert children() == [pid]


def test_a_process_holds_no_files_of_the_job(tmp_path: Path) -> None:
    with open(tmp_path / "secret", "w") as file, pool(processes=2) as decoders, ThreadPoolExecutor(2) as threads:
        os.set_inheritable(file.fileno(), True)
        list(threads.map(lambda data: decoders.decode([data], SPEC), CLEAN))
        for pid in children():
            held = [os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()]
            assert len(held) == 7, held
            assert sum("memfd:decoder" in name for name in held) == 3
            limits = Path(f"/proc/{pid}/limits").read_text()
            assert "Max open files            0 " in limits
            assert "Max core file size        0 " in limits
            assert "NoNewPrivs:\t1" in Path(f"/proc/{pid}/status").read_text()


def test_it_works_in_a_worker_that_is_a_daemon() -> None:
    done = run_python("-c", DAEMON)
    assert done.stdout == "['not_an_image']\n"


def test_nothing_grows_over_many_requests() -> None:
    with pool(processes=1) as decoders:
        there(decoders, CLEAN * 10)
        (pid,) = children()
        fds, before = len(os.listdir("/proc/self/fd")), rss(pid)
        mine = rss(os.getpid())
        for _ in range(1000):
            decoders.decode(CLEAN[:2], SPEC)
        assert children() == [pid]
        assert len(os.listdir("/proc/self/fd")) == fds
        assert rss(pid) <= before + 2 * MIB
        assert rss(os.getpid()) <= mine + 8 * MIB


def rss(pid: int) -> int:
    """Bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# Reading


def test_a_reader_splits_what_is_large_and_keeps_the_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("pipeline.images.reader.HELD", 1500)
    asked: list[int] = []
    decode = Decoders.decode

    def counted(decoders: Decoders, encoded: list[bytes], *others: Any, **named: Any) -> list[Result]:
        asked.append(len(encoded))
        return decode(decoders, encoded, *others, **named)

    monkeypatch.setattr(Decoders, "decode", counted)
    refs = [ImageRef(id=n, data=data) for n, data in enumerate([*CLEAN, b"", b"x" * 1600, *CLEAN])]
    refs[5] = ImageRef(id=5, path="absent.jpg")
    source = Source(root=str(tmp_path), max_bytes=MIB)
    seconds: dict[str, float] = {}
    with PixelReader(source, DECODER, SPEC, Decoders(DECODER, processes=1, seconds=60, memory=MIB * 2048)) as reader:
        results = reader.read_all(refs, lambda stage, spent: seconds.update({stage: spent}))
    plain = PixelReader(source, DECODER, SPEC).read_all(refs, lambda stage, spent: None)
    assert all(alike(one, other) for one, other in zip(results, plain, strict=True))
    assert statuses(results)[5] == "not_found"
    assert statuses(results)[12:14] == ["empty", "not_an_image"]
    assert len(asked) > 1
    assert sum(asked) == len(refs) - 2
    assert set(seconds) == {"read", "decode"}


def test_the_file_of_a_large_image_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEEP", 1000)
    with pool(processes=1) as decoders:
        assert statuses(decoders.decode([CLEAN[0] + bytes(5000)], SPEC)) == ["ok"]
        slot = decoders._slots.get()
        assert slot is not None
        assert os.fstat(slot._inbox.fileno()).st_size == 0
        decoders._slots.put(slot)
        assert statuses(there(decoders, list(CLEAN))) == ["ok"] * 12
