from __future__ import annotations

from dataclasses import replace

import pytest

from shardpoint.errors import MismatchError
from shardpoint.manifest import Manifest, TensorEntry
from shardpoint.planning import MergedTable, Table, TensorFact, match_target, merge_tables

W = TensorFact("modeling", "w", None, "w", "F32", (2, 3))
V = replace(W, fqn="v", key="v")
M = replace(W, part="optimizer", state="m", key="w.m")


def table(*facts: TensorFact) -> MergedTable:
    return merge_tables([([0], Table((), facts))], 1)


def manifest(*facts: TensorFact) -> Manifest:
    tensors = [TensorEntry(f.part, f.fqn, f.state, f.key, f.dtype, f.shape, 0, 0, 24, "0" * 16) for f in facts]
    return Manifest(
        format="shardpoint",
        version=(1, 0),
        checkpoint_id="0" * 32,
        replaces=None,
        sequence="0" * 12,
        name="epoch-0_step-4",
        epoch=0,
        step=4,
        sample_start_index=0,
        created_utc="",
        library="",
        world_size=1,
        roles=[""],
        metrics={},
        files=[],
        tensors=tensors,
    )


BOTH = {"modeling", "optimizer"}


def test_tensors_are_matched_by_part_name_and_state_in_any_order() -> None:
    match = match_target(table(W, V, M), manifest(M, V, W), BOTH)
    assert (match.stored, match.missing, match.unexpected) == ((2, 1, 0), (), ())


def test_the_key_in_the_file_does_not_matter() -> None:
    assert match_target(table(W), manifest(replace(W, key="other")), BOTH).stored == (0,)


def test_parts_that_are_not_loaded_are_not_looked_at() -> None:
    assert match_target(table(W), manifest(M, W), {"modeling"}).stored == (1,)
    with pytest.raises(MismatchError) as caught:
        match_target(table(W), manifest(M, W), BOTH)
    assert caught.value.unexpected == ["optimizer: w [m]"]


def test_everything_is_listed_at_once() -> None:
    target = table(W, V, M)
    stored = manifest(replace(W, shape=(3, 2)), replace(M, dtype="BF16"), replace(V, fqn="u"))
    with pytest.raises(MismatchError) as caught:
        match_target(target, stored, BOTH, problems=["param group 0: 2 against 3"])
    error = caught.value
    assert error.missing == ["modeling: v"]
    assert error.unexpected == ["modeling: u"]
    assert error.mismatched == [
        "param group 0: 2 against 3",
        "modeling: w: stored F32 [3, 2], the target wants F32 [2, 3]",
        "optimizer: w [m]: stored BF16 [2, 3], the target wants F32 [2, 3]",
    ]
    assert "epoch-0_step-4" in str(error)
    assert all(line in str(error) for line in [*error.missing, *error.unexpected, *error.mismatched])


def test_not_strict_allows_names_and_nothing_else() -> None:
    match = match_target(table(W, V), manifest(W, replace(V, fqn="u")), BOTH, strict=False)
    assert (match.stored, match.missing, match.unexpected) == ((0, None), ("modeling: v",), ("modeling: u",))
    for other in (replace(W, shape=(6,)), replace(W, dtype="BF16"), replace(W, shape=(2, 3, 1))):
        with pytest.raises(MismatchError):
            match_target(table(W), manifest(other), BOTH, strict=False)
    with pytest.raises(MismatchError):
        match_target(table(W), manifest(W), BOTH, problems=["groups differ"], strict=False)


def test_long_lists_are_cut_in_the_message_and_whole_in_the_attributes() -> None:
    facts = [replace(W, fqn=f"p{i}", key=f"p{i}") for i in range(50)]
    with pytest.raises(MismatchError) as caught:
        match_target(table(*facts), manifest(), BOTH)
    assert len(caught.value.missing) == 50
    assert "and 30 more" in str(caught.value)
    assert "p49" not in str(caught.value)
