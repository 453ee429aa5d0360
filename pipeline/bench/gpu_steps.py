"""The steps of the benchmark of a GPU, in the order of what they prove."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.bench import gpu_images
from pipeline.bench.command import quoted
from pipeline.bench.gpu_collect import Killer, backend_rows, cluster_figures, job_figures, junit, read_figures
from pipeline.bench.gpu_micro import Spec
from pipeline.bench.gpu_records import Step
from pipeline.bench.pipeline_run import merged
from pipeline.config.choices import BACKENDS
from pipeline.config.schema import ParityConfig

PYTHON = (sys.executable, "-m")
JOB = (*PYTHON, "pipeline.run")
# A job within a share of the GPU's memory, beyond which torch raises its own error: too little for the whole batch, and
# enough for half of it beside the buffers of the loader.
CAPPED = """
import json, runpy, sys, torch
report, share = json.load(open(sys.argv.pop(1))), 0.65
limit = share * report["memory"]["peak_gpu_mib"] * 2**20 / torch.cuda.mem_get_info()[1]
torch.cuda.set_per_process_memory_fraction(limit)
sys.argv[0] = "pipeline.run"
runpy.run_module("pipeline.run", run_name="__main__", alter_sys=True)
"""
# Seconds of a job on a GPU before its first batch, about, and those in which kernels are compiled and timed.
STARTUP, COMPILING = 15.0, 75.0
# Below this rate (images/s) half of the rows show it.
SLOW = 5000
LABELS = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "crescent", "diamond", "arrow")
# Distributions of which a decoder needs one.
DECODERS = {"gpu": ("nvidia-nvimgcodec-cu13", "nvidia-nvimgcodec-cu12"), "fast": ("simplejpeg",)}


class Job(NamedTuple):
    """A whole job: its model, one of :attr:`Plan.models`, its rows and decoder, a rate (images/s) that makes the least
    time, processes on the card, and an override."""

    model: int
    rows: str
    decoder: str
    rate: float
    processes: int = 1
    override: str = ""


JOBS = (
    Job(0, "files", "fast", 9000),
    Job(0, "files", "gpu", 9000),
    Job(1, "files", "fast", 2000),
    Job(0, "bytes", "fast", 9000),
    Job(0, "files", "exact", 2000),
    Job(0, "files", "fast", 9000, processes=2),
    Job(1, "files", "fast", 2000, override="backend=torch_fp8"),
    Job(0, "bytes", "gpu", 9000),
    Job(0, "files", "gpu", 9000, override="images.gpu_share=0.5"),
    Job(0, "files", "gpu", 9000, override="loader.feeders=2"),
    Job(0, "files", "gpu", 9000, processes=2),
    Job(1, "files", "gpu", 2000),
    Job(0, "bytes", "exact", 2000),
    Job(1, "bytes", "fast", 2000),
)
# Of these, a rehearsal leaves out what differs by its model or its rows alone.
REHEARSED = (*JOBS[:2], *JOBS[3:8])
# Rows of the notes' own table, which each need their package: name of the step and value of --only.
TABLE = {
    "torch": "torch:fp32,torch:fp16,torch:bf16,torchscript",
    "onnx": "onnx:fp32,onnx:fp16,onnx_int8:static",
    "tensorrt": "tensorrt",
    "int8": "torch_int8",
    "fp8": "torch_fp8",
}


@dataclass(frozen=True, slots=True)
class Plan:
    """The options of the command: device, rows of the largest job, folders of the results and of temporary files.

    ``card`` has two names of the one GPU, as CUDA_VISIBLE_DEVICES takes them.
    """

    device: str
    rows: int
    out: Path
    work: Path
    card: tuple[str, str] = ("0", "0")

    @property
    def cuda(self) -> bool:
        """True on a card; False for a rehearsal."""
        return self.device == "cuda"

    @property
    def models(self) -> tuple[str, ...]:
        """Models by their config, the small one first; a rehearsal takes a tiny one."""
        return ("clip_vit_b32", "clip_vit_l14", "clip_vit_b16") if self.cuda else ("demo",)

    @property
    def images(self) -> Path:
        """The folder of the rendered images."""
        return self.work / "images"

    def least(self, seconds: float) -> float:
        """The least time of a step; a rehearsal begins each."""
        return seconds if self.cuda else 1.0


def steps(plan: Plan) -> list[Step]:
    """Return every step; those that this machine cannot do have a reason."""
    jobs = [_job_step(plan, wanted) for wanted in (JOBS if plan.cuda else REHEARSED)]
    return [_rendering(plan), *jobs, _tests(plan), *_forward(plan), *_backends(plan), *_cluster(plan)]


def job(plan: Plan, model: str, rows: str, *more: str, part: int = 1) -> list[str]:
    """Return the overrides of a job over ``files`` or ``bytes``, 1 in ``part`` of them, with gates that let pass.

    A gate would end a run that has a speed to show; the table says which ones miss.
    """
    path = (gpu_images.files_in if rows == "files" else gpu_images.bytes_in)(plan.images, part)
    limits = [
        f"parity.{kind}.{name}=0.0"
        for kind, values in asdict(ParityConfig()).items()
        if isinstance(values, dict)
        for name in values
    ]
    return [
        f"model={model}",
        *([] if model == "demo" else ["model.weights=random"]),
        f"backend.device={plan.device}",
        f"manifest.path={quoted(str(path))}",
        f"manifest.image={'path' if rows == 'files' else 'image'}",
        f"prompts.labels=[{','.join(LABELS)}]",
        # No page, which needs a library to draw, and is not what is measured.
        "report.progress=none",
        "report.html=false",
        *limits,
        *more,
    ]


def _rendering(plan: Plan) -> Step:
    return Step(
        "images",
        "pipeline",
        f"render {plan.rows:,} JPEG files",
        ((*PYTHON, "pipeline.bench.gpu_images", str(plan.images), str(plan.rows)),),
        lambda ran: {"bytes": sum(path.stat().st_size for path in gpu_images.bytes_in(plan.images).iterdir())},
        least=plan.least(5),
        most=120,
    )


def _job_step(plan: Plan, wanted: Job) -> Step:
    model = plan.models[min(wanted.model, len(plan.models) - 1)]
    # Fewer rows are enough for the rate of a slow model or decoder.
    part = 1 if wanted.rate > SLOW else 2
    key, _, value = wanted.override.partition("=")
    backend = value if key == "backend" else ""
    option = backend or "-".join(filter(None, [key.rpartition(".")[2], value]))
    several = f"{wanted.processes}-processes" if wanted.processes > 1 else ""
    words = [model, wanted.rows, wanted.decoder, option, several]
    name = "-".join(filter(None, words))
    output = plan.work / "datasets" / name
    own = [f"images={wanted.decoder}", f"output.dir={quoted(str(output))}", *filter(None, [wanted.override])]
    overrides = job(plan, model, wanted.rows, *own, part=part)
    shares = [f"cluster.part={i + 1}/{wanted.processes}" for i in range(wanted.processes)] if several else [""]
    absent = missing(*BACKENDS[backend].packages) if backend else ""
    absent = absent or missing(*DECODERS.get(wanted.decoder, ()))
    if not plan.cuda and (backend or wanted.decoder == "gpu"):
        absent = f"{backend or 'the decoder gpu'} needs a card"
    return Step(
        name,
        "pipeline",
        ", ".join(filter(None, [*words[:2], f"decoder {wanted.decoder}", *words[3:]])),
        tuple((*JOB, *overrides, *filter(None, [share])) for share in shares),
        partial(job_figures, output=output),
        least=plan.least(STARTUP + (COMPILING if backend else 0) + plan.rows / part / wanted.rate),
        most=180,
        absent=absent,
        needs=gpu_images.files_in(plan.images),
    )


def _tests(plan: Plan) -> Step:
    root = Path(__file__).resolve().parents[2]
    report = plan.out / "tests.xml"
    mark = ("-m", "gpu", str(root / "tests")) if plan.cuda else (str(root / "tests" / "test_ids.py"),)
    options = ("-p", "no:cacheprovider", "-c", str(root / "pyproject.toml"), f"--junitxml={report.resolve()}")
    return Step(
        "tests",
        "tests",
        "pytest -m gpu" if plan.cuda else "pytest of one file",
        ((*PYTHON, "pytest", *options, *mark),),
        partial(junit, report=report),
        least=plan.least(20),
        most=120,
        absent=missing("pytest") or ("" if (root / "tests").is_dir() else f"{root} has no folder tests"),
        grace_seconds=10,
    )


def _forward(plan: Plan) -> list[Step]:
    found = []
    for model in plan.models:
        out = plan.work / f"forward-{model}.json"
        sizes = (64, 128, 256, 512, 1024) if plan.cuda else (2, 4)
        spec = Spec(model, plan.device, sizes, sizes[-2], 0.5 if plan.cuda else 0.05, str(out))
        found.append(
            Step(
                f"forward-{model}",
                "forward",
                f"{model} forward",
                ((*PYTHON, "pipeline.bench.gpu_micro", spec.to_json()),),
                partial(read_figures, path=out),
                least=plan.least(20),
                most=90,
            )
        )
    return found


def _backends(plan: Plan) -> list[Step]:
    found = []
    for name, rows in TABLE.items() if plan.cuda else {"torch": "torch:bf16"}.items():
        folder = plan.work / f"backends-{name}"
        model = plan.models[0]
        keys = [key for key in job(plan, model, "files") if not key.startswith(("report.", "parity."))]
        first = BACKENDS[rows.partition(":")[0].partition(",")[0]]
        batches = "1,256" if plan.cuda else "1,2"
        options = ("--repeats", "2", "--seconds", "0.5", "--timeout", "100", "--batches", batches)
        found.append(
            Step(
                f"backends-{name}",
                "backends",
                f"{model}: {rows.replace(',', ', ')}",
                ((*PYTHON, "pipeline.bench", "backends", *keys, "--only", rows, *options, "--out", str(folder)),),
                partial(backend_rows, path=folder / "backends.json"),
                least=plan.least(25),
                most=150,
                absent=missing(*first.packages),
                needs=gpu_images.files_in(plan.images),
            )
        )
    return found


def _cluster(plan: Plan) -> list[Step]:
    kind, part = ("cuda", 8) if plan.cuda else ("local", 1)
    # In 16 shards, so that a worker has something left when it is killed.
    shard = max(1, min(512, plan.rows // part // 16))
    folder = plan.work / "cluster"
    # The card by two names, so that two workers share it: a process that reads both sees the first alone.
    both = {"CUDA_VISIBLE_DEVICES": ",".join(plan.card)} if plan.cuda else {}
    one = {"CUDA_VISIBLE_DEVICES": plan.card[0]} if plan.cuda else {}
    distributed = missing("distributed")
    # A MIG device has one name.
    single = "the device has no second name" if plan.cuda and len({*plan.card}) == 1 else ""
    alone = "" if plan.cuda else "the memory of a card is measured on a card"

    def step(name: str, title: str, *more: str, **options: Any) -> Step:
        output = folder / name
        own = [f"output.dir={quoted(str(output))}", f"manifest.shard_rows={shard}", "images=fast"]
        keys = merged(job(plan, plan.models[0], "files", *own, part=part), more)
        collect = partial(cluster_figures, output=output, other=folder / options.pop("like", "inline"))
        first, absent = options.pop("first", JOB), options.pop("absent", "") or missing("simplejpeg")
        return Step(
            f"cluster-{name}",
            "cluster",
            title,
            ((*first, *keys),),
            partial(collect, killer=options.get("during")),
            least=plan.least(20),
            most=90,
            absent=absent,
            **{"needs": gpu_images.files_in(plan.images), "environment": one, **options},
        )

    def workers(name: str, title: str, count: int, **options: Any) -> Step:
        keys = f"cluster={kind}", f"cluster.workers={count}"
        return step(name, f"cluster={kind}, {title}", *keys, **{"absent": distributed, **options})

    # In fp32, which no gate opens a second model for, and with few buffers, which are not halved.
    sizes = f"loader.batch_size={4 * shard}", f"manifest.shard_rows={8 * shard}"
    large = "backend.precision=fp32", "loader.prefetch=1", *sizes
    report = folder / "memory" / "_report.json"
    capped = {"first": (sys.executable, "-c", CAPPED, str(report)), "needs": report}
    return [
        step("inline", "one process, to compare with"),
        workers("one", "one worker", 1),
        workers("two", "two workers on one device", 2, environment=both, absent=distributed or single),
        workers("killed", "the worker killed under way", 1, during=Killer(folder / "killed")),
        step("memory", "a large batch", *large, absent=alone, like="memory"),
        step("halved", "the same batch in two thirds of that memory", *large, absent=alone, like="memory", **capped),
    ]


def missing(*packages: str) -> str:
    """Return the reason why a step is left out: none of these distributions is installed; empty if one is, or none is
    asked for."""
    for name in packages:
        try:
            version(name)
        except PackageNotFoundError:
            continue
        return ""
    return f"{' or '.join(packages)} is not installed" if packages else ""
