"""Is a simulated job as a real one: every byte owned once, votes that add up, a checkpoint that others can read?"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file

from shardpoint.catalog import verify
from shardpoint.checksum import crc64, merge_packed
from shardpoint.commit import committed_checkpoints
from shardpoint.engine import PlanCache
from shardpoint.errors import UsageError
from shardpoint.layout import Mesh, Placement
from shardpoint.planning import WriteItem
from shardpoint.storage import LocalStore
from shardpoint.testing import Simulation, VirtualTensor, llama3_405b, transformer_tensors

SHARD, REPLICATE = Placement("shard", 0), Placement("replicate")


def small_job() -> Simulation:
    """Return a decoder on 2 x 2 ranks."""
    tensors = transformer_tensors(
        num_layers=2, hidden=24, ffn=40, kv_hidden=8, vocab=50, data_parallel=2, tensor_parallel=2, dtype="F32"
    )
    return Simulation(tensors, 4, max_file_bytes=8_000)


def odd_job() -> Simulation:
    """Return 6 ranks that hold tensors in all ways: shared by replicas, on two stages, plain, uneven, empty."""
    everybody, pairs = Mesh((6,), tuple(range(6))), Mesh((3, 2), (5, 0, 3, 1, 4, 2))
    first, last = Mesh((3,), (0, 1, 2)), Mesh((3,), (3, 4, 5))
    return Simulation(
        [
            VirtualTensor("modeling", "replicated", "F32", (64, 65), (everybody,), (REPLICATE,)),
            VirtualTensor("modeling", "hybrid", "I64", (33, 50), (pairs,), (REPLICATE, SHARD)),
            VirtualTensor("modeling", "first", "F16", (7, 3), (first,), (SHARD,)),
            VirtualTensor("modeling", "last", "F32", (5, 3), (last,), (Placement("shard", 1),)),
            VirtualTensor("modeling", "both", "F32", (11,), (first, last), (SHARD,)),
            VirtualTensor("modeling", "plain", "U8", (9,), (everybody,)),
            VirtualTensor("modeling", "empty", "F32", (0, 4), (everybody,), (SHARD,)),
            VirtualTensor("critic/optimizer", "replicated", "F64", (), (everybody,), (REPLICATE,), "step"),
        ],
        6,
    )


def contents_of(job: Simulation) -> dict[tuple[str, str], npt.NDArray[Any]]:
    dice = np.random.default_rng(7)
    kinds = {"F32": "f4", "F64": "f8", "F16": "f2", "I64": "i8", "U8": "u1"}
    return {
        (tensor.part, tensor.key): dice.integers(0, 200, tensor.shape).astype(kinds[tensor.dtype])
        for tensor in job.tensors
    }


def on_disk(checkpoint: Path, job: Simulation) -> dict[tuple[str, str], npt.NDArray[Any]]:
    parts = {tensor.part for tensor in job.tensors}
    return {
        (part, key): array
        for part in parts
        for file in sorted((checkpoint / part).glob("*.safetensors"))
        for key, array in load_file(file).items()
    }


def assert_same(found: Mapping[Any, npt.NDArray[Any]], expected: Mapping[Any, npt.NDArray[Any]]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize("make", [small_job, odd_job])
@pytest.mark.parametrize("fanout", [2, 32])
def test_a_checkpoint_of_virtual_ranks_holds_what_they_held(make: Any, fanout: int, tmp_path: Path) -> None:
    job = make()
    contents = contents_of(job)
    result = job.write(LocalStore(tmp_path), "made", contents, fanout=fanout)
    assert result.num_tensors == len(job.tensors)
    assert_same(on_disk(tmp_path / "made", job), contents)
    (committed,) = committed_checkpoints(LocalStore(tmp_path))
    assert verify(LocalStore(tmp_path), committed).ok
    assert committed.manifest is not None
    tensors = {(tensor.part, tensor.key): tensor for tensor in committed.manifest.tensors}
    whole = job.judge(job.bundles(fanout, contents))
    for entry, covered, crc in zip(job.merged.entries, whole.covered, whole.crcs, strict=True):
        data = contents[entry.part, entry.key].tobytes()
        assert covered
        assert f"{crc:016x}" == f"{crc64(data):016x}" == tensors[entry.part, entry.key].crc64nvme


def test_virtual_ranks_hold_what_torch_would_give_them() -> None:
    job = small_job()
    assert [ranks for ranks, _ in job.tables] == [[0, 2], [1, 3]]
    first, second = (table for _, table in job.tables)
    assert first.facts == second.facts
    assert [mesh.ranks for mesh in first.meshes] == [(0, 1, 2, 3), (0, 2)]
    assert [mesh.ranks for mesh in second.meshes] == [(0, 1, 2, 3), (1, 3)]
    assert len(first.facts) == 3 * (9 * 2 + 3)


@pytest.mark.parametrize("make", [small_job, odd_job])
def test_every_byte_has_one_owner(make: Any) -> None:
    job = make()
    job.check_coverage()
    counts = [np.zeros(entry.num_bytes, dtype=int) for entry in job.merged.entries]
    for rank in range(job.world_size):
        for item in job.items(rank):
            for byte_offset, _, num_bytes in item.runs(job.merged):
                counts[item.entry][byte_offset : byte_offset + num_bytes] += 1
    assert all((count == 1).all() for count in counts)


@pytest.mark.parametrize("fault", ["nobody", "two"])
def test_a_byte_without_one_owner_is_noticed(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    job = odd_job()
    real = {rank: job.items(rank) for rank in range(job.world_size)}
    if fault == "nobody":
        item = real[2].pop()
    else:
        item = real[0][0]
        real[2].append(WriteItem(item.entry, item.region, item.local_start, item.local_start + 1))
    monkeypatch.setattr("shardpoint.testing.simulator.owned_items", lambda _table, rank: real[rank])
    with pytest.raises(AssertionError, match=job.merged.entries[item.entry].fqn):
        job.check_coverage()
    votes = [job.vote(rank) for rank in range(job.world_size)]
    assert not job.judge(votes).covered[item.entry]
    assert sum(not covered for covered in job.judge(votes).covered) == 1


def test_a_large_world_is_covered_and_its_votes_add_up() -> None:
    job = llama3_405b(num_layers=2, data_parallel=32, tensor_parallel=8)
    assert len(job.merged.entries) == 3 * (2 * 9 + 3)
    assert len(job.tables) == 8
    job.check_coverage()
    bundles = job.bundles(fanout=4)
    assert len(bundles) == 5
    whole = job.judge(bundles)
    assert all(whole.covered)
    # The quick way to a vote is the plain one.
    plain = Simulation(job.tensors, job.world_size)
    plain.__dict__["_kinds"] = None
    for rank in (0, 1, 100, 255):
        assert job.vote(rank) == plain.vote(rank)
    # A missing vote shows.
    lacking = [merge_packed([job.vote(rank) for rank in range(255)])]
    assert not all(job.judge(lacking).covered)


def test_votes_of_replicas_go_by_their_cuts() -> None:
    everybody = (Mesh((3,), (0, 1, 2)),)
    job = Simulation([VirtualTensor("modeling", f"w{n}", "U8", (9_000,), everybody, (REPLICATE,)) for n in range(4)], 3)
    job.check_coverage()
    assert all(job.judge([job.vote(rank) for rank in range(3)]).covered)
    zeros = {("modeling", f"w{n}"): np.zeros(9_000, np.uint8) for n in range(4)}
    assert [job.vote(rank) for rank in range(3)] == [job.vote(rank, zeros) for rank in range(3)]


def test_a_simulated_plan_is_cached_as_a_real_one() -> None:
    job = small_job()
    plan = PlanCache().plan(job.merged, job.naming, job.max_file_bytes, 3)
    assert plan.layout == job.layout
    assert list(plan.items) == job.items(3)


def test_a_description_of_no_world_is_refused() -> None:
    tensor = odd_job().tensors[0]
    with pytest.raises(UsageError, match="not in a world of 5 ranks"):
        _ = Simulation([tensor], 5).tables
    overlapping = replace(tensor, meshes=(Mesh((2,), (0, 1)), Mesh((2,), (1, 2))))
    with pytest.raises(UsageError, match="rank 1 is in two meshes"):
        _ = Simulation([overlapping], 6).tables


def test_planning_and_voting_do_without_torch() -> None:
    code = (
        "import sys\n"
        "from shardpoint.testing import llama3_405b\n"
        "job = llama3_405b(num_layers=1, data_parallel=2, tensor_parallel=2)\n"
        "job.check_coverage()\n"
        "assert all(job.judge(job.bundles()).covered)\n"
        "assert job.layout.files\n"
        "assert 'torch' not in sys.modules\n"
    )
    run = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
