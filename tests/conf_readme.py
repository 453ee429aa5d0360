"""``python -m tests.conf_readme`` writes ``conf/README.md`` from the schemas and from the comments of the YAML files.

New groups, options and keys are included automatically. The text of a key is the comment above it in its YAML file.
"""

# ruff: noqa: E501 - a row of a table is one line

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from pipeline.config.ranges import AUTO, DEFAULT, DefaultNumber
from pipeline.config.schema import Config, conf_dir
from pipeline.config.validate import AUTOMATIC, CHOICES, RANGES, limits

README = Path(__file__).resolve().parent.parent / "conf" / "README.md"
HEAD = """# Configuration

Every setting of `python -m pipeline.run`. A group is a folder, and its options are the files in it. `GROUP=OPTION`
selects an option, `KEY=VALUE` sets a value, and `--cfg job` prints the complete config. All settings are checked
against the schemas and limits in `pipeline/config/` before any work begins, and one message lists all mistakes. Put
text that is not plain ASCII in quotes: `'prompts.labels=["Käse","ein Hund"]'`.

`python -m tests.conf_readme` generates the sections of the groups from the schemas, the limits and the comments in the
YAML files.

## Frequent settings

| | |
| --- | --- |
| model | `model=demo`, `clip_vit_b32`, `clip_vit_b16`, `clip_vit_l14`, `siglip2_base`, `chinese_clip_base`, ..., or `model=hub model.name=<Hugging Face id or local folder>` for any other model, such as a CLIP, a SigLIP at a fixed resolution or a DINOv2 ([what opens](../pipeline/models/README.md)); `model.revision` pins a version; `model.weights=random` takes the full-size model without a download, for measurements |
| backend | `backend=torch`, `torchscript`, `torch_int8`, `torch_fp8`, `onnx`, `onnx_int8`, `tensorrt`, or `auto`: the fastest within the limits of `parity`; see [Backends](../pipeline/backends/README.md) |
| precision and device | `backend.precision=fp32`, `bf16`, `fp16` (CUDA), `auto`; `backend.device=cpu`, `cuda`, `cuda:1`, `auto`; `backend.compile=default` compiles `torch` |
| manifest | `manifest.path` is a Parquet file, a folder or a glob at any fsspec address; `manifest.id`, `manifest.image` (paths or URLs, bytes, or `struct<bytes, path>`), `manifest.text` ([captions](../pipeline/job/README.md#texts)), `manifest.keep=[a,b]`, `manifest.root` |
| labels | `prompts.labels=[cat,dog]` or `prompts.path=labels.csv` (YAML, CSV, Parquet), `prompts.templates`; `labels.top_k`, `labels.threshold` |
| images | `images=exact`, `fast`, `scaled`, `gpu`; see [Decoders](../pipeline/images/README.md#decoders) |
| batches | `loader.batch_size` (`auto` measures the best size once and stores it), `loader.workers`, `backend.streams` (batches encoded side by side on a CPU); `manifest.shard_rows` ([`auto`](../pipeline/job/README.md#resume)) is the unit of commit and resume |
| addresses | manifest, images and output may be in S3 (`output.dir=s3://bucket/photos`; `pip install -e '.[s3]'`, credentials and endpoint as for every AWS tool) or at any other fsspec address; `images.schemes=[file,https]` allows web addresses in rows |
"""
WORDS = {int: "whole number", float: "number", bool: "true or false", str: "text", list[str]: "list of texts"}
# Keys that are in the schema only.
ELSEWHERE = {
    "images.formats": "Formats that may be decoded, whatever the name of the file; the schema explains the choice."
}
SHARED, CHOSEN = "See the key above.", "Set by the option."


def comments(path: Path) -> dict[str, str]:
    """Return the comment above each key of a YAML file; a key directly below another one shares its comment."""
    found: dict[str, str] = {}
    lines: list[str] = []
    for line in path.read_text().splitlines():
        if line.startswith("#"):
            lines.append(line.removeprefix("#").strip())
        elif match := re.match(r"(\w+):", line):
            found[match[1]] = " ".join(lines) if lines else SHARED
            lines = []
    return found


def options_of(group: str) -> list[Path]:
    """Return the files of a group, sorted by name."""
    return sorted((conf_dir() / group).glob("*.yaml"))


def descriptions(group: str) -> tuple[dict[str, str], dict[str, str]]:
    """Return the descriptions of a group's options and of its keys.

    In a group with several options the comment at the top of a file describes the option, not its first key.
    """
    options, keys = {}, {}
    files = options_of(group)
    for path in files:
        found = comments(path)
        if len(files) > 1:
            first = next(iter(found))
            options[path.stem] = found.pop(first)
            keys.setdefault(first, CHOSEN)
        keys |= {key: text for key, text in found.items() if keys.get(key, CHOSEN) in (CHOSEN, SHARED)}
    return options, keys


def kind_of(hint: Any) -> str:
    """Return a type in words."""
    for kind, text in WORDS.items():
        if hint == kind:
            return text
        if hint == kind | None:
            return f"{text}, or null"
    return "numbers by name"


def shown(value: Any) -> str:
    """Return a default as a user types it."""
    if isinstance(value, dict):
        return "<br>".join(f"`{name}: {number}`" for name, number in value.items())
    text = yaml.safe_dump(value, default_flow_style=True, width=1000, allow_unicode=True).removesuffix("\n...\n")
    return f"`{text.strip()}`"


def values_of(key: str) -> str:
    """Return the allowed values of a key, besides their type."""
    if key in CHOICES:
        return " ".join(f"`{choice}`" for choice in CHOICES[key])
    return limits(key).removeprefix("must be ") if key in RANGES else ""


def section(group: str, kind: Any) -> Iterator[str]:
    """Yield the lines about one group."""
    options, keys = descriptions(group)
    about = str(kind.__doc__).split("\n")[0].partition(": ")[2]
    yield f"\n## {group}\n"
    yield f"{about[0].upper()}{about[1:]}\n"
    if options:
        yield f"| `{group}=` | |\n| --- | --- |"
        yield from (f"| `{name}` | {cell(text)} |" for name, text in options.items())
        yield ""
    yield "| key | type | default | values | |\n| --- | --- | --- | --- | --- |"
    hints = get_type_hints(kind)
    for field in fields(kind):
        key = f"{group}.{field.name}"
        default = field.default if field.default is not MISSING else field.default_factory()  # type: ignore[misc]
        text = AUTO if key in AUTOMATIC and default == 0 else default
        text = DEFAULT if isinstance(default, DefaultNumber) else text
        columns = (
            kind_of(hints[field.name]),
            shown(text),
            values_of(key),
            cell(keys.get(field.name) or ELSEWHERE[key]),
        )
        yield f"| `{key}` | {' | '.join(columns)} |"


def cell(text: str) -> str:
    """Escape text for a table."""
    return text.replace("|", "\\|").replace("<", "&lt;")


def page() -> str:
    """Return the whole page."""
    lines = [line for group, kind in get_type_hints(Config).items() for line in section(group, kind)]
    return HEAD + "\n".join(lines) + "\n"


if __name__ == "__main__":
    README.write_text(page())
