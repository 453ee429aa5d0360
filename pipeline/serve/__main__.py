"""``python -m pipeline.serve [GROUP=OPTION ...] [KEY=VALUE ...]``: embeddings and labels over HTTP."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from pipeline.core.cli import ErrorOutput, add_overrides, command_parser, run_command, run_process
from pipeline.core.log_format import JsonLines, new_run
from pipeline.models.lean import import_transformers, load_torch_aside
from pipeline.serve.settings import need_packages, service_config

EXAMPLES = """\
examples:
  python -m pipeline.serve
      the demo model on http://127.0.0.1:8000
  python -m pipeline.serve model=clip_vit_b32 backend=onnx_int8 loader.batch_size=16 serve.shapes=3 log.format=json
      batches of up to 16 images, in shapes of 16, 4 and 1; a log in JSON
  python -m pipeline.serve model=clip_vit_b32 'prompts.labels=[a cat,a dog]' serve.port=0
      labels for requests without labels; any free port, which is logged
  curl -F image=@photo.jpg -F 'texts=a cat,a dog' http://127.0.0.1:8000/predict
  curl -H 'content-type: application/json' -d '{"texts": ["a red circle"]}' http://127.0.0.1:8000/embed

POST /embed and /predict, GET /healthz, /readyz, /metrics, /version and /openapi.json. Results equal the rows
of a job with the same settings. On SIGTERM the service answers every accepted request, then ends.
For several GPUs, run 'pipeline.serve.app:create()' in gunicorn, with the overrides in PIPELINE_SERVE_OVERRIDES.
exit codes: 0 ended by a signal, 2 wrong config or machine, 4 backend too far from fp32, 75 interrupted before it was
ready, 1 requests were not answered, or an error
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and serve until a signal; return the exit code."""
    options = _parser().parse_args(arguments)
    errors = ErrorOutput("interrupted before the service was ready")
    return run_command(lambda: _serve(options, errors), errors)


def _serve(options: argparse.Namespace, errors: ErrorOutput) -> int:
    run, config = new_run(), service_config(options.overrides)
    errors.formatter = JsonLines(run) if config.log.format == "json" else None
    need_packages()
    load_torch_aside()
    import_transformers()
    from pipeline.serve.server import serve
    from pipeline.telemetry.logs import library_messages, log_to_terminal

    with library_messages(config.log, run), log_to_terminal(config.log, run):
        return serve(config)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "python -m pipeline.serve",
        "Answer requests for embeddings and labels over HTTP.",
        EXAMPLES,
    )
    add_overrides(parser)
    return parser


if __name__ == "__main__":
    run_process(main)
