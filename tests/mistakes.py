"""Common mistakes of new users: the command, and its message.

``python -m tests.mistakes`` makes each of them and writes ``jobs/results/mistakes.md``, which a test compares.
"""

# ruff: noqa: E501 - a mistake is a line, as it is in the table

from __future__ import annotations

import importlib
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.machinery import PathFinder
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.torch import load_file, save_file

from pipeline.models.hub import DEMO_FOLDER
from tests.conftest import ROOT
from tests.forks import Child, forks
from tests.jobs import scene

RESULT = ROOT / "jobs" / "results" / "mistakes.md"
NOWHERE = {"AWS_EC2_METADATA_DISABLED": "true", "AWS_SHARED_CREDENTIALS_FILE": "/none", "AWS_CONFIG_FILE": "/none"}
MODULES = {
    "pipeline.manifest": "pipeline.manifest.__main__",
    "pipeline.artifacts": "pipeline.artifacts",
    "pipeline.bench": "pipeline.bench.__main__",
    "pipeline.report": "pipeline.report.__main__",
    "pipeline.browse": "pipeline.browse.__main__",
}
RUN = "python -m pipeline.run"
END = "-- ended with"
JOB = f"{RUN} manifest.path=photos.parquet output.dir=out"


@dataclass(frozen=True)
class Mistake:
    """A mistake, its command and exit code, and two parts of its message: the place, the way out.

    With ``varies`` the message depends on the machine, and its wording is not compared with the table.
    """

    what: str
    command: str
    code: int
    place: str
    way_out: str
    absent: tuple[str, ...] = ()
    failpoints: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    varies: bool = False


MISTAKES = (
    Mistake("the wrong column", f"{JOB} manifest.image=image", 2, "photos.parquet", "id (string), path (string)"),
    Mistake("the wrong path", f"{RUN} manifest.path=fotos.parquet", 2, "fotos.parquet", "did you mean photos.parquet?"),
    Mistake("no GPU", f"{JOB} backend.device=cuda", 2, "backend.device=cuda", "backend.device=cpu", varies=True),
    Mistake("a typo in a backend", f"{JOB} backend=onx", 2, "backend = 'onx'", "did you mean onnx?"),
    Mistake("no disk space", JOB, 1, "/out/", "free some space", failpoints="storage.staged[part-]=raise:ENOSPC", varies=True),
    Mistake("a folder without pictures", f"{RUN} manifest.path=papers", 2, "manifest.path=papers", "pipeline.manifest folder"),
    Mistake("an id twice", f"{RUN} manifest.path=twice.parquet", 2, "row 0 and at", "drop a row, or set manifest.id"),
    Mistake("a missing extra", f"{JOB} backend=onnx", 2, "onnxruntime", "pip install", absent=("onnxruntime",)),
    Mistake(
        "no way to the hub",
        f"{JOB} model=clip_vit_b32",
        2,
        "openai/clip-vit-base-patch32",
        "check the network",
        environment={"HF_ENDPOINT": "http://127.0.0.1:9"},
    ),
    Mistake("old output of another model", f"{RUN} manifest.path=photos.parquet output.dir=done model=hub model.name=other", 2, "model: there", "another output.dir"),
    Mistake("the manifest has changed since", f"{RUN} manifest.path=more.parquet output.dir=done", 2, "manifest.rows: there 6, now 7", "another output.dir"),
    Mistake("a CSV as manifest", f"{RUN} manifest.path=photos.csv", 2, "photos.csv", "pipeline.manifest csv"),
    Mistake("paths from another folder", f"{JOB} manifest.root=pictures", 3, "not_found 6", "relative paths start at"),
    Mistake("a root that is not there", f"{JOB} manifest.root=/mnt/photos", 2, "manifest.root=/mnt/photos", "is a disk not mounted?"),
    Mistake("no image can be read", f"{RUN} manifest.path=texts.parquet output.dir=out", 3, "not_an_image 6", "_report.html"),
    Mistake("a manifest without rows", f"{RUN} manifest.path=empty.parquet", 2, "empty.parquet", "see what wrote it"),
    Mistake("ids that are no ids", f"{RUN} manifest.path=floats.parquet", 2, "manifest.id=id is double", "name another column"),
    Mistake("an id is null", f"{RUN} manifest.path=null.parquet", 2, "null.parquet, row 1", "every row needs an id"),
    Mistake("one label, no list", f"{JOB} prompts.labels=cat", 2, "prompts.labels = 'cat'", "prompts.labels=[cat]"),
    Mistake("labels without brackets", f"{JOB} prompts.labels=cat,dog", 2, "prompts.labels", "prompts.labels=[cat,dog]"),
    Mistake("labels with spaces, no quotes", f"{JOB} prompts.labels=[a cat,a dog]", 2, "prompts.labels = '[a'", "quote the whole"),
    Mistake("a file of labels that is not there", f"{JOB} prompts.path=labels.csv", 2, "labels.csv", "relative paths start at"),
    Mistake("a name of the hub as model", f"{JOB} model=openai/clip-vit-base-patch32", 2, "model = ", "model=hub model.name=openai/clip-vit-base-patch32"),
    Mistake("model=hub alone", f"{JOB} model=hub", 2, "model.name", "such as model.name=openai/"),
    Mistake("dashes before a key", f"{RUN} --model clip_vit_b32", 2, "--model", "write model=clip_vit_b32"),
    Mistake("a key without its group", f"{JOB} batch_size=32", 2, "batch_size", "loader"),
    Mistake("a typo in a key", f"{RUN} manifest.pth=photos.parquet", 2, "manifest.pth", "did you mean manifest.path?"),
    Mistake("a typo in a group", f"{JOB} bakend=onnx", 2, "bakend", "did you mean backend?"),
    Mistake("spaces around the =", f"{RUN} manifest.path = photos.parquet", 2, "'manifest.path'", "no spaces around the ="),
    Mistake("a ~ within an override", f"{JOB} output.dir=~/out", 2, "output.dir = '~/out'", "'output.dir=\"~/out\"'"),
    Mistake("a batch of a million", f"{JOB} loader.batch_size=1000000", 2, "loader.batch_size = 1000000", "from 1 to 65536"),
    Mistake("fp16 on a CPU", f"{JOB} backend.device=cpu backend.precision=fp16", 2, "backend.precision=fp16", "take bf16"),
    Mistake("the GPU decoder without a GPU", f"{JOB} backend.device=cpu images=gpu", 2, "images.decoder=gpu", "images=fast"),
    Mistake("TensorRT without a GPU", f"{JOB} backend.device=cpu backend=tensorrt", 2, "backend=tensorrt", "backend=onnx"),
    Mistake("output.dir is a file", f"{RUN} manifest.path=photos.parquet output.dir=photos.csv", 1, "photos.csv", "choose another place"),
    Mistake("output.dir may not be written", JOB, 1, "/out/", "check the permissions", failpoints="storage.staged=raise:EACCES", varies=True),
    Mistake("the output within the manifest", f"{RUN} manifest.path=tables output.dir=tables/out", 2, "output.dir=", "beside the manifest"),
    Mistake("S3 without its extra", f"{RUN} manifest.path=s3://bucket/photos.parquet", 2, "s3://bucket", "pip install", absent=("s3fs",)),
    Mistake(
        "S3 without credentials",
        f"{RUN} manifest.path=s3://bucket/photos.parquet",
        2,
        "s3://bucket/photos.parquet",
        "check the address, the credentials",
        environment=NOWHERE,
    ),
    Mistake("an address of no kind", f"{RUN} manifest.path=ftps://host/photos.parquet", 2, "ftps://host", "s3://"),
    Mistake("the same command again", f"{RUN} manifest.path=photos.parquet output.dir=done", 0, "done", "nothing to do"),
    Mistake("Ctrl-C", JOB, 75, "interrupted", "the same command goes on", failpoints="plan.settled=kill:SIGINT"),
    Mistake("verify: no dataset there", "python -m pipeline.verify outputs", 2, "outputs", "give the output.dir of a job"),
    Mistake("search: no dataset there", "python -m pipeline.search nowhere cat", 2, "nowhere", "give the output.dir of a job"),
    Mistake("search: an id that is not there", "python -m pipeline.search done --id nobody", 2, "nobody", "no row of"),
    Mistake("relabel: onto itself", "python -m pipeline.relabel done output.dir=done prompts.labels=[cat]", 2, "output.dir", "beside it"),
    Mistake("convert: onto a folder", "python -m pipeline.convert done --to numpy --out pictures", 2, "pictures", "name another one"),
    Mistake("convert: a missing extra", "python -m pipeline.convert done --to lance --out table", 2, "pylance", "pip install", absent=("lance",)),
    Mistake("manifest: no such folder", "python -m pipeline.manifest folder fotos m.parquet", 2, "fotos", "relative paths start at"),
    Mistake("manifest: another column", "python -m pipeline.manifest csv photos.csv m.parquet --image file", 2, "'file'", "columns are id, path"),
    Mistake("bench: a typo", "python -m pipeline.bench model=clip_vit_b23", 2, "clip_vit_b23", "did you mean clip_vit_b32?"),
    Mistake("nightly: another kind of date", "python jobs/nightly.py --store nights --date 22.11.2026 manifest.path=photos.parquet", 2, "--date", "2026-11-22"),
)  # fmt: skip


@contextmanager
def home() -> Iterator[Path]:
    """A folder with pictures, good and bad manifests, a finished dataset and a checkpoint."""
    folder = Path(tempfile.mkdtemp(prefix="mistakes-"))
    try:
        furnish(folder)
        yield folder
    finally:
        shutil.rmtree(folder)


def furnish(folder: Path) -> None:
    """Fill a folder for :data:`MISTAKES`."""
    (folder / "pictures").mkdir()
    names = [f"pictures/{i}.jpg" for i in range(7)]
    for i, name in enumerate(names):
        (folder / name).write_bytes(scene(i)[0])
    (folder / "photos.csv").write_text("id,path\n" + "".join(f"{i},{name}\n" for i, name in enumerate(names)))
    ids = [str(i) for i in range(7)]
    tables = {
        "photos": (ids[:6], names[:6]),
        "more": (ids, names),
        "twice": (["a", "b", "a"], names[:3]),
        "null": (["a", None], names[:2]),
        "floats": ([0.5, 1.5], names[:2]),
        "texts": (ids[:6], ["photos.csv"] * 6),
        "empty": ([], []),
    }
    for name, (keys, paths) in tables.items():
        kind = pa.float64() if name == "floats" else pa.string()
        table = pa.table({"id": pa.array(keys, kind), "path": pa.array(paths, pa.string())})
        pq.write_table(table, folder / f"{name}.parquet")
    shutil.copytree(DEMO_FOLDER, folder / "other")
    weights = load_file(folder / "other" / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in weights.items()}, folder / "other" / "model.safetensors")
    (folder / "papers").mkdir()
    (folder / "papers" / "letter.txt").write_text("Dear reader")
    (folder / "tables").mkdir()
    shutil.copy(folder / "photos.parquet", folder / "tables")
    done = Mistake("", f"{RUN} manifest.path=photos.parquet output.dir=done", 0, "", "")
    child = begin([done], folder)
    assert child.wait() == 0, child.said()


def begin(mistakes: Sequence[Mistake], folder: Path) -> Child:
    """Make the mistakes in a process of their own, in that folder, with the environment of the first one."""
    first = mistakes[0]
    cache = os.environ.get("XDG_CACHE_HOME", str(folder / "cache"))
    return forks().start(
        "tests.mistakes:typed",
        *(str(folder), [each.command for each in mistakes], first.absent, ["loader.isolation=none"]),
        failpoints=first.failpoints,
        environment={"XDG_CACHE_HOME": cache, "COLUMNS": "100", "HF_HOME": str(folder), **first.environment},
    )


def typed(folder: str, commands: Sequence[str], absent: Sequence[str], more: Sequence[str] = ()) -> int:
    """Commands that are typed in ``folder``, where the packages ``absent`` are not installed; runs in the fork.

    Jobs take the overrides ``more`` too, such as one without which each would start decoders. The exit codes are printed between the output of the commands; the last one is that of the process.
    """
    os.chdir(folder)
    for known in [each for each in sys.modules if each.partition(".")[0] in absent]:
        del sys.modules[known]
    find = PathFinder.find_spec
    PathFinder.find_spec = staticmethod(  # type: ignore[method-assign]
        lambda name, *more: None if name.partition(".")[0] in absent else find(name, *more)
    )
    code = 0
    for command in commands:
        shutil.rmtree("out", ignore_errors=True)
        # Like a shell: at spaces, also within brackets.
        words = shlex.split(command)
        name = words[2] if words[1] == "-m" else "pipeline.nightly.cli"
        sys.argv = [*(words[2:] if words[1] == "-m" else words[1:]), *(more if name == "pipeline.run" else ())]
        try:
            code = importlib.import_module(MODULES.get(name, name)).main() or 0
        except SystemExit as left:
            code = int(left.code or 0)
        print(f"{END} {code}", file=sys.stderr, flush=True)
    return code


def message(output: str, folder: Path) -> str:
    """The last message, without paths and versions of this machine."""
    kept = output[output.index("error: ") :] if "error: " in output else "\n".join(output.splitlines()[-2:])
    for place, name in ((folder.resolve(), "/home/you"), (folder, "/home/you"), (ROOT, "/clip-pipeline")):
        kept = kept.replace(str(place), name)
    kept = re.sub(r" \(failpoint [\w.]+\)", "", kept)
    kept = re.sub(r"(torch|ONNX Runtime|TensorRT) \d[\w.+]*", r"\1", kept)
    return re.sub(r"\b[0-9a-f]{8}\.\.\.", "<digest>", kept).strip()


def make_all(folder: Path) -> dict[str, tuple[int, str]]:
    """Make every mistake; return exit codes and output."""
    special = [each for each in MISTAKES if each.absent or each.failpoints or each.environment]
    found = {}
    for group in ([each for each in MISTAKES if each not in special], *([each] for each in special)):
        child = begin(group, folder)
        child.wait()
        output = re.split(rf"^{END} (\d+)\n", child.said(), flags=re.MULTILINE)
        for each, text, code in zip(group, output[::2], output[1::2], strict=False):
            found[each.what] = (int(code), text)
    return found


def row(mistake: Mistake, code: int, text: str) -> str:
    """One line of the table."""
    shown = "<br>".join(f"`{line.strip()}`" for line in text.splitlines()).replace("|", "\\|")
    hidden = " ".join(word for word in mistake.command.replace("|", "\\|").split())
    return f"| {mistake.what} | `{hidden}` | {shown} | {code} |"


def write() -> None:
    """Make every mistake, and write the table."""
    with home() as folder:
        found = make_all(folder)
        rows = [row(each, found[each.what][0], message(found[each.what][1], folder)) for each in MISTAKES]
    head = "# Mistakes\n\nCommon mistakes of new users, their commands and messages. "
    head += "`python -m tests.mistakes` makes each one and\nwrites this page; a test compares it.\n\n"
    RESULT.write_text(
        head + "| mistake | command | message | exit code |\n| --- | --- | --- | ---: |\n" + "\n".join(rows) + "\n"
    )


if __name__ == "__main__":
    write()
