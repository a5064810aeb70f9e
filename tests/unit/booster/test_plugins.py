from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.parallel import DistributedDataParallel

from shardpoint.booster import Plugin, TorchDDPPlugin, TorchFSDPPlugin, launch
from shardpoint.booster.blocks import find_blocks
from shardpoint.errors import UsageError


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for expert in self.experts:
            x = expert(x)
        return x


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 4)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.head = nn.Linear(4, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        result: torch.Tensor = self.head(x)
        return result


def names(found: list[tuple[str, nn.Module]]) -> list[str]:
    return sorted(name for name, _ in found)


def groups_of(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, FSDPModule)}


# ---- which modules are blocks


def test_a_transformers_model_names_its_blocks(llama: Callable[..., nn.Module]) -> None:
    assert names(find_blocks(llama())) == ["model.layers.0", "model.layers.1"]
    wrapper = nn.ModuleDict({"inner": llama()})
    assert names(find_blocks(wrapper)) == ["inner.model.layers.0", "inner.model.layers.1"]


def test_repeated_modules_of_the_outermost_lists_are_blocks_and_experts_are_not() -> None:
    assert names(find_blocks(Stack())) == ["layers.0", "layers.1"]
    model = nn.Sequential()
    model.add_module("mixed", nn.ModuleList([nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.LayerNorm(2)]))
    assert names(find_blocks(model)) == ["mixed.0", "mixed.2"]


def test_blocks_given_by_name_or_class_come_children_first() -> None:
    model = Stack()
    assert [name for name, _ in find_blocks(model, [Layer, "Linear"])] == [
        "head",
        "layers.1.experts.1",
        "layers.1.experts.0",
        "layers.1",
        "layers.0.experts.1",
        "layers.0.experts.0",
        "layers.0",
        "embed",
    ]
    assert find_blocks(model, ()) == []
    with pytest.raises(UsageError, match="Missing"):
        find_blocks(model, ["Missing"])
    with pytest.raises(UsageError, match="sequence"):
        find_blocks(model, "Layer")


def test_a_found_block_with_a_tied_parameter_stays_in_the_root_and_a_given_one_is_refused() -> None:
    model = Stack()
    model.head.weight = model.layers[0].experts[0].weight  # type: ignore[union-attr, index]
    assert names(find_blocks(model)) == ["layers.1"]
    with pytest.raises(UsageError, match="tied"):
        find_blocks(model, [Layer])


def test_a_layer_used_twice_is_one_block() -> None:
    model = Stack()
    model.layers[1] = model.layers[0]
    assert len(find_blocks(model)) == 1


# ---- FSDP2


@pytest.mark.parametrize(
    "plugin, placements",
    [(TorchFSDPPlugin(), (Shard(0),)), (TorchFSDPPlugin(hsdp_shape=(1, 1)), (Replicate(), Shard(0)))],
    ids=["fsdp", "hsdp"],
)
def test_blocks_and_root_are_sharded(plugin: TorchFSDPPlugin, placements: object) -> None:
    plugin.mesh = None
    model = Stack()
    assert plugin.configure(model) is model
    assert groups_of(model) == {"", "layers.0", "layers.1"}
    for parameter in model.parameters():
        assert isinstance(parameter, DTensor)
        assert parameter.placements == placements
    model(torch.ones(2, 4)).sum().backward()
    assert plugin.configure(model) is model, "a second time changes nothing"


def test_a_mesh_of_the_user_is_used() -> None:
    launch.join_ranks()
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("data",))
    model = TorchFSDPPlugin(mesh=mesh).configure(Stack())
    assert all(isinstance(p, DTensor) and p.device_mesh == mesh for p in model.parameters())


def test_two_models_share_the_mesh_of_a_plugin() -> None:
    plugin = TorchFSDPPlugin()
    plugin.configure(Stack())
    mesh = plugin.mesh
    plugin.configure(Stack())
    assert plugin.mesh is mesh


@pytest.mark.parametrize(
    "given, expected",
    [
        (None, MixedPrecisionPolicy()),
        ("bf16", MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)),
        ("fp16", MixedPrecisionPolicy(param_dtype=torch.float16, reduce_dtype=torch.float32)),
        (MixedPrecisionPolicy(output_dtype=torch.float32), MixedPrecisionPolicy(output_dtype=torch.float32)),
    ],
)
def test_mixed_precision(given: object, expected: MixedPrecisionPolicy) -> None:
    assert TorchFSDPPlugin(mixed_precision=given).policy == expected  # type: ignore[arg-type]


def test_bf16_computes_in_bf16_and_keeps_float32_parameters() -> None:
    model = TorchFSDPPlugin(mixed_precision="bf16").configure(Stack())
    out = model(torch.ones(2, 4))
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


def test_what_sits_on_a_parameter_goes_along() -> None:
    model = Stack()
    model.head.weight.no_decay = True  # type: ignore[attr-defined]
    TorchFSDPPlugin().configure(model)
    assert model.head.weight.no_decay is True  # type: ignore[attr-defined]


def test_a_model_on_the_meta_device_is_sharded_as_it_is() -> None:
    with torch.device("meta"):
        model = Stack()
    TorchFSDPPlugin().configure(model)
    assert all(isinstance(p, DTensor) and p.is_meta for p in model.parameters())


def scalar() -> nn.Module:
    model = Stack()
    model.scale = nn.Parameter(torch.tensor(1.0))
    return model


def transposed() -> nn.Module:
    model = Stack()
    model.head.weight = nn.Parameter(torch.ones(4, 6).T)
    return model


def two_dtypes() -> nn.Module:
    model = Stack()
    model.head.bfloat16()
    return model


def with_gradient() -> nn.Module:
    model = Stack()
    model(torch.ones(1, 4)).sum().backward()
    return model


def with_hook() -> nn.Module:
    model = Stack()
    model.head.weight.register_post_accumulate_grad_hook(lambda _: None)
    return model


@pytest.mark.parametrize(
    "make, message",
    [
        (scalar, "scale is a 0-dim"),
        (transposed, "head.weight is not contiguous"),
        (two_dtypes, r"the root.*embed.weight is torch.float32, head.weight is torch.bfloat16"),
        (with_gradient, "has a gradient"),
        (with_hook, "head.weight has hooks"),
        (lambda: DistributedDataParallel(Stack()), "wrapped by DistributedDataParallel"),
    ],
)
def test_what_fsdp_cannot_honour_is_refused_before_anything_changes(
    make: Callable[[], nn.Module], message: str
) -> None:
    launch.join_ranks()
    model = make()
    with pytest.raises(UsageError, match=message):
        TorchFSDPPlugin().configure(model)
    assert not groups_of(model)
    assert not any(isinstance(p, DTensor) for p in model.parameters())


def test_frozen_parameters_may_have_another_dtype() -> None:
    model = two_dtypes()
    model.get_submodule("head").requires_grad_(requires_grad=False)
    TorchFSDPPlugin().configure(model)
    assert groups_of(model) == {"", "layers.0", "layers.1"}


@pytest.mark.parametrize("shape", [(1, 2, 3), (0, 1), (2,), (1, 1.0), (True, 1)])
def test_a_bad_hsdp_shape(shape: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match="hsdp_shape"):
        TorchFSDPPlugin(hsdp_shape=shape)


def test_arguments_that_contradict_each_other() -> None:
    launch.join_ranks()
    mesh = init_device_mesh("cpu", (1,))
    with pytest.raises(UsageError, match="not both"):
        TorchFSDPPlugin(mesh=mesh, hsdp_shape=(1, 1))
    with pytest.raises(UsageError, match="named axes"):
        TorchFSDPPlugin(mesh=init_device_mesh("cpu", (1, 1)))
    with pytest.raises(UsageError, match="3 ranks; there are 1"):
        TorchFSDPPlugin(hsdp_shape=(1, 3)).configure(Stack())
    with pytest.raises(UsageError, match="mixed_precision"):
        TorchFSDPPlugin(mixed_precision="fp8")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="reshard_after_forward=1"):
        TorchFSDPPlugin(reshard_after_forward=1).configure(Stack())


def test_no_sync_of_a_model_that_is_not_spread() -> None:
    with pytest.raises(UsageError, match="FSDP2"):
        TorchFSDPPlugin().no_sync(Stack())
    with pytest.raises(UsageError, match="TorchDDPPlugin"):
        TorchDDPPlugin().no_sync(Stack())


# ---- DDP


def test_ddp_wraps_once_and_passes_its_options() -> None:
    plugin = TorchDDPPlugin(bucket_cap_mb=7, find_unused_parameters=True, gradient_as_bucket_view=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = plugin.configure(Stack())
    assert isinstance(model, DistributedDataParallel)
    assert (model.bucket_bytes_cap, model.find_unused_parameters) == (7 * 1024 * 1024, True)
    assert (model.gradient_as_bucket_view, model.forward_sync_buffers) == (True, True)
    assert plugin.configure(model) is model


def test_ddp_without_broadcast_buffers_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = TorchDDPPlugin(broadcast_buffers=False, static_graph=True).configure(Stack())
    assert isinstance(model, DistributedDataParallel)
    assert model.forward_sync_buffers is False
    assert model.static_graph is True


def test_ddp_leaves_a_frozen_model_unwrapped() -> None:
    model = Stack().requires_grad_(requires_grad=False)
    plugin = TorchDDPPlugin()
    assert plugin.configure(model) is model
    with plugin.no_sync(model):
        pass


def test_ddp_refuses_what_it_cannot_replicate() -> None:
    with pytest.raises(UsageError, match="check_reduction"):
        TorchDDPPlugin(check_reduction=True)
    with torch.device("meta"):
        meta = Stack()
    with pytest.raises(UsageError, match="meta device"):
        TorchDDPPlugin().configure(meta)
    sharded = TorchFSDPPlugin().configure(Stack())
    with pytest.raises(UsageError, match="DTensor"):
        TorchDDPPlugin().configure(sharded)


def test_plugins_say_whether_they_control_precision() -> None:
    assert issubclass(TorchFSDPPlugin, Plugin)
    assert (TorchDDPPlugin.controls_precision, TorchFSDPPlugin.controls_precision) == (False, True)
