"""Fast reading of regular files below a folder, where the kernel itself keeps a path within it (Linux 5.6).

What it does not read is read, or refused with the reason, by the slower way of :mod:`pipeline.images.sources.source`.
"""

from __future__ import annotations

import ctypes
import os
import stat
import sys

# Of linux/openat2.h and asm/unistd.h, where the number is the same for every architecture that torch runs on.
_OPENAT2 = 437
_RESOLVE_NO_MAGICLINKS, _RESOLVE_BENEATH = 0x02, 0x08
_libc = ctypes.CDLL(None)


class _How(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


class Folder:
    """A folder that is kept open; paths are resolved below it, links and ``..`` included.

    Absolute paths may begin with one of its ``names``.
    """

    def __init__(self, path: str, *names: str) -> None:
        self._descriptor = -1
        self._names = tuple({f"{name.rstrip('/')}/" for name in (path, *names)})
        if sys.platform == "linux" and path:
            self._how = _How(os.O_PATH | os.O_CLOEXEC, 0, _RESOLVE_BENEATH | _RESOLVE_NO_MAGICLINKS)
            try:
                self._descriptor = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            except OSError:
                # The slower way says why.
                return

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def read(self, path: str, start: int, stop: int | None, most: int) -> bytes | None:
        """Bytes ``start`` to ``stop`` of a regular file, or all from ``start`` on.

        None for whatever else: an address, a path that leads out, no such file, no permission, no bytes, more than
        ``most``.
        """
        if self._descriptor < 0 or ":" in path or "\0" in path:
            return None
        if path.startswith("/"):
            known = next((name for name in self._names if path.startswith(name)), None)
            if known is None:
                return None
            path = path[len(known) :]
        found: int = _libc.syscall(
            _OPENAT2, self._descriptor, os.fsencode(path), ctypes.byref(self._how), ctypes.sizeof(_How)
        )
        if found < 0:
            return None
        try:
            status = os.fstat(found)
            # Opening a device can do something, and a named pipe waits.
            size = (status.st_size if stop is None else min(stop, status.st_size)) - start
            if not stat.S_ISREG(status.st_mode) or not 0 < size <= most or (stop or 0) - start > most:
                return None
            opened = os.open(f"/proc/self/fd/{found}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                data = os.pread(opened, size, start)
            finally:
                os.close(opened)
        except OSError:
            return None
        finally:
            os.close(found)
        return data if len(data) == size else None
