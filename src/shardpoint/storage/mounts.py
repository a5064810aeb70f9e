"""What kind of filesystem a directory is on, and which kernel this process runs on."""

from __future__ import annotations

import os
import re
import uuid
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_MOUNTS = Path("/proc/self/mountinfo")
_ESCAPE = re.compile(r"\\([0-7]{3})")

# Clients of these cache pages by themselves: two hosts that write different bytes of one page overwrite each other.
_NOT_COHERENT = frozenset({"nfs", "nfs4", "cifs", "smb3", "9p", "virtiofs", "vboxsf"})


def kernel_id() -> str:
    """Return what identifies the running kernel: processes with the same one share locks and page cache."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return f"node-{uuid.getnode():x}"


def filesystem_type(path: str, mountinfo: str | None = None) -> str | None:
    """Return the type of the filesystem that a path is on, or will be on once it is made; None where none can be told.

    Args:
        path: need not exist.
        mountinfo: the text of `/proc/self/mountinfo`, for tests.
    """
    if mountinfo is None:
        try:
            mountinfo = _MOUNTS.read_text()
        except OSError:
            return None
    real = os.path.realpath(path)
    best: tuple[int, str] | None = None
    for line in mountinfo.splitlines():
        fields, _, rest = line.partition(" - ")
        columns = fields.split()
        if len(columns) < 5 or not rest:  # noqa: PLR2004 - the mount point is the fifth column (proc_pid_mountinfo(5))
            continue
        point = _ESCAPE.sub(lambda match: chr(int(match.group(1), 8)), columns[4])
        inside = real == point or real.startswith(point.rstrip("/") + "/")
        # A later line of the same mount point hides the earlier one.
        if inside and (best is None or len(point) >= best[0]):
            best = (len(point), rest.split()[0])
    return best[1] if best else None


def hosts_share_files(path: str) -> bool:
    """Tell whether several hosts may write disjoint bytes of one file at once on the filesystem of a path.

    NFS, SMB and FUSE clients keep their own pages, so not there. Lustre, GPFS, CephFS and BeeGFS keep them coherent by
    distributed locks; a local filesystem has one host only.
    """
    kind = filesystem_type(path)
    return kind is None or not (kind in _NOT_COHERENT or kind.startswith("fuse"))
