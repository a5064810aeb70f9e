"""Is a base that is not trained under adapters written once, is every checkpoint whole all the same, and never torn?"""

from __future__ import annotations

import importlib
import shutil
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors import safe_open
from torch import nn

from shardpoint import Checkpointer, Latest, TrainState
from shardpoint.catalog import verify
from shardpoint.commit import find_committed
from shardpoint.errors import TornSnapshotError
from shardpoint.events import Event
from shardpoint.storage import LocalStore
from tests.training import bits, on_disk, same_bits, weights

save_module: Any = importlib.import_module("shardpoint.engine.save")

BASE = "modeling/model-00001-of-00001.safetensors"
ADAPTER = "adapter/default/adapter_model.safetensors"


def adapted(seed: int, hidden: int = 8) -> Any:
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    torch.manual_seed(seed)
    sizes = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": 2, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, tie_word_embeddings=False))
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    return model


def state_of(model: nn.Module) -> TrainState:
    return TrainState(model=model, optimizer=torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), 0.1))


def step(state: TrainState, number: int) -> torch.Tensor:
    assert state.optimizer is not None
    ids = torch.arange(number, number + 6).reshape(1, 6)
    loss: torch.Tensor = state.model(input_ids=ids, labels=ids).loss
    state.optimizer.zero_grad()
    loss.backward()
    state.optimizer.step()
    return loss.detach()


def inode(root: Path, number: int, path: str) -> int:
    return (root / f"epoch-0_step-{number}" / path).stat().st_ino


def base_of(model: Any) -> dict[str, torch.Tensor]:
    """Return the base weights of a peft model under the names that they have without it."""
    prefix = "base_model.model."
    return {
        name.removeprefix(prefix).replace(".base_layer", ""): tensor
        for name, tensor in weights(model).items()
        if "lora_" not in name
    }


@pytest.mark.parametrize("async_save", [False, True])
def test_the_base_is_written_once_and_every_checkpoint_is_whole(tmp_path: Path, *, async_save: bool) -> None:
    state = state_of(adapted(1))
    with Checkpointer(tmp_path, keep=[Latest(2)], async_save=async_save) as checkpointer:
        linked = []
        for number in range(1, 5):
            step(state, number)
            pending = checkpointer.save(state, epoch=0, step=number, batch_size=1)
            assert pending is not None
            linked.append(pending.result().linked_bytes)
    assert linked[0] == 0
    assert linked[1:] == [(tmp_path / "epoch-0_step-4" / BASE).stat().st_size] * 3
    assert inode(tmp_path, 3, BASE) == inode(tmp_path, 4, BASE)
    assert inode(tmp_path, 3, ADAPTER) != inode(tmp_path, 4, ADAPTER)
    shutil.rmtree(tmp_path / "epoch-0_step-3")
    directory = tmp_path / "epoch-0_step-4"
    assert same_bits(base_of(state.model), on_disk(directory / "modeling"))
    committed = find_committed(LocalStore(tmp_path), directory.name)
    assert committed is not None
    assert verify(LocalStore(tmp_path), committed).ok

    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(directory / "modeling")
    opened = PeftModel.from_pretrained(plain, str(directory / "adapter" / "default")).eval()
    ids = torch.arange(6).reshape(1, 6)
    assert bits(opened(input_ids=ids).logits) == bits(state.model.eval()(input_ids=ids).logits)

    state.model.train()
    other = state_of(adapted(9))
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.resume(other) is not None
    for number in range(5, 8):
        assert bits(step(other, number)) == bits(step(state, number))
    assert same_bits(weights(other.model), weights(state.model))


def test_a_base_that_changed_is_written_and_told(tmp_path: Path) -> None:
    state, heard = state_of(adapted(1)), list[Event]()
    with Checkpointer(tmp_path, listener=heard.append) as checkpointer:
        checkpointer.save(state, epoch=0, step=1, batch_size=1)
        with torch.no_grad():
            state.model.get_parameter("base_model.model.model.norm.weight")[2] = 7
        checkpointer.save(state, epoch=0, step=2, batch_size=1)
    (told,) = [event for event in heard if event.kind == "frozen_changed"]
    assert "model.norm.weight" in told.message
    assert on_disk(tmp_path / "epoch-0_step-1" / "modeling")["model.norm.weight"][2] == 1
    assert on_disk(tmp_path / "epoch-0_step-2" / "modeling")["model.norm.weight"][2] == 7


def test_of_a_base_that_is_trained_in_part_the_rest_is_linked(tmp_path: Path) -> None:
    model, heard = adapted(1), list[Event]()
    model.get_parameter("base_model.model.model.norm.weight").requires_grad_()
    state = state_of(model)
    with Checkpointer(tmp_path, listener=heard.append) as checkpointer:
        for number in (1, 2):
            step(state, number)
            checkpointer.save(state, epoch=0, step=number, batch_size=1)
    still, trained = (f"modeling/model-0000{number}-of-00002.safetensors" for number in (1, 2))
    assert inode(tmp_path, 1, still) == inode(tmp_path, 2, still)
    assert inode(tmp_path, 1, trained) != inode(tmp_path, 2, trained)
    with safe_open(tmp_path / "epoch-0_step-2" / trained, "pt") as opened:
        assert list(opened.keys()) == ["model.norm.weight"]
    assert same_bits(base_of(model), on_disk(tmp_path / "epoch-0_step-2" / "modeling"))
    assert not [event for event in heard if event.kind == "frozen_changed"]


class Held:
    """Holds the checksums of what is frozen back until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, after: bool) -> None:
        self.reached, self.go = threading.Event(), threading.Event()
        checksum = save_module.checksum_frozen

        def held(*args: Any) -> None:
            if after:
                checksum(*args)
            self.reached.set()
            assert self.go.wait(60)
            if not after:
                checksum(*args)

        monkeypatch.setattr(save_module, "checksum_frozen", held)


def merge(model: Any) -> None:
    model.merge_adapter()


@pytest.mark.parametrize("hidden", [8, 256], ids=["small", "large"])
def test_staged_waits_until_the_base_is_read_and_steps_do_not(
    hidden: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, held = state_of(adapted(1, hidden)), Held(monkeypatch, after=False)
    base = {name: tensor.clone() for name, tensor in base_of(state.model).items()}
    with Checkpointer(tmp_path, async_save=True) as checkpointer:
        pending = checkpointer.save(state, epoch=0, step=1, batch_size=1)
        assert pending is not None
        assert held.reached.wait(60)
        step(state, 1)
        with pytest.raises(TimeoutError):
            pending.staged(timeout_s=0.05)
        held.go.set()
        pending.staged()
        merge(state.model)
        pending.result()
    assert same_bits(base, on_disk(tmp_path / "epoch-0_step-1" / "modeling"))


@pytest.mark.parametrize("after", [False, True], ids=["before_its_checksum", "before_it_is_written"])
@pytest.mark.parametrize("hidden", [8, 256], ids=["small", "large"])
def test_a_base_that_changes_too_early_is_never_committed(
    hidden: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, after: bool
) -> None:
    state, held = state_of(adapted(1, hidden)), Held(monkeypatch, after=after)
    base = {name: tensor.clone() for name, tensor in base_of(state.model).items()}
    with Checkpointer(tmp_path, async_save=True) as checkpointer:
        pending = checkpointer.save(state, epoch=0, step=1, batch_size=1)
        assert pending is not None
        assert held.reached.wait(60)
        merge(state.model)
        held.go.set()
        if hidden == 8:  # up to 64 KiB a tensor was copied before the save returned
            pending.result()
        else:
            with pytest.raises(TornSnapshotError, match=r"pending\.staged"):
                pending.result()
    found = [on_disk(path / "modeling") for path in tmp_path.glob("epoch*")]
    assert len(found) == (hidden == 8)
    assert all(same_bits(weights, base) for weights in found)


def test_a_row_of_the_base_that_changes_too_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, held = state_of(adapted(1, 256)), Held(monkeypatch, after=False)
    base = state.model.get_parameter("base_model.model.model.layers.0.mlp.up_proj.weight")
    with Checkpointer(tmp_path, async_save=True) as checkpointer:
        pending = checkpointer.save(state, epoch=0, step=1, batch_size=1)
        assert pending is not None
        assert held.reached.wait(60)
        with torch.no_grad():
            base[3] += 1  # between the places that are sampled
        held.go.set()
        with pytest.raises(TornSnapshotError, match=r"up_proj.*pending\.staged"):
            pending.result()


@pytest.mark.parametrize("has_gradient", [False, True], ids=["trains", "has_a_gradient_left"])
def test_a_step_of_the_base_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, has_gradient: bool) -> None:
    model = adapted(1, 256)
    base = model.get_parameter("base_model.model.model.layers.0.mlp.up_proj.weight")
    state = TrainState(model=model, optimizer=torch.optim.AdamW(model.parameters(), 0.1))
    held, expected = Held(monkeypatch, after=False), bits(base)
    with Checkpointer(tmp_path, async_save=True) as checkpointer:
        pending = checkpointer.save(state, epoch=0, step=1, batch_size=1)
        assert pending is not None
        assert held.reached.wait(60)
        step(state, 1)  # does not wait
        assert not pending.done()
        if has_gradient:
            base.grad = torch.ones_like(base)
            work = cast("Any", state.optimizer).step
        else:
            base.requires_grad_()
            work = partial(step, state, 2)
        trainer = threading.Thread(target=work)
        trainer.start()
        trainer.join(0.2)
        had_waited = trainer.is_alive()
        held.go.set()
        trainer.join()
        pending.result()
    assert had_waited
    assert bits(base) != expected
    assert bits(on_disk(tmp_path / "epoch-0_step-1/modeling")["model.layers.0.mlp.up_proj.weight"]) == expected


def test_staged_waits_for_older_saves_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, held = state_of(adapted(1, 256)), Held(monkeypatch, after=False)
    plain = TrainState(model=nn.Linear(4, 4))
    with Checkpointer(tmp_path, async_save=True) as checkpointer:
        assert checkpointer.save(state, epoch=0, step=1, batch_size=1) is not None
        assert held.reached.wait(60)
        pending = checkpointer.save({"plain": plain}, epoch=0, step=2, batch_size=1)
        assert pending is not None
        try:
            with pytest.raises(TimeoutError):
                pending.staged(timeout_s=0.3)
        finally:
            held.go.set()
        pending.staged()
        merge(state.model)


def test_a_frozen_role_that_changes_after_its_checksum_is_never_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Linear(4, 4)
    made: Callable[..., Any] = save_module.checksum_frozen

    def and_change(*args: Any) -> None:
        made(*args)
        with torch.no_grad():
            model.weight[1, 1] += 1

    monkeypatch.setattr(save_module, "checksum_frozen", and_change)
    with (
        Checkpointer(tmp_path) as checkpointer,
        pytest.raises(TornSnapshotError, match="changed while they were saved"),
    ):
        checkpointer.save({"reference": TrainState(model=model, frozen=True)}, epoch=0, step=1, batch_size=1)
    assert not list(tmp_path.glob("epoch*"))
