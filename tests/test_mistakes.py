"""Messages for common mistakes name the place and the way out, and are those of the table."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.mistakes import MISTAKES, RESULT, Mistake, home, make_all, message, row


@pytest.fixture(scope="module")
def made() -> Iterator[tuple[Path, dict[str, tuple[int, str]]]]:
    with home() as folder:
        yield folder, make_all(folder)


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.what)
def test_the_message_for_a_mistake_has_its_place_and_a_way_out(
    made: tuple[Path, dict[str, tuple[int, str]]], mistake: Mistake
) -> None:
    if mistake.what == "no GPU" and torch.cuda.is_available():
        pytest.skip("this machine has one")
    folder, found = made
    code, output = found[mistake.what]
    shown = message(output, folder)
    assert code == mistake.code, output
    assert mistake.place in shown
    assert mistake.way_out in shown
    # Without a stack, settings of a library, or words of its grammar.
    for foreign in ("Traceback", "HYDRA_FULL_ERROR", "EOF", "Error(", "usage:", "HF_HUB"):
        assert foreign not in output
    if not mistake.varies:
        assert row(mistake, code, shown) in RESULT.read_text().splitlines(), "python -m tests.mistakes writes it again"


def test_the_table_has_a_row_for_every_mistake_and_no_other() -> None:
    rows = [
        line.split(" | ")[0].removeprefix("| ") for line in RESULT.read_text().splitlines() if line.startswith("| ")
    ]
    assert rows[2:] == [mistake.what for mistake in MISTAKES]
    assert len(set(rows)) == len(rows)
