"""The weights of a checkpoint: the proof that their files are whole, and the model of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig
from transformers.initialization import no_init_weights

from pipeline.core.errors import ModelError
from pipeline.models.config_check import explain_model
from pipeline.models.files import CONFIG, first_line, loaded_weights, read_json

# Types of numbers that are read as they are; integers are quantised weights, of which the factors would be lost.
_NUMBERS = ("F64", "F32", "F16", "BF16")
# Positions and batches are counted in whole numbers.
_COUNTED = ("position_ids", "num_batches_tracked")
# Tensors of one layer of a tower.
_LAYERS = re.compile(r"\.layers?\.[0-9]+\.")


@dataclass(frozen=True, slots=True)
class Build:
    """The way to a model of a config: the name of a class of transformers, and options of the model itself."""

    name: str = "AutoModel"
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def type(self) -> Any:
        """The class."""
        return getattr(transformers, self.name)

    def __call__(self, settings: Any) -> Any:
        """The model in fp32, with random weights unless their initialisation is off."""
        make = self.type.from_config if self.name == "AutoModel" else self.type._from_config
        return make(settings, dtype=torch.float32, **self.options)


PLAIN = Build()


def check_tensors(weights: list[Path]) -> set[str]:
    """Read the headers of the weights: their files are whole, and hold plain floating-point numbers.

    Returns the names of the tensors.

    Raises:
        ModelError: with the file, and the tensor.
    """
    names = set[str]()
    for path in weights:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    names.add(name)
                    part = file.get_slice(name)
                    if part.get_dtype() not in _NUMBERS and not name.endswith(_COUNTED):
                        raise ModelError(
                            f"{path}: the tensor {name} holds {part.get_dtype()}, not floating-point numbers as "
                            f"{', '.join(_NUMBERS)}; take the checkpoint before it was quantised or converted"
                        )
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{path}: the weights cannot be loaded ({first_line(error)}); the file is damaged or truncated: "
                "download the checkpoint again"
            ) from error
    return names


def _filled(settings: Any, weights: list[Path], build: Build = PLAIN) -> Any:
    """The model of a config with the tensors in these files; None where they do not hold exactly its own.

    transformers builds a model without memory first, for which torch imports its compiler, and prepares to rename the
    tensors of all its models: that takes longer than to read a small model.
    """
    with no_init_weights():
        model = build(settings)
    # Of BERT's, transformers sets the row of the padding to zero, whatever the file holds.
    if any(getattr(module, "padding_idx", None) is not None for module in model.modules()):
        return None
    wanted, places = model.state_dict(), dict[str, Path]()
    for path in weights:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                # Older releases of transformers saved the positions, which follow from the config.
                if name not in wanted and name.endswith("position_ids"):
                    continue
                if name not in wanted or file.get_slice(name).get_shape() != list(wanted[name].shape):
                    return None
                places[name] = path
    if len(places) < len(wanted):
        return None
    for path in weights:
        with safe_open(path, framework="pt") as file, torch.no_grad():
            for name in (name for name, place in places.items() if place == path):
                wanted[name].copy_(file.get_tensor(name))
    return model.eval()


def load_model(folder: Path, weights: Path, build: Build = PLAIN) -> Any:
    """The model of the config in ``folder`` with the weights in another folder, or the same, in fp32.

    Raises:
        ModelError: weights and config do not belong together, or one of them is damaged.
    """
    config = folder / CONFIG
    try:
        settings = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        model = _filled(settings, loaded_weights(weights), build)
        if model is not None:
            return model
        model, facts = build.type.from_pretrained(
            weights,
            config=settings,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            # They are named below; transformers would only log them.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **build.options,
        )
    # A library raises anything for values that it does not expect.
    except Exception as error:
        explain_model(config, read_json(config))
        raise ModelError(
            f"{weights}: the weights cannot be loaded ({first_line(error)}); download the checkpoint again"
        ) from error
    wrong = sorted(facts["mismatched_keys"])
    if wrong:
        name, found, wanted = wrong[0]
        raise ModelError(
            f"{weights}: the tensor {name} has the shape {list(found)}, and {config.name} says {list(wanted)}"
            + (f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else "")
            + "; weights and config belong to different checkpoints, or one of them was changed"
        )
    # transformers fills missing tensors with random numbers, with a warning at most.
    missing = sorted(facts["missing_keys"])
    if missing:
        raise ModelError(
            f"{weights}: the weights lack {len(missing)} tensors of the model, for example {', '.join(missing[:3])}; "
            "the download or the conversion is incomplete"
        )
    unused = sorted(name for name in facts["unexpected_keys"] if _LAYERS.search(name))
    if unused:
        raise ModelError(
            f"{weights}: the weights hold {len(unused)} tensors of layers that {config.name} leaves out, for example "
            f"{unused[0]}; num_hidden_layers is not that of these weights"
        )
    return model
