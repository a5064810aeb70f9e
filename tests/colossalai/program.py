"""Save and load through the real Booster on one or two ranks; each check reports "ok" or what went wrong."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import colossalai
import pytest
import torch
import torch.distributed as dist
from coati.utils.ckpt_io import load_checkpoint, load_json, save_checkpoint
from colossalai.cluster import DistCoordinator
from colossalai.nn.lr_scheduler import CosineAnnealingWarmupLR
from colossalai.nn.optimizer import HybridAdam
from torch import nn

import shardpoint
from shardpoint.booster import LowLevelZeroPlugin as NativeZero
from shardpoint.booster import TorchDDPPlugin as NativeDDP
from shardpoint.booster import TorchFSDPPlugin as NativeFSDP
from shardpoint.errors import ChecksumError, MismatchError, PeerError, StorageError, UnsupportedFormatError
from tests.colossalai import cpu
from tests.colossalai import script as script_module
from tests.colossalai.runs import (
    RANK,
    WORLD_SIZE,
    Run,
    in_two_groups,
    llama,
    saved,
    small,
    stored_states,
    stored_weights,
    turned,
)
from tests.distributed.reporting import run_and_report
from tests.training import flip, optimizer_state, same_bits, weights

# Tied weights where ColossalAI loads what it saved of them; with Gemini it does not.
TIED = ("tp2", "pp2")


def goes_on(plugin: str, out: Path) -> None:
    tied = plugin in TIED
    run, path = saved(out, plugin, tied=tied)
    assert load_json(path / "running_states.json") == {"epoch": 1, "step": 3, "sample_start_index": 96}
    other = Run(plugin, 7, tied=tied)
    assert other.load(path) == (1, 3, 96)
    assert same_bits(other.weights(), run.weights())
    assert other.train(range(3, 6)) == run.train(range(3, 6))
    assert same_bits(other.weights(), run.weights())


def goes_on_with_lora(plugin: str, out: Path) -> None:
    run, path = saved(out, plugin, lora=True)
    assert any("lora_A" in name for name in stored_weights(path))
    other = Run(plugin, 7, lora=True)
    other.load(path)
    assert other.train(range(3, 6)) == run.train(range(3, 6))
    refused(Run(plugin, 7, lora=True, order=turned), path, MismatchError, "the parameters are in another order")


def is_all_or_nothing(plugin: str, out: Path) -> None:
    run, path = saved(out, plugin)
    whole = run.booster.save_optimizer

    def fails(*args: Any, **options: Any) -> None:
        whole(*args, **options)
        if WORLD_SIZE - 1 == RANK:
            raise OSError(28, "No space left on device")

    with (
        patch.object(run.booster, "save_optimizer", fails),
        pytest.raises((PeerError, OSError, StorageError), match="No space left"),
    ):
        run.save(out, 4)
    assert sorted(item.name for item in out.glob("epoch*")) == ["epoch-1_step-3"]
    dist.barrier()
    if RANK == 0:
        # A byte of a tensor; the last file, which is of the last stage where there are stages.
        flip(max(path.glob("modeling/pytorch_model*.bin")), 2000)
    dist.barrier()
    other = Run(plugin, 7)
    refused(other, path, ChecksumError, "pytorch_model")


def refused(run: Run, path: Path, error: type[Exception], *lines: str, optimizer: bool = True) -> None:
    """Check that every rank gets the error, before the real Booster is asked for anything."""
    before, options = run.weights(), [dict(group) for group in run.optimizer.optim.param_groups]
    with ExitStack() as stack:
        for name in ("load_model", "load_optimizer", "load_lr_scheduler"):
            never = AssertionError(f"{name} was called")
            stack.enter_context(patch.object(run.booster, name, side_effect=never))
        with pytest.raises(error) as caught:
            run.load(path, optimizer=optimizer)
    for line in lines:
        assert line in str(caught.value), str(caught.value)
    assert same_bits(run.weights(), before)
    assert not run.optimizer.optim.state
    assert [list(group) for group in run.optimizer.optim.param_groups] == [list(group) for group in options]


def refuses_what_would_be_skipped(plugin: str, out: Path) -> None:
    _, path = saved(out, plugin)
    if Run(plugin, 7).is_small:
        wider: Any = {"width": 6}
        more: Any = {"later": True}
        name, shape, more_name = "head.weight", "stored F32 [1, 5], the model has F32 [1, 6]", "later"
    else:
        wider, more = {"intermediate_size": 32}, {"attention_bias": True}
        name = "model.layers.1.mlp.down_proj.weight"
        shape = "stored F32 [16, 24], the model has " + ("BF16" if plugin == "gemini" else "F32") + " [16, 32]"
        more_name = "model.layers.1.self_attn.q_proj.bias"
    moments = f"optimizer: {name} [exp_avg]: stored" if plugin != "pp2" else "[exp_avg]: stored [16, 24]"
    refused(Run(plugin, 7, **wider), path, MismatchError, f"{name}: {shape}", moments)
    refused(Run(plugin, 7, **more), path, MismatchError, f"missing {more_name}", "build the groups as they were")
    _, larger = saved(out / "larger", plugin, **more)
    refused(Run(plugin, 7), larger, MismatchError, f"unexpected {more_name}")


def refuses_another_optimizer(plugin: str, out: Path) -> None:
    _, path = saved(out, plugin)
    refused(Run(plugin, 7, order=turned), path, MismatchError, "the parameters are in another order")
    refused(Run(plugin, 7, order=in_two_groups), path, MismatchError, "build the groups as they were")
    refused(Run(plugin, 7, step_lr=True), path, MismatchError, "another scheduler than StepLR")


def goes_on_natively(plugin: str, out: Path) -> None:
    tied = plugin in TIED
    run, path = saved(out, plugin, tied=tied)
    own = out / "own" / "epoch-1_step-3"
    run.own_save(own)
    real = Run(plugin, 5, tied=tied)
    assert real.load(own) == (1, 3, 96)
    assert same_bits(real.weights(), run.weights())
    if plugin == "pp2":
        assert (path / "modeling" / "pytorch_model-stage-00002-shard-00001.bin").is_file()
    native_states: list[dict[str, torch.Tensor]] = []
    for source in (path, own):
        for native_plugin in (NativeDDP, NativeFSDP):
            booster = shardpoint.Booster(plugin=native_plugin())
            bare: Any = small(9) if run.is_small else llama(9, tied=tied)
            model: nn.Module = bare
            optimizer = torch.optim.AdamW(bare.parameters(), lr=0.9)
            scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
            model, optimizer, *_ = booster.boost(model, optimizer)
            assert load_checkpoint(source, booster, model, optimizer, scheduler) == (1, 3, 96)
            loaded, wanted = weights(model), stored_weights(source)
            if tied:
                wanted.setdefault("lm_head.weight", wanted["model.embed_tokens.weight"])
            assert same_bits(loaded, wanted)
            native_states.append(optimizer_state(model, optimizer))
            assert scheduler.state_dict() == run.scheduler.state_dict()
            assert optimizer.param_groups[0]["lr"] == run.optimizer.optim.param_groups[0]["lr"]
    wanted = stored_states(path, small(0) if run.is_small else llama(0, tied=tied))
    for states in native_states:
        assert same_bits(states, wanted)
    assert any(tensor.abs().max() > 0 for tensor in wanted.values())
    if plugin == "ddp":
        assert same_bits(wanted, optimizer_state(run.bare, run.optimizer.unwrap()))


def what_shardpoint_wrote_is_not_given_to_it(out: Path) -> None:
    booster, model = shardpoint.Booster(), small(0)
    optimizer = torch.optim.AdamW(model.parameters())
    boosted, optimizer, *_ = booster.boost(model, optimizer)
    nothing: Any = None
    save_checkpoint(out, booster, boosted, optimizer, nothing, 1, 3, 32, DistCoordinator())
    with pytest.raises((UnsupportedFormatError, PeerError), match="Shardpoint's own Booster"):
        Run("ddp", 1).load(out / "epoch-1_step-3")


def tied_weights_that_gemini_cannot_load(out: Path) -> None:
    _, path = saved(out, "gemini", tied=True)
    refused(Run("gemini", 7, tied=True), path, MismatchError, "unexpected lm_head.weight")


def a_padded_vocabulary(out: Path) -> None:
    """ColossalAI saves its weights, then fails on its optimizer: nothing of that may remain."""
    run = Run("tp2", 1, vocab_size=100)
    run.train(range(2))
    with pytest.raises((PeerError, AssertionError), match="evenly distributed"):
        run.save(out, 3)
    assert not list(out.glob("epoch*"))
    path = run.save(out, 4, optimizer=False)
    assert stored_weights(path)["lm_head.weight"].shape == (100, 16)
    other = Run("tp2", 7, vocab_size=100)
    other.load(path, optimizer=False)
    assert same_bits(other.weights(), run.weights())
    smaller = Run("tp2", 7, vocab_size=90)
    line = "lm_head.weight: stored F32 [100, 16], the model has F32 [90, 16]"
    refused(smaller, path, MismatchError, line, optimizer=False)


def sixteen_bits_are_told(plugin: str, out: Path) -> None:
    run, path = saved(out, plugin)
    other = Run(plugin, 7)
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("shardpoint").addHandler(handler)
    try:
        other.load(path)
    finally:
        logging.getLogger("shardpoint").removeHandler(handler)
    lost = [text for text in told if "do not have" in text]
    assert len(lost) == (1 if RANK == 0 else 0)
    if RANK == 0:
        assert "the fp32 master weights" in lost[0]
        assert ("the loss scale" in lost[0]) == plugin.endswith("fp16")
    assert same_bits(other.weights(), run.weights())
    run.train(range(3, 9))
    other.train(range(3, 9))
    difference = max((run.weights()[name].float() - one.float()).abs().max() for name, one in other.weights().items())
    assert difference > 0, "it is exact: say so"


def sixteen_bits_go_on_natively(plugin: str, out: Path) -> None:
    """A model in 16 bits, as the script builds it, under our plugin of that name: masters are widened, as there."""
    run, path = saved(out, plugin)
    precision = plugin.rpartition("_")[2]
    booster = shardpoint.Booster(
        plugin=NativeZero(precision=precision, initial_scale=4 if precision == "fp16" else 2**32)
    )
    bare: Any = (small if run.is_small else llama)(9)
    bare.to(torch.float16 if precision == "fp16" else torch.bfloat16)
    optimizer = torch.optim.AdamW(bare.parameters(), lr=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    model, optimizer, *_ = booster.boost(bare, optimizer)
    assert load_checkpoint(path, booster, model, optimizer, scheduler) == (1, 3, 96)
    wanted = {name: one.float() if one.is_floating_point() else one for name, one in stored_weights(path).items()}
    assert same_bits(weights(model), wanted)
    assert same_bits(optimizer_state(model, optimizer), stored_states(path, (small if run.is_small else llama)(0)))
    before = weights(model)
    if run.is_small:
        loss = model(torch.ones(4, 3)).square().mean()
    else:
        loss = model(input_ids=torch.ones(1, 8, dtype=torch.int64), labels=torch.ones(1, 8, dtype=torch.int64)).loss
    booster.backward(loss, optimizer)
    optimizer.step()
    assert not same_bits(weights(model), before)


def native_hybrid_adam(plugin: str, out: Path) -> None:
    """A run with ColossalAI's optimizer and scheduler goes on without its Booster."""
    run = Run(plugin, 1, warm=True)
    run.train(range(3))
    path, lr = run.save(out, 3), run.scheduler.get_last_lr()[0]
    booster, bare = shardpoint.Booster(plugin=NativeDDP()), small(9) if run.is_small else llama(9)
    optimizer = HybridAdam(bare.parameters(), lr=0.9)
    scheduler = CosineAnnealingWarmupLR(optimizer, total_steps=20, warmup_steps=2)
    model, optimizer, *_ = booster.boost(bare, optimizer)
    assert load_checkpoint(path, booster, model, optimizer, scheduler) == (1, 3, 96)
    assert same_bits(weights(model), stored_weights(path))
    states = [state["step"] for state in optimizer.state.values()]
    assert states == [3] * len(states)
    assert all(isinstance(step, int) for step in states)
    assert scheduler.state_dict() == run.scheduler.state_dict()
    if plugin == "ddp":
        losses = [native_step(bare, model, booster, optimizer, scheduler, number) for number in range(3, 6)]
        assert losses == run.train(range(3, 6))
        assert same_bits(weights(model), run.weights())
    # torch's own cannot take over the scheduler's state: told, before anything is changed.
    other, adamw = small(9) if run.is_small else llama(9), None
    adamw = torch.optim.AdamW(other.parameters(), lr=0.9)
    plain = torch.optim.lr_scheduler.CosineAnnealingLR(adamw, 20)
    model, adamw, *_ = booster.boost(other, adamw)
    before = {name: tensor.clone() for name, tensor in weights(model).items()}
    with pytest.raises(MismatchError, match="ColossalAI's, with CosineAnnealingLR after a first stage") as caught:
        load_checkpoint(path, booster, model, adamw, plain)
    assert "lr_scheduler=None" in str(caught.value)
    assert same_bits(weights(model), before)
    assert not adamw.state
    load_checkpoint(path, booster, model, adamw, None)
    assert adamw.param_groups[0]["lr"] == lr


def native_step(bare: Any, model: Any, booster: Any, optimizer: Any, scheduler: Any, number: int) -> float:
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(10 * number + RANK))
    loss = model(x).square().mean() + 0 * (bare.frozen.sum() + bare.unused.sum())
    booster.backward(loss, optimizer)
    optimizer.step()
    optimizer.zero_grad()
    scheduler.step()
    return float(loss.item())


def script(plugin: str, out: Path) -> None:
    """The calls of ColossalChat's `train_sft.py` and trainers; the run that goes on does what is left of the epoch."""
    run_script(plugin, script_module.train_sft, out, is_exact=plugin == "gemini")


def run_script(plugin: str, train_sft: Callable[..., list[float]], out: Path, *, is_exact: bool) -> None:
    pretrained = out / "pretrained"
    if RANK == 0:
        llama(1).save_pretrained(pretrained)
    dist.barrier()
    whole = train_sft(plugin, pretrained, out / "checkpoints")
    step = len(whole) // 2
    path = out / "checkpoints" / f"epoch-0_step-{step}"
    assert load_json(path / "running_states.json") == {"epoch": 0, "step": step, "sample_start_index": step * 2}
    rest = train_sft(plugin, pretrained, out / "again", checkpoint_path=path)
    assert len(rest) == len(whole) - step
    if is_exact:
        assert rest == whole[step:]
    else:  # the fp32 masters are not in the files
        assert torch.allclose(torch.tensor(rest), torch.tensor(whole[step:]), rtol=0.01)


def script_with_other_imports(plugin: str, out: Path) -> None:
    """The same script with Shardpoint's plugins, Booster and coordinator: now a resume is exact."""
    source = Path(script_module.__file__).read_text()
    for theirs, ours in (
        ("from colossalai.booster import", "from shardpoint.booster import"),
        ("from colossalai.booster.plugin import", "from shardpoint.booster import"),
        ("from colossalai.cluster import", "from shardpoint.booster import"),
        ("from colossalai.nn.optimizer import", "from tests.colossalai.adamw import"),
    ):
        assert source.count(theirs) == 1
        source = source.replace(theirs, ours)
    namespace: dict[str, Any] = {"__name__": "script"}
    exec(compile(source, "script", "exec"), namespace)  # noqa: S102 - our own file
    assert namespace["Booster"] is shardpoint.Booster
    run_script(plugin, namespace["train_sft"], out, is_exact=True)


def checks() -> dict[str, Callable[[Path], None]]:
    plugins = ["ddp", "zero1", "zero2", "gemini", "hybrid", *(["tp2", "pp2"] if WORLD_SIZE == 2 else [])]
    of_each = (
        goes_on,
        is_all_or_nothing,
        refuses_what_would_be_skipped,
        refuses_another_optimizer,
        goes_on_natively,
    )
    found: dict[str, Callable[[Path], None]] = {
        f"{plugin}_{check.__name__}": functools.partial(check, plugin) for plugin in plugins for check in of_each
    }
    halves = ["zero1_bf16", "zero1_fp16", "hybrid_bf16", "hybrid_zero1_bf16"]
    halves += ["tp2_zero1_bf16"] if WORLD_SIZE == 2 else []
    found |= {
        f"{one}_{sixteen_bits_are_told.__name__}": functools.partial(sixteen_bits_are_told, one) for one in halves
    }
    for one in halves[:2] + halves[3:]:
        found[f"{one}_{sixteen_bits_go_on_natively.__name__}"] = functools.partial(sixteen_bits_go_on_natively, one)
    for one in ("ddp", "zero1", "hybrid"):  # ColossalAI has no LoRA with tensor parallelism
        found[f"{one}_goes_on_with_lora"] = functools.partial(goes_on_with_lora, one)
    for one in ("ddp", "gemini"):
        found[f"{one}_native_hybrid_adam"] = functools.partial(native_hybrid_adam, one)
    for one in ("gemini", "zero2", *(["3d"] if WORLD_SIZE == 2 else [])):
        found[f"{one}_script"] = functools.partial(script, one)
        found[f"{one}_script_with_other_imports"] = functools.partial(script_with_other_imports, one)
    more: list[Callable[[Path], None]] = [
        what_shardpoint_wrote_is_not_given_to_it,
        tied_weights_that_gemini_cannot_load,
    ]
    more += [a_padded_vocabulary] if WORLD_SIZE == 2 else []
    return found | {one.__name__: one for one in more}


if __name__ == "__main__":
    cpu.install()
    colossalai.launch_from_torch()
    run_and_report(checks(), lambda name: Path(sys.argv[1]) / name)
    dist.destroy_process_group()
