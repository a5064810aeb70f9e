"""Does torch's DCP load what is exported, and does a run go on from what torch's DCP saved, both to the last bit?"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_dcp
from torch.distributed.checkpoint.state_dict_saver import save as save_dcp

from shardpoint import Checkpointer, RunState, TrainState, load
from shardpoint.catalog import open_path, verify
from shardpoint.errors import (
    AlreadyExistsError,
    ChecksumError,
    MismatchError,
    NotFoundError,
    StorageError,
    TruncatedError,
    UnsupportedFormatError,
    UsageError,
)
from shardpoint.integrations.dcp import Keys, export_dcp, import_dcp
from tests.training import OPTIMIZERS, flip, on_disk, optimizer_state, same_bits, train, weights

NAME = "epoch-0_step-2"
FORMS = pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
ALONE = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

pytestmark = ALONE


class Small(nn.Module):
    """Parameters that all get gradients, of several dtypes and sizes; a frozen one; a buffer; a tied tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 5)
        self.norm = nn.BatchNorm1d(5)
        self.head = nn.Linear(5, 1, bias=False)
        self.frozen = nn.Parameter(torch.randn(7, dtype=torch.bfloat16), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(torch.tanh(self.norm(self.embed(x))))
        return out


def small(seed: int) -> Small:
    torch.manual_seed(seed)
    return Small()


def grouped(model: nn.Module) -> list[dict[str, Any]]:
    """Give each parameter a group of its own kind: some with weight decay, some without, the frozen one too."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    return [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0, "lr": 0.02}]


def trained(seed: int, kind: str = "adamw") -> TrainState:
    model = small(seed)
    optimizer = OPTIMIZERS[kind](grouped(model))
    train(model, optimizer, range(2))
    return TrainState(model=model, optimizer=optimizer)


def fresh(seed: int, kind: str = "adamw") -> TrainState:
    model = small(seed)
    return TrainState(model=model, optimizer=OPTIMIZERS[kind](grouped(model)))


def saved(root: Path, state: TrainState | dict[str, TrainState]) -> Path:
    with Checkpointer(root) as checkpointer:
        checkpointer.save(state, epoch=0, step=2, batch_size=4)
    return root / NAME


def everything(state: TrainState) -> dict[str, torch.Tensor]:
    assert state.optimizer is not None
    return weights(state.model) | optimizer_state(state.model, state.optimizer)


def go_on(state: TrainState) -> list[float]:
    assert state.optimizer is not None
    return train(state.model, state.optimizer, range(2, 5))


def by_torch(state: TrainState, *, flat: bool) -> tuple[dict[str, Any], StateDictOptions]:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    assert state.optimizer is not None
    model, optimizer = get_state_dict(state.model, state.optimizer, options=options)
    return {"model": model, "optimizer": optimizer}, options


def dcp_saved(directory: Path, state: TrainState, *, flat: bool = False, **more: Any) -> Path:
    save_dcp({**by_torch(state, flat=flat)[0], **more}, checkpoint_id=directory, no_dist=True)
    return directory


def imported(directory: Path, root: Path, optimizer_class: str | None = "AdamW", **options: Any) -> Path:
    import_dcp(directory, root, epoch=0, step=2, batch_size=4, optimizer_class=optimizer_class, **options)
    store, committed = open_path(root / NAME)
    assert verify(store, committed).ok
    return root / NAME


# ---- export


@FORMS
@pytest.mark.parametrize("kind", ["adamw", "adamw_foreach_amsgrad", "sgd_momentum", "sgd_plain"])
def test_torch_loads_what_is_exported(tmp_path: Path, kind: str, *, flat: bool) -> None:
    state, other = trained(0, kind), fresh(9, kind)
    before = everything(state)
    result = export_dcp(saved(tmp_path / "root", state), tmp_path / "dcp", flatten_optimizer=flat)
    target, options = by_torch(other, flat=flat)
    load_dcp(target, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert other.optimizer is not None
    set_state_dict(
        other.model,
        other.optimizer,
        model_state_dict=target["model"],
        optim_state_dict=target["optimizer"],
        options=options,
    )
    assert same_bits(everything(other), before)
    assert go_on(other) == go_on(state)
    assert result.num_tensors >= len(weights(state.model))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dcp", "root"]


def test_one_role_is_exported_without_its_optimizer(tmp_path: Path) -> None:
    roles = {"actor": trained(0), "critic": trained(1)}
    checkpoint = saved(tmp_path / "root", roles)
    with pytest.raises(UsageError, match=r"\['actor', 'critic'\]: give one of its roles"):
        export_dcp(checkpoint, tmp_path / "dcp")
    with pytest.raises(UsageError, match="there is no role 'reward'"):
        export_dcp(checkpoint, tmp_path / "dcp", role="reward")
    export_dcp(checkpoint, tmp_path / "dcp", role="critic", optimizer=False, keys=Keys(model=""))
    target = {name: torch.zeros_like(value) for name, value in weights(roles["critic"].model).items()}
    load_dcp(target, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert same_bits(target, weights(roles["critic"].model))


def test_damage_is_never_exported(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path / "root", trained(0))
    flip(checkpoint / "modeling" / "model-00001-of-00001.safetensors")
    with pytest.raises(ChecksumError, match=r"model-00001-of-00001\.safetensors .* is damaged"):
        export_dcp(checkpoint, tmp_path / "dcp")
    assert [path.name for path in tmp_path.iterdir()] == ["root"]


def test_a_damaged_counter_is_never_exported(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path / "root", trained(0))
    flip(checkpoint / "optimizer" / "param_groups.json", 40)
    with pytest.raises(ChecksumError):
        export_dcp(checkpoint, tmp_path / "dcp")
    assert [path.name for path in tmp_path.iterdir()] == ["root"]


def test_a_cut_file_is_found_before_it_is_mapped(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path / "root", trained(0))
    path = checkpoint / "modeling" / "model-00001-of-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(TruncatedError):
        export_dcp(checkpoint, tmp_path / "dcp")


def test_an_export_never_goes_over_anything(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path / "root", trained(0))
    (tmp_path / "dcp").mkdir()
    with pytest.raises(AlreadyExistsError):
        export_dcp(checkpoint, tmp_path / "dcp")
    assert list((tmp_path / "dcp").iterdir()) == []


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    checkpoint = saved(tmp_path / "root", trained(0))
    monkeypatch.setattr(torch, "save", refuse)
    with pytest.raises(StorageError, match="No space left") as caught:
        export_dcp(checkpoint, tmp_path / "dcp")
    assert caught.value.errno == errno.ENOSPC
    assert [path.name for path in tmp_path.iterdir()] == ["root"]


def test_a_killed_export_has_not_its_name(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path / "root", trained(0))
    program = """
import os, signal, sys, torch
from shardpoint.integrations.dcp import export_dcp

write, left = torch.save, [5]

def killed_at_the_fifth(*arguments, **options):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    return write(*arguments, **options)

torch.save = killed_at_the_fifth
export_dcp(sys.argv[1], sys.argv[2])
"""
    command = [sys.executable, "-c", program, str(checkpoint), str(tmp_path / "dcp")]
    assert subprocess.run(command, check=False, capture_output=True).returncode == -signal.SIGKILL
    assert not (tmp_path / "dcp").exists()
    assert len(list(tmp_path.glob(".dcp.exporting-*"))) == 1
    store, committed = open_path(checkpoint)
    assert verify(store, committed).ok
    export_dcp(checkpoint, tmp_path / "dcp")


def test_what_has_no_optimizer_says_so(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path / "root", TrainState(model=small(0)))
    with pytest.raises(MismatchError, match="export without it"):
        export_dcp(checkpoint, tmp_path / "dcp")
    export_dcp(checkpoint, tmp_path / "dcp", optimizer=False)


# ---- import


@FORMS
@pytest.mark.parametrize("kind,name", [("adamw", "AdamW"), ("sgd_momentum", "SGD")])
def test_a_run_goes_on_from_what_torch_saved(tmp_path: Path, kind: str, name: str, *, flat: bool) -> None:
    state, other = trained(0, kind), fresh(9, kind)
    dcp_saved(tmp_path / "dcp", state, flat=flat, progress={"step": 2, "tokens": torch.tensor(8)})
    directory = imported(tmp_path / "dcp", tmp_path / "root", name)
    assert same_bits(on_disk(directory / "modeling"), weights(state.model))
    with Checkpointer(tmp_path / "root") as checkpointer:
        assert checkpointer.resume(other) == RunState(0, 2, 8)
    assert same_bits(everything(other), everything(state))
    assert go_on(other) == go_on(state)


def test_there_and_back_is_the_same(tmp_path: Path) -> None:
    state, other = trained(0), fresh(9)
    export_dcp(saved(tmp_path / "root", state), tmp_path / "dcp", keys=Keys("app.model", "app.optim"))
    with pytest.raises(NotFoundError, match=r"no tensor under 'model': it has \['app"):
        imported(tmp_path / "dcp", tmp_path / "again")
    imported(tmp_path / "dcp", tmp_path / "again", keys=Keys("app.model", "app.optim"), role="actor")
    load(tmp_path / "again", {"actor": other})
    assert same_bits(everything(other), everything(state))


def test_a_model_at_the_top_is_found_beside_a_trainers_own_state(tmp_path: Path) -> None:
    state = trained(0)
    parts, _ = by_torch(state, flat=True)
    top = {**parts["model"], "optimizer": parts["optimizer"], "train_state": {"step": torch.tensor(2)}}
    save_dcp(top, checkpoint_id=tmp_path / "dcp", no_dist=True)
    directory = imported(tmp_path / "dcp", tmp_path / "root", keys=Keys(model=""))
    assert same_bits(on_disk(directory / "modeling"), weights(state.model))


def test_the_optimizer_is_left_out_only_when_that_is_said(tmp_path: Path) -> None:
    state = trained(0)
    save_dcp({"model": by_torch(state, flat=False)[0]["model"]}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    with pytest.raises(MismatchError, match="leave the optimizer out explicitly"):
        imported(tmp_path / "dcp", tmp_path / "root")
    assert not (tmp_path / "root" / NAME).exists()
    imported(tmp_path / "dcp", tmp_path / "root", None)
    with Checkpointer(tmp_path / "root") as checkpointer, pytest.raises(MismatchError, match="start the optimizer"):
        checkpointer.resume(fresh(9))


def test_another_optimizer_does_not_get_its_state(tmp_path: Path) -> None:
    imported(dcp_saved(tmp_path / "dcp", trained(0)), tmp_path / "root", "Adam")
    with Checkpointer(tmp_path / "root") as checkpointer, pytest.raises(MismatchError, match="the state of Adam"):
        checkpointer.resume(fresh(9))


def test_an_import_never_goes_over_a_checkpoint(tmp_path: Path) -> None:
    dcp_saved(tmp_path / "dcp", trained(1))
    before = on_disk(saved(tmp_path / "root", trained(0)) / "modeling")
    with pytest.raises(AlreadyExistsError):
        imported(tmp_path / "dcp", tmp_path / "root")
    assert same_bits(on_disk(tmp_path / "root" / NAME / "modeling"), before)


def test_states_by_number_are_refused(tmp_path: Path) -> None:
    state = trained(0)
    assert state.optimizer is not None
    raw = {"model": state.model.state_dict(), "optimizer": state.optimizer.state_dict()}
    save_dcp(raw, checkpoint_id=tmp_path / "dcp", no_dist=True)
    with pytest.raises(UsageError, match="save what torch's get_optimizer_state_dict returns"):
        imported(tmp_path / "dcp", tmp_path / "root")


def test_a_model_directory_opens_with_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
                         num_key_value_heads=1, vocab_size=32, tie_word_embeddings=True)  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    config.save_pretrained(tmp_path / "files")
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    state, tied = TrainState(model=model, optimizer=optimizer), {"lm_head.weight": "model.embed_tokens.weight"}
    dcp_saved(tmp_path / "dcp", state)
    directory = imported(tmp_path / "dcp", tmp_path / "root", tied=tied, model_files=tmp_path / "files")
    plain, info = AutoModelForCausalLM.from_pretrained(directory / "modeling", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert same_bits(weights(plain), weights(model))
    other = LlamaForCausalLM(config)
    again = TrainState(model=other, optimizer=torch.optim.AdamW(other.parameters()))
    with Checkpointer(tmp_path / "root") as checkpointer:
        checkpointer.resume(again)
    assert same_bits(everything(again), everything(state))
    export_dcp(directory, tmp_path / "back", tied=tied)
    target, _ = by_torch(TrainState(model=other, optimizer=torch.optim.AdamW(other.parameters())), flat=False)
    load_dcp(target, checkpoint_id=tmp_path / "back", no_dist=True)
    assert same_bits(target["model"], weights(model))


def test_tensors_that_are_not_tied_are_not_called_so(tmp_path: Path) -> None:
    dcp_saved(tmp_path / "dcp", trained(0))
    with pytest.raises(MismatchError, match="said to be tied, and differ"):
        imported(tmp_path / "dcp", tmp_path / "root", tied={"norm.bias": "norm.weight"})
    checkpoint = imported(tmp_path / "dcp", tmp_path / "root")
    with pytest.raises(MismatchError, match="is stored by itself"):
        export_dcp(checkpoint, tmp_path / "back", tied={"norm.bias": "norm.weight"})


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda path: (path / "__0_0.distcp").unlink(), id="file_missing"),
        pytest.param(lambda path: os.truncate(path / "__0_0.distcp", 2000), id="file_cut"),
        pytest.param(lambda path: (path / "__0_0.distcp").write_bytes(b"\0" * 40_000), id="file_of_zeros"),
    ],
)
def test_damaged_files_are_errors(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    damage(dcp_saved(tmp_path / "dcp", trained(0)))
    with pytest.raises(TruncatedError):
        imported(tmp_path / "dcp", tmp_path / "root")
    assert not (tmp_path / "root" / NAME).exists()


MEASURED = """
import re, sys
from pathlib import Path
from shardpoint.integrations import dcp_import

dcp_import.BUDGET_BYTES = 8 * 2**20
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
before = peak()
dcp_import.import_dcp(sys.argv[1], sys.argv[2], epoch=0, step=2, batch_size=4, optimizer_class="AdamW")
print(peak() - before)
"""


def test_an_import_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    model = nn.ParameterList(torch.full((2**20,), float(number)) for number in range(16))
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = TrainState(model=model, optimizer=optimizer)
    dcp_saved(tmp_path / "dcp", state)
    size = sum(path.stat().st_size for path in (tmp_path / "dcp").glob("*.distcp"))
    command = [sys.executable, "-W", "error", "-c", MEASURED, str(tmp_path / "dcp"), str(tmp_path / "root")]
    taken = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert size > 190 * 2**20
    assert taken < 64 * 2**20, f"{taken} bytes for {size} of state, in tensors of 4 MiB"
    directory = tmp_path / "root" / NAME
    assert same_bits(on_disk(directory / "modeling"), weights(model))
    stored = {name: value for name, value in optimizer_state(model, optimizer).items() if value.dim()}
    assert same_bits(on_disk(directory / "optimizer"), stored)


def test_no_metadata_is_no_checkpoint(tmp_path: Path) -> None:
    dcp_saved(tmp_path / "dcp", trained(0))
    (tmp_path / "dcp" / ".metadata").unlink()
    with pytest.raises(NotFoundError, match=r"\.metadata"):
        imported(tmp_path / "dcp", tmp_path / "root")


def test_values_beyond_plain_data_are_refused(tmp_path: Path) -> None:
    parts, _ = by_torch(trained(0), flat=False)
    parts["optimizer"]["param_groups"][0]["lr"] = Fraction(1, 3)
    save_dcp(parts, checkpoint_id=tmp_path / "dcp", no_dist=True)
    with pytest.raises(UnsupportedFormatError, match="more than tensors and plain data"):
        imported(tmp_path / "dcp", tmp_path / "root")
