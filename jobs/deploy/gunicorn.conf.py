"""One uvicorn worker per GPU: ``gunicorn -c jobs/deploy/gunicorn.conf.py``.

The environment says what differs between machines; all of it may be left out.

============================ ====================================================================================
``PIPELINE_SERVE_OVERRIDES`` what would follow ``python -m pipeline.serve``, but for serve.host and serve.port
``SERVE_HOST``               the address to listen at, 127.0.0.1 by default
``SERVE_PORT``               8000 by default; every worker answers here, and worker n alone n + 1 ports further
``WEB_CONCURRENCY``          how many workers; one per visible GPU by default, one where there is none
``FORWARDED_ALLOW_IPS``      whose X-Forwarded-For is believed, 127.0.0.1 by default
============================ ====================================================================================

Behind the shared port the kernel picks the worker, mostly the one that slept last, and a scrape meets any of them.
So each worker has a port of its own too: nginx spreads the load over these, and Prometheus scrapes each.

SIGTERM to one worker answers what it has accepted, and starts another in its place, on its GPU and its port, while the
others go on: one after the other, nothing is lost. SIGHUP ends all at once, and nobody answers until a model is warm.
"""

import os
import re
import signal
import socket
import subprocess
import sys
from typing import Any, ClassVar

from gunicorn.arbiter import Arbiter
from uvicorn_worker import UvicornWorker


def _visible_gpus() -> list[str]:
    """What ``CUDA_VISIBLE_DEVICES`` may name, one entry a worker; this process itself never loads CUDA."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name.strip() for name in given.split(",") if name.strip() not in ("", "-1")]
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    if done.returncode:
        return []
    return uuids(done.stdout)


def uuids(listing: str) -> list[str]:
    """The UUIDs that ``nvidia-smi -L`` prints; a GPU that MIG splits gives way to its parts, in the lines below it."""
    found: list[str] = []
    for uuid in re.findall(r"\(UUID: ([^)]+)\)", listing):
        if uuid.startswith("MIG-") and found and found[-1].startswith("GPU-"):
            found.pop()
        found.append(uuid)
    return found


def _number(name: str, default: int, lowest: int) -> int:
    text = os.environ.get(name) or str(default)
    if not text.isdigit() or int(text) < lowest:
        raise SystemExit(f"error: {name}={text!r}: must be a whole number of at least {lowest}")
    return int(text)


class Worker(UvicornWorker):
    """A worker that ends when its engine is broken, so that gunicorn starts another one in its place."""

    CONFIG_KWARGS: ClassVar[dict[str, Any]] = {
        **{"ws": "none", "lifespan": "on", "access_log": False, "server_header": False},
        "timeout_notify": 2,
    }

    def load_wsgi(self) -> None:
        """As the class above; what is wrong with the settings is a sentence."""
        from pipeline.core.errors import PipelineError

        try:
            super().load_wsgi()
        except PipelineError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(Arbiter.WORKER_BOOT_ERROR) from error

    async def _serve(self) -> None:
        """As the class above, with the server of ``python -m pipeline.serve``: its patience, and its end."""
        from pipeline.serve.uvicorn_server import Server

        self.config.app = self.wsgi
        server = Server(self.config, self.wsgi.state.service)
        self._install_sigquit_handler()
        await server.serve(sockets=self.sockets)
        if not server.started:
            sys.exit(Arbiter.WORKER_BOOT_ERROR)

    async def callback_notify(self) -> None:
        """Every few seconds: tell gunicorn that the event loop runs, and look at the engine."""
        await super().callback_notify()
        fault = self.wsgi.state.service.fault
        if fault is not None:
            self.log.error("the engine broke, so this worker ends: %s", fault)
            signal.raise_signal(signal.SIGTERM)


_host = os.environ.get("SERVE_HOST") or "127.0.0.1"
_port = _number("SERVE_PORT", 8000, 1)
_gpus = _visible_gpus()

wsgi_app = "pipeline.serve.app:create()"
bind = [f"[{_host}]:{_port}" if ":" in _host else f"{_host}:{_port}"]
worker_class = Worker
workers = _number("WEB_CONCURRENCY", len(_gpus) or 1, 1)
# A forked CUDA context does not work: every worker opens the model itself.
preload_app = False
# A worker whose event loop says nothing for so long is killed. The model is opened beside the loop.
timeout = 120
# Longer than serve.grace_seconds, after which workers are killed.
graceful_timeout = 45
# Longer than nginx keeps an idle connection (60 s), or it would send a request into one that is just closed.
keepalive = 75
backlog = 512
# The heartbeat of a worker, where a slow disk cannot hold it up.
worker_tmp_dir = "/dev/shm" if os.path.isdir("/dev/shm") else None
# Whose X-Forwarded-For is believed, which tells clients apart: nginx.
forwarded_allow_ips = os.environ.get("FORWARDED_ALLOW_IPS") or "127.0.0.1"
# The service logs every request by itself, with its id.
accesslog = None
control_socket_disable = True


def pre_fork(server: Any, worker: Any) -> None:
    """Give the worker the slot that has the fewest others, so that whoever replaces a worker gets its GPU and port."""
    taken = [other.slot for other in server.WORKERS.values()]
    worker.slot = min(range(server.num_workers), key=taken.count)


def post_fork(server: Any, worker: Any) -> None:
    """Show the worker one GPU, before anything loads CUDA, and give it a port of its own."""
    if _gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = _gpus[worker.slot % len(_gpus)]
    if worker.age > server.num_workers:
        # Where the successor of a worker cannot open the model, as on a GPU without memory, the others go on, and it is
        # tried again; at the first start gunicorn ends.
        os.environ["PIPELINE_SERVE_BOOT_CODE"] = "1"
    worker.sockets = [*worker.sockets, _own_port(worker.slot)]


def _own_port(slot: int) -> socket.socket:
    """A socket that uvicorn listens at once the app has started: until then nginx is refused, and asks another."""
    family = socket.AF_INET6 if ":" in _host else socket.AF_INET
    opened = socket.socket(family, socket.SOCK_STREAM)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # While gunicorn reloads, the old worker and its successor are both there.
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        opened.bind((_host, _port + 1 + slot))
    except OSError as error:
        print(
            f"error: worker {slot} cannot listen at {_host}:{_port + 1 + slot}: {error}; "
            "set SERVE_PORT to a number with free ports after it",
            file=sys.stderr,
        )
        # Without this code gunicorn would start the worker over and over.
        raise SystemExit(Arbiter.WORKER_BOOT_ERROR) from error
    opened.setblocking(False)
    return opened
