"""A few thousand broken files of the fuzzer (``python -m tests.fuzz``) through a job."""

from __future__ import annotations

import hashlib
import io
import os
import random
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.forks import forks
from tests.fuzz import Fuzzer, pieces, write_manifest
from tests.mutations import MUTATIONS, bases, mutant

# PIPELINE_TEST_FUZZ=10000 for more.
FILES = int(os.environ.get("PIPELINE_TEST_FUZZ", "3000"))


def digest(seed: int, files: int) -> str:
    return hashlib.sha256(b"".join(mutant(seed, number) for number in range(files))).hexdigest()


def tell_digest(seed: int, files: int) -> int:
    print(digest(seed, files))
    return 0


def test_every_base_is_a_whole_picture() -> None:
    kinds = set()
    for data in bases():
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            kinds.add(image.format)
    assert kinds >= {"JPEG", "MPO", "PNG", "WEBP", "GIF", "TIFF", "BMP", "ICO", "AVIF", "JPEG2000"}


def test_a_mutant_is_the_same_in_every_process() -> None:
    there = forks().start("tests.test_fuzz:tell_digest", 7, 200)
    assert there.wait() == 0
    assert there.said().strip() == digest(7, 200)
    assert digest(7, 200) != digest(8, 200)


def test_every_mutation_changes_files() -> None:
    for change in MUTATIONS:
        dice = random.Random(3)
        changed = [change(dice, data) != data for data in bases()]
        assert sum(changed) > len(changed) / 3, change.__name__


@pytest.mark.parametrize("change", MUTATIONS)
def test_a_mutation_takes_any_bytes(change: Callable[[random.Random, bytes], bytes]) -> None:
    dice = random.Random(4)
    for data in (b"", b"x", b"II*\0", b"\xff\xd8", b"\x89PNG\r\n\x1a\n", *(base[:13] for base in bases())):
        for _ in range(20):
            assert isinstance(change(dice, data), bytes)


def test_the_jobs_of_a_run_cover_its_files_once() -> None:
    assert [n for numbers in pieces(12_345, 0) for n in numbers] == list(range(12_345))
    assert next(pieces(0, 60)) == range(5_000)


def test_a_manifest_holds_the_mutants_of_its_numbers(tmp_path: Path) -> None:
    write_manifest(tmp_path / "m.parquet", 5, range(300, 600))
    rows = pq.read_table(tmp_path / "m.parquet").to_pylist()
    assert [row["id"] for row in rows] == list(range(300, 600))
    assert all(row["image"] == mutant(5, row["id"]) for row in rows)


@pytest.mark.slow
def test_thousands_of_broken_files_end_as_rows(tmp_path: Path) -> None:
    fuzzer = Fuzzer(forks(), tmp_path, seed=2, isolation="process", keep=None)
    for numbers in pieces(FILES, 0):
        fuzzer.run(numbers)
    assert fuzzer.figures.problems == []
    assert sum(fuzzer.figures.statuses.values()) == FILES
    # Neither all sound nor all refused: the decoders read them.
    assert fuzzer.figures.statuses["ok"] > FILES / 10
    assert fuzzer.figures.statuses["corrupt"] > FILES / 20


@pytest.mark.slow
def test_what_a_decoder_died_of_is_counted_and_kept(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    fuzzer = Fuzzer(
        forks(), tmp_path, seed=2, isolation="process", keep=kept, failpoints="child.decode[II*]=kill:SIGSEGV"
    )
    fuzzer.run(range(16))
    guilty = {number for number in range(16) if b"II*" in mutant(2, number)}
    assert guilty
    assert fuzzer.figures.problems == []
    assert fuzzer.figures.statuses["decoder_crashed"] == len(guilty)
    names = {path.name: path.read_bytes() for path in kept.glob("decoder_crashed-*")}
    assert names == {f"decoder_crashed-2-{number}.bin": mutant(2, number) for number in guilty}


def test_a_job_that_dies_is_a_problem_and_what_it_lost_is_kept(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    fuzzer = Fuzzer(forks(), tmp_path, seed=2, isolation="none", keep=kept, failpoints="commit.done=kill@1")
    fuzzer.run(range(300))
    assert any("the job ended with -9" in problem for problem in fuzzer.figures.problems)
    assert any("rows came out of 300 files" in problem for problem in fuzzer.figures.problems)
    assert (kept / "lost-2-299.bin").read_bytes() == mutant(2, 299)
    assert not (kept / "lost-2-0.bin").exists()
