"""Lines of the log as JSON, what each is known to be about, and that libraries which nobody can act on are quiet."""

from __future__ import annotations

import json
import logging
import os
import re
import threading
import warnings
from enum import IntEnum
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("distributed", reason="needs the extra dask")

from pipeline.config.schema import Config, LogConfig
from pipeline.core.cli import ErrorOutput
from pipeline.core.errors import ConfigError, Interrupted, ManifestError, NumericalError, Problem
from pipeline.core.log_format import SILENCED, JsonLines, ending, new_run, shard_of, silence, within
from pipeline.job.cluster.dask_executor import DaskExecutor
from pipeline.job.cluster.events import EventSender, Forward
from pipeline.storage.factory import open_storage
from pipeline.telemetry.logs import library_messages, log_to, log_to_terminal, progress_mode
from pipeline.telemetry.progress import Progress
from tests.families import write_siglip
from tests.jobs import scenes_manifest, start
from tests.pictures import saved

JSON = LogConfig(format="json")
log = logging.getLogger("pipeline.tests")


class _Odd:
    def __str__(self) -> str:
        raise ValueError("no text")


class _Level(IntEnum):
    HIGH = 3


def told(record: logging.LogRecord, run: str = "r-1") -> dict[str, Any]:
    line = JsonLines(run).format(record)
    assert "\n" not in line
    assert line.isascii()
    found: dict[str, Any] = json.loads(line, parse_constant=pytest.fail)
    return found


def record_of(message: str, *arguments: object, **extra: Any) -> logging.LogRecord:
    record = logging.LogRecord("pipeline.x", logging.WARNING, __file__, 1, message, arguments, None)
    record.__dict__.update(extra)
    return record


def lines_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_line_is_one_object_with_time_level_logger_message_and_run() -> None:
    record = record_of("%d of %d\nrows", 3, 9, rows=3)
    record.created = 1795443651.5
    found = told(record)
    assert found.pop("process") == record.process
    assert found == {
        "time": "2026-11-23T14:20:51.500Z",
        "level": "warning",
        "logger": "pipeline.x",
        "message": "3 of 9\nrows",
        "run": "r-1",
        "rows": 3,
    }
    assert "run" not in told(record_of("x"), run="")


def test_any_value_can_be_a_field() -> None:
    loop: list[Any] = []
    loop.append(loop)
    odd = {
        "nan": float("nan"), "inf": float("inf"), "path": Path("a/b"), "set": {1}, "bytes": b"x", "level": _Level.HIGH,
        "nested": {1: [float("nan"), (None, True)]}, "loop": loop, "odd": _Odd(), "half": "a\udc80b", "name_": "n",
        "error": "mine",
    }  # fmt: skip
    found = told(record_of("x", **odd))
    assert (found["nan"], found["inf"], found["path"], found["set"]) == ("nan", "inf", "a/b", [1])
    assert found["bytes"] == "b'x'"
    assert found["nested"] == {"1": ["nan", [None, True]]}
    assert "_Odd object" in found["odd"]
    assert found["half"] == "a?b"
    # What a line always has, no field can replace.
    assert (found["level"], found["level_"], found["error"]) == ("warning", 3, "mine")


def test_an_exception_has_its_traceback_in_the_same_line() -> None:
    try:
        _ = 1 / 0
    except ZeroDivisionError as error:
        found = told(ending(error, 1))
    assert (found["level"], found["error"], found["exit_code"]) == ("error", "ZeroDivisionError", 1)
    assert found["message"] == "ZeroDivisionError('division by zero')"
    assert found["traceback"].startswith("Traceback (most recent call last):\n")
    foreseen = told(ending(ManifestError("m.parquet: no column id"), 2))
    assert (foreseen["message"], foreseen["error"]) == ("m.parquet: no column id", "ManifestError")
    assert "traceback" not in foreseen


def test_what_is_logged_within_a_shard_is_about_it_in_its_own_thread_alone() -> None:
    seen: list[dict[str, Any]] = []

    def work() -> None:
        with within(7):
            seen.append(told(record_of("x")))
            thread = threading.Thread(target=lambda: seen.append(told(record_of("x"))))
            thread.start()
            thread.join()
            raise NumericalError("NaN")

    with pytest.raises(NumericalError) as caught:
        work()
    seen += [told(record_of("x")), told(ending(caught.value)), told(record_of("x", shard=3))]
    assert [each.get("shard") for each in seen] == [7, None, None, 7, 3]
    # An error that was in a shard before stays in it; some errors have room for no such thing.
    with pytest.raises(NumericalError), within(8):
        raise caught.value
    assert shard_of(caught.value) == 7
    assert shard_of(ConfigError([Problem("a", 1, "b")])) is None


def test_every_run_has_a_name_of_its_own() -> None:
    names = {new_run() for _ in range(100)}
    assert len(names) == 100
    assert all(re.fullmatch(r"\d{8}T\d{6}Z-[0-9a-f]{8}", name) for name in names)


def test_terminal_and_file_have_the_same_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    storage = open_storage(str(tmp_path))

    def work() -> None:
        with log_to(storage, form=JSON, run="r-1"):
            log.info("one", extra={"rows": 1})
            raise ManifestError("two\nlines")

    with pytest.raises(ManifestError):
        work()
    file = lines_of((tmp_path / "_run.log").read_text())
    assert lines_of(capsys.readouterr().err) == file[:1]
    assert [(line["message"], line["level"]) for line in file] == [("one", "info"), ("two\nlines", "error")]
    assert {line["run"] for line in file} == {"r-1"}


def test_a_log_within_another_takes_its_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with log_to(open_storage(str(tmp_path / "outer")), run="r-1"):
        log.info("before")
        with log_to(open_storage(str(tmp_path / "inner")), run="r-1"):
            log.info("between")
        log.info("after")
    assert capsys.readouterr().err == "before\nbetween\nafter\n"
    found = [(tmp_path / name / "_run.log").read_text().splitlines()[1:] for name in ("outer", "inner")]
    assert [[line.rpartition(": ")[2] for line in lines] for lines in found] == [["before", "after"], ["between"]]


def test_a_file_of_text_names_the_run_once(tmp_path: Path) -> None:
    with log_to(open_storage(str(tmp_path)), run="r-1"):
        log.warning("a \udc80 name")
    text = (tmp_path / "_run.log").read_text()
    assert text.count("r-1") == 1
    assert "INFO pipeline: run r-1\n" in text
    assert text.endswith("WARNING pipeline.tests: a \\udc80 name\n")


def test_the_terminal_shows_what_its_level_asks_for_and_the_file_has_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with log_to(open_storage(str(tmp_path)), form=LogConfig(level="error")):
        log.info("one")
        log.warning("two")
        log.error("three")
    assert capsys.readouterr().err == "error: three\n"
    assert len((tmp_path / "_run.log").read_text().splitlines()) == 3


def test_progress_is_lines_with_fields_and_no_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config(log=JSON)
    assert progress_mode(config) == "plain"
    assert progress_mode(Config()) == "auto"
    monkeypatch.setattr("pipeline.telemetry.progress.LINE_SECONDS", 0.0)
    with log_to_terminal(JSON, "r-1"), Progress(8, done=0, mode="plain") as progress:
        progress.embedded(4)
        progress.failed(1)
    first, second = lines_of(capsys.readouterr().err)
    assert (first["rows"], second["rows"], second["total"], second["failed"], second["images"]) == (4, 5, 8, 1, 4)
    assert second["images_per_second"] > 0


def test_libraries_speak_in_lines_of_the_log(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    foreign, showwarning = logging.getLogger("somelib.part"), warnings.showwarning
    with library_messages(LogConfig(), "r-1"):
        foreign.info("not this")
        foreign.warning("before")
        with log_to(open_storage(str(tmp_path)), run="r-1"):
            foreign.warning("look %s", "here")
            warnings.showwarning(UserWarning("odd data"), UserWarning, "/x/somelib/io.py", 12)
    assert warnings.showwarning is showwarning
    assert capsys.readouterr().err == (
        "warning: somelib.part: before\nwarning: somelib.part: look here\nwarning: somelib: odd data\n"
    )
    assert "WARNING somelib.part: look here\n" in (tmp_path / "_run.log").read_text()
    with library_messages(JSON, "r-1"):
        warnings.showwarning(UserWarning("odd data"), UserWarning, "/x/somelib/io.py", 12)
    (line,) = lines_of(capsys.readouterr().err)
    assert (line["message"], line["category"], line["place"]) == ("odd data", "UserWarning", "somelib/io.py:12")


def test_what_nobody_can_act_on_is_dropped_and_nothing_else() -> None:
    silence()
    silence()
    for name, words in SILENCED:
        logger = logging.getLogger(name)
        assert [logger.filter(record_of(f"x: {text} y")) for text in (words, "anything else")] == [False, True]
        assert len([each for each in logger.filters if getattr(each, "words", "") == words]) == 1


# Whoever changes versions of libraries runs these with PIPELINE_TEST_SLOW=1: they export, compile and start a cluster.
SLOW = pytest.mark.skipif(os.environ.get("PIPELINE_TEST_SLOW") != "1", reason="PIPELINE_TEST_SLOW=1 runs it")
# Several jobs of one process, which imports everything once.
RUNS = [
    pytest.param(("--multirun", "backend=torch,torchscript", "images=scaled"), id="eager"),
    pytest.param(("--multirun", "backend=onnx,onnx_int8"), id="exported", marks=SLOW),
    pytest.param(("backend=torch_int8",), id="compiled", marks=SLOW),
    pytest.param(("backend.precision=bf16", "cluster=local", "cluster.workers=1"), id="cluster", marks=SLOW),
]


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("siglip")
    write_siglip(folder)
    return folder


def odd_pictures() -> dict[int, bytes]:
    """Pictures that make Pillow, libtiff and libjpeg print messages."""
    picture = Image.linear_gradient("L").resize((60, 40)).convert("RGB")
    exif = b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01\x03\0\xff\xff\xff\xff"
    jpeg = saved(picture, "JPEG", exif=exif)
    tiff = bytearray(saved(picture, "TIFF"))
    tiff[-30:] = b"\xff" * 30
    return {
        0: jpeg,
        1: jpeg[: len(jpeg) // 2],
        2: bytes(tiff),
        3: saved(picture.convert("P"), "PNG", transparency=bytes(range(256))),
        4: saved(Image.new("1", (12_000, 9_000)), "PNG"),
        5: saved(picture, "TIFF", compression="tiff_lzw")[:-60],
        6: saved(picture, "PNG", icc_profile=b"junk" * 30),
    }


@pytest.mark.slow
@pytest.mark.parametrize("arguments", RUNS)
def test_nothing_but_lines_of_our_own_reaches_the_terminal_and_each_is_json(
    arguments: tuple[str, ...], tmp_path: Path, siglip: Path
) -> None:
    manifest = scenes_manifest(tmp_path / "m.parquet", 16, damaged=odd_pictures())
    given = [f"manifest.path={manifest}", "manifest.image=image", "loader.batch_size=8", "errors.max_fraction=1"]
    given += ["model=hub", f"model.name={siglip}", "prompts.labels=[cat,dog]", "parity.images=8", "log.format=json"]
    places = [f"output.dir='{tmp_path}/out/${{backend.name}}'", f"backend.artifacts={tmp_path}/artifacts"]
    places.append(f"hydra.sweep.dir={tmp_path}")
    job = start(*arguments, *given, *places)
    _, said = job.communicate(timeout=300)
    assert job.returncode == 0, said
    assert all(line.startswith("{") for line in said.splitlines()), said
    lines = lines_of(said)
    assert [line for line in lines if line["logger"].partition(".")[0] != "pipeline"] == []
    outputs = sorted((tmp_path / "out").iterdir())
    files = [line for output in outputs for line in lines_of((output / "_run.log").read_text())]
    assert len(files) == len(lines)
    runs = {json.loads((output / "_report.json").read_text())["run"] for output in outputs}
    assert {line["run"] for line in lines} == {line["run"] for line in files} == runs
    assert len(runs) == len(outputs)
    told = [line for line in lines if "worker" in line]
    assert bool(told) == ("cluster=local" in arguments)
    for line in told:
        assert (line["worker"], line["process"]) == ("0", job.pid)
        assert line["worker_process"] != job.pid
        assert not line["message"].startswith("worker")


def test_what_a_worker_says_is_passed_on_with_its_name_and_its_shard(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    class Worker:
        name = 3

        def log_event(self, topic: str, message: dict[str, Any]) -> None:
            assert topic == "topic"
            messages.append(json.loads(json.dumps(message)))

    messages: list[dict[str, Any]] = []
    forward = Forward(EventSender(Worker(), "topic"), "worker 3 (process 9 on node)", logging.INFO)
    with within(7):
        forward.emit(record_of("%s: try %d", "s3://b/x", 2, tries=2))
    fleet = DaskExecutor(Config(), open_storage(str(tmp_path)), lambda: None)
    for form in (JSON, LogConfig()):
        with log_to_terminal(form, "r-1"):
            fleet._handle(messages[0])
    first, second = capsys.readouterr().err.splitlines()
    line = json.loads(first)
    assert (line["message"], line["logger"], line["level"]) == ("s3://b/x: try 2", "pipeline.x", "warning")
    assert (line["worker"], line["shard"], line["tries"], line["run"]) == ("3", 7, 2, "r-1")
    assert second == "warning: worker 3 (process 9 on node): s3://b/x: try 2"


def test_what_ends_a_run_is_said_as_the_config_wants_it() -> None:
    error = Interrupted("interrupted")
    assert ErrorOutput("").line(error) == "error: interrupted"
    found = json.loads(ErrorOutput("", JsonLines("r-1")).line(error))
    assert (found["message"], found["run"], found["level"], found["exit_code"]) == ("interrupted", "r-1", "error", 75)


def test_a_config_that_fails_is_told_as_text() -> None:
    job = start("log.format=jsom")
    _, said = job.communicate(timeout=60)
    assert job.returncode == 2
    assert said.startswith("error: the config has a problem:\n  - log.format = 'jsom': must be one of text, json")
