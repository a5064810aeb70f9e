"""Do optimizers with states that are nests come back bit by bit, and can no two names in them collide?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardpoint import Checkpointer, TrainState
from shardpoint.adapters.names import name_tensors
from shardpoint.adapters.nesting import is_skeleton, leaves, paths, put_together, take_apart
from shardpoint.adapters.optimizer import target_optimizer
from shardpoint.engine.training import optimizer_document
from shardpoint.errors import ManifestError, UsageError
from shardpoint.manifest import encode_document
from tests.optimizers import Nested
from tests.training import net, on_disk, same_bits, train, weights

KEYS = st.one_of(st.text(alphabet="a/~#0.", max_size=4), st.integers(-2, 12))
LEAVES = st.one_of(st.builds(lambda n: torch.full((n,), float(n)), st.integers(0, 3)), st.integers(), st.none())
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.lists(inner, max_size=3).map(tuple), st.dictionaries(KEYS, inner, max_size=4)
    ),
    max_leaves=8,
)


def same(first: Any, second: Any) -> bool:
    if type(first) is not type(second):
        return False
    if isinstance(first, torch.Tensor):
        return first is second
    if isinstance(first, dict):
        return list(first) == list(second) and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


def tensors_in(tree: Any) -> int:
    if isinstance(tree, dict):
        return sum(map(tensors_in, tree.values()))
    if isinstance(tree, list | tuple):
        return sum(map(tensors_in, tree))
    return isinstance(tree, torch.Tensor)


@given(st.dictionaries(KEYS, TREES, max_size=4))
def test_nests_come_back_and_no_two_names_are_equal(states: dict[Any, Any]) -> None:
    found: dict[str, torch.Tensor] = {}
    skeletons = {key: take_apart(key, tree, "x", lambda value, _: value, found) for key, tree in states.items()}
    assert all(map(is_skeleton, skeletons.values()))
    assert len(found) == tensors_in(states), "two tensors have one name"
    assert sorted(path for node in skeletons.values() for path in paths(node)) == sorted(found)
    assert {path: value for path, value in leaves(states) if isinstance(value, torch.Tensor)} == found
    back = {key: put_together(node, found, lambda value, _: value, key) for key, node in skeletons.items()}
    assert same(back, states)


def trained(steps: range, seed: int = 0) -> TrainState:
    model = net(seed)
    optimizer = Nested(model.parameters())
    train(model, optimizer, steps)
    return TrainState(model=model, optimizer=optimizer)


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("steps_before", [0, 2])
def test_the_next_steps_are_those_of_a_run_that_was_never_interrupted(
    tmp_path: Path, steps_before: int, *, lazy: bool
) -> None:
    state, other = trained(range(3)), trained(range(9, 9 + steps_before), seed=5)
    assert state.optimizer is not None
    assert other.optimizer is not None
    before = dict(leaves(other.optimizer.state.get(other.model.get_parameter("head.weight"), {})))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(state, epoch=0, step=3, batch_size=4)
        checkpointer.resume(other, lazy_optimizer=lazy)
        checkpointer.optimizer_ready()
    stored = on_disk(tmp_path / "epoch-0_step-3" / "optimizer")
    ours = state.optimizer.state[state.model.get_parameter("head.weight")]
    assert torch.equal(stored["head.weight.momenta/fast"], ours["momenta"]["fast"])
    assert torch.equal(stored["head.weight.momenta/slow~1~0~2"], ours["momenta"]["slow/~#"])
    assert torch.equal(stored["head.weight.momenta/#3/deep"], ours["momenta"][3]["deep"])
    assert torch.equal(stored["head.weight.history/1"], ours["history"][1])
    assert torch.equal(stored["head.weight.a~1b"], ours["a/b"])
    if steps_before and not lazy:
        after = dict(leaves(other.optimizer.state[other.model.get_parameter("head.weight")]))
        assert after["momenta/fast"] is before["momenta/fast"], "a tensor that fits is filled where it is"
    assert train(state.model, state.optimizer, range(3, 6)) == train(other.model, other.optimizer, range(3, 6))
    assert same_bits(weights(state.model), weights(other.model))
    theirs = other.optimizer.state[other.model.get_parameter("head.weight")]
    assert type(theirs["told"]) is tuple
    assert list(theirs) == list(ours) or set(theirs) == set(ours)


@pytest.mark.parametrize("strange", [{1, 2}, object(), {"x": b"bytes"}, {(1, 2): 3}, [torch.Size([2])]])
def test_what_cannot_be_stored_is_named(tmp_path: Path, strange: Any) -> None:
    state = trained(range(1))
    assert state.optimizer is not None
    state.optimizer.state[state.model.get_parameter("head.bias")]["strange"] = {"inner": strange}
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(UsageError, match=r"state 'strange' of head\.bias"):
        checkpointer.save(state, epoch=0, step=1, batch_size=4)


@pytest.mark.parametrize(
    "node",
    [
        None,
        "tensor",
        [],
        ["dict"],
        ["set", []],
        ["dict", []],
        ["dict", {"x": ["list", {}]}],
        ["dict", {(1, 2): ["value", 1]}],
        ["tensor", 3],
        ["list", [["tuple", "x"]]],
    ],
)
def test_what_is_no_skeleton_is_a_damaged_document(node: Any) -> None:
    assert not is_skeleton(node)
    document = {"class": "X", "groups": [], "states": {}, "nested": {"w": {"s": node}}}
    with pytest.raises(ManifestError, match="does not have the form"):
        optimizer_document(encode_document(document), "param_groups.json")


def test_a_skeleton_that_names_a_tensor_which_is_not_there() -> None:
    model = net(0)
    document = {
        "class": "Nested",
        "groups": [{"params": [name for name, _ in model.named_parameters()], "options": {}}],
        "states": {},
        "nested": {"head.bias": {"s": ["dict", {"x": ["tensor", "s/x"]}]}},
    }
    target = target_optimizer(Nested(model.parameters()), name_tensors(model), "optimizer", document, [])
    assert target.problems == ["optimizer: head.bias [s/x]: named by the param groups, and no tensor of the checkpoint"]


def test_a_state_that_holds_itself(tmp_path: Path) -> None:
    state = trained(range(1))
    assert state.optimizer is not None
    loop: dict[str, Any] = {}
    loop["self"] = loop
    state.optimizer.state[state.model.get_parameter("head.bias")]["loop"] = loop
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(UsageError, match="nested deeper than 32 levels"):
        checkpointer.save(state, epoch=0, step=1, batch_size=4)
