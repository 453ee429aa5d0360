"""The page over datasets with odd requests, odd values and things that change: no wrong rows, no endless waiting."""

from __future__ import annotations

import http.client
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytest.importorskip("uvicorn", reason="needs the extra serve")
pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("python_multipart", reason="needs the extra serve")

from pipeline.browse.__main__ import main
from pipeline.browse.cached import CachedDataset, Memory
from pipeline.browse.guard import LOOPBACK, Guard
from pipeline.browse.opened import OpenedDataset
from pipeline.browse.pictures import Pictures
from pipeline.browse.selection import Selection
from pipeline.browse.works import Works
from pipeline.core.errors import ConfigError, ManifestError, Problem, StorageError
from pipeline.dataset.analysis import analysis_url, writing
from pipeline.dataset.dataset import Dataset, open_dataset
from tests.finished import run_scenes, write_vectors
from tests.jobs import scenes_manifest
from tests.sites import Site, sites
from tests.test_browse import found, unit


@pytest.fixture
def site() -> Iterator[Callable[..., Site]]:
    with sites() as serve:
        yield serve


def rows_in(text: str) -> list[int]:
    return [int(each) for each in re.findall(r'row/(\d+)"', text)]


# --- requests ---


def headers_of(guard: Guard, path: str, *headers: tuple[str, str], method: str = "GET", query: str = "") -> Any:
    """The status and the headers of an answer of a guard before an app that answers 200."""
    import asyncio

    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def send(message: Any) -> None:
        sent.append(message)

    guard._app = app
    scope = {
        "type": "http", "method": method, "path": path, "query_string": query.encode(),
        "headers": [(name.encode(), value.encode("latin-1")) for name, value in headers],
    }  # fmt: skip
    asyncio.run(guard(scope, None, send))  # type: ignore[arg-type]
    return sent[0]["status"], {name.decode(): value.decode() for name, value in sent[0]["headers"]}


def guard(**more: Any) -> Guard:
    return Guard(None, hosts=LOOPBACK, port=8500, token="secret", **more)  # type: ignore[arg-type]


HOST = ("host", "127.0.0.1:8500")
COOKIE = "clip-pipeline-8500=secret"


@pytest.mark.parametrize(
    "cookies",
    [
        [f'prefs={{"a": [1, 2]}}; {COOKIE}'], [f"a b=1; {COOKIE}"], ["other=1", COOKIE], [f"{COOKIE}; x=\x01é"],
        [f"=; ;;{COOKIE}"],
    ],
)  # fmt: skip
def test_cookies_of_other_programs_on_this_host_do_not_lock_the_owner_out(cookies: list[str]) -> None:
    assert headers_of(guard(), "/0/", HOST, *(("cookie", each) for each in cookies))[0] == 200


@pytest.mark.parametrize("cookie", ["clip-pipeline-8500=", "clip-pipeline-8501=secret", "x=secret", "", "secret", "é"])
def test_another_cookie_is_no_token(cookie: str) -> None:
    assert headers_of(guard(), "/0/", HOST, ("cookie", cookie))[0] == 403


@pytest.mark.parametrize("path", ["//evil.example/x", "///evil.example", "http://evil.example/", "/\\evil.example"])
def test_the_address_with_the_token_leads_to_no_other_host(path: str) -> None:
    status, headers = headers_of(guard(), path, HOST, query="token=secret&q=%0d%0aX-Evil:1")
    assert status == 303
    assert re.match(r"/(?![/\\])", headers["location"])
    assert "\n" not in headers["location"]


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("photos.example", True), ("PHOTOS.example:8500", True), ("photos.example:8501", False),
        ("evil.photos.example", False), ("127.0.0.1", False),
    ],
)  # fmt: skip
def test_the_name_of_a_proxy_is_allowed_with_and_without_the_port(host: str, allowed: bool) -> None:
    given = guard(names=("photos.example",))
    assert headers_of(given, "/0/", ("host", host), ("cookie", COOKIE))[0] == (200 if allowed else 421)
    form = [("host", host), ("cookie", COOKIE), ("origin", f"https://{host}")]
    assert headers_of(given, "/0/upload", *form, method="POST")[0] == (200 if allowed else 421)


def test_two_hosts_or_origins_are_refused() -> None:
    evil = ("host", "evil.example")
    for pair in ((HOST, evil), (evil, HOST), (HOST, HOST)):
        assert headers_of(guard(), "/0/", *pair, ("cookie", COOKIE))[0] == 421
    origins = [("origin", "http://evil.example"), ("origin", f"http://{HOST[1]}")]
    assert headers_of(guard(), "/0/upload", HOST, ("cookie", COOKIE), *origins, method="POST")[0] == 403


def test_an_upload_without_a_length_is_refused(site: Any, tmp_path: Path) -> None:
    write_vectors(str(tmp_path / "d"), unit(2, 1))
    served = site(tmp_path / "d")
    about = {"Host": f"127.0.0.1:{served.port}", "Cookie": served.cookie, "Origin": f"http://127.0.0.1:{served.port}"}
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=20)
    connection.request("POST", "/0/upload", iter([b"x" * 10]), about, encode_chunked=True)
    assert connection.getresponse().status in (400, 411)
    connection.close()
    for length in ("x", "9" * 5000, str(65 * 2**20)):
        assert served.ask("/0/upload", method="POST", Origin=about["Origin"], Content_Length=length)[0] in (400, 413)
    assert served.ask("/0/")[0] == 200


@pytest.mark.parametrize("query", ["like=" + "1" * 5000, "group=clusters:" + "1" * 5000, "group=clusters:" + "9" * 30])
def test_long_numbers_are_refused_by_name(site: Any, tmp_path: Path, query: str) -> None:
    clustered(tmp_path / "d", ["row-1"])
    status, _, data = site(tmp_path / "d").ask(f"/0/?{query}")
    assert status in (200, 400)
    assert b"must be" in data


# --- values ---


def test_labels_and_values_with_spaces_or_none_lead_to_their_own_rows(site: Any, tmp_path: Path) -> None:
    labels = ["cat ", "cat", "", " ", None, "cat"]
    truth = ["", " cat", "cat", "", "x", None]
    write_vectors(str(tmp_path / "d"), unit(6, 1), label=labels, score=np.ones(6, np.float32), truth=truth)
    served = site(tmp_path / "d")
    text = served.page("/0/labels?truth=truth")
    links = re.findall(r'href="(/0/\?[^"]*op=is[^"]*)">([^<]*)<', text)
    by_label = {tuple(rows_in(served.page(link.replace("&amp;", "&")))) for link, _ in links if "truth" not in link}
    assert by_label >= {(0,), (1, 5), (2,), (3,)}
    table = {
        (tuple(rows_in(served.page(link.replace("&amp;", "&")))), int(count))
        for link, count in links
        if "truth" in link
    }
    assert all(len(rows) == count for rows, count in table)
    assert {rows for rows, _ in table} == {(0,), (3,), (1,), (2,)}
    # An empty line of the form is none, and a blank number neither.
    assert served.page("/0/?column=&op=is&value=&column=score&op=lt&value=+").count('class="picture"') == 6


@pytest.mark.parametrize(
    ("value", "rows"),
    [
        ("2026-01-01", [1, 2]), ("2026-01-01 01:00", [2]), ("2026-01-01 00:00:00Z", [2]),
        ("2026-01-01 01:00:00+01:00", [2]), (" 2026-01-01 ", [1, 2]),
    ],
)  # fmt: skip
def test_times_with_a_zone_are_compared_with_times_of_that_zone(tmp_path: Path, value: str, rows: list[int]) -> None:
    taken = pa.array([1767221999, 1767222000, 1767225600], pa.timestamp("s", "Europe/Berlin"))
    made = CachedDataset.of(write_vectors(str(tmp_path / "d"), unit(3, 1), taken=taken), Memory(0))
    assert found(made, urlencode({"column": "taken", "op": "ge", "value": value})).rows.tolist() == rows


def test_texts_that_are_not_utf_8_are_shown(site: Any, tmp_path: Path) -> None:
    stored = pa.array([b"\xff\xfeab", b"ok", b"<b>"])
    kept = pa.Array.from_buffers(pa.string(), 3, stored.buffers())
    write_vectors(
        str(tmp_path / "d"), unit(3, 1), label=["a"] * 3, text=kept, coded=kept.dictionary_encode(),
        nested=pa.StructArray.from_arrays([kept], ["a"]),
    )  # fmt: skip
    served = site(tmp_path / "d")
    assert "��ab" in served.page("/0/row/0")
    assert "&lt;b&gt;" in served.page("/0/row/2")
    assert "��ab" in served.page("/0/labels?truth=text")
    assert "��ab" in served.page("/0/labels?truth=coded")


def test_a_dataset_whose_rows_all_failed_has_every_page(site: Any, tmp_path: Path) -> None:
    write_vectors(str(tmp_path / "d"), np.full((6, 16), np.nan, np.float32), shard_rows=2)
    served = site(tmp_path / "d")
    for path in ("", "?sort=score", "?sort=margin", "?sort=outlier", "labels", "failures", "map", "row/0", "about"):
        served.page(f"/0/{path}")
    assert b'"rows":[]' in served.ask("/0/map.json")[2]
    assert "6 of 6 rows failed" in served.page("/0/failures")


def test_the_commands_of_a_page_are_words_of_a_shell(site: Any, tmp_path: Path) -> None:
    write_vectors(str(tmp_path / "my $(touch x) d"), unit(2, 1))
    served = site(tmp_path / "my $(touch x) d")
    for path in ("about", "duplicates", "clusters"):
        assert re.search(r"<pre>python -m pipeline\.\w+ &#39;[^<]*my \$\(touch x\) d&#39;", served.page(f"/0/{path}"))


# --- things that change ---


def clustered(folder: Path, ids: list[str], **parameters: Any) -> Dataset:
    made = open_dataset(str(folder)) if folder.exists() else write_vectors(str(folder), unit(12, 1))
    schema = pa.schema([("id", pa.string()), ("cluster", pa.int32()), ("distance", pa.float32())])
    with writing(analysis_url(made, "clusters"), "clusters", made, schema, parameters=parameters, counts={}) as writer:
        count = len(ids)
        if count:
            writer.write_table(pa.table({"id": ids, "cluster": [0] * count, "distance": [0.1] * count}, schema=schema))
    return made


def test_groups_without_rows_or_of_other_rows_are_empty(site: Any, tmp_path: Path) -> None:
    clustered(tmp_path / "d", [])
    served = site(tmp_path / "d")
    assert "<b>0</b> rows" in served.page("/0/?group=clusters:0")
    assert "0 clusters" in served.page("/0/clusters")
    clustered(tmp_path / "d", ["gone", "row-3"], rows=2)
    assert rows_in(served.page("/0/clusters")) == [3]
    assert rows_in(served.page("/0/?group=clusters:0")) == [3]
    assert "<b>0</b> rows" in served.page("/0/?group=clusters:7")


def test_an_analysis_that_was_made_again_is_shown_anew(site: Any, tmp_path: Path) -> None:
    clustered(tmp_path / "d", ["row-1", "row-2"], rows=2)
    served = site(tmp_path / "d")
    for path in ("/0/clusters", "/0/?group=clusters:0"):
        assert rows_in(served.page(path)) == [1, 2]
    clustered(tmp_path / "d", ["row-5"], rows=1)
    for path in ("/0/clusters", "/0/?group=clusters:0"):
        assert rows_in(served.page(path)) == [5]


def test_the_pictures_of_a_dataset_that_was_replaced_are_its_own(
    site: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.browse.collection.FRESH_SECONDS", 0.0)
    manifest = scenes_manifest(tmp_path / "m.parquet", 20)
    run_scenes(tmp_path, "d", manifest)
    served = site(tmp_path / "d")
    _, headers, before = served.ask("/0/thumbnail/0")
    assert (before[:2], "max-age" in headers["cache-control"]) == (b"\xff\xd8", False)
    assert served.ask("/0/thumbnail/0", If_None_Match=headers["etag"])[0] == 304
    import shutil

    shutil.rmtree(tmp_path / "d")
    table = pq.read_table(manifest)
    pq.write_table(table.take(list(range(19, -1, -1))), manifest)
    run_scenes(tmp_path, "d", manifest)
    status, _, after = served.ask("/0/thumbnail/0", If_None_Match=headers["etag"])
    assert (status, after[:2]) == (200, b"\xff\xd8")
    assert after != before


def test_a_picture_that_could_not_be_read_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = scenes_manifest(tmp_path / "m.parquet", 20)
    run_scenes(tmp_path, "d", manifest)
    away = manifest.rename(tmp_path / "away")
    pictures = Pictures(CachedDataset.of(open_dataset(str(tmp_path / "d")), Memory(1 << 20)))
    try:
        assert pictures.thumbnail(0) == b""
        assert "m.parquet" in pictures.problem
        away.rename(manifest)
        assert pictures.thumbnail(0) == b""
        monkeypatch.setattr("pipeline.browse.pictures.AGAIN_SECONDS", 0.0)
        assert pictures.thumbnail(0)[:2] == b"\xff\xd8"
    finally:
        pictures.close()
    # Closed, it makes none, and says nothing else.
    pictures.want({1: "x"})
    assert pictures.thumbnail(1) == b""


def test_a_manifest_with_other_rows_by_now_is_not_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = scenes_manifest(tmp_path / "m.parquet", 20)
    run_scenes(tmp_path, "d", manifest)
    arguments = [str(tmp_path / "d"), "--select", "column=status&op=is&value=ok", "--format", "manifest", "--export"]
    assert main([*arguments, str(tmp_path / "good.parquet")]) == 0
    assert pq.read_metadata(tmp_path / "good.parquet").num_rows == 19
    pq.write_table(pq.read_table(manifest).take(list(range(19, -1, -1))), manifest)
    assert main([*arguments, str(tmp_path / "bad.parquet")]) != 0
    assert "other rows" in capsys.readouterr().err
    assert not (tmp_path / "bad.parquet").exists()


def test_a_night_that_is_gone_is_said_and_one_that_comes_back_is_shown(
    site: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.browse.app.FRESH_SECONDS", 0.0)
    seen: list[int] = []

    def nights(collection: Any, store: int, progress: Any) -> list[Any]:
        seen.append(store)
        return []

    monkeypatch.setattr("pipeline.browse.views.nights_of", nights)
    write_vectors(str(tmp_path / "store" / "date=2026-11-27"), unit(2, 1))
    served = site(tmp_path / "store")
    for _ in range(3):
        served.page("/nights/0")
        time.sleep(0.01)
    assert len(seen) == 3


# --- waiting ---


def test_a_failure_between_two_questions_is_told_once() -> None:
    works, calls = Works(), list[int]()

    def work(progress: Any) -> int:
        calls.append(1)
        time.sleep(0.05)
        raise StorageError("gone")

    try:
        assert works.start("key", work).result(0.001) is None
        time.sleep(0.3)
        with pytest.raises(StorageError):
            works.start("key", work).result(0.001)
        assert len(calls) == 1
        works.start("key", work)
        time.sleep(0.1)
        assert len(calls) == 2
    finally:
        works.close()


def test_work_that_runs_ends_at_its_next_step_when_the_page_closes() -> None:
    works, begun, ended = Works(), threading.Event(), threading.Event()

    def work(progress: Any) -> None:
        try:
            for step in range(2000):
                progress(step, 2000)
                begun.set()
                time.sleep(0.01)
        finally:
            ended.set()

    works.start("key", work)
    assert begun.wait(5)
    works.close()
    assert ended.wait(2)


def test_more_rows_wait_for_a_result_that_is_not_there_any_more(
    site: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_vectors(str(tmp_path / "d"), unit(120, 1), score=np.linspace(0, 1, 120).astype(np.float32))
    served, go = site(tmp_path / "d"), threading.Event()
    find = OpenedDataset.find

    def late(self: Any, selection: Selection, progress: Any) -> Any:
        go.wait(20)
        return find(self, selection, progress)

    monkeypatch.setattr(OpenedDataset, "find", late)
    path = "/0/?sort=score&from=48"
    text = served.ask(path)[2].decode()
    again = re.search(r'hx-get="([^"]+)"', text)
    assert again is not None
    assert again[1].replace("&amp;", "&") == path
    go.set()
    assert rows_in(served.page(path)) == list(range(71, 23, -1))


def test_an_error_of_a_work_takes_the_place_of_its_progress(
    site: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_vectors(str(tmp_path / "d"), unit(3, 1))
    served = site(tmp_path / "d")
    for error, code in ((StorageError("a part <i>"), 503), (ManifestError("gone"), 503), (KeyError("odd"), 500)):

        def fail(self: Any, selection: Any, progress: Any, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(OpenedDataset, "find", fail)
        status, headers, data = served.ask("/0/?sort=-score&part=results", HX_Request="true")
        assert (status, headers["content-type"]) == (code, "text/html; charset=utf-8")
        # htmx takes what has this attribute.
        assert data.startswith(b"<section data-part=")
        assert b"<i>" not in data
        assert "<html" in served.page("/0/?sort=-score", code)


def test_an_upload_keeps_the_filters(site: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_vectors(str(tmp_path / "d"), unit(3, 1), label=["a", "b", "b"])
    monkeypatch.setattr(OpenedDataset, "upload", lambda self, data: "key")
    served = site(tmp_path / "d")
    query = urlencode([*[("column", "label"), ("op", "is"), ("value", "b&\"'")] * 4, ("group", "")])
    form = re.search(r'<form method="post".*?</form>', served.page(f"/0/?{query}"), re.DOTALL)
    assert form is not None
    hidden = re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', form[0])
    assert hidden == [("column", "label"), ("op", "is"), ("value", "b&amp;&#34;&#39;")] * 4
    fields = [(name, value.replace("&amp;", "&").replace("&#34;", '"').replace("&#39;", "'")) for name, value in hidden]
    lines = [f'--x\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n' for name, value in fields]
    picture = '--x\r\nContent-Disposition: form-data; name="picture"; filename="a"\r\n\r\nP\r\n--x--\r\n'
    about = {"Content_Type": "multipart/form-data; boundary=x", "Origin": f"http://127.0.0.1:{served.port}"}
    body = "".join([*lines, picture]).encode()
    status, headers, _ = served.ask("/0/upload", method="POST", body=body, **about)
    assert (status, headers["location"]) == (303, f"/0/?{urlencode([*fields, ('image', 'key')])}")


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/0/?sort=score", "/0/export?format=csv"])
def test_the_command_ends_soon_while_it_works(tmp_path: Path, path: str) -> None:
    write_vectors(str(tmp_path / "d"), unit(400, 1), shard_rows=2, score=np.ones(400, np.float32))
    slow = (
        "import time; from pipeline.browse.cached import CachedDataset; read = CachedDataset.read\n"
        "CachedDataset.read = lambda *given, **named: time.sleep(1) or read(*given, **named)\n"
        "from pipeline.browse import exports; exports.ROWS_AT_ONCE = 2; rows = CachedDataset.rows\n"
        "CachedDataset.rows = lambda *given, **named: time.sleep(0.2) or rows(*given, **named)\n"
        "from pipeline.browse.__main__ import main; from pipeline.core.cli import run_process\n"
        f"run_process(lambda: main([{str(tmp_path / 'd')!r}]))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", slow], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as started:
        assert started.stdout is not None
        assert started.stderr is not None
        port, token = re.findall(r":(\d+)/\?token=(.*)", started.stdout.readline())[0]
        served = Site(int(port), token)
        served.cookie = served.ask(f"/?token={token}")[1]["set-cookie"].split(";")[0]
        answers = list[bytes]()
        asking = threading.Thread(target=lambda: answers.append(served.ask(path)[2]))
        asking.start()
        time.sleep(1.5)
        begun = time.monotonic()
        started.send_signal(signal.SIGINT)
        assert started.wait(60) == 0
        # All of it takes 25 seconds and more.
        assert time.monotonic() - begun < 10
        asking.join(10)
        assert b"waiting" in answers[0] if "sort" in path else b"the page is closed" in answers[0]
        assert started.stderr.read() == ""


def test_a_work_that_nobody_asks_for_any_more_ends_and_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    works, ended = Works(), threading.Event()

    def work(progress: Any) -> None:
        try:
            for step in range(500):
                progress(step, 500)
                time.sleep(0.01)
        finally:
            ended.set()

    try:
        monkeypatch.setattr("pipeline.browse.works.ABANDONED", 0.2)
        for _ in range(8):
            assert works.start("key", work).result(0.1) is None
        assert not ended.is_set()
        assert ended.wait(3)
        monkeypatch.setattr("pipeline.browse.works.ABANDONED", 90.0)
        assert works.start("key", lambda progress: 7).result(5) == 7
        # Work that no page waits for, such as reading ahead, goes on.
        monkeypatch.setattr("pipeline.browse.works.ABANDONED", -1.0)
        ahead = works.start("ahead", lambda progress: progress(1, 1) or 8)
        assert ahead.future.result(5) == 8
    finally:
        works.close()


def test_a_truth_with_a_value_for_each_row_is_refused(
    site: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.browse.measures.MOST_PAIRS", 40)
    names = [f"{row}" for row in range(60)]
    kept = {"name": names, "odd": [str(row % 2) for row in range(60)]}
    write_vectors(str(tmp_path / "d"), unit(60, 1), label=["a"] * 60, **kept)
    served = site(tmp_path / "d")
    assert "has more than 40 values" in served.page("/0/labels?truth=name", 400)
    assert "Labels by odd" in served.page("/0/labels?truth=odd")


def test_an_export_that_fails_in_the_middle_leaves_no_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.browse.exports.ROWS_AT_ONCE", 20)
    made = write_vectors(str(tmp_path / "d"), unit(90, 1, 8), shard_rows=30)
    part = tmp_path / "d" / made.commits[-1].part
    part.write_bytes(part.read_bytes()[:100])
    for name in ("rows.csv", "rows.parquet"):
        assert main([made.url, "--export", str(tmp_path / name)]) != 0
        assert not (tmp_path / name).exists()
    assert "--repair" in capsys.readouterr().err


def test_a_slow_store_keeps_no_other_dataset_waiting(
    site: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.browse.collection.FRESH_SECONDS", 0.0)
    for name in ("a", "b"):
        write_vectors(str(tmp_path / name), unit(3, 1))
    served, go = site(tmp_path / "a", tmp_path / "b"), threading.Event()
    from pipeline.storage.local import LocalStorage

    read = LocalStorage.read

    def slow(self: Any, name: str, *given: Any) -> Any:
        if self.url.endswith("/a"):
            go.wait(20)
        return read(self, name, *given)

    monkeypatch.setattr(LocalStorage, "read", slow)
    waiting = threading.Thread(target=served.ask, args=("/0/about",))
    waiting.start()
    try:
        time.sleep(0.2)
        begun = time.monotonic()
        assert "3 rows" in served.page("/1/")
        assert time.monotonic() - begun < 10
    finally:
        go.set()
        waiting.join(20)


def test_an_error_of_a_request_speaks_of_the_request(
    site: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_vectors(str(tmp_path / "d"), unit(3, 1))
    served = site(tmp_path / "d")
    text = served.page("/0/?sort=odd", 400)
    assert "sort: must be one of" in text
    assert "the config has" not in text

    def refuse(self: Any, data: bytes) -> str:
        raise ConfigError([Problem("--image", "/tmp/x/picture", "not_an_image: no picture")])

    monkeypatch.setattr(OpenedDataset, "upload", refuse)
    body = b'--x\r\nContent-Disposition: form-data; name="picture"; filename="a"\r\n\r\nP\r\n--x--\r\n'
    about = {"Content_Type": "multipart/form-data; boundary=x", "Origin": f"http://127.0.0.1:{served.port}"}
    status, _, data = served.ask("/0/upload", method="POST", body=body, **about)
    assert (status, b"picture: not_an_image" in data, b"/tmp/" in data) == (400, True, False)


def test_a_request_that_a_store_refuses_for_a_moment_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.browse import cached, opened

    clustered(tmp_path / "d", ["row-3"])
    made = CachedDataset.of(open_dataset(str(tmp_path / "d")), Memory(0))
    monkeypatch.setattr("pipeline.storage.retry.FIRST_WAIT", 0.001)
    for module in (cached, opened):
        failures = iter([ConnectionResetError, TimeoutError])
        real = module.open_arrow

        def flaky(url: str, failures: Any = failures, real: Any = real) -> Any:
            if (error := next(failures, None)) is not None:
                raise error("a moment")
            return real(url)

        monkeypatch.setattr(module, "open_arrow", flaky)
    assert made.rows([3], ["id"]) == [{"id": "row-3"}]
    page = OpenedDataset(made, None)
    assert page.analysis("clusters")["id"].to_pylist() == ["row-3"]
    page.close()


@pytest.mark.slow
def test_a_dataset_in_s3_is_shown_with_one_request_of_ten_failing(
    site: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.s3 import BUCKET, moto_server, pointed_at, proxy_to

    monkeypatch.setattr("pipeline.storage.retry.FIRST_WAIT", 0.003)
    monkeypatch.setattr("pipeline.browse.collection.FRESH_SECONDS", 0.0)
    with moto_server(tmp_path / "log") as server, proxy_to(server) as proxy, pointed_at(proxy.url):
        address = f"s3://{BUCKET}/d"
        write_vectors(address, unit(120, 1), label=["a", "b"] * 60, score=np.linspace(0, 1, 120).astype(np.float32))
        served = site(address, memory=0)
        proxy.throw_dice(0.1, 3)
        assert rows_in(served.page("/0/?sort=score"))[:3] == [119, 118, 117]
        assert ">60</b> rows" in served.page("/0/?column=label&op=is&value=a")
        for path in ("labels", "failures", "duplicates", "about", "row/77", "?like=5"):
            served.page(f"/0/{path}")
        assert any(fault for *_, fault in proxy.requests)
        proxy.share = 0.0
        proxy.inject("403", "GET", times=1000)
        assert "This cannot be shown" in served.page("/0/?sort=-score", 503)
        proxy.reset()
        assert rows_in(served.page("/0/?sort=-score"))[0] == 0
