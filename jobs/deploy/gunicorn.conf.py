"""One uvicorn worker per GPU: ``gunicorn -c jobs/deploy/gunicorn.conf.py``.

The environment holds the settings of a machine; all of them are optional.

============================ ====================================================================================
``PIPELINE_SERVE_OVERRIDES`` arguments of ``python -m pipeline.serve``, without serve.host and serve.port
``SERVE_HOST``               address of the service; default 127.0.0.1
``SERVE_PORT``               port that all workers share; default 8000. Worker n also has port SERVE_PORT + n + 1
``WEB_CONCURRENCY``          number of workers; default one for each visible GPU or MIG device, or one
``FORWARDED_ALLOW_IPS``      proxies whose X-Forwarded-For is trusted; default 127.0.0.1
============================ ====================================================================================

The kernel chooses the worker of a connection to the shared port, often the one that was idle last, so a scrape reaches
any of them. Therefore each worker has a port of its own too: nginx balances the load over these, and Prometheus scrapes
each.

After SIGTERM a worker answers its accepted requests and ends, and gunicorn starts another one on the same GPU and port
while the others continue. Replace workers one after the other, and no request is lost. SIGHUP ends all workers at once,
and there are no answers until a model is warm.
"""

import os
import signal
import socket
import sys
from typing import Any, ClassVar

from gunicorn.arbiter import Arbiter
from uvicorn_worker import UvicornWorker

from pipeline.core.gpus import visible


def _number(name: str, default: int, lowest: int) -> int:
    text = os.environ.get(name) or str(default)
    if not text.isdigit() or int(text) < lowest:
        raise SystemExit(f"error: {name}={text!r}: must be a whole number of at least {lowest}")
    return int(text)


class Worker(UvicornWorker):
    """A worker that ends if its engine fails, so that gunicorn starts another one."""

    CONFIG_KWARGS: ClassVar[dict[str, Any]] = {
        **{"ws": "none", "lifespan": "on", "access_log": False, "server_header": False},
        "timeout_notify": 2,
    }

    def load_wsgi(self) -> None:
        """Load the app with what a command imports; report wrong settings as one sentence."""
        from pipeline.core.errors import PipelineError
        from pipeline.core.processes import mark_as_command
        from pipeline.models.lean import import_transformers, load_torch_aside

        mark_as_command()
        load_torch_aside()
        try:
            import_transformers()
            super().load_wsgi()
        except PipelineError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(Arbiter.WORKER_BOOT_ERROR) from error

    async def _serve(self) -> None:
        """Run the server of ``python -m pipeline.serve``, with its timeouts and its shutdown."""
        from pipeline.serve.uvicorn_server import Server

        self.config.app = self.wsgi
        server = Server(self.config, self.wsgi.state.service)
        self._install_sigquit_handler()
        await server.serve(sockets=self.sockets)
        if not server.started:
            sys.exit(Arbiter.WORKER_BOOT_ERROR)

    async def callback_notify(self) -> None:
        """Send gunicorn a heartbeat every few seconds, and check the engine."""
        await super().callback_notify()
        fault = self.wsgi.state.service.fault
        if fault is not None:
            self.log.error("the engine broke, so this worker ends: %s", fault)
            signal.raise_signal(signal.SIGTERM)


_host = os.environ.get("SERVE_HOST") or "127.0.0.1"
_port = _number("SERVE_PORT", 8000, 1)
_gpus = visible()

wsgi_app = "pipeline.serve.app:create()"
bind = [f"[{_host}]:{_port}" if ":" in _host else f"{_host}:{_port}"]
worker_class = Worker
workers = _number("WEB_CONCURRENCY", len(_gpus) or 1, 1)
# CUDA contexts do not survive a fork: every worker loads the model itself.
preload_app = False
# Seconds without a heartbeat after which a worker is killed. The model is loaded outside of the event loop.
timeout = 120
# Seconds after which a worker that ends is killed; longer than serve.grace_seconds.
graceful_timeout = 45
# Longer than nginx keeps an idle connection (60 s). Otherwise nginx could send a request to a closing connection.
keepalive = 75
backlog = 512
# Heartbeat files in memory, so that a slow disk cannot delay them.
worker_tmp_dir = "/dev/shm" if os.path.isdir("/dev/shm") else None
# The proxy whose X-Forwarded-For is trusted to identify clients: nginx.
forwarded_allow_ips = os.environ.get("FORWARDED_ALLOW_IPS") or "127.0.0.1"
# The service logs every request with its id.
accesslog = None
control_socket_disable = True


def pre_fork(server: Any, worker: Any) -> None:
    """Give the worker the least used slot, so that the successor of a worker gets its GPU and port."""
    taken = [other.slot for other in server.WORKERS.values()]
    worker.slot = min(range(server.num_workers), key=taken.count)


def post_fork(server: Any, worker: Any) -> None:
    """Restrict the worker to one GPU before CUDA is loaded, and give it a port of its own."""
    if _gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = _gpus[worker.slot % len(_gpus)]
    if worker.age > server.num_workers:
        # If the successor of a worker cannot load the model, as on a GPU without memory, the others continue and
        # gunicorn tries again. At the first start gunicorn ends.
        os.environ["PIPELINE_SERVE_BOOT_CODE"] = "1"
    worker.sockets = [*worker.sockets, _own_port(worker.slot)]


def _own_port(slot: int) -> socket.socket:
    """Return a socket at which uvicorn listens once the app has started; until then nginx tries another worker."""
    family = socket.AF_INET6 if ":" in _host else socket.AF_INET
    opened = socket.socket(family, socket.SOCK_STREAM)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # During a reload the old worker and its successor use the port together.
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        opened.bind((_host, _port + 1 + slot))
    except OSError as error:
        print(
            f"error: worker {slot} cannot listen at {_host}:{_port + 1 + slot}: {error}; "
            "set SERVE_PORT to a number with free ports after it",
            file=sys.stderr,
        )
        # Without this code gunicorn would restart the worker endlessly.
        raise SystemExit(Arbiter.WORKER_BOOT_ERROR) from error
    opened.setblocking(False)
    return opened
