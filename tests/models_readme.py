"""``python -m tests.models_readme`` writes the table of what opens into ``pipeline/models/README.md``."""

from __future__ import annotations

import re

from pipeline.models import dual, vision
from tests.conftest import ROOT

PAGE = ROOT / "pipeline" / "models" / "README.md"
HEAD = "| `model_type` | models | image features | texts and scores | for example |\n| --- | --- | --- | --- | --- |\n"
_TABLE = re.compile(re.escape(HEAD) + r"(?:\|[^\n]*\n)*")


def table() -> str:
    """Return the table of the families of transformers."""
    rows = [
        f"| `{name}` | {row.about} | the model's own | yes, {row.scoring} | `{row.example}` |\n"
        for name, row in dual.FAMILIES.items()
    ]
    rows += [
        f"| `{name}` | {row.about} | {row.features} | no | `{row.example}` |\n" for name, row in vision.FAMILIES.items()
    ]
    return HEAD + "".join(rows)


def page(text: str) -> str:
    """Return the page with the current table."""
    return _TABLE.sub(lambda _: table(), text)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
