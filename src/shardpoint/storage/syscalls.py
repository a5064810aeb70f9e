"""How to reach the Linux calls that Python lacks, or gets wrong for us: fallocate, renameat2, statx, mmap and madvise.

`os.posix_fallocate` is not used: where the filesystem has no fallocate, glibc emulates it by writing zeros, which
overwrote other processes' bytes. `mmap.mmap(-1, n)` is not used: it maps shared memory, which gets no huge pages and
which a forked child keeps. What changes files or maps memory raises OSError; `populate`, which is advice, does not.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

import numpy as np

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
UNSUPPORTED = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP})

MADV_DONTFORK = 10
MADV_HUGEPAGE = 14
MADV_POPULATE_WRITE = 23

_AT_FDCWD = -100
_AT_EMPTY_PATH = 0x1000
_STATX_DIOALIGN = 0x2000
_STATX_BYTES = 256
_STATX_DIO_OFFSET_ALIGN = 156  # where `stx_dio_offset_align` stands; `stx_dio_mem_align` is just before it
_PROT_READ_WRITE = 3
_MAP_PRIVATE_ANONYMOUS = 0x22
_MAP_FAILED = ctypes.c_void_p(-1).value
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


def direct_alignment(descriptor: int) -> tuple[int, int]:
    """Return what O_DIRECT asks of a file: the alignment of memory and that of offsets, in bytes; 0 where unknown.

    Raises:
        OSError: `ENOSYS` where the system has no statx; otherwise as statx(2) says.
    """
    call = getattr(_libc, "statx", None)
    if call is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    call.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p]
    status = ctypes.create_string_buffer(_STATX_BYTES)
    if call(descriptor, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, status) != 0:
        _raise_errno("")
    memory, offset = struct.unpack_from("=II", status, _STATX_DIO_OFFSET_ALIGN - 4)
    return memory, offset


def map_pages(num_bytes: int) -> int:
    """Map private anonymous memory and return its address.

    Raises:
        OSError: `ENOMEM`.
    """
    _libc.mmap.restype = ctypes.c_void_p
    _libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
    address = _libc.mmap(None, num_bytes, _PROT_READ_WRITE, _MAP_PRIVATE_ANONYMOUS, -1, 0)
    if address is None or address == _MAP_FAILED:
        _raise_errno("")
    return int(address or 0)


def unmap_pages(address: int, num_bytes: int) -> None:
    """Give memory back that `map_pages` mapped.

    Raises:
        OSError: as munmap(2) says.
    """
    _libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    if _libc.munmap(address, num_bytes) != 0:
        _raise_errno("")


def advise_pages(address: int, num_bytes: int, advice: int) -> None:
    """Tell the kernel how memory will be used.

    Raises:
        OSError: `EINVAL` where the kernel does not know the advice; `ENOMEM`.
    """
    _libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    if _libc.madvise(address, num_bytes, advice) != 0:
        _raise_errno("")


def is_fresh(address: int, num_bytes: int) -> bool:
    """Tell whether memory was never touched, by the page in the middle of it."""
    call = getattr(_libc, "mincore", None)
    if call is None:
        return False
    call.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    resident = ctypes.create_string_buffer(1)
    middle = (address + num_bytes // 2) // _PAGE_BYTES * _PAGE_BYTES
    return call(middle, _PAGE_BYTES, resident) == 0 and not resident.raw[0] & 1


def resident_pages(address: int, num_bytes: int) -> int | None:
    """Count the pages of a mapping that are in memory, without fetching any.

    Args:
        address: of a page.
        num_bytes: how far, from there.

    Returns:
        The number; of a file of another user's, which the kernel does not tell, all. None where the system cannot say.
    """
    call = getattr(_libc, "mincore", None)
    if call is None:
        return None
    call.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    resident = ctypes.create_string_buffer(-(-num_bytes // _PAGE_BYTES))
    if call(address, num_bytes, resident) != 0:
        return None
    return int((np.frombuffer(resident.raw, dtype=np.uint8) & 1).sum())


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
    made: bool = call(first, stop - first, MADV_POPULATE_WRITE) == 0
    return made
