"""The main command from a shell: its speed, messages and exit codes; it leaves no files."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hydra import compose, initialize_config_dir

from pipeline import run as command
from pipeline.config.compose import groups, register
from pipeline.config.schema import conf_dir
from pipeline.config.validate import known_keys
from pipeline.core.cli import ErrorOutput
from tests.conftest import ROOT
from tests.forks import forks
from tests.processes import WARNINGS

HEAVY = {"torch", "transformers", "pandas", "pyarrow", "PIL", "dask", "fsspec"}


def run(
    folder: Path, *arguments: str, options: tuple[str, ...] = (), **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *options, "-m", "pipeline.run", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": WARNINGS, "HOME": str(folder), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def answered(*arguments: str, **environment: str) -> str:
    """The output of the command, in a fork, which exits with 0."""
    child = forks().start("tests.forks:run_command", *arguments, environment=environment)
    assert child.wait() == 0, child.said()
    return child.said()


def cpu_seconds() -> float:
    """CPU time of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def imported(trace: str) -> set[str]:
    """Top-level packages in the output of ``-X importtime``."""
    return {name.split(".")[0] for name in re.findall(r"^import time:.*\| +(\S+)$", trace, re.MULTILINE)}


@pytest.mark.parametrize("arguments", [("--cfg", "job"), ("modle=demo",)], ids=" ".join)
def test_answers_that_need_no_job_load_nothing_heavy_and_leave_no_files(
    tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    before = cpu_seconds()
    done = run(tmp_path, *arguments, options=("-X", "importtime"))
    assert cpu_seconds() - before < 3
    is_light(tmp_path, done.stderr)


def is_light(folder: Path, trace: str) -> None:
    loaded = imported(trace)
    assert {"hydra", "pipeline"} <= loaded
    assert not loaded & HEAVY
    assert list(folder.iterdir()) == []


def test_help_loads_nothing_heavy_and_shows_every_group_every_option_and_the_exit_codes(tmp_path: Path) -> None:
    before = cpu_seconds()
    done = run(tmp_path, "--help", options=("-X", "importtime"))
    assert cpu_seconds() - before < 5
    is_light(tmp_path, done.stderr)
    assert done.returncode == 0
    assert all(line.startswith("import time:") for line in done.stderr.splitlines())
    for group, options in groups(conf_dir()).items():
        assert f"{group}: {', '.join(options)}" in done.stdout
    assert "Exit codes: 0 done; 2 wrong config, manifest or machine; 3 " in done.stdout
    shown = re.findall(r"^  '?([a-z]+(?:\.[a-z_]+)?)=", done.stdout, re.MULTILINE)
    assert len(shown) == 10
    assert set(shown) <= {*known_keys(), *groups(conf_dir())}


def test_cfg_job_prints_every_key_with_its_value() -> None:
    shown = yaml.safe_load(answered("--cfg", "job", "manifest.keep=[a,b]", "prompts.labels=['heißer Hund','猫']"))
    assert [f"{group}.{name}" for group, values in shown.items() for name in values] == known_keys()
    assert shown["manifest"]["keep"] == ["a", "b"]
    assert shown["prompts"]["labels"] == ["heißer Hund", "猫"]


WRONG = [
    (["model=hub"], ["  - model.name = '???': has no default; give a value"]),
    (
        ["modle=demo", "loader.batch_sise=8", "loader.workers=abc", "loader.prefetch=0"],
        [
            "error: the config has 4 problems:",
            "(did you mean model?)",
            "  - loader.batch_sise = '8': there is no such key (did you mean loader.batch_size?)",
            "  - loader.workers = 'abc': must be a whole number",
            "  - loader.prefetch = 0: must be from 1 to 64",
        ],
    ),
    (["model=openai/whatever"], ["(for any other checkpoint: model=hub model.name=openai/whatever)"]),
    (["photos.parquet"], ["the argument = 'photos.parquet': has no key or no =; write GROUP=OPTION or KEY=VALUE"]),
    (["prompts.labels=cat,dog"], ["a list: prompts.labels=[cat,dog]"]),
    (["output.dir=${oc.env:NO_SUCH_VARIABLE}"], ["output.dir = '${oc.env:NO_SUCH_VARIABLE}'"]),
    (["--bogus"], ["--bogus = None: there is no such option; overrides have no dashes: GROUP=OPTION or KEY=VALUE"]),
    (["--model", "demo"], ["the config has a problem:", "--model = 'demo': there is no", "(write model=demo)"]),
    (["--batch-size=8"], ["--batch-size = '8': there is no such option", "(write loader.batch_size=8)"]),
    (["--cfg"], ["error: argument --cfg/-c: expected one argument"]),
]


@pytest.mark.parametrize(("arguments", "lines"), WRONG, ids=[arguments[0] for arguments, _ in WRONG])
def test_a_wrong_config_ends_with_code_2_and_a_plain_message(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    lines: list[str],
) -> None:
    monkeypatch.setattr(command, "on_signals", lambda handler: None)
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        command.main()
    assert caught.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    for line in lines:
        assert line in output.err
    assert "Traceback" not in output.err
    assert "HYDRA_FULL_ERROR" not in output.err
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_config_that_hydra_composed_ends_a_process_with_code_2(tmp_path: Path) -> None:
    arguments, lines = WRONG[0]
    done = run(tmp_path, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert all(line in done.stderr for line in lines)
    assert "Traceback" not in done.stderr
    assert "HYDRA_FULL_ERROR" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_manifest_ends_with_code_2_before_any_model_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pq.write_table(pa.table({"id": ["a", "b", "a"], "path": ["1.jpg", "2.jpg", "3.jpg"]}), tmp_path / "m.parquet")
    # In this process, which has loaded torch already; it keeps its own handlers of signals.
    monkeypatch.setattr(command, "interrupt_within", lambda grace, leave: None)
    monkeypatch.chdir(tmp_path)
    register()
    with initialize_config_dir(config_dir=str(conf_dir()), version_base="1.3"):
        arguments = ["manifest.path=m.parquet", "output.dir=out", "model=hub", "model.name=no/such-model"]
        composed = compose("config", overrides=arguments)
    with pytest.raises(SystemExit) as caught:
        command.run_task(composed, ErrorOutput(command.INTERRUPTED))
    assert caught.value.code == 2
    output = capsys.readouterr().err
    assert f"error: id 'a' stands twice: at {tmp_path}/m.parquet, row 0 and at {tmp_path}/m.parquet, row 2" in output
    assert "Traceback" not in output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.parquet", "out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["_run.log"]


@pytest.mark.parametrize(
    ("line", "choices"),
    [
        ("model=", [f"model={name}" for name in groups(conf_dir())["model"]]),
        ("model=clip", [f"model={name}" for name in groups(conf_dir())["model"] if name.startswith("clip")]),
        ("loader.", [f"{key}=" for key in known_keys() if key.startswith("loader.")]),
        ("model=demo manifest.sh", ["manifest.shard_rows="]),
    ],
)
def test_the_shell_completes_groups_options_and_keys(line: str, choices: list[str]) -> None:
    whole = f"run.py {line}"
    shown = answered("-sc", "query=bash", COMP_LINE=whole, COMP_POINT=str(len(whole)))
    assert sorted(shown.split()) == sorted(choices)


def test_completion_is_installed_by_the_command_that_the_help_names() -> None:
    assert "hydra_bash_completion" in answered("-sc", "install=bash")


def test_values_of_options_are_not_taken_for_overrides() -> None:
    shown = answered("--cfg", "job", "--package", "loader", "loader.batch_size=8")
    assert yaml.safe_load(shown.partition("\n")[2])["batch_size"] == 8
