"""The schedules under jobs/schedules: parsed by their own tools, or run with a stand-in for the job."""

from __future__ import annotations

import ast
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.nightly import cli as command
from tests.conftest import ROOT

SCHEDULES = ROOT / "jobs" / "schedules"
CODES = (0, 1, 2, 3, 4, 75)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A checkout whose Python records its arguments, and exits with the code in CODE."""
    for name, text in {
        ".venv/bin/python": 'printf "%s\\n" "$*" >> calls; exit "${CODE:-0}"',
        "bin/python": 'printf "%s\\n" "$*" >> calls',
        "bin/scontrol": 'echo "$*" >> slurm',
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
    return tmp_path


def calls(home: Path) -> list[str]:
    """The command lines that the stand-in was given; those of the nightly job must parse."""
    lines = (home / "calls").read_text().splitlines()
    for line in lines:
        words = line.split()
        if words[0] == "jobs/nightly.py":
            options = command._parser().parse_intermixed_args(words[1:])
            days, configs, nights = command._read(options)
            assert len(days) == 1
            assert configs[0].manifest.path == "/data/photos.parquet"
            assert nights.store == "/data/nights"
    return lines


def crontab() -> tuple[dict[str, str], list[tuple[list[str], str]]]:
    """The names that a crontab sets, and its lines: five fields and a command."""
    names, lines = {}, []
    for line in (SCHEDULES / "clip-nightly.crontab").read_text().splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        name, equals, value = line.partition("=")
        if equals and re.fullmatch(r"[A-Z]+", name.strip()):
            names[name.strip()] = value.strip()
            continue
        *fields, script = line.split(None, 5)
        lines.append((fields, script))
    return names, lines


def test_every_line_of_the_crontab_has_five_fields_and_no_bare_percent() -> None:
    names, lines = crontab()
    assert len(lines) == 1
    for fields, script in lines:
        for field, highest in zip(fields, (59, 23, 31, 12, 7), strict=True):
            assert re.fullmatch(r"\*|\d+(-\d+)?", field)
            assert all(int(number) <= highest for number in re.findall(r"\d+", field))
        # cron would end the command there.
        assert not re.search(r"(?<!\\)%", script)
    # A value is not expanded by cron.
    assert all("$" not in value for value in names.values())


@pytest.mark.parametrize("code", CODES)
def test_cron_mails_what_a_person_must_see_and_leaves_the_rest_to_the_next_line(home: Path, code: int) -> None:
    names, [(_, script)] = crontab()
    environment = {**names, "HOME": str(home), "LOG": str(home / "log"), "CODE": str(code)}
    done = subprocess.run([names["SHELL"], "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert bool(done.stderr) == (code not in (0, 75))
    assert done.returncode == (0 if code == 75 else code)
    assert len(calls(home)) == 1


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd-analyze")
def test_systemd_takes_the_unit_and_the_timer(tmp_path: Path) -> None:
    for name in ("clip-nightly.service", "clip-nightly.timer"):
        # The paths are those of the machine that it is for.
        text = (SCHEDULES / name).read_text().replace("/opt/clip-pipeline/.venv/bin/python", sys.executable)
        (tmp_path / name).write_text(text)
    units = [str(tmp_path / name) for name in ("clip-nightly.service", "clip-nightly.timer")]
    done = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True, check=False)
    assert "clip-nightly" not in done.stderr
    assert done.returncode == 0, done.stderr


def test_the_unit_tells_the_exit_codes_apart_and_its_command_is_understood(home: Path) -> None:
    unit: dict[str, str] = {}
    for line in (SCHEDULES / "clip-nightly.service").read_text().splitlines():
        name, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            unit[name] = value
    assert unit["SuccessExitStatus"] == "3"
    assert unit["RestartForceExitStatus"] == "75"
    assert unit["RestartPreventExitStatus"] == "2 4"
    words = unit["ExecStart"].split()
    subprocess.run([str(home / ".venv/bin/python"), *words[1:]], cwd=home, check=True)
    assert "--date yesterday" in calls(home)[0]


def cronjob() -> Any:
    return yaml.safe_load((SCHEDULES / "kubernetes-cronjob.yaml").read_text())


def test_the_cron_job_forbids_two_nights_at_a_time_and_gives_up_where_a_retry_is_of_no_use() -> None:
    spec = cronjob()["spec"]
    assert spec["concurrencyPolicy"] == "Forbid"
    assert spec["startingDeadlineSeconds"] > 0
    job = spec["jobTemplate"]["spec"]
    [codes] = [rule["onExitCodes"]["values"] for rule in job["podFailurePolicy"]["rules"] if "onExitCodes" in rule]
    assert codes == [2, 3, 4]
    assert job["backoffLimit"] > 0
    # Kubernetes refuses podFailurePolicy with any other.
    assert job["template"]["spec"]["restartPolicy"] == "Never"
    names = [container["name"] for container in job["template"]["spec"]["containers"]]
    assert [rule["onExitCodes"]["containerName"] for rule in job["podFailurePolicy"]["rules"][:1]] == names


def test_a_pod_that_starts_late_makes_the_night_that_its_job_was_due_for(home: Path) -> None:
    [container] = cronjob()["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    # In minutes, as Kubernetes counts; the pod starts whenever this test runs.
    due = int(datetime(2026, 11, 23, 2, 17, tzinfo=UTC).timestamp()) // 60
    environment = {
        "JOB": f"clip-nightly-{due}",
        "PING_URL": "https://hc.example/x",
        "PATH": f"{home}/bin:/usr/bin:/bin",
    }
    subprocess.run([*container["command"], *container["args"]], env=environment, cwd=home, check=True)
    assert "--date 2026-11-22" in calls(home)[0]


@pytest.mark.parametrize("name", ["manual-1", "test", "clip-nightly-2026"])
def test_a_job_that_was_made_by_hand_makes_no_night_of_1969(home: Path, name: str) -> None:
    [container] = cronjob()["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    environment = {"JOB": name, "PING_URL": "https://hc.example/x", "PATH": f"{home}/bin:/usr/bin:/bin"}
    command = [*container["command"], *container["args"]]
    done = subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "not named after a minute" in done.stderr
    assert not (home / "calls").exists()


@pytest.mark.skipif(not shutil.which("kubectl"), reason="no kubectl")
def test_kubectl_knows_every_field_of_the_cron_job() -> None:
    place = str(SCHEDULES / "kubernetes-cronjob.yaml")
    command = ["kubectl", "set", "env", "--local", "-f", place, "-o", "json", "PROBE=1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)

    # It reads into Kubernetes' own types: a field that those do not have is gone afterwards.
    def missing(ours: Any, theirs: Any, key: str) -> list[str]:
        if isinstance(ours, dict):
            lost = [f"{key}.{name}" for name in ours if name not in theirs]
            return lost + [one for name in ours if name in theirs for one in missing(ours[name], theirs[name], name)]
        if isinstance(ours, list):
            return [one for each, other in zip(ours, theirs, strict=False) for one in missing(each, other, key)]
        return [] if str(ours) == str(theirs) else [f"{key}: {ours} became {theirs}"]

    assert missing(cronjob(), json.loads(done.stdout), "") == []


@pytest.mark.parametrize("name", ["slurm-nightly.sbatch", "slurm-array.sbatch"])
def test_a_batch_script_is_sound_and_its_directives_come_first(name: str) -> None:
    subprocess.run(["bash", "-n", str(SCHEDULES / name)], check=True)
    lines = (SCHEDULES / name).read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    # Slurm stops looking for directives at the first command.
    assert not [line for line in lines[first:] if line.startswith("#SBATCH")]
    assert all(re.fullmatch(r"#SBATCH --[a-z-]+(=\S+)?", line) for line in lines if line.startswith("#SBATCH"))


SLURM = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_MIN": "0",
         "SLURM_ARRAY_TASK_MAX": "15", "SLURM_ARRAY_TASK_COUNT": "16"}  # fmt: skip


def sbatch(home: Path, name: str, *arguments: str, **more: str) -> subprocess.Popen[str]:
    environment = {**SLURM, "PATH": f"{home}/bin:/usr/bin:/bin", "SLURM_SUBMIT_DIR": str(home), **more}
    command = ["bash", str(SCHEDULES / name), *arguments]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("code", CODES)
def test_slurm_queues_a_night_again_where_that_helps(home: Path, code: int) -> None:
    process = sbatch(home, "slurm-nightly.sbatch", "2026-11-22", CODE=str(code))
    process.communicate(timeout=30)
    assert process.returncode == code
    assert "--date 2026-11-22" in calls(home)[0]
    again = (home / "slurm").read_text() if (home / "slurm").exists() else ""
    assert again == ("requeue 7\n" if code in (1, 75) else "")


def test_slurm_guesses_no_date_as_a_job_that_is_queued_again_would_guess_another(home: Path) -> None:
    process = sbatch(home, "slurm-nightly.sbatch")
    assert "give the date" in process.communicate(timeout=30)[1]
    assert process.returncode == 2
    assert not (home / "calls").exists()


def test_slurm_gives_up_after_some_restarts_and_takes_a_date(home: Path) -> None:
    process = sbatch(home, "slurm-nightly.sbatch", "2026-01-05", CODE="75", SLURM_RESTART_COUNT="5")
    process.communicate(timeout=30)
    assert process.returncode == 75
    assert "--date 2026-01-05" in calls(home)[0]
    assert not (home / "slurm").exists()


def test_slurm_hands_its_signal_on_and_waits_for_the_job(home: Path) -> None:
    trap = "#!/bin/sh\ntrap 'echo stopped > stopped; exit 75' TERM\ntouch ready\nwhile :; do sleep 0.05; done\n"
    (home / ".venv/bin/python").write_text(trap)
    process = sbatch(home, "slurm-nightly.sbatch", "2026-01-05")
    while not (home / "ready").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert (home / "stopped").exists()
    assert process.returncode == 75


def test_an_array_splits_the_manifest_into_parts_from_one_on(home: Path) -> None:
    process = sbatch(home, "slurm-array.sbatch")
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert "cluster.part='3/16'" in calls(home)[0]
    # With 0-15:2, half the shards would belong to no task.
    process = sbatch(home, "slurm-array.sbatch", SLURM_ARRAY_TASK_COUNT="8")
    assert "gaps" in process.communicate(timeout=30)[1]
    assert process.returncode == 2


def test_the_dag_is_sound_and_is_checked_by_airflow_where_that_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    place = SCHEDULES / "airflow_dag.py"
    tree = ast.parse(place.read_text())
    compile(tree, str(place), "exec")
    assert ast.get_docstring(tree)
    pytest.importorskip("airflow", reason="Airflow is not installed")
    monkeypatch.syspath_prepend(str(SCHEDULES))
    import airflow_dag  # type: ignore[import-not-found]

    dag = airflow_dag.clip_nightly()
    assert dag.max_active_runs == 1
    # At 02:17 of the 23rd the run of the 22nd begins.
    assert type(dag.timetable).__name__ == "CronDataIntervalTimetable"
