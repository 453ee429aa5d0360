"""What the demo model makes of a few rendered scenes, beside what it made of them where the package was tested.

The figures are kept in ``golden.json``: embeddings in fp32 to four digits, and the best label of each scene. A library
that is broken, or built for another processor, shows here, before it shows in somebody's dataset.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.doctor.check import Check, Status

if TYPE_CHECKING:
    from pipeline.models.checkpoint import Checkpoint

GROUP = "one batch"
FILE = Path(__file__).resolve().with_name("golden.json")
SCENES = 8
# Rounding to four digits alone leaves 0.9999995; another version of Pillow, which renders the scenes, a little less.
LOWEST_COSINE = 0.9995
BROKEN = "install the packages anew, best in a new environment: "


def look(checkpoint: Checkpoint) -> Iterator[Check]:
    """Compare the demo model with the figures that are kept."""
    import torch

    from pipeline.backends.compare import compare
    from pipeline.doctor.versions import install

    known = json.loads(FILE.read_text(encoding="utf-8"))
    found = figures(checkpoint)
    parity = compare(torch.tensor(found["embeddings"]), torch.tensor(known["embeddings"]), ids=known["ids"], bank=None)
    wrong = [
        f"{id} is a {label!r}, not a {wanted!r}"
        for id, label, wanted in zip(known["ids"], found["labels"], known["labels"], strict=True)
        if label != wanted
    ]
    said = {"lowest_cosine": parity.lowest_cosine}
    fact = f"the demo model in fp32, {SCENES} scenes: lowest cosine {parity.lowest_cosine:.6f} to the golden figures"
    # Written so that NaN misses.
    if wrong or not parity.lowest_cosine >= LOWEST_COSINE:
        others = f"; {wrong[0]}" if wrong else ""
        yield Check(GROUP, "golden figures", Status.FAIL, f"{fact}{others}", f"{BROKEN}{install()}", said)
    else:
        yield Check(GROUP, "golden figures", Status.OK, f"{fact}, labels as known", figures=said)


def figures(checkpoint: Checkpoint) -> dict[str, Any]:
    """Ids, labels and embeddings of the scenes, as ``golden.json`` keeps them."""
    import torch

    from pipeline.backends.parity import embed_sample
    from pipeline.backends.torch import reference
    from pipeline.engine.demo.folder import label_names, rendered_sample
    from pipeline.models.text import embed_prompts

    sample = rendered_sample(checkpoint.spec, SCENES)
    encoder = reference(checkpoint, torch.device("cpu"), batch_size=SCENES, sample=lambda: sample)
    vectors = embed_sample(encoder, sample)
    names = label_names()
    features = torch.from_numpy(embed_prompts(checkpoint, [[f"a photo of a {name}"] for name in names]))
    best = (vectors @ features.T).argmax(dim=1).tolist()
    return {
        "ids": list(sample.ids),
        "labels": [names[index] for index in best],
        "embeddings": [[round(value, 4) for value in row] for row in vectors.tolist()],
    }
