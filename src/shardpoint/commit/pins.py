"""Which checkpoints a person wants to stay, whatever a run's policies say: an empty file for each, by its name.

Pins lie in `.shardpoint/pins/`, beside the incarnations: no checkpoint has a file more because of one, and none is lost
when a checkpoint is replaced or a root changes its owner. Who pins needs no ownership, so pruning looks for a pin last
of all.
"""

from __future__ import annotations

from contextlib import suppress

from shardpoint.commit.visible import CONTROL_DIRECTORY, find_committed
from shardpoint.errors import AlreadyExistsError, NotFoundError
from shardpoint.storage import Store, SyncPoint

_PINS = f"{CONTROL_DIRECTORY}/pins"


def pinned_names(store: Store) -> frozenset[str]:
    """Return the names that are pinned; a name may have no checkpoint any more.

    Raises:
        StorageError: the pins cannot be read.
    """
    try:
        return frozenset(entry.name for entry in store.entries(_PINS))
    except NotFoundError:
        return frozenset()


def is_pinned(store: Store, name: str) -> bool:
    """Return whether a name is pinned."""
    return store.exists(f"{_PINS}/{name}")


def pin(store: Store, name: str) -> None:
    """Keep a committed checkpoint from being pruned, by any run; one that is pinned already stays so.

    Args:
        store: the root.
        name: the checkpoint.

    Raises:
        NotFoundError: there is no committed checkpoint of that name, or a run pruned it in this moment.
        StorageError: the pin cannot be written.

    Durability:
        On return the pin survives power loss.
    """
    _check_committed(store, name)
    for directory in (CONTROL_DIRECTORY, _PINS):
        with suppress(AlreadyExistsError):
            store.make_directory(directory)
        store.sync_directory(directory.rpartition("/")[0], SyncPoint.PARENT)
    with suppress(AlreadyExistsError):
        store.write_document(f"{_PINS}/{name}", b"", SyncPoint.DOCUMENT)
    store.sync_directory(_PINS, SyncPoint.PARENT)
    # Race: a run that looked for a pin before this one was there may be pruning it.
    try:
        _check_committed(store, name)
    except NotFoundError:
        with suppress(NotFoundError):
            store.remove_tree(f"{_PINS}/{name}")
        raise


def unpin(store: Store, name: str) -> None:
    """Let a checkpoint be pruned again; it need not be there any more.

    Args:
        store: the root.
        name: the checkpoint.

    Raises:
        NotFoundError: it is not pinned.
        StorageError: the pin cannot be deleted.

    Durability:
        On return the pin is gone, and a power loss does not bring it back.
    """
    try:
        store.remove_tree(f"{_PINS}/{name}")
    except NotFoundError:
        text = f"{name} in {store.location} is not pinned"
        raise NotFoundError(text) from None
    store.sync_directory(_PINS, SyncPoint.PARENT)


def _check_committed(store: Store, name: str) -> None:
    if find_committed(store, name) is None:
        text = f"{name} in {store.location} is not a committed checkpoint: there is nothing to pin"
        raise NotFoundError(text)
