"""Which filesystem is a root on, and may several hosts write one file there?"""

from __future__ import annotations

from pathlib import Path

import pytest

from shardpoint.storage import LocalStore
from shardpoint.storage.mounts import filesystem_type, kernel_id

MOUNTS = r"""
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 22 0:40 / /data rw shared:2 - nfs4 server:/export rw,vers=4.2
31 30 0:41 / /data/scratch rw - lustre mgs:/fs rw
32 22 0:42 / /with\040space rw master:3 - fuse.sshfs host:/ rw
33 22 8:2 / /data2 rw - xfs /dev/sdb1 rw
34 22 0:43 / /twice rw - tmpfs tmpfs rw
35 22 0:44 / /twice rw - cifs //server/share rw
malformed line
""".strip()


@pytest.mark.parametrize(
    "path, kind",
    [
        ("/srv/x", "ext4"),
        ("/data", "nfs4"),
        ("/data/runs/a", "nfs4"),
        ("/data2/runs", "xfs"),
        ("/data/scratch/runs", "lustre"),
        ("/with space/runs", "fuse.sshfs"),
        ("/twice/runs", "cifs"),
    ],
)
def test_the_longest_and_last_mount_point_decides(path: str, kind: str) -> None:
    assert filesystem_type(path, MOUNTS) == kind


def test_nothing_can_be_told_without_mounts() -> None:
    assert filesystem_type("/anywhere", "") is None


@pytest.mark.parametrize(
    "kind, shared",
    [
        ("ext4", "any"),
        ("lustre", "any"),
        ("ceph", "any"),
        ("nfs", "one_host"),
        ("nfs4", "one_host"),
        ("fuse.s3fs", "one_host"),
        (None, "any"),
    ],
)
def test_a_store_finds_out_who_may_share_files(
    kind: str | None, shared: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shardpoint.storage.mounts.filesystem_type", lambda _: kind)
    assert LocalStore(tmp_path).shared_files == shared


def test_the_user_has_the_last_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardpoint.storage.mounts.filesystem_type", lambda _: "nfs")
    assert LocalStore(tmp_path, shared_files=True).shared_files == "any"
    assert LocalStore(tmp_path, shared_files=False).shared_files == "never"


def test_the_kernel_has_one_name() -> None:
    assert kernel_id() == kernel_id() != ""
