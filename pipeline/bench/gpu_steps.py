"""The steps of the benchmark of a GPU, in the order of what they prove."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pipeline.bench import gpu_images
from pipeline.bench.command import quoted
from pipeline.bench.gpu_collect import Killer, backend_rows, cluster_figures, job_figures, junit, read_figures
from pipeline.bench.gpu_micro import Spec
from pipeline.bench.gpu_records import Step
from pipeline.bench.pipeline_run import merged
from pipeline.config.choices import BACKENDS
from pipeline.config.schema import ParityConfig

JOB = (sys.executable, "-m", "pipeline.run")
# A job within a share of the GPU's memory: torch raises its own error beyond it.
CAPPED = """
import json, runpy, sys, torch
report, share = json.load(open(sys.argv.pop(1))), 0.75
limit = share * report["memory"]["peak_gpu_mib"] * 2**20 / torch.cuda.mem_get_info()[1]
torch.cuda.set_per_process_memory_fraction(limit)
sys.argv[0] = "pipeline.run"
runpy.run_module("pipeline.run", run_name="__main__", alter_sys=True)
"""
# Seconds of a job on a GPU before its first batch, about.
STARTUP = 15.0
# Below this rate (images/s) half of the rows show it.
SLOW = 5000
LABELS = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "crescent", "diamond", "arrow")
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
        """Models by their config; a rehearsal takes a tiny one."""
        return ("clip_vit_b32", "clip_vit_l14", "clip_vit_b16") if self.cuda else ("demo",)

    def least(self, seconds: float) -> float:
        """The least time of a step; a rehearsal begins each."""
        return seconds if self.cuda else 1.0


def steps(plan: Plan) -> list[Step]:
    """Return every step; those that this machine cannot do have a reason."""
    return [*_pipeline(plan), *_tests(plan), *_forward(plan), *_backends(plan), *_cluster(plan)]


def _images(plan: Plan) -> Path:
    return plan.work / "images"


def job(plan: Plan, model: str, rows: str, *more: str, part: int = 1) -> list[str]:
    """Return the overrides of a job over ``files`` or ``bytes``, 1 in ``part`` of them, with gates that let pass.

    A gate would end a run that has a speed to show; the table says which ones miss.
    """
    images = _images(plan)
    files = rows == "files"
    path, column = (gpu_images.files_in if files else gpu_images.bytes_in)(images, part), "path" if files else "image"
    limits = [
        f"parity.{kind}.{name}=0.0"
        for kind, values in asdict(ParityConfig()).items()
        if isinstance(values, dict)
        for name in values
    ]
    weights = [] if model == "demo" else ["model.weights=random"]
    own = [f"manifest.path={quoted(str(path))}", "manifest.id=id", f"manifest.image={column}", "manifest.keep=[]"]
    labels = f"prompts.labels=[{','.join(LABELS)}]"
    device = f"backend.device={plan.device}"
    # No page, which needs a library to draw, and is not what is measured.
    report = "report.progress=none", "report.html=false"
    return [f"model={model}", *weights, device, *own, labels, *report, *limits, *more]


def _pipeline(plan: Plan) -> list[Step]:
    images = _images(plan)
    found = [
        Step(
            "images",
            "pipeline",
            f"render {plan.rows:,} JPEG files",
            ((sys.executable, "-m", "pipeline.bench.gpu_images", str(images), str(plan.rows)),),
            lambda ran: {"bytes": sum(path.stat().st_size for path in gpu_images.bytes_in(images).iterdir())},
            least=plan.least(5),
            most=120,
        )
    ]
    small, large = plan.models[0], plan.models[min(1, len(plan.models) - 1)]
    # Model, rows, decoder, processes, and images/s that make the least time.
    wanted = [
        (small, "files", "fast", 1, 9000, ""),
        (small, "files", "gpu", 1, 9000, ""),
        (large, "files", "fast", 1, 2000, ""),
        (small, "bytes", "fast", 1, 9000, ""),
        (small, "files", "exact", 1, 2000, ""),
        (small, "files", "fast", 2, 9000, ""),
        (large, "files", "fast", 1, 2000, "torch_fp8"),
        (small, "bytes", "gpu", 1, 9000, ""),
        (small, "files", "gpu", 2, 9000, ""),
        (large, "files", "gpu", 1, 2000, ""),
        (small, "bytes", "exact", 1, 2000, ""),
        (large, "bytes", "fast", 1, 2000, ""),
    ]
    # A rehearsal leaves out what differs by its model or its rows alone.
    for model, rows, decoder, processes, rate, backend in wanted if plan.cuda else wanted[:2] + wanted[3:8]:
        found.append(_job_step(plan, (model, rows, decoder, backend), processes, rate))
    return found


def _job_step(plan: Plan, kind: tuple[str, str, str, str], processes: int, rate: float) -> Step:
    model, rows, decoder, backend = kind
    # Fewer rows are enough for the rate of a slow model or decoder.
    part = 1 if rate > SLOW else 2
    name = "-".join(filter(None, [model, rows, decoder, backend, f"{processes}-processes" if processes > 1 else ""]))
    output = plan.work / "datasets" / name
    more = [f"images={decoder}", f"output.dir={quoted(str(output))}", *([f"backend={backend}"] if backend else [])]
    parts: list[tuple[str, ...]] = [
        (f"cluster.part={i + 1}/{processes}",) if processes > 1 else () for i in range(processes)
    ]
    overrides = job(plan, model, rows, *more, part=part)
    absent = missing(*BACKENDS[backend].packages) if backend else ""
    absent = absent or missing(*{"gpu": ("nvidia-nvimgcodec-cu13",), "fast": ("simplejpeg",)}.get(decoder, ()))
    if not plan.cuda and (backend or decoder == "gpu"):
        absent = f"{backend or 'the decoder gpu'} needs a card"
    words = "defaults" if decoder == "exact" else f"decoder {decoder}"
    title = f"{model}, {rows}, {words}{f', {backend}' if backend else ''}"
    return Step(
        name,
        "pipeline",
        f"{title}, {processes} processes" if processes > 1 else title,
        tuple((*JOB, *overrides, *part) for part in parts),
        partial(job_figures, output=output),
        least=plan.least(STARTUP + plan.rows / part / rate),
        most=150,
        absent=absent,
        needs=gpu_images.files_in(_images(plan)),
    )


def _tests(plan: Plan) -> list[Step]:
    root = Path(__file__).resolve().parents[2]
    report = plan.out / "tests.xml"
    absent = missing("pytest") or ("" if (root / "tests").is_dir() else f"{root} has no folder tests")
    mark = ("-m", "gpu", str(root / "tests")) if plan.cuda else (str(root / "tests" / "test_ids.py"),)
    options = ("-p", "no:cacheprovider", "-c", str(root / "pyproject.toml"), f"--junitxml={report.resolve()}")
    return [
        Step(
            "tests",
            "tests",
            "pytest -m gpu" if plan.cuda else "pytest of one file",
            ((sys.executable, "-m", "pytest", *options, *mark),),
            partial(junit, report=report),
            least=plan.least(20),
            most=120,
            absent=absent,
            grace_seconds=10,
        )
    ]


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
                ((sys.executable, "-m", "pipeline.bench.gpu_micro", spec.to_json()),),
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
        command = (sys.executable, "-m", "pipeline.bench", "backends", *keys, "--only", rows, *options)
        found.append(
            Step(
                f"backends-{name}",
                "backends",
                f"{model}: {rows.replace(',', ', ')}",
                ((*command, "--out", str(folder)),),
                partial(backend_rows, path=folder / "backends.json"),
                least=plan.least(25),
                most=150,
                absent=missing(*first.packages),
                needs=gpu_images.files_in(_images(plan)),
            )
        )
    return found


def _cluster(plan: Plan) -> list[Step]:
    model = plan.models[0]
    kind = "cuda" if plan.cuda else "local"
    part = 8 if plan.cuda else 1
    # In 16 shards, so that a worker has something left when it is killed.
    shard = max(1, min(512, plan.rows // part // 16))
    folder = plan.work / "cluster"
    # The card by two names, so that two workers share it: a process that reads both sees the first alone.
    both = {"CUDA_VISIBLE_DEVICES": ",".join(plan.card)} if plan.cuda else {}
    one = {"CUDA_VISIBLE_DEVICES": plan.card[0]} if plan.cuda else {}
    # A MIG device has one name.
    single = "the device has no second name" if plan.cuda and len({*plan.card}) == 1 else ""
    distributed = missing("distributed")

    def step(name: str, title: str, *more: str, **options: Any) -> Step:
        output = folder / name
        own = [f"output.dir={quoted(str(output))}", f"manifest.shard_rows={shard}", "images=fast"]
        keys = merged(job(plan, model, "files", *own, part=part), more)
        command = (*options.pop("first", JOB), *keys)
        collect = partial(cluster_figures, output=output, other=folder / options.pop("like", "inline"))
        return Step(
            f"cluster-{name}",
            "cluster",
            title,
            (command,),
            partial(collect, killer=options.get("during")),
            least=plan.least(20),
            most=90,
            absent=options.pop("absent", "") or missing("simplejpeg"),
            **{"needs": gpu_images.files_in(_images(plan)), **options},
        )

    workers = [f"cluster={kind}", "cluster.workers=1"], [f"cluster={kind}", "cluster.workers=2"]
    alone = "" if plan.cuda else "the memory of a card is measured on a card"
    # In fp32, which no gate opens a second model for.
    whole = [f"loader.batch_size={4 * shard}", f"manifest.shard_rows={8 * shard}", "backend.precision=fp32"]
    report = folder / "memory" / "_report.json"
    return [
        step("inline", "one process, to compare with", environment=one),
        step("one", f"cluster={kind}, one worker", *workers[0], environment=one, absent=distributed),
        step(
            "two",
            f"cluster={kind}, two workers on one device",
            *workers[1],
            environment=both,
            absent=distributed or single,
        ),
        step(
            "killed",
            f"cluster={kind}, the worker killed under way",
            *workers[0],
            environment=one,
            absent=distributed,
            during=Killer(folder / "killed"),
        ),
        step("memory", "a large batch", *whole, environment=one, absent=alone, like="memory"),
        step(
            "halved",
            "the same batch in three quarters of that memory",
            *whole,
            first=(sys.executable, "-c", CAPPED, str(report)),
            needs=report,
            environment=one,
            absent=alone,
            like="memory",
        ),
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
