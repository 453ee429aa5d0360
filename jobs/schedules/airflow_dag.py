"""The nightly job by Apache Airflow (2.10 and up, 3 included): one task, whose date is the start of its data interval.

Put this file into the DAGs folder. The task runs the command line in the checkout's own virtual environment, so that
Airflow and the job need not agree on the versions of anything. A range of dates is Airflow's own backfill; nights are
made one after the other, as each carries what the one before it embedded.
"""

from __future__ import annotations

import subprocess
from datetime import UTC, datetime, timedelta

try:
    from airflow.sdk import dag, task
except ImportError:  # Airflow 2
    from airflow.decorators import dag, task
from airflow.exceptions import AirflowException, AirflowFailException, AirflowSkipException
from airflow.timetables.interval import CronDataIntervalTimetable

HOME = "/opt/clip-pipeline"
STORE = "/data/nights"
OVERRIDES = ["manifest.path=/data/photos.parquet", "model=clip_vit_b32"]


@dag(
    dag_id="clip_nightly",
    # Not the expression alone: from Airflow 3 on the interval of such a run has no length, and begins today.
    schedule=CronDataIntervalTimetable("17 2 * * *", timezone="UTC"),
    start_date=datetime(2026, 1, 1, tzinfo=UTC),
    catchup=False,
    # Each night compares with the one before, and a store has room for one at a time.
    max_active_runs=1,
    default_args={"depends_on_past": False, "retries": 5, "retry_delay": timedelta(minutes=10)},
    tags=["clip"],
    doc_md=__doc__,
)
def clip_nightly() -> None:
    """One night for each run; see the module."""

    @task(execution_timeout=timedelta(hours=20))
    def nightly(data_interval_start: datetime | None = None) -> None:
        """Run the command; its exit code decides whether Airflow tries again."""
        if data_interval_start is None:
            raise AirflowFailException("the run has no data interval, so there is no date to make a night for")
        command = [".venv/bin/python", "jobs/nightly.py", "--date", data_interval_start.strftime("%Y-%m-%d")]
        code = subprocess.run([*command, "--store", STORE, *OVERRIDES], cwd=HOME, check=False).returncode
        settle(code)

    nightly()


def settle(code: int) -> None:
    """Turn an exit code into what Airflow does next: succeed, skip, fail for good, or try again."""
    if code == 0:
        return
    if code == 3:
        # The night is published. Skipped stands out in the grid, and a retry would change nothing.
        raise AirflowSkipException("published, with more failed images than errors.max_fraction")
    if code in (2, 4):
        raise AirflowFailException(f"exit code {code}: config, manifest or backend; a retry would say the same")
    # 75: interrupted, or another night is at work; 1 and signals: a disk, a store, a machine. The command goes on.
    raise AirflowException(f"exit code {code}; the same command goes on")


clip_nightly()
