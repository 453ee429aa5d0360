"""Commands of the README pages: each runs, or is shown to be valid; :mod:`tests.readme` lists which and why."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.compose import check_overrides
from tests.commands import PARSERS, prove
from tests.conftest import ROOT
from tests.forks import forks
from tests.jobs import scene
from tests.mistakes import END
from tests.readme import PAGES, Elsewhere, Prove, Run, Slow, blocks, commands, row_of, spans, substituted, words_of
from tests.test_words import EXTRAS

ALL = commands()
RUNS = [command for command in ALL if isinstance(row_of(command), Run)]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a user's folder: pictures, a table of them with captions, and one of somebody's answers about them."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "Pictures").mkdir()
    for i in range(12):
        (folder / "Pictures" / f"{i:03}.jpg").write_bytes(scene(i)[0])
    ids = [f"{i:03}.jpg" for i in range(12)]
    pairs = {"id": ids, "path": [f"Pictures/{each}" for each in ids], "caption": [scene(i)[1] for i in range(12)]}
    pq.write_table(pa.table(pairs), folder / "pairs.parquet")
    pq.write_table(pa.table({"id": ids, "is_sharp": [i % 2 == 0 for i in range(12)]}), folder / "answers.parquet")
    return folder


@pytest.fixture(scope="module")
def ran(home: Path) -> dict[str, tuple[int, str]]:
    """Run the commands in the order of the pages in one process; return their exit codes and outputs."""
    texts = []
    for command in RUNS:
        row = row_of(command)
        assert isinstance(row, Run)
        texts.append(shlex.join(words_of(command, row.more)))
    child = forks().start(
        "tests.mistakes:typed", *(str(home), texts, []), environment={"XDG_CACHE_HOME": os.environ["XDG_CACHE_HOME"]}
    )
    child.wait(400)
    pieces = re.split(rf"^{END} (\d+)\n", child.said(), flags=re.MULTILINE)
    return {command: (int(code), said) for command, said, code in zip(RUNS, pieces[::2], pieces[1::2], strict=False)}


def test_every_command_has_a_row() -> None:
    assert [command for command in ALL if row_of(command) is None] == [], "add a row to tests/readme.py"
    assert len(ALL) > 15


@pytest.mark.slow
@pytest.mark.parametrize("command", RUNS)
def test_a_command_succeeds(ran: dict[str, tuple[int, str]], command: str) -> None:
    code, said = ran[command]
    assert code == 0, said
    assert "Traceback" not in said


@pytest.mark.parametrize("command", [each for each in ALL if isinstance(row_of(each), Prove)])
def test_a_command_that_is_not_run_is_valid(command: str) -> None:
    row, words = row_of(command), words_of(command)
    assert isinstance(row, Prove)
    if words[0] == "pip":
        assert "-c" not in words or (ROOT / words[words.index("-c") + 1]).is_file()
        named = re.findall(r"\[([\w,]+)\]", command)
        assert {extra for names in named for extra in names.split(",")} <= EXTRAS
    else:
        prove(words[2:] if words[1] == "-m" else words[1:])


@pytest.mark.parametrize("command", [each for each in ALL if isinstance(row_of(each), Elsewhere)])
def test_a_command_that_is_tested_elsewhere_is_there(command: str) -> None:
    row = row_of(command)
    assert isinstance(row, Elsewhere)
    assert row.text in (ROOT / row.where).read_text()


@pytest.mark.parametrize("command", [each for each in ALL if each.startswith("export PART=")])
def test_the_shell_numbers_a_part(command: str) -> None:
    script = f"SLURM_ARRAY_TASK_ID=2 RANK=2 WORLD_SIZE=16; {command}; echo $PART"
    assert subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout == "3/16\n"


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_the_gate_runs_a_line_of_the_page(page: str) -> None:
    pattern = re.search(rf"grep -m 1 '([^']+)' {re.escape(page)}", (ROOT / ".ci" / "run").read_text())
    assert pattern is not None
    assert len(re.findall(pattern[1], (ROOT / page).read_text(), re.MULTILINE)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("command", [each for each in ALL if isinstance(row_of(each), Slow)])
def test_a_slow_command_succeeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    row = row_of(command)
    assert isinstance(row, Slow)
    words = words_of(command, row.more)
    for text, other in row.replaced:
        words = [other if word == text else word for word in words]
    assert words[:2] == ["python", "-m"]
    monkeypatch.chdir(tmp_path)
    assert importlib.import_module(words[2]).main(words[3:]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("code", blocks("python"))
def test_a_piece_of_python_runs(
    ran: dict[str, tuple[int, str]], home: Path, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    monkeypatch.chdir(home)
    exec(compile(substituted(code), "README.md", "exec"), {})


@pytest.mark.slow
@pytest.mark.parametrize("code", blocks("sql"))
def test_a_piece_of_sql_answers(
    ran: dict[str, tuple[int, str]], home: Path, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    duckdb = pytest.importorskip("duckdb")
    monkeypatch.chdir(home)
    for query in filter(str.strip, code.split(";")):
        assert duckdb.sql(query).fetchall()


def test_the_overrides_in_the_text_are_valid() -> None:
    wrong = {}
    for span in spans():
        words = shlex.split(span) if span.count("'") % 2 == 0 and span.count('"') % 2 == 0 else []
        overrides = [word for word in words if re.match(r"[a-z_]+(\.[a-z_0-9]+)*=", word)]
        told = [word for word in overrides if not re.search(r"=$|=(\.\.\.|<)|=\S*\.\.\.$|[<{]", word)]
        if overrides != words or not told:
            continue
        problems = check_overrides(told)
        if problems:
            wrong[span] = [str(problem) for problem in problems]
    assert wrong == {}


def test_the_commands_that_the_text_names_exist() -> None:
    named = {f"pipeline.{name}" for text in PAGES.values() for name in re.findall(r"python -m pipeline\.(\w+)", text)}
    assert named <= {"pipeline.run", "pipeline.nightly", *(command.split()[0] for command in PARSERS)}


@pytest.mark.parametrize("page", PAGES)
def test_the_links_of_a_page_lead_to_files_and_headings(page: str) -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", PAGES[page]) if "://" not in link]
    for link in links:
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in headings(target.read_text()), link


def headings(text: str) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    return {
        re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    }


def test_the_readme_is_short_and_leads_to_every_other_page() -> None:
    assert len(PAGES["README.md"].splitlines()) <= 220
    assert [page for page in PAGES if page != "README.md" and f"]({page}" not in PAGES["README.md"]] == []
