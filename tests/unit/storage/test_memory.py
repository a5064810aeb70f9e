"""Is staging memory aligned, bounded, used again and given back?"""

from __future__ import annotations

import os
import threading

import pytest

from shardpoint.errors import UsageError
from shardpoint.storage import Buffer, BufferPool

MIB = 2**20
WAIT_S = 30.0


def test_a_buffer_is_aligned_writable_and_goes_away() -> None:
    events: list[str] = []

    def pin(address: int, num_bytes: int) -> object:
        events.append(f"pinned {num_bytes}")
        assert address % 4096 == 0
        return lambda: events.append("unpinned")

    buffer = Buffer(3 * MIB, pin)  # type: ignore[arg-type]  # a lambda's None
    assert buffer.array.shape == (3 * MIB,)
    assert buffer.array.ctypes.data == buffer.address
    buffer.array[:] = 7
    assert int(buffer.array.sum()) == 7 * 3 * MIB
    buffer.close()
    buffer.close()
    assert events == [f"pinned {3 * MIB}", "unpinned"]


def test_a_forked_child_does_not_have_it() -> None:
    buffer = Buffer(MIB)
    child = os.fork()
    if child == 0:
        buffer.close()  # must not unmap what the child has there
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    buffer.array[:] = 1
    buffer.close()


def test_buffers_are_used_again() -> None:
    pool = BufferPool(4 * MIB)
    assert pool.buffer_bytes == MIB
    first = pool.acquire()
    assert first is not None
    pool.release(first)
    assert pool.acquire() is first
    assert pool.num_bytes == MIB


@pytest.mark.parametrize(
    "budget, buffer_bytes", [(64 * MIB, 16 * MIB), (20 * MIB, 5 * MIB), (2 * MIB, MIB), (3 * MIB + 5, MIB)]
)
def test_a_budget_is_cut_into_four_buffers_or_fewer(budget: int, buffer_bytes: int) -> None:
    pool = BufferPool(budget)
    assert pool.buffer_bytes == buffer_bytes
    taken = []
    while (buffer := pool.acquire(give_up=lambda: True)) is not None:
        taken.append(buffer)
    assert 2 <= len(taken) == budget // buffer_bytes
    assert pool.num_bytes <= budget


def test_who_finds_none_waits_until_one_is_given_back() -> None:
    pool = BufferPool(2 * MIB)
    held = [pool.acquire(), pool.acquire()]
    got: list[Buffer | None] = []
    thread = threading.Thread(target=lambda: got.append(pool.acquire()), daemon=True)
    thread.start()
    pool.wait_until(lambda: False)  # returns since somebody waits
    assert held[0] is not None
    pool.release(held[0])
    thread.join(WAIT_S)
    assert got == [held[0]]
    beyond = pool.acquire(beyond_budget=True)
    assert beyond is not None
    assert pool.num_bytes == 3 * MIB
    pool.release(beyond)
    assert pool.num_bytes == 2 * MIB


def test_a_closed_pool_gives_nothing_and_takes_back() -> None:
    pool = BufferPool(None, MIB)
    held = pool.acquire()
    assert held is not None
    pool.close()
    assert pool.acquire(give_up=lambda: False) is None
    pool.release(held)
    assert pool.num_bytes == 0


def test_a_budget_for_less_than_two_is_refused() -> None:
    with pytest.raises(UsageError, match="two buffers"):
        BufferPool(2 * MIB - 1)
