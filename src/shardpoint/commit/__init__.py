"""The only place where a checkpoint becomes visible, is replaced, or goes away; and who may do that."""

from shardpoint.commit.attempt import Attempt
from shardpoint.commit.ownership import RootOwner, acquire_root, owned_root
from shardpoint.commit.pins import is_pinned, pin, pinned_names, unpin
from shardpoint.commit.publish import publish, publish_file, write_documents
from shardpoint.commit.removal import prune
from shardpoint.commit.visible import (
    CONTROL_DIRECTORY,
    Committed,
    committed_checkpoints,
    find_committed,
    read_manifest,
)

__all__ = [
    "CONTROL_DIRECTORY",
    "Attempt",
    "Committed",
    "RootOwner",
    "acquire_root",
    "committed_checkpoints",
    "find_committed",
    "is_pinned",
    "owned_root",
    "pin",
    "pinned_names",
    "prune",
    "publish",
    "publish_file",
    "read_manifest",
    "unpin",
    "write_documents",
]
