"""Failpoints, and the siege: die, fail or wait at every step of a job, then run it again and compare."""

from __future__ import annotations

import ast
import errno
import os
import shutil
import timeit
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.config.schema import Config
from pipeline.core.failpoints import POINTS, arm, armed, failpoint
from tests.conftest import ROOT
from tests.crashes import BEGIN, END, PLACES, SHARDS, SPECIAL, at, check_dataset, leftovers, small_job
from tests.forks import forks
from tests.jobs import content, overrides_of
from tests.s3 import BUCKET, environment, moto_server, objects
from tests.soak import Soak, parse

# A run comes by these only if the one before it was not struck at or behind the place.
ALONE = [
    "storage.durable[_plan.json]",
    "storage.durable[_SUCCESS]",
    *END[END.index("storage.replaced[_report.json]") :],
]
# PIPELINE_TEST_SIEGE=full strikes with every action at every place, early and late.
FULL = os.environ.get("PIPELINE_TEST_SIEGE") == "full"
# The module of each failpoint, by the first word of its name; pipeline/job/relabel.py has some of them too.
MODULES = {
    "lease": "dataset/lease", "plan": "engine/prepare", "rows": "engine/loader", "read": "images/reader",
    "decode": "images/reader", "child": "images/pool/worker", "decoded": "images/reader", "encode": "engine/forward",
    "encoded": "engine/forward", "label": "engine/forward", "storage": "storage/local",
    "object": "storage/object_store", "commit": "dataset/commits", "finalize": "dataset/commits",
    "report": "job/finish", "ids": "manifest/hash_files",
}  # fmt: skip
RELABELLED = {"plan.settled", "label", "part.build", "report.written"}


def called() -> dict[str, set[str]]:
    """The names that the package calls ``failpoint`` with, and the modules that do."""
    found = defaultdict(set)
    for path in (ROOT / "pipeline").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "failpoint":
                for constant in ast.walk(node.args[0]):
                    if isinstance(constant, ast.Constant) and isinstance(constant.value, str):
                        found[constant.value].add(str(path.relative_to(ROOT / "pipeline").with_suffix("")))
    return dict(found)


def test_every_failpoint_is_called_where_its_name_says() -> None:
    found = called()
    assert set(found) == set(POINTS)
    for name, modules in found.items():
        if name in RELABELLED:
            modules.discard("job/relabel")
        if name == "rows":
            # Texts are read by a reader of their own.
            modules.discard("engine/texts")
        if not name.startswith("part."):
            assert modules == {MODULES[name.split(".")[0]]}, name
    assert found["part.build"] == {"engine/loop"}


def test_every_failpoint_has_its_place_in_the_siege() -> None:
    assert {place.split("[")[0] for place in PLACES} | set(SPECIAL) == set(POINTS)


def test_nothing_happens_at_a_failpoint_that_is_not_armed() -> None:
    with armed(""):
        for name in POINTS:
            failpoint(name, b"anything")
    with armed("encode=raise:EIO"):
        failpoint("encoded")


def test_an_unarmed_failpoint_costs_less_than_a_microsecond() -> None:
    with armed(""):
        assert min(timeit.repeat(lambda: failpoint("decode", b"data"), number=20_000, repeat=5)) / 20_000 < 1e-6


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("encode=raise:EIO", [1, 2, 3, 4]),
        ("encode=raise:EIO@3", [3]),
        ("encode=raise:EIO@3+", [3, 4]),
        ("encode[b]=raise:EIO", [2, 4]),
        ("encode[b]=raise:EIO@2", [4]),
        (" encode = raise:EIO".replace(" ", "") + " ; ;label=raise:EIO", [1, 2, 3, 4]),
        ("encode[a]=raise:EIO@1;encode[b]=raise:EIO@1", [1, 2]),
    ],
)
def test_a_rule_acts_at_the_times_that_it_names(rule: str, expected: list[int]) -> None:
    failed = []
    with armed(rule):
        for time, data in enumerate(("a", "b", b"a", b"ab"), start=1):
            try:
                failpoint("encode", data)
            except OSError:
                failed.append(time)
    assert failed == expected


def test_a_raised_error_has_the_number_and_names_the_failpoint() -> None:
    with (
        armed("part.write=raise:ENOSPC"),
        pytest.raises(OSError, match=r"No space left.*failpoint part\.write") as info,
    ):
        failpoint("part.write")
    assert info.value.errno == errno.ENOSPC
    with armed("part.write=raise:EACCES"), pytest.raises(PermissionError):
        failpoint("part.write")


def test_a_delay_waits() -> None:
    with armed("encode=delay:0.05"):
        assert timeit.timeit(lambda: failpoint("encode"), number=1) >= 0.05


@pytest.mark.parametrize(
    "rule",
    [
        "encode", "encode=", "encode=explode", "encodes=kill", "=kill", "encode=kill@", "encode=kill@x",
        "encode[x=kill", "encode=raise:EIO@2-", "encode=kill;nonsense",
    ],
)  # fmt: skip
def test_a_rule_that_names_no_place_or_action_is_refused(rule: str) -> None:
    try:
        with pytest.raises(ValueError, match=r"PIPELINE_FAILPOINTS: '.*' is not POINT"):
            arm(rule)
    finally:
        arm("")


def test_armed_ends_with_what_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPELINE_FAILPOINTS", "label=raise:EIO")
    with armed("encode=raise:EIO"):
        failpoint("label")
    with pytest.raises(OSError, match="label"):
        failpoint("label")
    monkeypatch.undo()
    with armed(""):
        pass
    failpoint("label")


def cases() -> Iterator[str]:
    """What each case arms: a place, an action, and the time at which it acts.

    A case is one run, or several in a row, separated by a space, each of which goes on where the last was struck.
    """
    if FULL:
        for place in PLACES:
            yield from (f"{place}={action}@1" for action in ("kill", "raise:ENOSPC", "raise:EIO", "delay:0.2"))
        for place in SHARDS:
            yield from (f"{place}={action}" for action in ("kill@9", "raise:EIO@9", "delay:0.05", "kill:SIGSEGV@5"))
        return
    edges = [place for place in BEGIN + END if place not in ALONE]
    for action, places, length in (
        ("kill@1", edges, len(edges)),
        ("kill@1", SHARDS, 7),
        ("kill@3", SHARDS, 4),
        ("raise:EIO@1", edges, len(edges)),
        ("raise:ENOSPC@2", SHARDS, 3),
    ):
        for start in range(0, len(places), length):
            yield " ".join(f"{place}={action}" for place in places[start : start + length])
    for number, place in enumerate(ALONE):
        yield f"{place}={('kill', 'raise:ENOSPC')[number % 2]}@1"


CASES = list(cases())


def is_fast(case: str) -> bool:
    """Around the commits, the plan and the marker of completion: the places that the protocol rests on."""
    return (
        FULL
        or case.startswith(("part.published=kill@1", "storage.durable[_commits/]", "storage.durable[_plan.json]"))
        or ("_SUCCESS" in case and len(case.split()) == 1)
    )


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A job that ran through, as the ones under siege should have."""
    config = small_job(tmp_path_factory.mktemp("siege"), report={"html": False})
    child = forks().start("tests.forks:job", at(config, config.output.dir))
    assert child.wait() == 0, child.said()
    ids = pq.read_table(str(config.manifest.path))["id"].to_pylist()
    assert check_dataset(Path(config.output.dir), ids) == len(ids)
    return config


@pytest.fixture(scope="module")
def sieges(request: pytest.FixtureRequest, unbroken: Config) -> Iterator[dict[str, Future[None]]]:
    """Every case that was asked for, as many at a time as there are cores."""
    wanted = [item.callspec.params.get("case") for item in request.session.items if hasattr(item, "callspec")]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        yield {case: pool.submit(besiege, unbroken, case) for case in wanted if case in CASES}


def besiege(unbroken: Config, case: str) -> None:
    """Run a job that ``case`` strikes, look at what it leaves, run it again, compare."""
    whole = Path(unbroken.output.dir)
    folder = whole.parent / f"{CASES.index(case):04d}"
    output, scratch = folder / "out", folder / "tmp"
    scratch.mkdir(parents=True)
    ids = pq.read_table(str(unbroken.manifest.path))["id"].to_pylist()
    # Matplotlib takes longer than the job.
    page = "report." in case
    for rule in (*case.split(), ""):
        environment = {"TMPDIR": str(scratch)}
        config = at(unbroken, output)
        config["report"]["html"] = page
        child = forks().start("tests.forks:job", config, failpoints=rule, environment=environment)
        code, said = child.wait(), child.said()
        check_outcome(rule, code, said, output)
        rows = check_dataset(output, ids)
    assert rows == len(ids)
    assert content(output) == content(whole)
    assert {"_report.json", "_run.log", *(["_report.html"] if page else [])} <= {path.name for path in output.iterdir()}
    assert leftovers(output) == []
    assert [path for path in scratch.rglob("*") if path.is_file()] == []
    shutil.rmtree(folder)


def check_outcome(rule: str, code: int, said: str, output: Path) -> None:
    """The job was struck where and as ``rule`` says, and said so."""
    if "=kill" in rule:
        assert code == (-11 if "SIGSEGV" in rule else -9), f"{rule}: {code}, never came by: {said}"
    elif "=raise" in rule and "[_report.html]" in rule:
        # The rows and the report are there; the page can be drawn again.
        assert code == 0, f"{rule}: {code}: {said}"
        assert "could not be drawn" in said
    elif "=raise" in rule:
        assert code == 1, f"{rule}: {code}: {said}"
        # Of a full disk the error says more than what was raised.
        point = rule.split("[")[0].split("=")[0]
        assert f"failpoint {point}" in said or ("ENOSPC" in rule and "No space left on device" in said), said
        if "storage." in rule:
            assert "Traceback" not in said, f"{rule}: {said}"
            assert f"error: {output}" in said
            assert "ENOSPC" not in rule or "free some space" in said
    else:
        assert code == 0, f"{rule}: {code}: {said}"


@pytest.mark.parametrize(
    "case", [case if is_fast(case) else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_a_job_that_is_struck_and_run_again_is_the_unbroken_one(sieges: dict[str, Future[None]], case: str) -> None:
    sieges[case].result()


@pytest.mark.slow
def test_a_job_that_waits_at_every_place_is_the_unbroken_one(unbroken: Config, tmp_path: Path) -> None:
    rules = ";".join(f"{place}=delay:0.005" for place in PLACES)
    config = at(unbroken, tmp_path / "out")
    config["report"]["html"] = True
    child = forks().start("tests.forks:job", config, failpoints=rules)
    assert child.wait() == 0, child.said()
    assert content(tmp_path / "out") == content(Path(unbroken.output.dir))


def test_the_command_reports_a_full_disk_in_one_line(unbroken: Config, tmp_path: Path) -> None:
    config = replace(unbroken, output=replace(unbroken.output, dir=str(tmp_path / "out")))
    rule = "storage.linked[_commits/]=raise:ENOSPC@1"
    child = forks().start("tests.forks:run_command", *overrides_of(config), "report.html=false", failpoints=rule)
    assert child.wait() == 1
    assert "Traceback" not in child.said()
    last = child.said().strip().splitlines()[-1]
    assert last.startswith(f"error: {tmp_path / 'out'}/")
    assert "No space left on device" in last
    assert "run the same command again" in last


@pytest.mark.slow
def test_a_run_whose_shard_was_committed_by_another_meanwhile_loses_quietly(unbroken: Config, tmp_path: Path) -> None:
    """Killed as it learns that it lost, and left to end."""
    whole, output = Path(unbroken.output.dir), tmp_path / "out"
    first = sorted(whole.glob("part-00000-*"))[0]
    for rule, code in (("commit.lost=kill@1", -9), ("", 0)):
        child = forks().start(
            "tests.forks:job", at(unbroken, output), failpoints=f"part.write=delay:1.5@1;{rule}".strip(";")
        )
        for _ in range(600):
            if (output / "_plan.json").exists() or not child.alive(0.02):
                break
        # Past find_done, into the delay before the first part.
        child.alive(0.5)
        (output / "_commits").mkdir(exist_ok=True)
        shutil.copy(first, output / first.name)
        shutil.copy(whole / "_commits" / "00000.json", output / "_commits" / "00000.json")
        assert child.wait() == code, child.said()
        check_dataset(output, pq.read_table(str(unbroken.manifest.path))["id"].to_pylist())
        if code == 0:
            assert content(output) == content(whole)
        shutil.rmtree(output)


@pytest.mark.parametrize(
    "rule",
    [
        "decode=kill@20",
        pytest.param("commit.done=kill@3", marks=pytest.mark.slow),
        pytest.param("finalize.checked=kill", marks=pytest.mark.slow),
        pytest.param("decode=raise:EIO@9", marks=pytest.mark.slow),
    ],
)
def test_decoder_processes_end_with_their_job_and_change_nothing(unbroken: Config, tmp_path: Path, rule: str) -> None:
    config = at(unbroken, tmp_path / "out")
    config["loader"]["isolation"] = "process"
    for rules in (rule, ""):
        child = forks().start("tests.forks:job", config, failpoints=rules)
        check_outcome(rules, child.wait(), child.said(), tmp_path / "out")
        assert forks().strays() == []
    assert content(tmp_path / "out") == content(Path(unbroken.output.dir))


@pytest.mark.compat("moto")
def test_a_job_in_an_object_store_that_is_killed_and_run_again_is_the_unbroken_one(
    unbroken: Config, tmp_path: Path
) -> None:
    names = ["created[_plan.json]", "put[part-]", "created[_commits/]"]
    with moto_server(tmp_path / "log") as server:
        config = at(unbroken, f"s3://{BUCKET}/siege")
        config["report"]["html"] = True
        for rule in (*(f"object.{name}=kill@1" for name in names), ""):
            child = forks().start("tests.forks:job", config, failpoints=rule, environment=environment(server))
            assert child.wait() == (-9 if rule else 0), f"{rule}: {child.said()}"
        found = objects(server, "siege")
    whole = content(Path(unbroken.output.dir))
    assert {name: found.get(name) for name in whole} == whole
    assert set(found) - set(whole) == {"_report.json", "_report.html", "_run.log"}


@pytest.mark.slow
def test_a_short_soak_ends_with_nothing_wrong(tmp_path: Path) -> None:
    options = parse(["--kills", "3", "--rows", "16", "--seed", "3", "--isolation", "none"])
    soak = Soak(options, tmp_path, forks())
    soak.run()
    assert soak.kills >= 3
    assert soak.rounds >= 1
    assert "| SIGKILL |" in soak.table()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "its part is damaged": lambda out: first(out, "part-*").write_bytes(b"PAR1"),
    "No such file": lambda out: first(out, "part-*").unlink(),
    "other counts": lambda out: edit(out, '"ok": 2', '"ok": 1'),
    "a row twice": lambda out: shutil.copy(first(out, "part-*"), out / "part-00000-again.parquet"),
    "rows are missing": lambda out: (first(out, "_commits/*").unlink(), first(out, "part-*").unlink()),
}


def first(output: Path, pattern: str) -> Path:
    return sorted(output.glob(pattern))[0]


def edit(output: Path, old: str, new: str) -> None:
    path = first(output, "_commits/*")
    path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize("said", DAMAGES)
def test_what_the_siege_looks_for_it_finds(unbroken: Config, tmp_path: Path, said: str) -> None:
    output = Path(shutil.copytree(unbroken.output.dir, tmp_path / "out"))
    DAMAGES[said](output)
    with pytest.raises((AssertionError, FileNotFoundError), match=said):
        check_dataset(output, pq.read_table(str(unbroken.manifest.path))["id"].to_pylist())


def test_no_process_outlives_its_job(unbroken: Config) -> None:
    assert forks().strays() == []
