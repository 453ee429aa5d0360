"""File name extensions of the formats that are decoded: which files of a folder or a tar are taken for images."""

from __future__ import annotations

# By the names of ``images.formats``, the usual one first. The job recognises a format by a file's content, never by its
# name.
BY_FORMAT: dict[str, tuple[str, ...]] = {
    "AVIF": (".avif", ".avifs"),
    "BMP": (".bmp",),
    "DIB": (".dib",),
    "GIF": (".gif",),
    "HEIF": (".heic", ".heics", ".heif", ".heifs", ".hif"),
    "ICO": (".ico",),
    # MPO, the format of 3-D cameras and gain maps, opens as the JPEG that it begins with.
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".pjp", ".pjpeg"),
    "JPEG2000": (".jp2", ".j2c", ".j2k", ".jpc", ".jpf", ".jpx"),
    "JXL": (".jxl",),
    "PCX": (".pcx",),
    "PNG": (".png", ".apng"),
    "PPM": (".ppm", ".pbm", ".pfm", ".pgm", ".pnm"),
    "QOI": (".qoi",),
    "SGI": (".sgi", ".bw", ".rgb", ".rgba"),
    "TGA": (".tga", ".icb", ".vda", ".vst"),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
}
EXTENSIONS = frozenset(extension for each in BY_FORMAT.values() for extension in each)


def extension_of(name: str) -> str:
    """The extension of a file's name in lower case, such as ``.jpg``; empty if it has none."""
    base = name.rpartition("/")[2]
    stem, dot, last = base.rpartition(".")
    return f".{last.lower()}" if dot and stem and last else ""
