from __future__ import annotations

import pytest

from shardpoint.checksum import Partial, combine, crc64, pack_partials, shift, to_hex, unpack_partials, zeros


def bitwise(data: bytes) -> int:
    """Compute CRC-64/NVME bit by bit, from its definition."""
    crc = (1 << 64) - 1
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x9A6C9329AC4BC9B5 if crc & 1 else 0)
    return crc ^ ((1 << 64) - 1)


@pytest.mark.parametrize("data", [b"", b"\0", b"a", b"123456789", bytes(range(256)) * 3])
def test_it_is_the_published_checksum(data: bytes) -> None:
    assert crc64(data) == bitwise(data)
    assert crc64(memoryview(data)[len(data) // 2 :], crc64(data[: len(data) // 2])) == bitwise(data)


def test_the_published_check_value() -> None:
    assert crc64(b"123456789") == 0xAE8B14860A799888
    assert to_hex(0) == "0" * 16


def test_combine_is_concatenation() -> None:
    assert combine(crc64(b"1234"), crc64(b"56789"), 5) == crc64(b"123456789")
    assert combine(crc64(b"1234"), crc64(b""), 0) == crc64(b"1234")
    assert combine(crc64(b""), crc64(b"56789"), 5) == crc64(b"56789")


@pytest.mark.parametrize("size", [0, 1, 2, 3, 255, 4096, 100_003])
def test_zeros(size: int) -> None:
    assert zeros(size) == crc64(bytes(size))


def test_zeros_of_terabytes_needs_no_terabytes() -> None:
    assert zeros(3 * 10**12) == combine(zeros(10**12), zeros(2 * 10**12), 2 * 10**12)


def test_shift_is_linear() -> None:
    a, b = crc64(b"abc"), crc64(b"xyz")
    assert shift(a ^ b, 1_000) == shift(a, 1_000) ^ shift(b, 1_000)
    assert shift(shift(a, 10), 20) == shift(a, 30)


DATA = bytes(range(1, 41))
SIZE = len(DATA)
QUARTERS = [(0, 10), (10, 20), (20, 30), (30, 40)]


def partial_of(*cuts: tuple[int, int]) -> Partial:
    partial = Partial()
    for start, stop in cuts:
        partial.add(crc64(DATA[start:stop]), start, stop - start, SIZE)
    return partial


def test_runs_in_any_order_give_the_whole() -> None:
    partial = partial_of(*reversed(QUARTERS), (7, 7))
    assert partial.covers(SIZE)
    assert partial.whole_crc(SIZE) == crc64(DATA)


@pytest.mark.parametrize(
    "cuts",
    [
        pytest.param([], id="nothing"),
        pytest.param(QUARTERS[1:], id="first missing"),
        pytest.param(QUARTERS[:3], id="last missing"),
        pytest.param([*QUARTERS, QUARTERS[1]], id="one twice"),
        pytest.param([*QUARTERS[:2], QUARTERS[1], QUARTERS[3]], id="one in place of another"),
        pytest.param([(0, 10), (11, 21), (20, 30), (30, 40)], id="shifted"),
        pytest.param([(0, 39)], id="a byte short"),
        pytest.param([(10, 20), (10, 20), (20, 30), (20, 30)], id="inner quarters twice, outer never"),
        pytest.param([(0, 10), (0, 10), (30, 40), (30, 40)], id="outer quarters twice, inner never"),
        pytest.param([(1, 11), (9, 19), (20, 30), (30, 40)], id="shifted against each other"),
    ],
)
def test_a_cover_that_is_not_exact_is_noticed(cuts: list[tuple[int, int]]) -> None:
    assert not partial_of(*cuts).covers(SIZE)


def test_an_unowned_run_of_zeros_has_the_right_checksum_and_is_noticed_all_the_same() -> None:
    # What preallocation puts where nobody wrote.
    partial = Partial()
    partial.add(crc64(b"ab"), 0, 2, 6)
    assert partial.whole_crc(6) == crc64(b"ab\0\0\0\0")
    assert not partial.covers(6)


def test_an_empty_tensor_is_covered_by_nothing() -> None:
    assert Partial().covers(0)
    assert Partial().whole_crc(0) == crc64(b"")


def test_partials_travel() -> None:
    size = 3 * 10**12  # its square has more than 64 bits
    large = Partial()
    large.add(crc64(b"x"), size - 1, 1, size)
    large.add(0, 0, size - 1, size)
    sent = [(0, Partial()), (7, partial_of((0, 10), (30, 40))), (2**32 - 1, large)]
    assert large.covers(size)
    assert len(pack_partials(sent)) == 3 * 44
    assert unpack_partials(pack_partials(sent)) == sent
    assert unpack_partials(b"") == []
