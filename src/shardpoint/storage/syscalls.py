"""How to reach the Linux calls that Python's os module lacks, or gets wrong for us: fallocate and renameat2.

`os.posix_fallocate` is not used: where the filesystem has no fallocate, glibc emulates it by writing zeros, which
overwrote other processes' bytes. Every function here raises OSError.
"""

from __future__ import annotations

import ctypes
import errno
import os

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
UNSUPPORTED = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP})

_AT_FDCWD = -100
_libc = ctypes.CDLL(None, use_errno=True)


def _raise_errno(path: str) -> None:
    number = ctypes.get_errno()
    raise OSError(number, os.strerror(number), path)


def fallocate(descriptor: int, num_bytes: int) -> None:
    """Reserve space for a file and set its size.

    Raises:
        OSError: `EOPNOTSUPP` or `ENOSYS` where the filesystem, or the system, has no fallocate; `ENOSPC` where it is
            full.
    """
    call = getattr(_libc, "fallocate", None)
    if call is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    call.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    while call(descriptor, 0, 0, num_bytes) != 0:
        if ctypes.get_errno() != errno.EINTR:
            _raise_errno("")


def renameat2(source: str, target: str, flags: int) -> None:
    """Rename with `RENAME_NOREPLACE` or `RENAME_EXCHANGE`.

    Raises:
        OSError: an errno in `UNSUPPORTED` where the flag is not supported there; any other as rename(2) has.
    """
    call = getattr(_libc, "renameat2", None)
    if call is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    call.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    if call(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flags) != 0:
        _raise_errno(source)
