"""A file as memory, shared with other processes that have the file."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import weakref
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_int64)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
# Linux alone has files of memory, and seals on them.
_SEALS = hasattr(os, "memfd_create") and hasattr(fcntl, "F_ADD_SEALS")
_FAILED = ctypes.c_void_p(-1).value
_NO_ACCESS, _ALL = 0, mmap.PROT_READ | mmap.PROT_WRITE


def shared(fd: int, size: int, start: int = 0) -> NDArray[np.uint8]:
    """``size`` bytes of a file from ``start``, a multiple of a page, for as long as the array or a view of it is held.

    They must be there for as long: to touch what is behind a file's end kills the process. Python's own ``mmap``
    would keep a descriptor of its own, which a decoder process may not open.

    Raises:
        OSError: the file is shorter, or there is no room for it among the addresses of this process.
    """
    if os.fstat(fd).st_size < start + size:
        raise OSError(errno.EINVAL, f"a file of less than {start + size:,} bytes")
    address = _map(fd, size, start, _ALL)
    array = _array(address, size)
    # Not as Python ends: others may hold it to the last.
    weakref.finalize(array, _libc.munmap, address, size).atexit = False
    return array


class Window:
    """Addresses for the first ``size`` bytes of a file that may still grow; one part of it can be touched at a time.

    To map a part anew would cost a page fault for every page of it.
    """

    def __init__(self, fd: int, size: int) -> None:
        self._size, self._address = size, _map(fd, size, 0, _NO_ACCESS)
        self._part = (0, 0)

    def fits(self, end: int) -> bool:
        """True if there are addresses up to byte ``end``."""
        return end <= self._size

    def part(self, start: int, size: int) -> NDArray[np.uint8]:
        """``size`` bytes of the file from ``start``, a multiple of a page; the part before cannot be touched any more.

        Raises:
            OSError: the system refuses.
        """
        for (where, length), rights in ((self._part, _NO_ACCESS), ((start, size), _ALL)):
            if length and _libc.mprotect(self._address + where, length, rights):
                raise OSError(ctypes.get_errno(), "memory of a file cannot be protected")
        self._part = (start, size)
        return _array(self._address + start, size)


def _map(fd: int, size: int, start: int, rights: int) -> int:
    address: int = _libc.mmap(None, size, rights, mmap.MAP_SHARED, fd, start)
    if address == _FAILED:
        raise OSError(ctypes.get_errno(), f"{size:,} bytes of a file cannot be mapped")
    return address


def _array(address: int, size: int) -> NDArray[np.uint8]:
    memory: Any = (ctypes.c_ubyte * size).from_address(address)
    array: NDArray[np.uint8] = np.frombuffer(memory, dtype=np.uint8)
    return array


def seal(fd: int) -> None:
    """Keep a file of memory from being shortened by any process, where the system can do that."""
    if _SEALS:
        with suppress(OSError):
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)


def cannot_shrink(fd: int) -> bool:
    """True if a file is sealed, so that its mapped pages stay."""
    try:
        return _SEALS and bool(fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK)
    except OSError:
        return False
