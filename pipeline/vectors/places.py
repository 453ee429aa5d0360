"""Where what is made of a dataset may lie."""

from __future__ import annotations

import os

from pipeline.addresses import is_local, local_path


def within(place: str, folder: str) -> bool:
    """Whether an address lies in a folder, however deep, or is that folder; links on this machine are followed.

    Readers of a dataset take every Parquet file below its folder for a part of it.
    """
    inner, outer = (os.path.realpath(local_path(each)) if is_local(each) else each for each in (place, folder))
    return f"{inner.rstrip('/')}/".startswith(f"{outer.rstrip('/')}/")
