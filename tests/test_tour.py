"""The notebook ``jobs/analytics/tour.ipynb`` runs from top to bottom, and shows what its committed outputs show."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("nbclient", reason="needs the extra compat")

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

from tests.conftest import ROOT

TOUR = ROOT / "jobs" / "analytics" / "tour.ipynb"
pytestmark = pytest.mark.slow
# Cells whose outputs are the same everywhere.
SAME = "same"


@pytest.fixture(scope="module")
def committed() -> NotebookNode:
    return nbformat.read(TOUR, as_version=4)


@pytest.fixture(scope="module")
def executed(committed: NotebookNode, tmp_path_factory: pytest.TempPathFactory) -> NotebookNode:
    """A copy, run in a kernel of its own, in a folder that is not the checkout."""
    copy = nbformat.from_dict(committed)
    for cell in copy.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    folder = tmp_path_factory.mktemp("tour")
    (folder / "temporary").mkdir()
    told = {"PYTHONPATH": str(ROOT), "TMPDIR": str(folder / "temporary"), "IPYTHONDIR": str(folder / "ipython")}
    client = NotebookClient(copy, timeout=300, coalesce_streams=True, resources={"metadata": {"path": str(folder)}})
    client.execute(env={**os.environ, **told})
    # Temporary datasets go with the kernel.
    assert not [*(folder / "temporary").glob("clip-pipeline-*")]
    return copy


def texts(cell: NotebookNode) -> list[str]:
    """Texts that a cell shows or prints."""
    return [output.text if "text" in output else output.data["text/plain"] for output in cell.outputs]


def test_the_notebook_runs_and_shows_what_it_showed(executed: NotebookNode, committed: NotebookNode) -> None:
    pairs = [pair for pair in zip(executed.cells, committed.cells, strict=True) if pair[0].cell_type == "code"]
    steady = [pair for pair in pairs if SAME in pair[0].metadata.get("tags", [])]
    assert len(steady) >= 7
    for ours, theirs in steady:
        assert texts(ours) == texts(theirs), ours.source
    for ours, theirs in pairs:
        assert [output.output_type for output in ours.outputs] == [output.output_type for output in theirs.outputs]
        # Bars are all that comes over standard error.
        # The notice that the demo model knows rendered shapes only, which these pictures are.
        warned = [text for text in texts(ours) if "warning" in text.lower() and "model=demo, the default" not in text]
        assert not warned, ours.source


def test_the_notebook_finds_what_it_looks_for(executed: NotebookNode) -> None:
    shown = {cell.source.splitlines()[0]: cell for cell in executed.cells if cell.cell_type == "code"}
    [hearts] = texts(shown['photos.search("a red heart", top=5)'])
    assert [line.endswith("red heart") for line in hearts.splitlines()[2:]] == [True, True, True, False, False]
    [near] = texts(shown["ids, matrix = photos.matrix()"])
    assert near.splitlines()[0].split()[1:] == ["007-again.jpg", "007.jpg"]
    page = shown["photos = embed(folder)"].outputs[-1].data["text/html"]
    assert page.count("data:image/jpeg;base64,") == 12
    drawn = [cell for cell in executed.cells if "plt.show()" in cell.source]
    assert ["image/png" in cell.outputs[0].data for cell in drawn] == [True, True]
    [groups] = [cell for cell in executed.cells if "pipeline dedup" in cell.source]
    assert "007-again.jpg" in texts(groups)[-1].splitlines()[1]


def test_the_committed_notebook_is_whole_and_small(committed: NotebookNode) -> None:
    nbformat.validate(committed)
    assert TOUR.stat().st_size < 300_000
    code = [cell for cell in committed.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)]
    assert all(cell.outputs or "%cd" in cell.source for cell in code)
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert str(ROOT) not in TOUR.read_text()
