"""Are ColossalAI's options taken in its order, with its defaults, and refused by name where they mean nothing here?"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from shardpoint import Booster
from shardpoint.booster import GeminiPlugin, HybridParallelPlugin, LowLevelZeroPlugin, clipping, tensor_parallel
from shardpoint.booster import hybrid as hybrid_module
from shardpoint.booster import zero as zero_module
from shardpoint.errors import UsageError

# Read off colossalai 0.5.0.
PARAMETERS = {
    HybridParallelPlugin: """tp_size pp_size sp_size precision zero_stage enable_all_optimization
        enable_fused_normalization enable_flash_attention enable_jit_fused enable_sequence_parallelism
        sequence_parallelism_mode parallel_output num_microbatches microbatch_size initial_scale min_scale growth_factor
        backoff_factor growth_interval hysteresis max_scale max_norm broadcast_buffers ddp_bucket_cap_mb
        find_unused_parameters check_reduction gradient_as_bucket_view static_graph zero_bucket_size_in_m cpu_offload
        communication_dtype overlap_communication custom_policy pp_style num_model_chunks scheduler_nodes
        num_layers_per_stage gradient_checkpoint_config enable_metadata_cache make_vocab_size_divisible_by dp_outside
        overlap_p2p overlap_allgather fp8_communication use_fp8 inner_ring_size""",
    LowLevelZeroPlugin: """stage precision initial_scale min_scale growth_factor backoff_factor growth_interval
        hysteresis max_scale max_norm norm_type reduce_bucket_size_in_m communication_dtype overlap_communication
        overlap_allgather cpu_offload master_weights verbose cast_inputs fp8_communication use_fp8 extra_dp_size""",
    GeminiPlugin: """chunk_config_dict chunk_init_device placement_policy enable_gradient_accumulation max_prefetch
        shard_param_frac offload_optim_frac offload_param_frac warmup_non_model_data_ratio steady_cuda_cap_ratio
        precision master_weights pin_memory force_outputs_fp32 strict_ddp_mode search_range_m hidden_dim
        min_chunk_size_m memstats gpu_margin_mem_ratio initial_scale min_scale growth_factor backoff_factor
        growth_interval hysteresis max_scale max_norm norm_type tp_size extra_dp_size enable_all_optimization
        enable_fused_normalization enable_flash_attention enable_sequence_parallelism enable_jit_fused
        enable_async_reduce use_fp8 verbose fp8_communication""",
}
HONOURED = {
    HybridParallelPlugin: "tp_size sp_size precision zero_stage parallel_output max_norm",
    LowLevelZeroPlugin: "stage precision max_norm norm_type master_weights cast_inputs extra_dp_size",
    GeminiPlugin: """enable_gradient_accumulation shard_param_frac precision master_weights force_outputs_fp32 max_norm
        norm_type extra_dp_size""",
}
# Read by ColossalAI only behind another option that is off here: scripts pass them in any case.
WITHOUT_EFFECT = {
    HybridParallelPlugin: """num_microbatches microbatch_size pp_style num_model_chunks scheduler_nodes
        num_layers_per_stage enable_metadata_cache overlap_p2p sequence_parallelism_mode inner_ring_size""",
    LowLevelZeroPlugin: "",
    GeminiPlugin: "",
}
SCALING = "initial_scale min_scale growth_factor backoff_factor growth_interval hysteresis max_scale"
GIVEN: dict[Any, dict[str, Any]] = {HybridParallelPlugin: {"tp_size": 1}, LowLevelZeroPlugin: {}, GeminiPlugin: {}}


def changed(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return "other" if isinstance(value, str) else object()


@pytest.mark.parametrize("plugin", PARAMETERS)
def test_the_parameters_are_colossalais(plugin: Any) -> None:
    found = list(inspect.signature(plugin).parameters)
    assert found == PARAMETERS[plugin].split()


@pytest.mark.parametrize(
    "plugin, name",
    [(plugin, name) for plugin, names in PARAMETERS.items() for name in names.split()],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_what_cannot_be_honoured_is_refused_by_name(plugin: Any, name: str) -> None:
    if name in f"{HONOURED[plugin]} {WITHOUT_EFFECT[plugin]} {SCALING}".split():
        return
    default = inspect.signature(plugin).parameters[name].default
    plugin(**GIVEN[plugin], **{name: default})
    with pytest.raises(UsageError, match=f"{name}=.*cannot be honoured"):
        plugin(**GIVEN[plugin], **{name: changed(default)})


@pytest.mark.parametrize("plugin", PARAMETERS)
def test_what_has_no_effect_in_colossalai_has_none_here(plugin: Any) -> None:
    given = GIVEN[plugin] | {"initial_scale": 8, "growth_interval": 7}
    defaults = inspect.signature(plugin).parameters
    given |= {name: changed(defaults[name].default) for name in WITHOUT_EFFECT[plugin].split()}
    made, plain = vars(plugin(**given)), vars(plugin(**GIVEN[plugin]))
    kept = [name for name, value in plain.items() if isinstance(value, bool | int | float | str | None)]
    assert {name: made[name] for name in kept} == {name: plain[name] for name in kept}
    with pytest.raises(UsageError, match="growth_factor"):
        plugin(**GIVEN[plugin], growth_factor=0.5)


def test_all_refused_options_are_named_at_once() -> None:
    with pytest.raises(UsageError, match=r"(?s)pp_size=2.*enable_flash_attention=True"):
        HybridParallelPlugin(2, 2, enable_flash_attention=True)
    assert set(hybrid_module._REFUSED) < set(PARAMETERS[HybridParallelPlugin].split())
    assert set(zero_module._GEMINI_REFUSED) < set(PARAMETERS[GeminiPlugin].split())


@pytest.mark.parametrize(
    "plugin, options, message",
    [
        (GeminiPlugin, {"precision": "int8"}, "neither 'fp16' nor 'bf16' nor 'fp32'"),
        (HybridParallelPlugin, {"tp_size": 0}, "not a number of ranks"),
        (HybridParallelPlugin, {"tp_size": 2, "sp_size": 2}, "sequence parallelism"),
        (HybridParallelPlugin, {"tp_size": 2, "zero_stage": 3}, "zero_stage=3"),
        (HybridParallelPlugin, {"tp_size": 2, "max_norm": -1.0}, "positive"),
        (LowLevelZeroPlugin, {"stage": 3}, "GeminiPlugin"),
        (LowLevelZeroPlugin, {"max_norm": 1.0, "norm_type": 0.0}, "positive"),
        (LowLevelZeroPlugin, {"extra_dp_size": 0}, "replica groups"),
        (GeminiPlugin, {"shard_param_frac": 0.5}, "shard_param_frac=0.5"),
    ],
)
def test_values_without_a_meaning(plugin: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plugin(**options)


def test_precision_belongs_to_the_plugin() -> None:
    for plugin in (HybridParallelPlugin(1), LowLevelZeroPlugin(), GeminiPlugin()):
        with pytest.raises(UsageError, match="belongs to the plugin"):
            Booster(plugin=plugin, mixed_precision="bf16")


# ---- what a tp_plan may say


class Small(nn.Module):
    tp_plan: dict[str, str]

    def __init__(self, plan: dict[str, str]) -> None:
        super().__init__()
        self.tp_plan = plan
        self.table = nn.Embedding(6, 4)
        self.layers = nn.ModuleList([nn.Linear(4, 6), nn.Linear(6, 4)])
        self.conv = nn.Conv1d(1, 2, 1)
        self.head = nn.Linear(4, 6, bias=False)


def test_cuts_are_found_by_pattern() -> None:
    model = Small({"layers.*": "colwise", "table": "embedding_rowwise", "conv": "replicate"})
    found = [(one.name, one.style, one.dim) for one in tensor_parallel.find_cuts(model, 2)]
    assert found == [("table", "embedding_rowwise", 0), ("layers.0", "colwise", 0), ("layers.1", "colwise", 0)]
    assert [one.dim for one in tensor_parallel.find_cuts(Small({"layers.1": "rowwise"}), 2)] == [1]


@pytest.mark.parametrize(
    "plan, size, message",
    [
        ({}, 2, "no tp_plan"),
        ({"nothing.*": "colwise"}, 2, "names no module"),
        ({"head": "packed_colwise"}, 2, "'packed_colwise', which is not supported"),
        ({"head.weight": "colwise"}, 2, "head.weight"),
        ({"conv": "colwise"}, 2, "a Conv1d"),
        ({"layers.0": "colwise"}, 4, "does not divide dim 0"),
        ({"layers.1": "rowwise"}, 4, "does not divide dim 1"),
    ],
)
def test_plans_that_cannot_be_honoured(plan: dict[str, str], size: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        tensor_parallel.find_cuts(Small(plan), size)


@pytest.mark.parametrize("plan", [{"head": "colwise_rep"}, {"head": "colwise_rep", "table": "embedding_colwise"}])
def test_tied_weights_are_cut_alike(plan: dict[str, str]) -> None:
    model = Small(plan)
    model.head.weight = model.table.weight
    with pytest.raises(UsageError, match="are tied, but"):
        tensor_parallel.find_cuts(model, 2)
    model.tp_plan = {"head": "colwise_rep", "table": "embedding_rowwise"}
    assert [one.dim for one in tensor_parallel.find_cuts(model, 2)] == [0, 0]


# ---- clipping, on plain tensors


def gradients(seed: int) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    made = [nn.Parameter(torch.zeros(shape)) for shape in ((3, 4), (5,), (0, 2), (2,))]
    for parameter in made[:3]:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return made


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.5, float("inf")])
@pytest.mark.parametrize("max_norm", [0.3, 1e3])
def test_clipping_is_torchs(norm_type: float, max_norm: float) -> None:
    mine, torchs = gradients(0), gradients(0)
    total = clipping.clip_grad_norm_(mine, max_norm, norm_type)
    expected = torch.nn.utils.clip_grad_norm_([p for p in torchs if p.numel()], max_norm, norm_type)
    torch.testing.assert_close(total, expected)
    for one, other in zip(mine[:3], torchs[:3], strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_clipping_nothing() -> None:
    assert Booster().clip_grad_norm_(nn.Linear(2, 2), 1.0) == 0
    with pytest.raises(UsageError, match="positive"):
        Booster().clip_grad_norm_(nn.Linear(2, 2), 0.0)


def test_a_closure_would_not_be_clipped() -> None:
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    clipping.clip_before_steps(optimizer, 1.0, 2.0)
    step: Callable[..., Any] = optimizer.step
    for arguments, named in (((lambda: 1.0,), {}), ((), {"closure": lambda: 1.0})):
        with pytest.raises(UsageError, match="closure"):
            step(*arguments, **named)
    parameter.grad = torch.tensor([3.0, 4.0])
    step()
    torch.testing.assert_close(parameter.detach(), 1 - 0.1 * torch.tensor([0.6, 0.8]))
