"""The process belongs to the caller: what a job sets for all of it is set back."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

# An iterator of images may itself call a job.
_TURN = threading.RLock()


@contextmanager
def settings_kept() -> Iterator[None]:
    """Leave PyTorch's threads and precision, and Pillow's limit on pixels, as they were.

    They and the log's handlers are those of the process, so that calls in several threads take turns.
    """
    import torch
    from PIL import Image

    with _TURN:
        threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
        tf32, pixels = torch.backends.cudnn.allow_tf32, Image.MAX_IMAGE_PIXELS
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            torch.set_float32_matmul_precision(precision)
            torch.backends.cudnn.allow_tf32 = tf32
            Image.MAX_IMAGE_PIXELS = pixels
