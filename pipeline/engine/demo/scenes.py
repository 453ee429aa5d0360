"""Small rendered scenes with known content: the images of the demo, of its model and of the benchmarks.

A scene is one figure on a background. It is a pure function of (seed, index): the same pair gives the same scene at any
resolution. Accuracy is measured on seeds that are not in the training set, and benchmarks render any number of images
of any size.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

# Hue in degrees, saturation and value in [0, 1]; the sampler jitters each a little.
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (358, 0.90, 0.82),
    "orange": (27, 0.95, 0.96),
    "yellow": (54, 0.90, 0.97),
    "green": (128, 0.75, 0.58),
    "cyan": (182, 0.75, 0.88),
    "blue": (222, 0.85, 0.80),
    "purple": (275, 0.70, 0.62),
    "pink": (333, 0.45, 0.98),
    "brown": (24, 0.72, 0.42),
    "black": (0, 0.0, 0.08),
}
SHAPES: tuple[str, ...] = (
    "circle",
    "square",
    "triangle",
    "star",
    "heart",
    "cross",
    "ring",
    "crescent",
    "diamond",
    "arrow",
)
TEXTURES: tuple[str, ...] = ("plain", "striped", "dotted", "checkered")
SIZES: tuple[str, ...] = ("small", "large")
# RGB at the top and at the bottom of the picture.
BACKGROUNDS: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "white": ((250, 250, 250), (240, 240, 240)),
    "gray": ((170, 172, 175), (150, 152, 155)),
    "sand": ((236, 222, 190), (222, 204, 168)),
    "sky": ((196, 220, 244), (228, 240, 250)),
    "night": ((24, 28, 58), (44, 48, 84)),
}

# Combinations of colour and shape that are not in the training set, in images or in captions: one for each colour and
# each shape, to measure whether the model recognises new combinations.
HELD_OUT: frozenset[tuple[str, str]] = frozenset(
    (colour, SHAPES[(3 * index + 1) % len(SHAPES)]) for index, colour in enumerate(COLOURS)
)


@dataclass(frozen=True, slots=True)
class Scene:
    """One figure on a background.

    Lengths are fractions of the shorter side of the picture, angles are degrees, and ``rgb`` and
    ``rgb_second`` (the second tone of a texture) are 0 to 255.
    """

    colour: str
    shape: str
    texture: str
    size: str
    background: str
    rgb: tuple[int, int, int]
    rgb_second: tuple[int, int, int]
    diameter: float
    centre: tuple[float, float]
    rotation: float
    texture_phase: float
    brightness: float
    grain_seed: int

    @property
    def label(self) -> str:
        """Colour and shape, the pair that the demo classifies: ``"red circle"``."""
        return f"{self.colour} {self.shape}"

    @property
    def held_out(self) -> bool:
        """True if this colour and shape are not in the training set of the demo model."""
        return (self.colour, self.shape) in HELD_OUT


def sample(seed: int, index: int, *, only: frozenset[tuple[str, str]] | None = None) -> Scene:
    """The scene number ``index`` of ``seed``; ``only`` restricts the pairs (colour, shape)."""
    rng = np.random.default_rng([seed, index])
    pairs = [(c, s) for c in COLOURS for s in SHAPES if only is None or (c, s) in only]
    colour, shape = pairs[int(rng.integers(len(pairs)))]
    # A black figure on the night sky would be invisible.
    backgrounds = [name for name in BACKGROUNDS if not (colour == "black" and name == "night")]
    size = SIZES[int(rng.integers(len(SIZES)))]
    diameter = rng.uniform(0.34, 0.44) if size == "small" else rng.uniform(0.62, 0.80)
    hue, saturation, value = COLOURS[colour]
    hue = (hue + rng.uniform(-4, 4)) % 360 / 360
    saturation = min(1.0, saturation * rng.uniform(0.92, 1.06))
    value = min(1.0, value * rng.uniform(0.92, 1.06))
    # The second tone of a texture keeps the hue: lighter for dark colours, darker for light ones.
    second = value * 0.62 if value > 0.5 else value + 0.26
    margin = diameter / 2
    return Scene(
        colour=colour,
        shape=shape,
        texture=TEXTURES[int(rng.integers(len(TEXTURES)))],
        size=size,
        background=backgrounds[int(rng.integers(len(backgrounds)))],
        rgb=_rgb(hue, saturation, value),
        rgb_second=_rgb(hue, saturation, second),
        diameter=float(diameter),
        centre=(float(rng.uniform(margin, 1 - margin)), float(rng.uniform(margin, 1 - margin))),
        rotation=float(rng.uniform(-14, 14)),
        texture_phase=float(rng.uniform(0, 1)),
        brightness=float(rng.uniform(0.9, 1.06)),
        grain_seed=int(rng.integers(2**31)),
    )


def scenes(seed: int, count: int, *, only: frozenset[tuple[str, str]] | None = None) -> Iterator[Scene]:
    """The first ``count`` scenes of ``seed``."""
    return (sample(seed, index, only=only) for index in range(count))


def caption(scene: Scene, attributes: Sequence[str]) -> str:
    """A true caption of ``scene`` that names only the given attributes.

    ``attributes`` holds any of ``size``, ``texture``, ``colour``, ``shape`` and ``background``.
    """
    words = ["a"]
    words += [getattr(scene, name) for name in ("size", "texture", "colour") if name in attributes]
    words.append(scene.shape if "shape" in attributes else "shape")
    text = " ".join(words)
    if words[1][0] in "aeiou":
        text = text.replace("a ", "an ", 1)
    return f"{text} on a {scene.background} background" if "background" in attributes else text


def render(scene: Scene, width: int, height: int) -> Image.Image:
    """Draw ``scene`` as an RGB picture of ``width`` x ``height`` pixels."""
    side = min(width, height)
    # Drawing larger and shrinking smooths the edges; large images need less of it.
    scale = 4 if side <= 160 else 2 if side <= 640 else 1
    canvas = _background(scene, width * scale, height * scale)
    unit = side * scale
    box = max(8, round(scene.diameter * unit))
    mask = Image.new("L", (box, box), 0)
    _draw_shape(ImageDraw.Draw(mask), scene.shape, box)
    mask = mask.rotate(scene.rotation, Image.Resampling.BILINEAR)
    # The figure lies in the centred square, so that CLIP's centre crop keeps it whole.
    left = round((width * scale - unit) / 2 + scene.centre[0] * unit - box / 2)
    top = round((height * scale - unit) / 2 + scene.centre[1] * unit - box / 2)
    canvas.paste(_texture(scene, box), (left, top), mask)
    if scale > 1:
        canvas = canvas.resize((width, height), Image.Resampling.BOX)
    return _grain(canvas, scene)


def _rgb(hue: float, saturation: float, value: float) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def _background(scene: Scene, width: int, height: int) -> Image.Image:
    top, bottom = (np.asarray(tone, dtype=np.float32) for tone in BACKGROUNDS[scene.background])
    ramp = np.linspace(0, 1, 64, dtype=np.float32)[:, None]
    column = (top * (1 - ramp) + bottom * ramp).astype(np.uint8)[:, None, :]
    picture = Image.fromarray(column).resize((width, height), Image.Resampling.BILINEAR)
    if scene.background == "night":
        rng = np.random.default_rng(scene.grain_seed)
        draw = ImageDraw.Draw(picture)
        radius = max(1, min(width, height) // 160)
        for x, y in rng.uniform(0, 1, (24, 2)):
            draw.ellipse(_around(x * width, y * height, radius), fill=(214, 216, 228))
    return picture


def _texture(scene: Scene, box: int) -> Image.Image:
    picture = Image.new("RGB", (box, box), scene.rgb)
    if scene.texture == "plain":
        return picture
    draw = ImageDraw.Draw(picture)
    step = box / 5
    shift = scene.texture_phase * step
    cells = range(-2, 13)
    if scene.texture == "striped":
        for index in cells[::2]:
            start = index * step / 1.4 + shift
            draw.rectangle((0, start, box, start + step / 1.4), fill=scene.rgb_second)
    elif scene.texture == "dotted":
        for column in cells:
            for row in cells:
                x = (column + 0.5 * (row % 2)) * step * 0.9 + shift
                draw.ellipse(_around(x, row * step * 0.8 + shift, step * 0.27), fill=scene.rgb_second)
    else:
        for column in cells:
            for row in cells:
                if (column + row) % 2:
                    x, y = column * step + shift, row * step + shift
                    draw.rectangle((x, y, x + step, y + step), fill=scene.rgb_second)
    return picture


def _draw_shape(draw: ImageDraw.ImageDraw, shape: str, box: int) -> None:
    """Fill ``shape`` with 255 in a square of ``box`` pixels, with room for the rotation."""
    middle, radius = box / 2, box * 0.46

    def polygon(points: Sequence[tuple[float, float]]) -> None:
        draw.polygon([(middle + radius * x, middle + radius * y) for x, y in points], fill=255)

    if shape == "circle":
        draw.ellipse(_around(middle, middle, radius), fill=255)
    elif shape == "ring":
        draw.ellipse(_around(middle, middle, radius), fill=255)
        draw.ellipse(_around(middle, middle, radius * 0.55), fill=0)
    elif shape == "crescent":
        draw.ellipse(_around(middle, middle, radius), fill=255)
        draw.ellipse(_around(middle + radius * 0.48, middle - radius * 0.1, radius * 0.82), fill=0)
    elif shape == "square":
        polygon([(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)])
    elif shape == "triangle":
        polygon([(0, -0.95), (0.95, 0.75), (-0.95, 0.75)])
    elif shape == "diamond":
        polygon([(0, -1), (0.68, 0), (0, 1), (-0.68, 0)])
    elif shape == "cross":
        a, b = 0.3, 0.92
        right = [(a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b)]
        polygon([*right, *((-x, -y) for x, y in right)])
    elif shape == "arrow":
        polygon([(-1, -0.3), (0.1, -0.3), (0.1, -0.8), (1, 0), (0.1, 0.8), (0.1, 0.3), (-1, 0.3)])
    elif shape == "star":
        reach = [1.0 if corner % 2 == 0 else 0.42 for corner in range(10)]
        turn = [math.pi * corner / 5 - math.pi / 2 for corner in range(10)]
        polygon([(r * math.cos(a), r * math.sin(a)) for r, a in zip(reach, turn, strict=True)])
    elif shape == "heart":
        # The usual parametric heart: x = 16 sin^3 t, y = 13 cos t - 5 cos 2t - 2 cos 3t - cos 4t.
        turn = [2 * math.pi * step / 120 for step in range(120)]
        polygon(
            [
                (
                    math.sin(t) ** 3,
                    -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16,
                )
                for t in turn
            ]
        )
    else:
        raise ValueError(f"unknown shape {shape!r}; known are {', '.join(SHAPES)}")


def _around(x: float, y: float, radius: float) -> tuple[float, float, float, float]:
    return x - radius, y - radius, x + radius, y + radius


def _grain(picture: Image.Image, scene: Scene) -> Image.Image:
    """Add exposure and sensor grain: without grain an image compresses far better than a photo."""
    pixels = np.asarray(picture, dtype=np.float32) * scene.brightness
    rng = np.random.default_rng(scene.grain_seed)
    pixels += rng.standard_normal(pixels.shape[:2], dtype=np.float32)[..., None] * 3.0
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
