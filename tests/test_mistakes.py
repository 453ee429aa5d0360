"""What new users get wrong is told with the place and the way out; the table of it is what is said."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.mistakes import MISTAKES, RESULT, Mistake, ask, home, message, row


@pytest.fixture(scope="module")
def made() -> Iterator[tuple[Path, dict[str, tuple[int, str]]]]:
    with home() as folder:
        yield folder, ask(folder)


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.what)
def test_a_mistake_is_told_with_its_place_and_a_way_out(
    made: tuple[Path, dict[str, tuple[int, str]]], mistake: Mistake
) -> None:
    if mistake.what == "no GPU" and torch.cuda.is_available():
        pytest.skip("this machine has one")
    folder, found = made
    code, said = found[mistake.what]
    told = message(said, folder)
    assert code == mistake.code, said
    assert mistake.place in told
    assert mistake.way_out in told
    # In the project's own words: no stack, no setting of a library, and nothing of its grammar.
    for foreign in ("Traceback", "HYDRA_FULL_ERROR", "EOF", "Error(", "usage:", "HF_HUB"):
        assert foreign not in said
    if not mistake.varies:
        assert row(mistake, code, told) in RESULT.read_text().splitlines(), "python -m tests.mistakes writes it again"


def test_the_table_has_a_row_for_every_mistake_and_no_other() -> None:
    rows = [
        line.split(" | ")[0].removeprefix("| ") for line in RESULT.read_text().splitlines() if line.startswith("| ")
    ]
    assert rows[2:] == [mistake.what for mistake in MISTAKES]
    assert len(set(rows)) == len(rows)
