from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from shardpoint.checksum import (
    Partial,
    combine,
    crc64,
    merge_packed,
    pack_partials,
    shift,
    to_hex,
    unpack_partials,
    whole_tensors,
    zeros,
)


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


def merged_one_by_one(votes: Sequence[Sequence[tuple[int, Partial]]]) -> list[tuple[int, Partial]]:
    totals: dict[int, Partial] = {}
    for vote in votes:
        for index, partial in vote:
            totals.setdefault(index, Partial()).merge(partial)
    return sorted(totals.items())


def random_votes(seed: int) -> list[list[tuple[int, Partial]]]:
    """Return votes of which some name a tensor twice or none; the sums of squares need their 128 bits and carry."""
    dice = random.Random(seed)

    def partial() -> Partial:
        square = dice.choice([0, 2**32 - 1, 2**64 - 1, 2**96 - 1, 2**121 - 1, dice.getrandbits(121)])
        return Partial(dice.getrandbits(64), dice.getrandbits(56), square, dice.getrandbits(64))

    return [[(dice.choice([0, 1, 5, 2**32 - 1]), partial()) for _ in range(dice.randrange(9))] for _ in range(12)]


@pytest.mark.parametrize("seed", range(5))
def test_packed_partials_merge_as_partials_do(seed: int) -> None:
    votes = random_votes(seed)
    packed = [pack_partials(vote) for vote in votes]
    assert unpack_partials(merge_packed(packed)) == merged_one_by_one(votes)
    # In any grouping and order.
    grouped = merge_packed([merge_packed(packed[7:]), *packed[3:7], merge_packed(packed[:3])])
    assert grouped == merge_packed(packed)


def test_merging_nothing_is_nothing() -> None:
    assert merge_packed([]) == merge_packed([b"", b""]) == b""
    with pytest.raises(ValueError, match="multiple"):
        merge_packed([b"abc"])


def test_whole_tensors_are_what_their_partials_cover() -> None:
    sizes = [100, 0, 7 * 2**40, 100, 100, 2**33, 50]
    random_bytes = random.Random(3).randbytes(100)
    votes: list[list[tuple[int, Partial]]] = [[], [], []]
    for rank, cuts in enumerate([[(0, 40)], [(40, 90)], [(90, 100)]]):
        votes[rank].append((0, counted(random_bytes, cuts)))
    votes[0].append((2, zero_run(0, 2**40, sizes[2])))
    votes[1].append((2, zero_run(2**40, 6 * 2**40, sizes[2])))
    votes[0].append((3, counted(random_bytes, [(0, 40)])))  # a hole
    votes[1].append((4, counted(random_bytes, [(0, 25), (25, 50), (25, 50), (75, 100)])))  # twice, and never
    votes[2].append((5, zero_run(0, 2**33, 2**33)))
    votes[2].append((6, zero_run(0, 51, 51)))
    whole = whole_tensors([pack_partials(vote) for vote in votes], sizes)
    totals = dict(merged_one_by_one(votes))
    assert whole.covered == [totals.get(i, Partial()).covers(size) for i, size in enumerate(sizes)]
    assert whole.covered == [True, True, True, False, False, True, False]
    assert whole.counted_bytes == [100, 0, 7 * 2**40, 40, 100, 2**33, 51]
    assert whole.crcs[0] == crc64(random_bytes)
    assert whole.crcs[1] == 0
    assert whole.crcs[2] == zeros(7 * 2**40)
    assert whole.crcs[5] == zeros(2**33)


def test_a_cover_whose_first_two_sums_are_right_is_refused() -> None:
    # Quarters: the inner two twice, the outer two never. Symmetric about the middle.
    faulty = counted(bytes(100), [(25, 50), (25, 50), (50, 75), (50, 75)])
    assert (faulty.sum_bytes, faulty.sum_squares) == (100, 100 * 100)
    assert whole_tensors([pack_partials([(0, faulty)])], [100]).covered == [False]


@pytest.mark.parametrize("change", [{"sum_bytes": 1}, {"sum_squares": 1}, {"sum_squares": 1 << 64}, {"sum_mixed": 1}])
def test_a_cover_of_which_one_sum_is_wrong_is_refused(change: dict[str, int]) -> None:
    partial = zero_run(0, 2**40, 2**40)
    assert whole_tensors([pack_partials([(0, partial)])], [2**40]).covered == [True]
    for name, by in change.items():
        setattr(partial, name, getattr(partial, name) ^ by)
    assert whole_tensors([pack_partials([(0, partial)])], [2**40]).covered == [False]


def test_a_partial_of_no_tensor_is_refused() -> None:
    with pytest.raises(ValueError, match="tensor 2, but there are 2 tensors"):
        whole_tensors([pack_partials([(2, Partial())])], [1, 1])


def counted(data: bytes, cuts: Sequence[tuple[int, int]]) -> Partial:
    partial = Partial()
    for start, stop in cuts:
        partial.add(crc64(data[start:stop]), start, stop - start, len(data))
    return partial


def zero_run(start: int, num_bytes: int, total_bytes: int) -> Partial:
    partial = Partial()
    partial.add(zeros(num_bytes), start, num_bytes, total_bytes)
    return partial
