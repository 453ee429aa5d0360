"""``python -m pipeline.export``: export a model's towers into the artefact store or a repository for Triton."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from pipeline.config.compose import compose_config
from pipeline.config.schema import Config
from pipeline.core.cli import ErrorOutput, add_overrides, command_parser, run_command, run_process
from pipeline.core.errors import ConfigError, Problem

if TYPE_CHECKING:
    from pipeline.backends.artifacts.store import Artifact
    from pipeline.backends.triton.model_config import Serving
    from pipeline.engine.engine import Engine

FORMATS = ("onnx", "torchscript")
TOWERS = ("image", "text")
# Options of --to triton.
TRITON = ("out", "tensorrt", "max_batch", "queue_microseconds", "instances", "engine_cache")
PRECISIONS = {"onnx": ("fp32", "fp16", "int8"), "torchscript": ("fp32", "bf16")}
EXAMPLES = """\
examples:
  python -m pipeline.export model=clip_vit_b32
      both towers as ONNX graphs in fp32, for ONNX Runtime
  python -m pipeline.export model=clip_vit_b32 --tower image --precision int8
      what backend=onnx_int8 loads
  python -m pipeline.export model=clip_vit_b32 --tower image --precision int8 --static manifest.path=photos.parquet
      calibrated on images of the manifest
  python -m pipeline.export --plain --precision fp16
      standard operators only, with fp32 norms: for TensorRT and other runtimes
  python -m pipeline.export --to triton --out models model=clip_vit_b32
      a model repository for Triton Inference Server: tritonserver --model-repository=models
  python -m pipeline.export --to triton --out models --tensorrt --precision fp16 model=clip_vit_b32
      the same on TensorRT; --max-batch, --queue-microseconds, --instances, --engine-cache set how it serves

An export is published once onnx.checker accepts it, its inputs and outputs are as declared, and its embeddings are
within the limits of the group parity to those of fp32 at batches of 1, 2, 7 and 64. python -m pipeline.artifacts lists
all exports. A job exports what it needs itself.
exit codes: 0 done, 2 wrong config, or the export cannot be made here, 4 too far from fp32, 75 interrupted, 1 other
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, export, print a summary; return the exit code."""
    options = _parser().parse_intermixed_args(arguments)
    return run_command(lambda: _run(options), ErrorOutput("interrupted; no partial export was kept"))


def _run(options: argparse.Namespace) -> None:
    config = _read(options)
    from pipeline.telemetry.logs import log_to_terminal

    with log_to_terminal():
        _act(config, options)


def _act(config: Config, options: argparse.Namespace) -> None:
    from pipeline.engine.engine import Engine

    made = []
    # One half of the images of a static export is for calibration, the other for the comparison.
    config = config.changed({"backend.quantization": "static" if options.static else "dynamic"})
    with Engine(config) as engine:
        checkpoint = engine.checkpoint
        for artifact in _export(engine, options):
            print(describe(artifact), flush=True)
            made.append(artifact)
    if options.to == "triton":
        from pipeline.backends.triton.repository import write_repository

        towers = {artifact.card["options"]["tower"]: artifact for artifact in made}
        names = write_repository(options.out, checkpoint, towers, config.images, _serving(options))
        print(
            f"{options.out}: a model repository for Triton with {', '.join(names)}; its README.md has example requests"
        )


def describe(artifact: Artifact) -> str:
    """Describe an export in a few lines: inputs and outputs, operators, distance from fp32, size and files."""
    card = artifact.card
    parity, facts, options = card["parity"], card["facts"], card["options"]
    kind = " ".join(str(v) for k, v in options.items() if k in ("precision", "quantization", "device"))
    lines = [
        f"{card['kind']} of {card['model']['name']}, {kind}: {artifact.size / 1e6:,.1f} MB, lowest cosine to fp32 "
        f"{parity['lowest_cosine']:.6f}, mean {parity['mean_cosine']:.6f}"
    ]
    if "inputs" in facts:
        sides = [
            ", ".join(f"{name} [{', '.join(axes)}]" for name, axes in facts[side].items())
            for side in ("inputs", "outputs")
        ]
        lines.append(f"  {' -> '.join(sides)}")
        most = list(facts["operators"].items())[:8]
        lines.append(f"  operators: {', '.join(f'{count} {name}' for name, count in most)}, ...")
    return "\n".join([*lines, *(f"  {artifact.file(name)}" for name in card["files"])])


def _export(engine: Engine, options: argparse.Namespace) -> Iterator[Artifact]:
    from functools import cache

    import torch

    from pipeline.backends.artifacts.exports import GraphOptions, onnx_graph
    from pipeline.backends.artifacts.store import ArtifactStore
    from pipeline.backends.artifacts.torchscript import TraceOptions, traced

    checkpoint, config, sample = engine.checkpoint, engine.config, cache(engine.cpu_decoded_sample)
    store, limits = ArtifactStore(config.backend.artifacts), config.parity
    if options.format == "torchscript":
        trace = TraceOptions(options.precision, torch.device("cpu"))
        yield traced(checkpoint, trace, store, sample=sample, limits=limits)
        return
    both = TOWERS if checkpoint.text is not None else ("image",)
    for tower in both if options.tower == "both" else (options.tower,):
        graph = GraphOptions(
            tower=tower,
            precision=options.precision,
            # Triton and TensorRT take standard operators; ONNX Runtime fuses them when it loads them.
            fused=not options.plain and options.to != "triton",
            quantization=("static" if options.static else "dynamic") if options.precision == "int8" else None,
        )
        yield onnx_graph(checkpoint, graph, store, sample=sample, limits=limits)


def _read(options: argparse.Namespace) -> Config:
    problems = _check(options)
    try:
        config = compose_config(options.overrides)
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from error
    if problems:
        raise ConfigError(problems)
    return config


def _check(options: argparse.Namespace) -> list[Problem]:
    problems = []
    able = PRECISIONS[options.format]
    if options.precision not in able:
        problems.append(Problem("--precision", options.precision, f"{options.format} takes {', '.join(able)}"))
    if options.format == "torchscript" and options.tower == "text":
        problems.append(Problem("--tower", "text", "TorchScript is exported for the image tower only"))
    if options.static and (options.precision != "int8" or options.format != "onnx"):
        problems.append(Problem("--static", True, "goes with --precision int8 of ONNX"))
    if options.static and options.tower != "image":
        problems.append(Problem("--static", True, "is calibrated on images", "add --tower image"))
    return [*problems, *_check_triton(options)]


def _check_triton(options: argparse.Namespace) -> list[Problem]:
    given = {name: getattr(options, name) for name in TRITON}
    given = {name: value for name, value in given.items() if value is not None and value is not False}
    if options.to != "triton":
        return [Problem(_flag(name), value, "goes with --to triton") for name, value in given.items()]
    from pipeline.backends.triton.model_config import problem_of

    problems = []
    if options.out is None:
        problems.append(Problem("--out", None, "names the folder of the repository", "add --out models"))
    elif problem := problem_of(options.out):
        problems.append(problem)
    if options.format != "onnx":
        problems.append(Problem("--format", options.format, "Triton is given ONNX graphs"))
    if options.tensorrt and options.precision not in ("fp32", "fp16"):
        problems.append(Problem("--precision", options.precision, "--tensorrt takes fp32, fp16"))
    for name, most in (("max_batch", 4096), ("queue_microseconds", 60_000_000), ("instances", 64)):
        value, least = given.get(name), 0 if name == "queue_microseconds" else 1
        if value is not None and not least <= value <= most:
            problems.append(Problem(_flag(name), value, f"wants a whole number from {least} to {most:,}"))
    if options.engine_cache is not None and not (options.tensorrt and options.engine_cache.startswith("/")):
        problems.append(Problem("--engine-cache", options.engine_cache, "an absolute path, and goes with --tensorrt"))
    return problems


def _serving(options: argparse.Namespace) -> Serving:
    from pipeline.backends.triton.model_config import Serving

    asked = {
        "max_batch_size": options.max_batch,
        "queue_microseconds": options.queue_microseconds,
        "instances": options.instances,
    }
    given = {name: value for name, value in asked.items() if value is not None}
    return Serving(**given, tensorrt=options.tensorrt, engine_cache=options.engine_cache)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "python -m pipeline.export",
        "Export a model's towers as ONNX graphs, TorchScript, or for Triton, compared with fp32.",
        EXAMPLES,
    )
    add_overrides(parser)
    parser.add_argument("--format", choices=FORMATS, default="onnx", help="default: onnx")
    parser.add_argument("--tower", choices=(*TOWERS, "both"), default="both", help="default: both")
    parser.add_argument("--precision", choices=("fp32", "fp16", "bf16", "int8"), default="fp32", help="default: fp32")
    parser.add_argument(
        "--static", action="store_true", help="int8 activations with fixed scales, calibrated on images"
    )
    parser.add_argument("--plain", action="store_true", help="ONNX's standard operators only, nothing fused")
    parser.add_argument("--to", choices=("store", "triton"), default="store", help="default: store")
    triton = parser.add_argument_group("with --to triton")
    triton.add_argument("--out", metavar="FOLDER", help="the model repository, a local folder that does not exist yet")
    triton.add_argument("--tensorrt", action="store_true", help="run on TensorRT; --precision fp32 or fp16")
    triton.add_argument(
        "--engine-cache", metavar="FOLDER", help="where the server keeps TensorRT's engines (default: nowhere)"
    )
    triton.add_argument("--max-batch", type=int, metavar="ROWS", help="the largest batch (default: 64)")
    triton.add_argument(
        "--queue-microseconds", type=int, metavar="N", help="longest wait of a request for others (default: 2000)"
    )
    triton.add_argument("--instances", type=int, metavar="N", help="copies of a model on each GPU or CPU (default: 1)")
    return parser


if __name__ == "__main__":
    run_process(main)
