"""Many pictures to the model's input size at once, on the device where they are, as :mod:`~pipeline.images.preprocess`
does it for one.

Pillow's resampling is linear: each output row is a weighted sum of source rows, then the same for columns, rounded to
8 bits after each pass. Both passes are matrix products here, in float32, of pictures that were padded to a common size;
the crop is the choice of rows and columns, and the black that is added where the picture is too small is a row of
zeros. Source of the weights: ``precompute_coeffs`` in Pillow's ``Resample.c``.

One way for every filter, shape and device. torch's own antialiased resize takes no uint8 on CUDA, has neither Lanczos
nor a crop, and one call for each size of picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from PIL import Image

from pipeline.core.records import PreprocessSpec
from pipeline.images.preprocess import _corner, resized_size

# Sides of the padded pictures are multiples of this: pictures of nearly one size go together.
STEP = 256
# Pixels of padded pictures that are resampled at a time, at 12 bytes each.
GROUP_PIXELS = 2**25
# Pictures in one matrix product. cuBLAS chooses its kernel, and with it the order of the sums, by their number as well:
# with a fixed one, a picture's pixels do not depend on those that are resampled with it.
PRODUCT = 8


def _triangle(x: torch.Tensor) -> torch.Tensor:
    return (1 - x.abs()).clamp_(min=0)


def _cubic(x: torch.Tensor) -> torch.Tensor:
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0))


def _lanczos(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x.abs() < 3, torch.sinc(x) * torch.sinc(x / 3), 0)


# Pillow's filters: how far one reaches in source pixels when it enlarges, and its weight at a distance.
FILTERS: dict[int, tuple[float, Callable[[torch.Tensor], torch.Tensor]]] = {
    Image.Resampling.BILINEAR: (1.0, _triangle),
    Image.Resampling.BICUBIC: (2.0, _cubic),
    Image.Resampling.LANCZOS: (3.0, _lanczos),
}


@dataclass(frozen=True, slots=True)
class _Axis:
    """One axis of one picture: ``length`` source pixels become ``resized``, of which ``shown`` are wanted from
    ``first`` on; they stand behind ``before`` empty places and depend on the source pixels ``start`` to ``stop``."""

    length: int
    resized: int
    first: int
    before: int
    shown: int
    start: int
    stop: int


def resample(pictures: Sequence[torch.Tensor], spec: PreprocessSpec) -> list[torch.Tensor]:
    """uint8 ``[H, W, 3]`` of any sizes to uint8 at ``spec.size``, on the same device; nothing is waited for.

    Within 2 levels of :func:`~pipeline.images.preprocess.preprocess`. Those that were resampled together share memory.
    """
    groups: dict[tuple[int, int], list[tuple[int, _Axis, _Axis]]] = {}
    for index, picture in enumerate(pictures):
        rows, columns = _axes(picture.shape[0], picture.shape[1], spec)
        padded = _padded(rows.stop - rows.start), _padded(columns.stop - columns.start)
        groups.setdefault(padded, []).append((index, rows, columns))
    results: list[torch.Tensor | None] = [None] * len(pictures)
    for (height, width), members in groups.items():
        most = max(1, GROUP_PIXELS // (height * width))
        most -= most % min(PRODUCT, most)
        for start in range(0, len(members), most):
            some = members[start : start + most]
            resampled = _group([(pictures[index], rows, columns) for index, rows, columns in some], height, width, spec)
            for (index, _, _), result in zip(some, resampled.unbind(0), strict=True):
                results[index] = result
    return [result for result in results if result is not None]


def _padded(length: int) -> int:
    return -(-length // STEP) * STEP


@lru_cache(maxsize=4096)
def _axes(height: int, width: int, spec: PreprocessSpec) -> tuple[_Axis, _Axis]:
    """The rows and columns of a picture for those of the model's input."""
    columns, rows = resized_size((width, height), spec)
    reach = FILTERS[spec.resample][0]
    found = []
    for length, resized, wanted in zip((height, width), (rows, columns), spec.size, strict=True):
        shown = min(resized, wanted)
        first = _corner(resized - wanted, spec.corner) if resized >= wanted else 0
        scale = length / resized
        margin = reach * max(1.0, scale) + 1
        start = max(0, math.floor(first * scale - margin))
        stop = min(length, math.ceil((first + shown) * scale + margin))
        before = math.ceil((wanted - shown) / 2)
        found.append(_Axis(length, resized, first, before, shown, start, stop))
    return found[0], found[1]


def _group(
    members: Sequence[tuple[torch.Tensor, _Axis, _Axis]], height: int, width: int, spec: PreprocessSpec
) -> torch.Tensor:
    """uint8 ``[N, *spec.size, 3]`` of pictures whose parts that count fit into ``height`` x ``width``."""
    device, count = members[0][0].device, len(members)
    together = min(PRODUCT, max(1, GROUP_PIXELS // (height * width)))
    # The places behind the pictures are empty.
    members = [*members, *[members[-1]] * (-count % together)]
    frames = torch.zeros((len(members), 3, height, width), device=device)
    for frame, (picture, rows, columns) in zip(frames.permute(0, 2, 3, 1), members[:count], strict=False):
        part = picture
        if rows.stop - rows.start < rows.length or columns.stop - columns.start < columns.length:
            part = picture[rows.start : rows.stop, columns.start : columns.stop]
        frame[: part.shape[0], : part.shape[1]].copy_(part)
    horizontal, vertical = _numbers(members, device)
    across = _weights(horizontal, spec.size[1], width, spec.resample)
    down = _weights(vertical, spec.size[0], height, spec.resample)
    narrow = _rounded(_products(frames.flatten(1, 2), across.mT, together)).view(len(members), 3, height, -1)
    levels = _rounded(_products(down[:, None], narrow, together))[:count]
    return levels.permute(0, 2, 3, 1).to(torch.uint8, memory_format=torch.contiguous_format)


def _products(left: torch.Tensor, right: torch.Tensor, together: int) -> torch.Tensor:
    """The matrix products of two stacks, ``together`` in each call."""
    return torch.cat([one @ other for one, other in zip(left.split(together), right.split(together), strict=True)])


def _rounded(levels: torch.Tensor) -> torch.Tensor:
    """Round to 8 bits as Pillow does: halves up."""
    return levels.add_(0.5).floor_().clamp_(0, 255)


def _numbers(
    members: Sequence[tuple[torch.Tensor, _Axis, _Axis]], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 ``[N, 6]`` for the columns and for the rows, on the device; one copy that is not waited for."""
    axes = [columns for _, _, columns in members] + [rows for _, rows, _ in members]
    numbers = torch.tensor(
        [[axis.length, axis.resized, axis.first, axis.before, axis.shown, axis.start] for axis in axes],
        dtype=torch.float64,
        # Pageable memory would be copied only when the stream has done all that is queued on it.
        pin_memory=device.type == "cuda",
    ).to(device, non_blocking=True)
    return numbers[: len(members)], numbers[len(members) :]


def _weights(numbers: torch.Tensor, size: int, padded: int, resample: int) -> torch.Tensor:
    """float32 ``[N, size, padded]``: how much each source pixel counts for each output pixel."""
    reach, weight = FILTERS[resample]
    device = numbers.device
    length, resized, first, before, shown, start = numbers[:, :, None].unbind(1)
    place = torch.arange(size, device=device) - before
    empty = (place < 0) | (place >= shown)
    scale = length / resized
    widened = scale.clamp(min=1.0)
    centre = (first + place + 0.5) * scale
    # Relative to the whole pixel at the centre, so that float32 is enough for pictures of any length.
    whole = centre.floor()
    lowest = (centre - reach * widened + 0.5).floor().clamp(min=0) - whole
    highest = torch.minimum((centre + reach * widened + 0.5).floor(), length) - whole
    lowest, highest = lowest.masked_fill(empty, 0), highest.masked_fill(empty, 0)
    offset = torch.arange(padded, device=device) - (whole - start)[:, :, None].to(torch.int32)
    inside = (offset >= lowest[:, :, None].to(torch.int32)) & (offset < highest[:, :, None].to(torch.int32))
    distance = (offset + (0.5 - (centre - whole))[:, :, None].float()) / widened[:, :, None].float()
    weights = torch.where(inside, weight(distance), 0)
    return weights / weights.sum(dim=2, keepdim=True).masked_fill_(empty[:, :, None], 1)
