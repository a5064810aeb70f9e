"""Are bytes read in few calls, by threads whose failures reach the caller, and by each replica in its own order?"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from shardpoint import Checkpointer, TrainState
from shardpoint.adapters.collect import Collected, Held
from shardpoint.adapters.destinations import Destinations
from shardpoint.adapters.names import name_tensors
from shardpoint.checksum import crc64
from shardpoint.comm import Comm, SoloComm, in_process_comms
from shardpoint.engine import LoadResult, Source, StructureCache, Target, load, open_checkpoint, open_committed
from shardpoint.engine.filling import Readers, fill
from shardpoint.errors import ChecksumError, NotFoundError, PeerError, StorageError, TruncatedError
from shardpoint.layout import Mesh
from shardpoint.planning import Wanted, plan_reads
from shardpoint.storage import LocalStore, Store
from shardpoint.testing import Fault, FaultyStore
from tests.training import bits, flip, on_disk, weights
from tests.unit.comm.threads import run_threads

NAME = "epoch-0_step-1"
FILE = f"{NAME}/modeling/model-00001-of-00001.safetensors"
MIB = 2**20


class Many(nn.Module):
    def __init__(self, count: int, length: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(length)) for _ in range(count)])


def saved(root: Path, model: nn.Module) -> nn.Module:
    with Checkpointer(root) as checkpointer:
        checkpointer.save(TrainState(model=model), epoch=0, step=1, batch_size=1)
    return model


def load_into(
    model: nn.Module, store: Store, comm: Comm | None = None, held: dict[str, Held] | None = None
) -> LoadResult:
    """Load on one rank; `held` replaces what the model holds by parts of it."""
    comm = SoloComm() if comm is None else comm

    def prepare(source: Source) -> Target:
        del source
        collected = Collected(comm.rank)
        named = name_tensors(model)
        if comm.world_size > 1:
            mesh = Mesh((comm.world_size,), tuple(range(comm.world_size)))
            for tensor in named.tensors:
                collected._add("modeling", tensor.fqn, None, tensor.fqn, tensor.tensor, mesh)
        else:
            collected.add_model(named, "modeling", "adapter")
        if held is not None:
            collected.held = {("modeling", name): item for name, item in held.items()}
        return Target(collected, frozenset({"modeling"}), lambda: None)

    return load(comm, lambda: open_committed(store, NAME), prepare, StructureCache())


def test_ten_thousand_small_tensors_cost_a_handful_of_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = saved(tmp_path, Many(10_000, 256, 0)), Many(10_000, 256, 1)
    calls: list[int] = []
    preadv = os.preadv

    def counted(descriptor: int, views: Any, offset: int) -> int:
        calls.append(len(views))
        return preadv(descriptor, views, offset)

    monkeypatch.setattr(os, "preadv", counted)
    result = load_into(two, LocalStore(tmp_path))
    assert len(calls) <= 12
    assert result.num_bytes == 10_000 * 1024
    assert result.num_bytes <= result.read_bytes <= 1.01 * result.num_bytes
    assert result.num_tensors == 10_000
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_a_tensor_larger_than_a_piece_is_read_in_place_by_several_threads(tmp_path: Path) -> None:
    one, two = saved(tmp_path, Many(3, 5 * MIB // 2, 0)), Many(3, 5 * MIB // 2, 1)
    pointers = [parameter.data_ptr() for parameter in two.parameters()]
    store = FaultyStore(LocalStore(tmp_path))
    assert load_into(two, store).verified
    assert [parameter.data_ptr() for parameter in two.parameters()] == pointers
    assert len([op for op, _ in store.log if op == "read"]) >= 8
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_destinations_that_are_not_plain_memory(tmp_path: Path) -> None:
    one, two = nn.Module(), nn.Module()
    for module, seed in ((one, 0), (two, 1)):
        torch.manual_seed(seed)
        module.register_buffer("strided", torch.randn(6, 4).t())
        module.register_buffer("conjugate", torch.randn(2**19, 3, dtype=torch.complex64).conj())
        module.register_buffer("columns", torch.randn(9, 8)[:, ::2])
        module.register_buffer("plain", torch.randn(5).to(torch.bfloat16))
        module.register_buffer("empty", torch.randn(0, 3))
    saved(tmp_path, one)
    strides = {name: tensor.stride() for name, tensor in two.named_buffers()}
    assert load_into(two, LocalStore(tmp_path)).verified
    for name, tensor in one.named_buffers():
        assert bits(two.get_buffer(name)) == bits(tensor), name
    assert {name: tensor.stride() for name, tensor in two.named_buffers()} == strides


def test_an_error_of_a_reading_thread_is_the_callers(tmp_path: Path) -> None:
    saved(tmp_path, Many(1, 16 * MIB, 0))
    for nth in (1, 3, 9):
        store = FaultyStore(LocalStore(tmp_path), [Fault("read", "*.safetensors", nth=nth)])
        with pytest.raises(StorageError, match=r"injected") as caught:
            load_into(Many(1, 16 * MIB, 1), store)
        assert caught.value.key == FILE
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("shardpoint-read")]


def test_an_error_of_a_reading_thread_is_every_ranks(tmp_path: Path) -> None:
    saved(tmp_path, Many(1, 16 * MIB, 0))

    def rank_main(comm: Comm) -> Any:
        faults = [Fault("read", "*.safetensors", nth=2)] if comm.rank == 1 else []
        return load_into(Many(1, 16 * MIB, 1), FaultyStore(LocalStore(tmp_path), faults), comm)

    first, second = run_threads(in_process_comms(2), rank_main)
    assert type(first) is type(second) is PeerError
    assert str(first) == str(second)
    assert list(first.failures) == [1]
    assert first.failures[1].type == "StorageError"


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


@pytest.mark.parametrize("when", [1, 3])
def test_a_file_that_shrinks_while_it_is_read_is_truncated(when: int, tmp_path: Path) -> None:
    saved(tmp_path, Many(1, 16 * MIB, 0))
    fault = Fault("read", "*.safetensors", nth=when, action="call", then=lambda: cut_short(tmp_path / FILE))

    def rank_main(comm: Comm) -> Any:
        faults = [fault] if comm.rank == 1 else []
        return load_into(Many(1, 16 * MIB, 1), FaultyStore(LocalStore(tmp_path), faults), comm)

    for outcome in run_threads(in_process_comms(2), rank_main):
        assert type(outcome) is TruncatedError, repr(outcome)
        assert outcome.target_modified


def test_a_file_that_vanishes_is_lost_or_pruned(tmp_path: Path) -> None:
    saved(tmp_path, Many(1, 64, 0))
    for victim, kind in ((FILE, TruncatedError), (NAME, NotFoundError)):

        def take_away(path: Path = tmp_path / victim) -> None:
            path.rename(tmp_path / "aside")

        fault = Fault("open_reader", "*.safetensors", action="call", then=take_away)
        with pytest.raises(kind) as caught:
            load_into(Many(1, 64, 1), FaultyStore(LocalStore(tmp_path), [fault]))
        assert type(caught.value) is kind
        (tmp_path / "aside").rename(tmp_path / victim)


def test_replicas_count_each_byte_once_and_notice_a_flipped_one(tmp_path: Path) -> None:
    one = saved(tmp_path, Many(5, 300_000, 0))

    def rank_main(comm: Comm) -> Any:
        model = Many(5, 300_000, 1 + comm.rank)
        return load_into(model, LocalStore(tmp_path), comm), weights(model)

    for result, found in run_threads(in_process_comms(3), rank_main):
        assert result.verified
        assert result.num_bytes == 5 * 1_200_000
        assert all(torch.equal(found[name], tensor) for name, tensor in weights(one).items())
    flip(tmp_path / FILE)

    def rank_fails(comm: Comm) -> Any:
        return load_into(Many(5, 300_000, 9), LocalStore(tmp_path), comm)

    outcomes = run_threads(in_process_comms(3), rank_fails)
    assert [type(outcome) for outcome in outcomes] == [ChecksumError] * 3
    assert {(str(outcome), outcome.key, outcome.target_modified) for outcome in outcomes} == {
        (str(outcomes[0]), "modeling/model-00001-of-00001.safetensors#weights.4", True)
    }


def test_each_replica_starts_elsewhere(tmp_path: Path) -> None:
    saved(tmp_path, Many(8, MIB, 0))  # 8 tensors of 4 MiB
    offsets: dict[int, list[int]] = {}

    def rank_main(comm: Comm) -> Any:
        store = LocalStore(tmp_path)
        reads: list[int] = offsets.setdefault(comm.rank, [])
        open_reader = store.open_reader

        def recording(key: str) -> Any:
            reader = open_reader(key)
            read_vectors = reader.read_vectors

            def read(targets: Any, byte_offset: int) -> None:
                reads.append(byte_offset)
                read_vectors(targets, byte_offset)

            reader.read_vectors = read  # type: ignore[method-assign]
            return reader

        store.open_reader = recording  # type: ignore[method-assign]
        return load_into(Many(8, MIB, 1), store, comm)

    results = run_threads(in_process_comms(2), rank_main)
    assert all(isinstance(result, LoadResult) for result in results), results
    size = (tmp_path / FILE).stat().st_size
    assert min(offsets[0][:2]) < size // 4
    assert size // 4 < min(offsets[1][:2]), "the second replica begins with its half"
    assert set(offsets[0]) == set(offsets[1])


def test_progress_is_told_of_every_byte(tmp_path: Path) -> None:
    saved(tmp_path, Many(3, MIB, 0))
    told: list[int] = []
    comm = SoloComm()
    comm.progress = told.append  # type: ignore[method-assign, assignment]
    result = load_into(Many(3, MIB, 1), LocalStore(tmp_path), comm)
    assert sum(told) == result.read_bytes
    assert len(told) >= 3


def test_files_are_closed_whatever_happens(tmp_path: Path) -> None:
    saved(tmp_path, Many(1, 4 * MIB, 0))
    before = len(list(Path("/proc/self/fd").iterdir()))
    load_into(Many(1, 4 * MIB, 1), LocalStore(tmp_path))
    with pytest.raises(StorageError):
        load_into(Many(1, 4 * MIB, 1), FaultyStore(LocalStore(tmp_path), [Fault("read", "*.safetensors", nth=2)]))
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_file_is_closed_after_its_last_read(tmp_path: Path) -> None:
    saved(tmp_path, Many(1, 64, 0))
    source = open_committed(LocalStore(tmp_path), NAME)
    reads = plan_reads([Wanted(0, 0, (0, 0, 64), (0, 0)), Wanted(0, 6000, (0, 0, 64), (0, 0))]).reads
    before = len(list(Path("/proc/self/fd").iterdir()))
    readers = Readers(source, reads)
    for _ in reads:
        readers.take(0)
        assert len(list(Path("/proc/self/fd").iterdir())) == before + 1
        readers.give_back(0)
    assert len(reads) == 2
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    readers.close()


def test_what_is_asked_before_each_read_can_end_it(tmp_path: Path) -> None:
    model = saved(tmp_path, Many(1, 8 * MIB, 0))
    source = open_committed(LocalStore(tmp_path), NAME)
    stored = source.manifest.tensors[0]
    out = torch.zeros(8 * MIB)
    plan = plan_reads([Wanted(stored.file, stored.byte_offset, (0, 0, stored.num_bytes), (0, stored.num_bytes))])
    readers = Readers(source, plan.reads)
    (partial,) = fill(readers, plan, [Destinations().of(out)], [stored.num_bytes], lambda _: None)
    assert torch.equal(out, next(model.parameters()))
    assert partial.whole_crc(stored.num_bytes) == crc64(out.numpy().tobytes())

    def stop() -> None:
        raise InterruptedError("enough")

    again = Readers(source, plan.reads)
    with pytest.raises(InterruptedError, match="enough"):
        fill(again, plan, [Destinations().of(out)], [stored.num_bytes], lambda _: None, stop)
    again.close()


def test_columns_are_those_of_numpy(tmp_path: Path) -> None:
    model = nn.Linear(300, 2000, bias=False)
    saved(tmp_path, model)
    whole = on_disk(tmp_path / NAME / "modeling")["weight"].numpy()
    with open_checkpoint(tmp_path / NAME) as checkpoint:
        found = checkpoint.read("weight", rows=(slice(3, 1500), slice(17, 290)))
    assert np.array_equal(found.tensor.numpy(), whole[3:1500, 17:290])
