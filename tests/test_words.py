"""Help texts, the pages about the config, the jobs and the layout, and the extras that they name."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from pipeline.__main__ import COMMANDS
from pipeline.config.compose import groups
from pipeline.config.schema import conf_dir
from pipeline.config.validate import known_keys
from pipeline.core.errors import install_hint
from tests import conf_readme, layout
from tests.commands import PARSERS, parser_of, prove
from tests.conf_readme import SHARED
from tests.conftest import ROOT
from tests.processes import run_python
from tests.readme import PAGES

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = set(PROJECT["optional-dependencies"])
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
JOBS = (ROOT / "jobs" / "README.md").read_text()
SOURCES = sorted([*(ROOT / "pipeline").rglob("*.py"), *(ROOT / "jobs").rglob("*.py")])
SCRIPTS = sorted((ROOT / "jobs" / "analytics").glob("*.py"))


# What to install.


def test_every_extra_that_the_code_or_the_config_names_is_one_of_the_project() -> None:
    texts = [*SOURCES, *conf_dir().rglob("*.yaml"), *(ROOT / page for page in PAGES)]
    named = {
        extra
        for path in texts
        for found in re.findall(r"install_hint\(\"(\w+)\"\)|'\.\[([\w,]+)\]'|eeds the extra (\w+)", path.read_text())
        for extra in filter(None, ",".join(found).split(","))
    }
    assert named <= EXTRAS
    assert {"onnx", "s3", "search", "lance", "nightly"} <= named


def test_every_extra_is_on_a_page() -> None:
    text = "".join(PAGES.values())
    missing = [extra for extra in EXTRAS if not re.search(rf"\[(\w+,)*{extra}(,\w+)*\]|`{extra}`", text)]
    assert missing == []


def test_install_commands_come_from_one_function() -> None:
    # The scripts for analysis may be copied elsewhere, so they have their own.
    ours = [
        path for path in SOURCES if ROOT / "jobs" not in path.parents and path.name not in ("errors.py", "versions.py")
    ]
    assert [path.name for path in ours if re.search(r"pip install[^\n]*(clip-pipeline|-e )", path.read_text())] == []


def test_an_extra_is_installed_from_the_checkout_or_from_the_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert install_hint("onnx") == "pip install -c constraints.txt -e '.[onnx]'"
    monkeypatch.chdir(tmp_path)
    assert install_hint("onnx") == f"pip install -c {ROOT}/constraints.txt -e '{ROOT}[onnx]'"
    monkeypatch.setattr(
        "pipeline.core.errors.__file__", str(tmp_path / "site-packages" / "pipeline" / "core" / "errors.py")
    )
    assert install_hint("onnx") == "pip install 'clip-pipeline[onnx]'"


# Help.


@pytest.fixture(scope="module")
def main_help() -> str:
    done = run_python("-m", "pipeline.run", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def examples(text: str) -> list[list[str]]:
    """The commands of a help text, without their ``python -m``."""
    found = re.findall(r"^ +python (?:-m )?((?:pipeline\.|jobs/).*)", text.replace("\\\n", " "), re.MULTILINE)
    return [shlex.split(part.partition("   ")[0]) for line in found for part in line.split("&& python -m ")]


def test_the_examples_of_the_main_help_are_good_configs(main_help: str) -> None:
    found = examples(main_help.partition("Examples")[2].partition("Ten common")[0])
    assert len(found) >= 5
    for words in found:
        assert words[0] == "pipeline.run"
        prove(words)
    assert max(map(len, main_help.partition("Groups and")[0].splitlines())) <= 120


@pytest.mark.parametrize("command", PARSERS)
def test_the_help_of_a_command_has_examples_that_it_takes_and_its_exit_codes(
    monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    text = parser_of(command).format_help()
    assert re.search(r"^exit codes: 0 ", text, re.MULTILINE)
    assert max(map(len, text.splitlines())) <= 120
    found = examples(text)
    assert len(found) >= 3
    for words in found:
        assert " ".join(words).startswith(command)
        prove(words)


def test_every_command_of_the_short_command_has_a_parser_here() -> None:
    looked_at = {"pipeline.run", "pipeline.nightly", *(command.split()[0] for command in PARSERS)}
    assert set(COMMANDS.values()) <= looked_at


# The config.


def test_the_page_of_the_config_is_what_its_generator_writes() -> None:
    assert conf_readme.README.read_text() == conf_readme.page(), "run python -m tests.conf_readme"


def test_the_page_of_the_config_has_every_group_option_and_key() -> None:
    page = conf_readme.page()
    for group, options in groups(conf_dir()).items():
        assert f"\n## {group}\n" in page
        assert len(options) == 1 or all(f"| `{option}` |" in page for option in options)
    assert [f"`{key}`" for key in known_keys()] == re.findall(r"^\| (`\w+\.\w+`) \|", page, re.MULTILINE)


def test_a_comment_is_shared_by_the_keys_right_below_it(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("# Of a and b,\n# both.\na: 1\nb: 2\n# Of c.\nc: 3\n")
    assert conf_readme.comments(tmp_path / "x.yaml") == {"a": "Of a and b, both.", "b": SHARED, "c": "Of c."}


# The jobs.


def test_the_page_of_the_jobs_names_every_script_folder_and_schedule() -> None:
    names = [path.name for path in SCRIPTS if path.name != "common.py"]
    assert [name for name in names if not re.search(rf"^\| `{name}[ `]", JOBS, re.MULTILINE)] == []
    assert set(re.findall(r"`(\w+\.py)", JOBS)) <= {path.name for path in (ROOT / "jobs").rglob("*.py")}
    folders = {
        path.name for path in (ROOT / "jobs").iterdir() if path.is_dir() and not path.name.startswith(("_", "."))
    }
    assert set(re.findall(r"^\| `(\w+)/`", JOBS, re.MULTILINE)) == folders


@pytest.mark.slow
def test_the_scripts_have_the_options_that_the_page_of_the_jobs_names() -> None:
    scripts = [path for path in SCRIPTS if path.name != "common.py"]
    processes = [
        subprocess.Popen([sys.executable, path, "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for path in scripts
    ]
    helps = {}
    for path, process in zip(scripts, processes, strict=True):
        helps[path.name], errors = process.communicate()
        assert (process.returncode, errors) == (0, "")
    everything = "".join(helps.values()) + parser_of("jobs/nightly.py").format_help()
    # The options of gunicorn, nginx and Prometheus are not those of the scripts.
    ours = re.sub(r"## deploy\n.*?(?=\n## )", "", JOBS, flags=re.DOTALL)
    assert set(re.findall(r"--[a-z][a-z-]*", ours)) <= {*re.findall(r"--[a-z-]+", everything), "--help"}
    assert all("--picture" in text or name in {"runs.py", "train_head.py"} for name, text in helps.items())


# The layout.


def test_the_page_for_contributors_shows_every_package_and_its_level() -> None:
    assert layout.table() in CONTRIBUTING, "run python -m tests.layout"
    for path in re.findall(r"`((?:pipeline|conf|jobs|tests)/[\w./]*)`", CONTRIBUTING):
        assert (ROOT / path).exists()


def test_the_commands_of_the_page_for_contributors_are_those_of_the_gate() -> None:
    readme = (ROOT / "README.md").read_text()
    command = re.search(r"^python3 -m venv .*pytest -n 2$", readme, re.MULTILINE)
    assert command is not None
    assert command[0] in CONTRIBUTING
    assert len(CONTRIBUTING.splitlines()) <= 110
