"""Start gunicorn, the service, nginx and Prometheus on loopback, send requests through all of them, and stop them.

``python jobs/deploy/up.py`` needs the extra ``deploy`` and Debian's packages ``nginx-light`` and ``prometheus``. The
configs beside this file are used with free ports and short intervals. Arguments are passed to the service, such as
``model=clip_vit_b32 backend=onnx_int8``. ``--stay`` keeps all of them running until Ctrl-C.

Exit codes: 0 everything answered and ended correctly; 1 something did not, and the logs are printed; 2 a program is
missing; 75 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACKAGES = {"nginx": "nginx-light", "prometheus": "prometheus"}
# Debian's folders of servers may be missing from PATH.
PLACES = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
# The addresses in each config, and the program that uses each port.
ADDRESSES = {
    "nginx.conf": {"127.0.0.1:8080": "nginx", "127.0.0.1:8001": "worker"},
    "prometheus.yml": {"127.0.0.1:8001": "worker"},
    "alerts.yml": {},
}
APP = "pipeline.serve.app:create()"
# A white PNG of 2 by 2 pixels.
PICTURE = "iVBORw0KGgoAAAANSUhEUgAAAAIAAAACCAAAAABX3VL4AAAADklEQVR42mP4/5/h/38AC/oD/f1NxGYAAAAASUVORK5CYII="
REQUEST_ID = "up-and-down"
LINES_OF_LOG = 40
# Longer than gunicorn's graceful_timeout.
STOP_SECONDS = 60.0
# All are handled as Ctrl-C; SIGHUP is sent when the terminal is closed.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass
class Part:
    """A started program, and the signal that ends it."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    stop: signal.Signals


class Failed(Exception):
    """Something did not start, answer or end; ``part`` is the program whose log explains it, if known."""

    def __init__(self, message: str, part: Part | None = None) -> None:
        super().__init__(message)
        self.part = part


def main() -> int:
    """Parse the command line, start and stop everything, and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="GROUP=OPTION or KEY=VALUE, for the service")
    parser.add_argument("--folder", type=Path, help="folder of configs, logs and data; default: a temporary one")
    parser.add_argument("--timeout", type=float, default=300.0, metavar="S", help="seconds for loading the model (300)")
    parser.add_argument("--app", default=APP, help=f"what gunicorn serves ({APP})")
    parser.add_argument("--stay", action="store_true", help="keep everything running until Ctrl-C")
    options = parser.parse_intermixed_args()
    for name, package in PACKAGES.items():
        if shutil.which(name, path=PLACES) is None:
            print(f"error: there is no {name}: apt-get install --no-install-recommends {package}", file=sys.stderr)
            return 2
    if any(importlib.util.find_spec(name) is None for name in ("gunicorn", "uvicorn_worker")):
        print("error: the extra deploy is missing: pip install -c constraints.txt -e '.[deploy]'", file=sys.stderr)
        return 2
    for number in SIGNALS:
        # Ignored signals stay ignored, as nohup requires.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    try:
        with _folder(options.folder) as folder:
            _up_and_down(folder, options)
    except (Failed, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted; everything has been stopped", file=sys.stderr)
        return 75
    return 0


@contextlib.contextmanager
def _folder(given: Path | None) -> Iterator[Path]:
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="clip-service-") as folder:
        yield Path(folder)


def _up_and_down(folder: Path, options: argparse.Namespace) -> None:
    ports = _free_ports()
    _write_configs(folder, ports)
    parts: list[Part] = []
    try:
        _start_all(parts, folder, ports, options)
        _ask(parts, ports, options.timeout)
        if options.stay:
            _say(f"up: http://127.0.0.1:{ports['nginx']}, and Prometheus at http://127.0.0.1:{ports['prometheus']}")
            _say("Ctrl-C ends it")
            with contextlib.suppress(KeyboardInterrupt):
                _wait(parts, float("inf"), lambda: False, "nothing")
    except Failed as error:
        logs = "".join(f"\n--- {part.name}\n{_tail(part.log)}" for part in ([error.part] if error.part else parts))
        raise Failed(f"{error}{logs}") from error
    finally:
        # A second Ctrl-C would leave some programs running.
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        # The proxy ends first, so that accepted requests are answered.
        late = [part for part in sorted(parts, key=lambda part: part.name != "nginx") if not _stop(part)]
    if late:
        endings = "; ".join(f"{part.name} ended with {part.process.returncode}\n{_tail(part.log)}" for part in late)
        raise Failed(f"not everything ended correctly: {endings}")
    for name, port in ports.items():
        with contextlib.closing(socket.socket()) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError as error:
                raise Failed(f"the port of {name}, {port}, is still taken: {error}") from error
    _say("down: every program has ended, and its port is free")


def _free_ports() -> dict[str, int]:
    """Return free ports of nginx and Prometheus, and two adjacent ones of gunicorn and its worker."""
    for _ in range(100):
        with contextlib.ExitStack() as held:
            nginx, prometheus, gunicorn, worker = (held.enter_context(socket.socket()) for _ in range(4))
            try:
                for one in (nginx, prometheus, gunicorn):
                    one.bind(("127.0.0.1", 0))
                worker.bind(("127.0.0.1", gunicorn.getsockname()[1] + 1))
            except (OSError, OverflowError):
                continue
            found = {"nginx": nginx, "prometheus": prometheus, "gunicorn": gunicorn, "worker": worker}
            return {name: one.getsockname()[1] for name, one in found.items()}
    raise Failed("there are no two neighbouring free ports on 127.0.0.1")


def _write_configs(folder: Path, ports: dict[str, int]) -> None:
    for name, addresses in ADDRESSES.items():
        text = (HERE / name).read_text(encoding="utf-8")
        for address, part in addresses.items():
            if text.count(address) != 1:
                raise Failed(f"{HERE / name} has {address} {text.count(address)} times, and must have it once")
            text = text.replace(address, f"127.0.0.1:{ports[part]}")
        # Short intervals, so that this script need not wait for a scrape.
        text = text.replace("_interval: 15s", "_interval: 1s").replace("scrape_timeout: 5s", "scrape_timeout: 1s")
        (folder / name).write_text(text, encoding="utf-8")


def _start_all(parts: list[Part], folder: Path, ports: dict[str, int], options: argparse.Namespace) -> None:
    def start(name: str, command: list[str], stop: signal.Signals = signal.SIGTERM, **environment: str) -> None:
        log = folder / f"{name}.log"
        with log.open("ab") as file:
            # A separate process group: Ctrl-C goes to this program only, which stops the others in order.
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True,
                env={**os.environ, **environment},
            )  # fmt: skip
        parts.append(Part(name, process, log, stop))

    start(
        "gunicorn", [sys.executable, "-m", "gunicorn", "-c", str(HERE / "gunicorn.conf.py"), options.app],
        SERVE_HOST="127.0.0.1", SERVE_PORT=str(ports["gunicorn"]), WEB_CONCURRENCY="1",
        PIPELINE_SERVE_OVERRIDES=shlex.join(options.overrides),
    )  # fmt: skip
    # Under root, nginx starts its workers as another user, who cannot open the temporary folder.
    user = ["-g", "user root;"] if os.geteuid() == 0 else []
    start(
        "nginx", [_program("nginx"), "-p", str(folder), "-e", "stderr", "-c", str(folder / "nginx.conf"), *user],
        signal.SIGQUIT,
    )  # fmt: skip
    start(
        "prometheus",
        [
            _program("prometheus"), f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'prometheus'}",
            f"--web.listen-address=127.0.0.1:{ports['prometheus']}",
        ],
    )  # fmt: skip


def _ask(parts: list[Part], ports: dict[str, int], timeout: float) -> None:
    """Wait until the service is ready, send requests through the proxy, and find them in Prometheus."""
    proxy = f"http://127.0.0.1:{ports['nginx']}"
    began = time.monotonic()
    _wait(parts, timeout, lambda: _get(f"{proxy}/readyz")[0] == 200, "the service is not ready")
    _say(f"ready after {time.monotonic() - began:.1f} s: {proxy}/readyz")

    asked: dict[str, dict[str, object]] = {
        "/embed": {"texts": ["a red circle"]},
        "/predict": {"images": [{"data": PICTURE}], "labels": ["red circle", "green square"]},
    }
    for path, body in asked.items():
        status, headers, answer = _get(f"{proxy}{path}", body, {"X-Request-ID": REQUEST_ID})
        if status != 200:
            raise Failed(f"POST {proxy}{path}: {status} {answer[:500]!r}")
        if headers.get("X-Request-ID") != REQUEST_ID:
            raise Failed(f"POST {proxy}{path}: the request id came back as {headers.get('X-Request-ID')!r}")
        _say(f"POST {proxy}{path}: {status}, {len(answer):,} bytes")
    if (hidden := _get(f"{proxy}/metrics")[0]) != 404:
        raise Failed(f"GET {proxy}/metrics: {hidden}, although the proxy must not serve the metrics")

    query = 'sum(clip_service_requests_total{route="/embed",code="200"})'
    page = f"http://127.0.0.1:{ports['prometheus']}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
    _wait(parts, 30, lambda: _value(page) == 1, f"Prometheus does not report one request ({query})")
    _say(f"Prometheus: {query} = 1")


def _get(url: str, body: object = None, headers: dict[str, str] | None = None) -> tuple[int, dict[str, str], bytes]:
    """Return status, headers and content; status 0 if there is no answer yet."""
    data = None if body is None else json.dumps(body).encode()
    kind = {"Content-Type": "application/json"} if data else {}
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, data, {**kind, **(headers or {})}), timeout=30
        ) as answer:
            return answer.status, dict(answer.headers), answer.read()
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers), error.read()
    except OSError:
        return 0, {}, b""


def _value(url: str) -> float | None:
    status, _, content = _get(url)
    found = json.loads(content)["data"]["result"] if status == 200 else []
    return float(found[0]["value"][1]) if found else None


def _wait(parts: list[Part], seconds: float, done: Callable[[], bool], otherwise: str) -> None:
    end = time.monotonic() + seconds
    while not done():
        for part in parts:
            if part.process.poll() is not None:
                raise Failed(f"{part.name} ended with {part.process.returncode}", part)
        if time.monotonic() > end:
            raise Failed(f"{otherwise}, after {seconds:.0f} s")
        time.sleep(0.2)


def _stop(part: Part) -> bool:
    """Stop a program and wait for it; return False if it had to be killed or ended with an error."""
    if part.process.poll() is None:
        part.process.send_signal(part.stop)
        with contextlib.suppress(subprocess.TimeoutExpired):
            part.process.wait(STOP_SECONDS)
    # Its child processes too, which a killed program leaves behind.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(part.process.pid, signal.SIGKILL)
    return part.process.wait() == 0


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-LINES_OF_LOG:])


def _program(name: str) -> str:
    found = shutil.which(name, path=PLACES)
    assert found is not None
    return found


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
