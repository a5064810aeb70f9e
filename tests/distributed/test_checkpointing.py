"""Do two ranks get back what they saved, on any plugin and number of ranks, and fail alike?"""

from __future__ import annotations

import json
import mmap
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from shardpoint import Checkpointer, RunState, TrainState
from shardpoint.errors import MismatchError
from tests.distributed.checkpointing_program import checks
from tests.distributed.launch import run_ranks
from tests.training import OPTIMIZERS, net, on_disk, optimizer_state, same_bits, train, weights

pytestmark = pytest.mark.distributed

PROGRAM = Path(__file__).with_name("checkpointing_program.py")
TIMEOUT_S = 240.0


def one_process(seed: int) -> TrainState:
    model = net(seed)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    return TrainState(
        model=model, optimizer=optimizer, lr_scheduler=torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 2, 5])
    )


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, str]]]:
    out = tmp_path_factory.mktemp("ranks")
    state = one_process(0)
    assert state.optimizer is not None
    train(state.model, state.optimizer, range(3))
    with Checkpointer(out / "one") as checkpointer:
        checkpointer.save(state, epoch=0, step=3, batch_size=4)
    outcomes = run_ranks(PROGRAM, 2, timeout_s=TIMEOUT_S, args=[str(out), *checks()])
    return out, [outcome.report() for outcome in outcomes]


@pytest.mark.parametrize("name", sorted(checks()))
def test_on_two_ranks(name: str, launched: tuple[Path, list[dict[str, str]]]) -> None:
    for rank, report in enumerate(launched[1]):
        assert report.get(name, "was not reached").startswith("ok"), f"rank {rank}: {report.get(name, 'not reached')}"


def test_one_process_goes_on_from_two(launched: tuple[Path, list[dict[str, str]]]) -> None:
    for root in (launched[0] / "fsdp_round_trips" / "fsdp-adamw", launched[0] / "ddp_round_trip" / "ddp"):
        state = one_process(7)
        assert state.optimizer is not None
        with Checkpointer(root) as checkpointer:
            assert checkpointer.resume(state) == RunState(1, 3, 12)
        directory = root / "epoch-1_step-3"
        assert same_bits(weights(state.model), on_disk(directory / "modeling"))
        found = {k: v for k, v in optimizer_state(state.model, state.optimizer).items() if v.dim()}
        assert same_bits(found, on_disk(directory / "optimizer"))


def test_a_sampler_whose_position_depends_on_the_rank(launched: tuple[Path, list[dict[str, str]]]) -> None:
    class Own:
        loaded: Any = None

        def load_state_dict(self, state: Any) -> None:
            self.loaded = state

        def state_dict(self) -> Any:
            return self.loaded

    root = launched[0] / "random_state_and_samplers_by_rank"
    model = torch.nn.Linear(1, 1)
    own = Own()
    with Checkpointer(root / "own") as checkpointer, pytest.raises(MismatchError) as caught:
        checkpointer.resume(TrainState(model=model, sampler=own))
    assert own.loaded is None
    assert "saved by 2 ranks whose states differ" in caught.value.mismatched[0]
    with Checkpointer(root / "shared") as checkpointer:
        checkpointer.resume(TrainState(model=model, sampler=own))
    assert own.loaded is not None


def test_the_checkpoint_does_not_depend_on_who_wrote_it(launched: tuple[Path, list[dict[str, str]]]) -> None:
    out = launched[0]
    first, second = (
        out / name / "epoch-1_step-500" / "modeling" for name in ("the_usage_example/ddp", "the_usage_example/fsdp")
    )
    files = [sorted(path.name for path in directory.glob("*.safetensors")) for directory in (first, second)]
    assert files[0] == files[1]
    assert all((first / name).read_bytes()[:4096] == (second / name).read_bytes()[:4096] for name in files[0])


def test_replicas_ask_the_device_for_each_byte_once(launched: tuple[Path, list[dict[str, str]]]) -> None:
    path = launched[0] / "replicas_ask_the_device_for_each_byte_once" / "device_bytes.json"
    told = json.loads(path.read_text(encoding="utf-8"))
    if told["read"] < told["stored"] // 2:
        pytest.skip(f"the filesystem of {launched[0]} does not drop its cache, or does not count its reads: {told}")
    assert told["read"] <= 1.1 * told["stored"]


def test_what_one_rank_holds_is_read_past_the_page_cache(launched: tuple[Path, list[dict[str, str]]]) -> None:
    path = launched[0] / "what_one_rank_holds_is_read_past_the_page_cache" / "pages.json"
    told = json.loads(path.read_text(encoding="utf-8"))
    read_bytes, num_cached = told["cold"]
    if read_bytes < told["stored"] // 2:
        pytest.skip(f"the filesystem of {launched[0]} does not drop its cache, or does not count its reads: {told}")
    assert read_bytes <= 1.1 * told["stored"]
    assert num_cached * mmap.PAGESIZE < 0.1 * told["stored"], "nothing was left in the page cache"
    assert told["warm"][0] < 0.1 * told["stored"], "a warm load asks the device for nothing"


@pytest.mark.crash
def test_a_killed_rank_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    survivor, killed = run_ranks(PROGRAM, 2, timeout_s=120.0, args=[str(tmp_path), "kill"])
    assert killed.returncode == -9
    told = survivor.report()
    assert told["waiting_for"] == [1]
    assert 1.0 < told["waited_s"] < 30.0
    assert told["visible"] == ["epoch-0_step-1"]
    began = time.monotonic()
    outcomes = run_ranks(PROGRAM, 2, timeout_s=120.0, args=[str(tmp_path), "resume"])
    assert [outcome.returncode for outcome in outcomes] == [0, 0], outcomes[0].stderr
    assert time.monotonic() - began < 60.0
    assert sorted(path.name for path in tmp_path.glob("epoch-*")) == ["epoch-0_step-1", "epoch-0_step-2"]
