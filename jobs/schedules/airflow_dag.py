"""The nightly job in Apache Airflow (2.10 and later): one task, whose date is the start of its data interval.

Put this file into the DAGs folder. The task runs the command line in the checkout's own virtual environment, so Airflow
and the job may use different versions of packages. For a range of dates use Airflow's backfill. The nights run one
after the other, because each carries rows from the night before.
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
    # A cron expression alone gives an empty interval that begins today, from Airflow 3 on.
    schedule=CronDataIntervalTimetable("17 2 * * *", timezone="UTC"),
    start_date=datetime(2026, 1, 1, tzinfo=UTC),
    catchup=False,
    # Each night needs the one before it, and a store allows one run at a time.
    max_active_runs=1,
    default_args={"depends_on_past": False, "retries": 5, "retry_delay": timedelta(minutes=10)},
    tags=["clip"],
    doc_md=__doc__,
)
def clip_nightly() -> None:
    """Make one night in each run."""

    @task(execution_timeout=timedelta(hours=20))
    def nightly(data_interval_start: datetime | None = None) -> None:
        """Run the command; the exit code decides whether Airflow tries again."""
        if data_interval_start is None:
            raise AirflowFailException("the run has no data interval, and so no date")
        command = [".venv/bin/python", "jobs/nightly.py", "--date", data_interval_start.strftime("%Y-%m-%d")]
        code = subprocess.run([*command, "--store", STORE, *OVERRIDES], cwd=HOME, check=False).returncode
        settle(code)

    nightly()


def settle(code: int) -> None:
    """Map an exit code to an outcome in Airflow: success, skip, final failure or retry."""
    if code == 0:
        return
    if code == 3:
        # The night is published. A skipped task is visible in the grid, and a retry would change nothing.
        raise AirflowSkipException("published, with more failed images than errors.max_fraction")
    if code in (2, 4):
        raise AirflowFailException(f"exit code {code}: config, manifest or backend; a retry would fail again")
    # 75: interrupted, or another night is running; 1 and signals: a disk, a store, a machine. The command resumes.
    raise AirflowException(f"exit code {code}; the same command resumes")


clip_nightly()
