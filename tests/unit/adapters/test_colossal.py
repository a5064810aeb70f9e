"""Is what ColossalAI leaves on tensors and optimizers told as whole tensors? The real one is in tests/colossalai."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from shardpoint.adapters.colossal import lost_in_its_files, plugin_name, whole_members, whole_weights


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 3)
        self.head = nn.Linear(3, 8, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("seen", torch.zeros(2, dtype=torch.int64))


def booster(class_name: str, module: str = "colossalai.booster.plugin", **attributes: Any) -> Any:
    plugin = type(class_name, (), {"__module__": module} | attributes)()
    return SimpleNamespace(plugin=plugin)


def test_a_plugin_is_named_whatever_zero_makes_of_its_class() -> None:
    assert plugin_name(booster("LowLevelZeroPlugin_ZeRO-1")) == "LowLevelZeroPlugin"
    assert plugin_name(booster("TorchDDPPlugin", "shardpoint.booster")) is None
    assert plugin_name(object()) is None


def test_weights_are_told_whole_and_without_padding() -> None:
    model = Tied()
    weight: Any = model.embed.weight
    weight.dist_layout = SimpleNamespace(global_shape=torch.Size([16, 6]))
    weight._padding_dim, weight._origin_length = 0, 11
    found = whole_weights(SimpleNamespace(unwrap=lambda: model))
    assert {name: (one.dtype, one.shape, one.first) for name, one in found.items()} == {
        "embed.weight": ("F32", (11, 6), "embed.weight"),
        "head.weight": ("F32", (11, 6), "embed.weight"),
        "seen": ("I64", (2,), "seen"),
    }


def test_members_of_each_kind_of_optimizer() -> None:
    model = nn.Linear(3, 2)
    weight, bias = model.parameters()
    plain: Any = torch.optim.AdamW([{"params": [bias]}, {"params": [weight]}])
    ids = {"id2param": {0: id(bias), 1: id(weight), 2: 17}}
    shapes = {"param2shape": {id(bias): torch.Size([2]), id(weight): torch.Size([2, 6]), 17: torch.Size([5])}}
    hybrid = SimpleNamespace(param_info={"param_groups": [{"params": [0]}, {"params": [1, 2]}]} | ids | shapes)
    part = torch.zeros(3)
    zero = SimpleNamespace(
        optim=SimpleNamespace(param_groups=[{"params": [part]}]), master_to_working_param={id(part): weight}
    )
    gemini = SimpleNamespace(
        params_info={"id2shape": {0: torch.Size([2, 3])}},
        id_to_real_params={0: weight},
        param_groups_backup=[{"params": [0]}],
    )

    def told(optimizer: Any) -> list[list[tuple[str, tuple[int, ...]]]]:
        return [[(one.name, one.shape) for one in group] for group in whole_members(model, optimizer)]

    assert told(plain) == [[("bias", (2,))], [("weight", (2, 3))]]
    assert told(hybrid) == [[("bias", (2,))], [("weight", (2, 6)), ("parameter 2", (5,))]]
    assert told(zero) == [[("weight", (2, 3))]]
    assert told(gemini) == [[("weight", (2, 3))]]


def test_what_the_files_lack_is_told_only_where_it_is_lost() -> None:
    master = torch.zeros(2)
    optimizer = SimpleNamespace(
        optim=SimpleNamespace(param_groups=[{"params": [master]}]),
        get_master_to_working_map=lambda: {id(master): master.bfloat16()},
    )
    zero, halves = booster("LowLevelZeroPlugin", precision="bf16"), booster("LowLevelZeroPlugin", precision="fp16")
    assert "fp32 master weights" in " ".join(lost_in_its_files(zero, optimizer, ["BF16"]))
    assert len(lost_in_its_files(halves, optimizer, ["F16"])) == 2
    assert lost_in_its_files(zero, optimizer, ["F32"]) == []
    assert lost_in_its_files(zero, None, ["BF16"]) == []
    assert lost_in_its_files(object(), optimizer, ["BF16"]) == []
