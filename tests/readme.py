"""The commands of the README pages, and how :mod:`tests.test_readme` tests each of them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

from tests.conftest import ROOT

# In the order in which their commands are run: the page at the root makes the datasets that the others use.
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in (
        ROOT / "README.md",
        *sorted((ROOT / "pipeline").rglob("README.md")),
        *(ROOT / folder / "README.md" for folder in ("conf", "jobs")),
    )
}
# Words that begin a command in running text; other code is a setting, a file, a column, ...
BEGINNINGS = r"(?:python3?|pip|pytest|dask worker|export|eval|source|clip-pipeline) "
# Replaced before a command is tested: models of the hub and the user's folders.
SUBSTITUTIONS = {
    "~/Pictures": "Pictures",
    "model=clip_vit_b32": "model=demo",
    "model=clip_vit_l14": "model=demo",
    'model="clip_vit_b32"': 'model="demo"',
}


@dataclass(frozen=True)
class Run:
    """Run the command, with further arguments at its end."""

    more: tuple[str, ...] = ()


@dataclass(frozen=True)
class Slow:
    """Run the module's ``main`` with replaced and further arguments, in a test that is marked slow."""

    replaced: tuple[tuple[str, str], ...] = ()
    more: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prove:
    """Parse the command's options and compose its config, but do not run it; ``why`` is the reason."""

    why: str


@dataclass(frozen=True)
class Elsewhere:
    """Do not run the command here; the file ``where`` contains ``text`` and runs the command or an equivalent."""

    where: str
    text: str


PIP = Prove("needs the package index; the extra is looked up")
# By the beginning of the command; the longest one that matches is used.
ROWS: dict[str, Run | Slow | Prove | Elsewhere] = {
    "python3 -m venv .venv": Elsewhere(".ci/run", "python3 -m venv"),
    "source .venv/bin/activate": Elsewhere(".ci/run", "python3 -m venv"),
    "pip install": PIP,
    "pip wheel": PIP,
    "python -m pytest -n 2": Elsewhere(".ci/run", "pytest -n 2"),
    "pytest -m slow": Elsewhere("pyproject.toml", '"slow: '),
    "python -m pipeline.run": Run(("manifest.demo_scenes=24", "loader.batch_size=8", "report.progress=none")),
    "python -m pipeline.run manifest.path=": Run(("report.progress=none",)),
    "python -m pipeline.run 'manifest.path=s3://": Prove("needs a bucket of tars: tests/test_tar_manifest.py"),
    "python -m pipeline.run run.dry=true manifest.path=s3://": Prove("needs a bucket: tests/test_manifest_s3.py"),
    "python -m pipeline.run cluster.part=auto": Prove("needs a bucket of tars: tests/benchmarks/elastic.py"),
    "python -m pipeline.manifest tar": Prove("needs a bucket of tars: tests/test_manifest_build.py"),
    "python -m pipeline.verify s3://": Prove("needs a bucket: tests/test_s3.py"),
    "python -m pipeline.run run.dry=true": Run(("report.progress=none",)),
    "python -m pipeline.run --help": Elsewhere("tests/test_run.py", '"--help"'),
    "python -m pipeline.doctor": Elsewhere("tests/test_doctor.py", "pipeline.doctor"),
    "python -m pipeline.manifest folder": Run(),
    "python -m pipeline.bench": Prove("measures for minutes; tests/test_bench.py runs it"),
    "python -m pipeline.bench pipeline": Prove("measures for minutes; tests/test_bench_pipeline.py runs it"),
    "python -m pipeline.bench gpu": Prove("measures for minutes; tests/test_bench_gpu.py runs it"),
    "python -m pipeline.export": Prove("exports for a minute; tests/test_export.py runs it"),
    "python -m pipeline.artifacts list": Run(),
    "python -m pipeline.verify": Run(),
    "python -m pipeline.relabel": Run(),
    "python -m pipeline.search": Run(),
    "python -m pipeline.convert": Run(),
    "python -m pipeline.convert outputs/photos --to pgvector": Prove("needs a server: tests/test_databases.py"),
    "python -m pipeline.convert outputs/photos --to qdrant": Prove("needs a server: tests/test_databases.py"),
    "python -m pipeline.dedup": Run(),
    "python -m pipeline.sample": Run(),
    "python -m pipeline.report": Run(),
    "python -m pipeline.report --compare": Prove("two runs of the same job: tests/test_report_command.py"),
    "python -m pipeline.report --history": Prove("a store of nights"),
    "python jobs/nightly.py": Run(),
    "python -m pipeline.browse outputs/photos --select": Run(),
    "python -m pipeline.browse": Prove("runs until it is stopped; tests/test_browse.py opens its pages and exports"),
    "python -m pipeline.serve": Prove("runs until it is stopped; tests/test_serve.py runs it"),
    "python jobs/deploy/up.py": Elsewhere("tests/test_deploy.py", "up.py"),
    "curl ": Elsewhere("tests/test_serve.py", "/predict"),
    "python -m tests.soak": Slow(replaced=(("200", "1"),), more=("--rows", "16")),
    "python -m tests.fuzz": Slow(replaced=(("10000", "20"),)),
    "python -m tests.relabel_cost": Elsewhere("tests/relabel_cost.py", "python -m tests.relabel_cost"),
    "python -m tests.benchmarks.databases": Elsewhere("tests/test_databases.py", "import databases as benchmark"),
    "python -m tests.dedup_cost": Elsewhere("tests/dedup_cost.py", "python -m tests.dedup_cost"),
    "python -m tests.benchmarks.browse": Elsewhere("tests/benchmarks/browse.py", "python -m tests.benchmarks.browse"),
    "python -m tests.conf_readme": Elsewhere("tests/test_words.py", "conf_readme.page()"),
    "python -m tests.models_readme": Elsewhere("tests/test_families.py", "models_readme.page(text)"),
    "PIPELINE_SERVE_OVERRIDES=": Elsewhere("jobs/deploy/up.py", "PIPELINE_SERVE_OVERRIDES"),
    "mkdir -p outputs/nginx": Elsewhere("tests/test_deploy.py", '"-p", str(folder)'),
    "nginx -p": Elsewhere("tests/test_deploy.py", '"nginx.conf")'),
    "prometheus --config.file=": Elsewhere("tests/test_deploy.py", "prometheus.yml"),
    "clip-pipeline": Elsewhere("tests/test_wheel.py", "clip-pipeline"),
    "eval ": Elsewhere("tests/test_run.py", "install=bash"),
    "dask worker ADDRESS": Elsewhere("tests/test_cluster.py", "--memory-limit"),
    "export PART=": Elsewhere("tests/test_readme.py", "export PART="),
}


def blocks(language: str) -> list[str]:
    """Return the fenced blocks of one language, of all pages, each once."""
    pattern = re.compile(rf"^```{language}\n(.*?)^```", re.MULTILINE | re.DOTALL)
    return list(dict.fromkeys(block for text in PAGES.values() for block in pattern.findall(text)))


def spans() -> list[str]:
    """Return every piece of code in running text and tables of all pages."""
    fenced = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
    return [span for text in PAGES.values() for span in re.findall(r"`([^`\n]+)`", fenced.sub("", text))]


def commands() -> list[str]:
    """Return every command once, in the order of the pages, without bare names of commands in running text."""
    lines = [line for block in blocks("sh") for line in block.replace("\\\n", " ").splitlines()]
    lines += [text for text in spans() if re.match(BEGINNINGS, text)]
    parts = [part for line in lines for part in re.split(r" && ", line)]
    found = dict.fromkeys(part.removeprefix(".venv/bin/") for part in parts if not re.match(r"\s*(#|$)", part))
    return [part for part in found if not re.fullmatch(r"python -m pipeline\.(?!run$)\w+(?: folder)?", part)]


def row_of(command: str) -> Run | Slow | Prove | Elsewhere | None:
    """Return how a command is tested, or None if no row matches."""
    begins = [start for start in ROWS if command == start or command.startswith((f"{start} ", start))]
    exact = [start for start in begins if command == start or not command[len(start) :].startswith(".")]
    return ROWS[max(exact, key=len)] if exact else None


def substituted(text: str) -> str:
    """Return a text with the substitutions."""
    for words, others in SUBSTITUTIONS.items():
        text = text.replace(words, others)
    return text


def words_of(command: str, more: tuple[str, ...] = ()) -> list[str]:
    """Return the arguments of a command after the substitutions, without comments."""
    return [*shlex.split(substituted(command), comments=True), *more]
