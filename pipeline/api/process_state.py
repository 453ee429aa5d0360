"""Save and restore process-wide settings that a job changes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.core.processes import give_home

# Reentrant, as an iterator of images may call the API itself.
_LOCK = threading.RLock()


@contextmanager
def settings_restored() -> Iterator[None]:
    """Restore PyTorch's threads and precision and Pillow's pixel limit afterwards.

    These and the log's handlers belong to the process, so calls in several threads run one after another.
    """
    import torch
    from PIL import Image

    give_home()
    with _LOCK:
        threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
        tf32, pixels = torch.backends.cudnn.allow_tf32, Image.MAX_IMAGE_PIXELS
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            torch.set_float32_matmul_precision(precision)
            torch.backends.cudnn.allow_tf32 = tf32
            Image.MAX_IMAGE_PIXELS = pixels
