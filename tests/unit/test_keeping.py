"""Does a run save when its policies say, over resumes, and prune what they say and nothing else, in a real root?"""

from __future__ import annotations

import os
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch

from shardpoint import (
    At,
    Best,
    Checkpointer,
    Every,
    EveryNth,
    Latest,
    NewerThan,
    OnPreemption,
    Pinned,
    RunState,
    TrainState,
)
from shardpoint.commit import pin, unpin
from shardpoint.errors import CorruptionError, UsageError
from shardpoint.events import Event
from shardpoint.manifest import MANIFEST_NAME
from shardpoint.policies import KeepPolicy, SavePolicy
from shardpoint.storage import LocalStore
from tests.training import flip

LOSSES = {1: 0.5, 2: 0.1, 3: float("nan"), 4: 0.1, 6: 0.9}  # 5 has none


def made(seed: int = 0) -> TrainState:
    torch.manual_seed(seed)
    return TrainState(model=torch.nn.Linear(3, 2))


def save(checkpointer: Checkpointer, step: int, *, force: bool = False) -> bool:
    metrics = {"loss": LOSSES[step]} if step in LOSSES else None
    saved = checkpointer.save(made(step), epoch=0, step=step, batch_size=1, metrics=metrics, force=force)
    return saved is not None


def ours(root: Path) -> list[int]:
    """Return the steps of what has a manifest and its own name."""
    return sorted(int(path.parent.name.rpartition("-")[2]) for path in root.glob(f"epoch-0_step-*/{MANIFEST_NAME}"))


def add_strangers(root: Path) -> dict[str, bytes]:
    """Put other people's things into a root, the oldest and the newest by time and name; return their contents."""
    shutil.copytree(root / "epoch-0_step-1", root / "best")
    (root / "epoch-0_step-2").rename(root / "epoch-9_step-9")
    for name in ("epoch-0_step-0", "epoch-0_step-99", "notes"):
        (root / name / "modeling").mkdir(parents=True)
        (root / name / "modeling" / "model.safetensors").write_bytes(b"mine")
    (root / "readme.txt").write_text("mine")
    (root / "link").symlink_to("best")
    damaged = root / "epoch-0_step-77"
    shutil.copytree(root / "epoch-0_step-1", damaged)
    flip(damaged / MANIFEST_NAME)
    os.utime(root / "best", (0, 0))
    os.utime(root / "notes", (2**31, 2**31))
    return contents(root)


def contents(root: Path) -> dict[str, bytes]:
    strangers = ("best", "epoch-9_step-9", "epoch-0_step-0", "epoch-0_step-99", "notes", "link", "epoch-0_step-77")
    files = [path for name in strangers for path in (root / name).rglob("*") if path.is_file()]
    return {str(path.relative_to(root)): path.read_bytes() for path in [*files, root / "readme.txt"]}


@pytest.mark.parametrize(
    "policies,kept",
    [
        ([], [1, 3, 4, 5, 6]),
        ([Latest(1)], [6]),
        ([Latest(2)], [5, 6]),
        ([Best(1, metric="loss", mode="min")], [4, 6]),  # 2 was taken away, and 6 is the last
        ([Best(2, metric="loss", mode="max")], [1, 6]),
        ([Best(9, metric="loss", mode="max")], [1, 4, 6]),
        ([Best(3, metric="reward", mode="max")], [6]),
        ([EveryNth(3)], [3, 6]),
        ([NewerThan(days=1)], [1, 3, 4, 5, 6]),
        ([Pinned(["epoch-0_step-3", "best", "nothing"])], [3, 6]),
        ([Latest(1), EveryNth(4), Pinned(["epoch-0_step-1"])], [1, 4, 6]),
    ],
    ids=repr,
)
def test_what_is_pruned_among_strangers(policies: list[KeepPolicy], kept: list[int], tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        for step in range(1, 6):
            save(checkpointer, step)
    before = add_strangers(tmp_path)
    events: list[Event] = []
    with Checkpointer(tmp_path, keep=policies, listener=events.append) as checkpointer:
        save(checkpointer, 6)
    names = {1, 3, 4, 5, 6} - set(kept)
    assert set(ours(tmp_path)) - {77} == set(kept)
    assert {event.key for event in events if event.kind == "pruned"} == {f"epoch-0_step-{step}" for step in names}
    assert contents(tmp_path) == before
    assert (tmp_path / "link").is_symlink()


def test_a_save_that_fails_prunes_nothing(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, keep=[Latest(2)]) as checkpointer:
        save(checkpointer, 1)
        save(checkpointer, 2)
        (tmp_path / "epoch-0_step-3").mkdir()  # somebody's: it cannot be replaced
        with pytest.raises(FileExistsError):
            save(checkpointer, 3)
    assert ours(tmp_path) == [1, 2]


def test_one_whose_manifest_is_damaged_neither_counts_nor_goes(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        for step in (1, 2, 3):
            save(checkpointer, step)
    flip(tmp_path / "epoch-0_step-3" / MANIFEST_NAME)
    with Checkpointer(tmp_path, keep=[Latest(2)]) as checkpointer:
        save(checkpointer, 4)
        assert ours(tmp_path) == [2, 3, 4]
        save(checkpointer, 5)
    assert ours(tmp_path) == [3, 4, 5]


def test_a_pin_holds_for_every_run_until_it_is_taken_away(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    with Checkpointer(tmp_path, keep=[Latest(1)]) as checkpointer:
        save(checkpointer, 1)
        pin(store, "epoch-0_step-1")
        for step in (2, 3):
            save(checkpointer, step)
        assert ours(tmp_path) == [1, 3]
    with Checkpointer(tmp_path, keep=[Latest(1)]) as checkpointer:
        save(checkpointer, 4)
        assert ours(tmp_path) == [1, 4]
        unpin(store, "epoch-0_step-1")
        save(checkpointer, 5)
    assert ours(tmp_path) == [5]


def run(root: Path, policies: list[SavePolicy], steps: range) -> tuple[RunState | None, list[int]]:
    """Live one life: resume, then ask at each step; return where it went on, and what it saved."""
    with Checkpointer(root, save=policies) as checkpointer:
        state = checkpointer.resume(made(9))
        return state, [step for step in steps if save(checkpointer, step)]


def test_at_saves_each_step_once_over_resumes(tmp_path: Path) -> None:
    policies: list[SavePolicy] = [At([2, 5, 9])]
    assert run(tmp_path, policies, range(1, 5)) == (None, [2])
    assert run(tmp_path, policies, range(3, 8)) == (RunState(0, 2, 2), [5])
    # The run is resumed from before a step that was saved: it is a new past, and the step is reached again.
    shutil.rmtree(tmp_path / "epoch-0_step-5")
    assert run(tmp_path, policies, range(3, 8, 3)) == (RunState(0, 2, 2), [6])
    assert run(tmp_path, policies, range(7, 12)) == (RunState(0, 6, 6), [9])
    assert run(tmp_path, policies, range(10, 20)) == (RunState(0, 9, 9), [])


def test_seconds_begin_anew_with_each_resume(tmp_path: Path) -> None:
    policies: list[SavePolicy] = [Every(seconds=100)]
    with Checkpointer(tmp_path, save=policies) as checkpointer:
        assert not save(checkpointer, 1)
        assert save(checkpointer, 2, force=True)
        schedule = checkpointer._schedule
        now = schedule._clock() + 99
        schedule._clock = lambda: now
        assert not save(checkpointer, 3)
        schedule._clock = lambda: now + 2
        assert save(checkpointer, 4)
        assert not save(checkpointer, 5)
        # Long after, it goes on from what is there: nothing is new yet.
        schedule._clock = lambda: now + 1000
        assert checkpointer.resume(made()) == RunState(0, 4, 4)
        assert not save(checkpointer, 5)
        schedule._clock = lambda: now + 1101
        assert save(checkpointer, 6)
    assert run(tmp_path, policies, range(7, 9)) == (RunState(0, 6, 6), [])


def test_preempted_in_one_process(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    events: list[Event] = []
    with Checkpointer(tmp_path, save=[OnPreemption()], listener=events.append) as checkpointer:
        assert not save(checkpointer, 1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert not checkpointer.preempted
        assert save(checkpointer, 2)
        assert checkpointer.preempted
        assert not save(checkpointer, 3)
    assert signal.getsignal(signal.SIGTERM) == before
    assert ours(tmp_path) == [2]
    assert [event.kind for event in events] == ["preempted", "committed"]


def test_an_error_that_ends_the_loop_puts_the_handlers_back_too(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError), Checkpointer(tmp_path, save=[OnPreemption()], async_save=True):
        _ = 1 / 0
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_checkpointer_that_cannot_be_made_leaves_the_handlers_alone(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    (tmp_path / ".shardpoint").write_text("mine")
    with pytest.raises(FileExistsError):
        Checkpointer(tmp_path, save=[OnPreemption()])
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_preemption_needs_the_main_thread(tmp_path: Path) -> None:
    raised: list[UsageError] = []

    def make() -> None:
        try:
            Checkpointer(tmp_path / "root", save=[OnPreemption()])
        except UsageError as error:
            raised.append(error)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    assert "main thread" in str(raised[0])
    assert not (tmp_path / "root").exists()


def test_a_corrupt_checkpoint_that_a_policy_kept_is_told_at_the_resume(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, keep=[Best(1, metric="loss", mode="min")]) as checkpointer:
        save(checkpointer, 1)
        save(checkpointer, 2)
    assert ours(tmp_path) == [2]
    flip(next((tmp_path / "epoch-0_step-2" / "modeling").glob("*.safetensors")))
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(CorruptionError):
        checkpointer.resume(made())
