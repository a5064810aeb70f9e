"""How a model's own `tp_plan` becomes torch's tensor parallelism: what can be cut, checked before anything changes.

The plan and the names of its styles are transformers'; the modules are parallelised by torch's `parallelize_module`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.optim import Optimizer

from shardpoint.adapters.tensors import local_tensor
from shardpoint.booster import repoint
from shardpoint.errors import UsageError

# Cut along the heads, a module with replicated weights sees part of the activations, so its gradients are sums over the
# ranks. Which dim is declared cut does not matter for a module that works on the last one.
_SUMMED = "replicated_with_grad_allreduce"

_STYLES: Mapping[str, Callable[[], ParallelStyle]] = {
    "colwise": ColwiseParallel,
    "colwise_gather_output": lambda: ColwiseParallel(output_layouts=Replicate()),
    "colwise_rep": lambda: ColwiseParallel(output_layouts=Replicate()),
    "rowwise": RowwiseParallel,
    "rowwise_rep": lambda: RowwiseParallel(input_layouts=Replicate()),
    "rowwise_split_input": lambda: RowwiseParallel(input_layouts=Replicate()),
    "embedding_rowwise": lambda: RowwiseParallel(input_layouts=Replicate()),
    "embedding_colwise": lambda: ColwiseParallel(output_layouts=Replicate()),
    _SUMMED: lambda: SequenceParallel(sequence_dim=0, use_local_output=True),
}
_EVEN = {"colwise": 0, "rowwise": 1}  # styles whose activations stay cut: the weight's dim that must divide


@dataclass(frozen=True, slots=True)
class Cut:
    """One module of a model and how its weights are cut.

    Attributes:
        name: the module's.
        module: a Linear or an Embedding, or one whose gradients are summed.
        style: transformers' name of how.
    """

    name: str
    module: nn.Module
    style: str

    @property
    def dim(self) -> int | None:
        """The dim of the weight that is cut; None where it is replicated."""
        if self.style == _SUMMED:
            return None
        # A Linear's weight is [out, in], an Embedding's [entries, width].
        outputs = 1 if isinstance(self.module, nn.Embedding) else 0
        return outputs if "colwise" in self.style else 1 - outputs


def find_cuts(model: nn.Module, tp_size: int) -> list[Cut]:
    """Return the modules that a model's `tp_plan` cuts, once everything that cannot be honoured is ruled out.

    Args:
        model: not spread yet, with a `tp_plan`: module name (`*` for a number) -> style.
        tp_size: over how many ranks.

    Raises:
        UsageError: there is no plan, a style or a module that cannot be cut, a size that does not divide, or weights
            tied to others that are cut otherwise.
    """
    # transformers before 5 has it as `_tp_plan` only.
    plan = getattr(model, "tp_plan", None) or getattr(model, "_tp_plan", None)
    if not plan:
        raise UsageError(
            f"{type(model).__name__} has no tp_plan, so nothing says how it is cut over {tp_size} ranks: give it one "
            '(model.tp_plan = {"layers.*.up": "colwise", "layers.*.down": "rowwise"}), or use TorchFSDPPlugin'
        )
    _check_heads(model, tp_size)
    styles = {re.compile(re.escape(name).replace(r"\*", r"\d+")): style for name, style in plan.items()}
    planned = [*model.named_modules(), *model.named_parameters()]
    cuts: list[Cut] = []
    for name, part in planned:
        for pattern, style in styles.items():
            if pattern.fullmatch(name) and style != "replicate":
                cuts.append(_cut(name, part, style, tp_size))
                break
    if not cuts:
        raise UsageError(f"the tp_plan of {type(model).__name__} names no module that it has: {sorted(plan)}")
    _check_ties(model, cuts)
    return cuts


def cut(model: nn.Module, cuts: list[Cut], mesh: DeviceMesh) -> None:
    """Cut the modules over a 1-D mesh, in place and without communication: all ranks hold the same model already.

    Tied weights stay tied, and what a user has set on a parameter stays on it.
    """
    attributes = repoint.attributes(model)
    tied = _tied(model)
    for one in cuts:
        parallelize_module(one.module, mesh, _STYLES[one.style](), src_data_rank=None)
        for key, parameter in list(one.module.named_parameters(recurse=False)):
            one.module.register_parameter(key, _compact(parameter))
            if one.style == _SUMMED:
                _sum_gradient(one.module.get_parameter(key))
    for places in tied:
        (first, key), *others = places
        for module, other in others:
            module.register_parameter(other, first.get_parameter(key))
    repoint.keep_attributes(model, attributes)


def check_steps_one_by_one(optimizer: Optimizer) -> None:
    """Check that an optimizer may step its parameters one by one.

    Raises:
        UsageError: it was told to step them together.
    """
    for group in optimizer.param_groups:
        chosen = [key for key in ("foreach", "fused") if group.get(key)]
        if chosen:
            raise UsageError(
                f"{chosen[0]}=True of {type(optimizer).__name__} cannot step cut and whole parameters together, which "
                "tensor parallelism without FSDP2 has side by side: leave it out"
            )


def step_one_by_one(optimizer: Optimizer) -> None:
    """Keep torch from choosing `foreach`, which raises on plain tensors and DTensors in one group."""
    for group in optimizer.param_groups:
        if "foreach" in group:
            group["foreach"] = False


def _check_heads(model: nn.Module, tp_size: int) -> None:
    config = getattr(model, "config", None)
    get_text_config = getattr(config, "get_text_config", None)
    config = get_text_config() if callable(get_text_config) else config
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, name, None)
        if isinstance(heads, int) and heads % tp_size:
            raise UsageError(
                f"tp_size={tp_size} does not divide {name}={heads} of {type(model).__name__}, and a head cannot be "
                "cut: choose another tp_size, or TorchFSDPPlugin"
            )


def _cut(name: str, part: Any, style: str, tp_size: int) -> Cut:
    if style not in _STYLES or isinstance(part, nn.Parameter):
        raise UsageError(
            f"the tp_plan cuts {name} by the style {style!r}, which is not supported here ({', '.join(_STYLES)} of "
            "modules are): use TorchFSDPPlugin for this model"
        )
    found = Cut(name, part, style)
    if style == _SUMMED:
        return found
    if type(part) not in (nn.Linear, nn.Embedding):
        raise UsageError(
            f"the tp_plan cuts {name}, a {type(part).__name__}: only nn.Linear and nn.Embedding can be cut (not "
            "adapters or quantised layers): use TorchFSDPPlugin for this model"
        )
    dim = _EVEN.get(style)
    if dim is not None and isinstance(part, nn.Linear) and part.weight.shape[dim] % tp_size:
        raise UsageError(
            f"tp_size={tp_size} does not divide dim {dim} of {name}.weight, {list(part.weight.shape)}: its neighbours "
            "take it in equal parts; choose another tp_size, or TorchFSDPPlugin"
        )
    return found


def _tied(model: nn.Module) -> list[list[tuple[nn.Module, str]]]:
    """Return, for each parameter that stands in several places, the places: modules and names in them."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            places.setdefault(id(parameter), []).append((module, key))
    return [found for found in places.values() if len(found) > 1]


def _check_ties(model: nn.Module, cuts: list[Cut]) -> None:
    names = {id(module): name for name, module in model.named_modules()}
    dims = {id(one.module): one.dim for one in cuts}
    for places in _tied(model):
        if len({dims.get(id(module)) for module, _ in places}) > 1:
            tied = " and ".join(f"{names[id(module)]}.{key}" for module, key in places)
            raise UsageError(f"{tied} are tied, but the tp_plan cuts them differently: cut both alike, or untie them")


def _compact(parameter: nn.Parameter) -> nn.Parameter:
    """Return a cut parameter whose memory is its own part alone, not a view into the whole."""
    if not isinstance(parameter, DTensor):
        return parameter
    local = local_tensor(parameter)
    if local.is_meta or local.untyped_storage().nbytes() == local.numel() * local.element_size():
        return parameter
    whole = DTensor.from_local(
        local.clone(memory_format=torch.contiguous_format),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
    return nn.Parameter(whole, requires_grad=parameter.requires_grad)


def _sum_gradient(parameter: nn.Parameter) -> None:
    # Under FSDP2 this parameter is replaced, and FSDP2 itself brings gradients to their parameters' placements.
    if parameter.requires_grad:
        parameter.register_hook(_replicated)


def _replicated(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.redistribute(placements=[Replicate()]) if isinstance(gradient, DTensor) else gradient
