"""Encoded bytes to an RGB image, by one fixed rule for each oddity.

The rules (all part of the dataset's fingerprint):

- Formats: only those in ``images.formats``, recognised by content, never by name.
- Size: the header's pixel count is checked before a pixel is decoded.
- EXIF: the orientation is applied (``images.exif=apply``), as transformers' ``load_image`` does, or not
  (``ignore``). Metadata that cannot be read turns nothing.
- Animation, several pages or sizes: the first frame (of an icon, the largest).
- Palettes: expanded, with their transparency.
- Transparency: composed onto ``images.transparency``; ``drop`` keeps the hidden colour. So is the screen around a GIF's
  first frame. An alpha channel of zeros alone is none in BMP, ICO and TGA.
- 16 bits a sample: the high byte counts. 32-bit integers are read as 16-bit samples, which is what
  they hold in PNG, TIFF and PGM files; floats are scaled from their lowest and highest value.
- CMYK, YCbCr, LAB and HSV: Pillow's conversion; embedded colour profiles are not applied.
- Variants that Pillow would show wrongly: ``unsupported`` (see :mod:`pipeline.images.tiff`).
- Damage: a truncated or corrupt image is a failure, never half a picture. Metadata that is too large is left out.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from pipeline.core.records import Failure, Pixels, PreprocessSpec
from pipeline.images.damage import damaged, too_large, unidentified
from pipeline.images.deep_samples import to_eight_bits
from pipeline.images.formats import open_image
from pipeline.images.orientation import DAMAGE, LARGE_PIXELS, upright
from pipeline.images.preprocess import preprocess
from pipeline.images.recover import recover
from pipeline.images.transparency import frame_of, settled

T = TypeVar("T")

# The decoder that the others are compared with.
EXACT = "exact"
# Decodes as much of a damaged file as possible, for thumbnails; in a process of its own, and never for a dataset.
GLANCE, GLANCE_SIZE = "glance", (320, 320)
# Decodes nothing, for benchmarks of everything else: black, but for a first pixel from the end of the file.
BLANK = "blank"
_large_lock = threading.Lock()

# Pillow warns of odd metadata that changes no pixel; a run over millions of files would log nothing else.
warnings.filterwarnings("ignore", module=r"PIL\.")

_BACKGROUNDS = {"white": (255, 255, 255), "black": (0, 0, 0)}
# The inverse of each EXIF orientation: from the upright image to the stored one.
_UNTURNED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@dataclass(frozen=True, slots=True)
class Decoder:
    """Pillow with the rules above; safe to use from many threads.

    ``kind`` is ``exact``, or ``fast`` or ``scaled`` (:mod:`pipeline.images.fast`), which change how :meth:`pixels`
    are computed and nothing else: what Pillow refuses is refused.
    ``large_lock`` is held for as long as a large image is in memory; by default it is one for this process.
    """

    formats: tuple[str, ...]
    max_pixels: int
    exif: str = "apply"
    transparency: str = "white"
    kind: str = EXACT
    large_lock: AbstractContextManager[Any] = field(default=_large_lock, repr=False, compare=False)

    def rules(self) -> dict[str, Any]:
        """The arguments that make the same decoder elsewhere, fit for JSON."""
        return {
            "formats": list(self.formats),
            "max_pixels": self.max_pixels,
            "exif": self.exif,
            "transparency": self.transparency,
            "kind": self.kind,
        }

    def decode(self, data: bytes) -> Image.Image | Failure:
        """An RGB image, or a failure as :meth:`apply` gives it."""
        return self.apply(data, Image.Image.copy)

    def pixels(self, data: bytes, spec: PreprocessSpec) -> Pixels | Failure:
        """The pixels that the model wants, or a failure as :meth:`apply` gives it."""
        if self.kind == BLANK:
            rgb = np.zeros((*spec.size, 3), dtype=np.uint8)
            rgb[0, 0, :2] = tuple(data[-2:])
            return Pixels(rgb=rgb)
        if self.kind in (EXACT, GLANCE):
            return self.apply(data, lambda image: preprocess(image, spec))
        from pipeline.images import fast

        def read(image: Image.Image) -> Pixels | None:
            return fast.read(data, image, spec, scaled=self.kind == "scaled", turned=self.exif == "apply")

        return self.apply(data, lambda image: fast.shrink(image, spec), read)

    def apply(
        self,
        data: bytes,
        finish: Callable[[Image.Image], T],
        read: Callable[[Image.Image], T | None] = lambda image: None,
    ) -> T | Failure:
        """Decode, and hand the RGB image to ``finish`` while its buffers are there.

        A large image holds the lock until ``finish`` is done with it: threads handle one at a time. ``read`` gets the
        image before it is loaded, and may give the result at once; where it gives None, Pillow loads the image.

        Statuses of a failure: ``not_an_image``, ``format_not_allowed``, ``truncated``, ``corrupt``,
        ``too_many_pixels``, ``unsupported`` (a variant that is not decoded, or a colour mode without a rule),
        ``out_of_memory``.
        """
        result = self._attempt(data, finish, read)
        if isinstance(result, Failure) and self.kind != GLANCE:
            # It may decode whole pictures, too, and few files come here.
            with self.large_lock:
                lean = recover(data, result)
            if lean is not None and not isinstance(again := self._attempt(lean, finish, read), Failure):
                return again
        return result

    def _attempt(
        self, data: bytes, finish: Callable[[Image.Image], T], read: Callable[[Image.Image], T | None]
    ) -> T | Failure:
        try:
            return self._decode(data, finish, read)
        except Image.DecompressionBombError as error:
            return too_large(error, self.max_pixels)
        except UnidentifiedImageError:
            return unidentified(data, self.formats)
        except MemoryError:
            return Failure("out_of_memory", f"not enough memory to decode {len(data):,} bytes")
        except DAMAGE as error:
            return damaged(error, data)

    def _decode(
        self, data: bytes, finish: Callable[[Image.Image], T], read: Callable[[Image.Image], T | None]
    ) -> T | Failure:
        opened = open_image(data, self.formats)
        if isinstance(opened, Failure):
            return opened
        with opened as image:
            pixels = image.width * image.height
            if pixels > self.max_pixels:
                return Failure(
                    "too_many_pixels",
                    f"{image.width} x {image.height} pixels, over images.max_pixels={self.max_pixels:,}",
                )
            with self.large_lock if pixels > LARGE_PIXELS else nullcontext():
                if (done := read(image)) is not None:
                    return done
                rgb = self._load(image, data)
                return rgb if isinstance(rgb, Failure) else finish(rgb)

    def _load(self, image: Image.Image, data: bytes) -> Image.Image | Failure:
        # Pillow turns a TIFF as it loads it, and leaves other formats as they are stored.
        turned_on_load = self.exif == "ignore" and image.format == "TIFF"
        orientation = image.getexif().get(ExifTags.Base.Orientation) if turned_on_load else None
        if self.kind == GLANCE:
            # JPEG at a fraction of its size, where that is large enough for a thumbnail.
            image.draft(None, GLANCE_SIZE)
        frame = frame_of(image)
        # JPEG decodes to RGB at once; other formats keep their own mode until the rule is known.
        image.load()
        if image.width * image.height > self.max_pixels:
            return Failure("too_many_pixels", f"{image.width} x {image.height} pixels once decoded")
        whole = settled(image, data, frame)
        if isinstance(whole, Failure):
            return whole
        if self.exif == "apply":
            turned = upright(whole)
        elif orientation in _UNTURNED:
            turned = whole.transpose(_UNTURNED[orientation])
        else:
            turned = whole
        return self._to_rgb(turned)

    def _to_rgb(self, image: Image.Image) -> Image.Image | Failure:
        if image.mode == "RGB" and "transparency" not in image.info:
            return image
        if image.mode.startswith("I") or image.mode == "F":
            grey = to_eight_bits(image)
            return grey if isinstance(grey, Failure) else self._to_rgb(grey)
        if image.has_transparency_data and self.transparency != "drop":
            rgba = image if image.mode == "RGBA" else image.convert("RGBA")
            background = Image.new("RGBA", rgba.size, (*_BACKGROUNDS[self.transparency], 255))
            return Image.alpha_composite(background, rgba).convert("RGB")
        return image.convert("RGB")


def limit_pixels(count: int) -> None:
    """Make Pillow refuse more than ``count`` pixels wherever a plugin opens an image of its own.

    The limit is global in Pillow, which raises at twice ``MAX_IMAGE_PIXELS``.
    """
    Image.MAX_IMAGE_PIXELS = max(1, count // 2)
    ImageFile.LOAD_TRUNCATED_IMAGES = False
