"""How to reach the Linux calls that Python's os module lacks, or gets wrong for us: fallocate, renameat2, madvise.

`os.posix_fallocate` is not used: where the filesystem has no fallocate, glibc emulates it by writing zeros, which
overwrote other processes' bytes. What changes files raises OSError; advice about memory that is refused does not.
"""

from __future__ import annotations

import ctypes
import errno
import os

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
UNSUPPORTED = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP})

_AT_FDCWD = -100
_MADV_POPULATE_WRITE = 23
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
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


def is_fresh(address: int, num_bytes: int) -> bool:
    """Tell whether memory was never touched, by the page in the middle of it."""
    call = getattr(_libc, "mincore", None)
    if call is None:
        return False
    call.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    resident = ctypes.create_string_buffer(1)
    middle = (address + num_bytes // 2) // _PAGE_BYTES * _PAGE_BYTES
    return call(middle, _PAGE_BYTES, resident) == 0 and not resident.raw[0] & 1


def populate(address: int, num_bytes: int) -> bool:
    """Have the whole pages of a range of private memory made at once, which costs less than one fault for each.

    The first touch of a page costs a fault and its zeroing: filling fresh memory takes several times as long as the
    read. Huge pages (`MADV_HUGEPAGE`) are not asked for: where a hypervisor takes free memory back, those are the pages
    that it has taken, and a load into them took twice as long (measured).

    Returns:
        Whether the kernel did. Where it cannot (before Linux 5.14), the pages are made one by one as they are filled.
    """
    first = -(-address // _PAGE_BYTES) * _PAGE_BYTES
    stop = (address + num_bytes) // _PAGE_BYTES * _PAGE_BYTES
    call = getattr(_libc, "madvise", None)
    if call is None or first >= stop:
        return False
    call.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    made: bool = call(first, stop - first, _MADV_POPULATE_WRITE) == 0
    return made
