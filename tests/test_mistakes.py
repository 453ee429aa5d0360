"""Messages for common mistakes name the place and the way out, and are those of the table."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.mistakes import MISTAKES, RESULT, Mistake, home, make_all, message, row


@pytest.mark.slow
def test_the_message_for_every_mistake_has_its_place_and_a_way_out() -> None:
    shown = RESULT.read_text().splitlines()
    with home() as folder:
        found = make_all(folder)
        wrong = [problem for mistake in MISTAKES for problem in _problems(mistake, *found[mistake.what], folder, shown)]
    assert not wrong, "\n".join(wrong)


def _problems(mistake: Mistake, code: int, output: str, folder: Path, table: list[str]) -> Iterator[str]:
    """Yield a message for every difference between the output of a mistake and its row."""
    if mistake.what == "no GPU" and torch.cuda.is_available():
        return
    text = message(output, folder)
    if code != mistake.code:
        yield f"{mistake.what}: exit code {code}, not {mistake.code}: {output}"
    for wanted in (mistake.place, mistake.way_out):
        if wanted not in text:
            yield f"{mistake.what}: {wanted!r} is not in {text}"
    # Without a stack, settings of a library, or words of its grammar.
    for foreign in ("Traceback", "HYDRA_FULL_ERROR", "EOF", "Error(", "usage:", "HF_HUB"):
        if foreign in output:
            yield f"{mistake.what}: {foreign} is in {output}"
    if not mistake.varies and row(mistake, code, text) not in table:
        yield f"{mistake.what}: not in {RESULT.name}, which python -m tests.mistakes writes again: {text}"


def test_the_table_has_a_row_for_every_mistake_and_no_other() -> None:
    rows = [
        line.split(" | ")[0].removeprefix("| ") for line in RESULT.read_text().splitlines() if line.startswith("| ")
    ]
    assert rows[2:] == [mistake.what for mistake in MISTAKES]
    assert len(set(rows)) == len(rows)
