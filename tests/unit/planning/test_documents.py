from __future__ import annotations

from typing import Any

import pytest

from shardpoint.errors import UsageError
from shardpoint.manifest import RawTensor
from shardpoint.planning import merge_optimizer_documents


def document(*groups: tuple[list[str], float], **states: Any) -> dict[str, Any]:
    return {
        "class": "AdamW",
        "groups": [{"params": names, "options": {"lr": lr, "betas": (0.9, 0.99)}} for names, lr in groups],
        "states": {name: {"step": value} for name, value in states.items()},
    }


def test_one_document_stays_as_it_is() -> None:
    only = document((["a", "b"], 0.1), a=1)
    assert merge_optimizer_documents([only], "optimizer") == only


def test_the_members_of_pipeline_stages_are_joined() -> None:
    first, second = document((["a", "tied"], 0.1), ([], 0.2), a=1, tied=1), document((["tied"], 0.1), (["b"], 0.2), b=1)
    merged = merge_optimizer_documents([first, second], "optimizer")
    assert [group["params"] for group in merged["groups"]] == [["a", "tied"], ["b"]]
    assert merged["states"] == {"a": {"step": 1}, "tied": {"step": 1}, "b": {"step": 1}}
    assert first["groups"][0]["params"] == ["a", "tied"]
    assert first == document((["a", "tied"], 0.1), ([], 0.2), a=1, tied=1)


def test_states_of_one_tensor_are_joined() -> None:
    first, second = document((["a"], 0.1), a=1), document((["a"], 0.1))
    second["states"] = {"a": {"k": 2}}
    assert merge_optimizer_documents([first, second], "optimizer")["states"] == {"a": {"step": 1, "k": 2}}


@pytest.mark.parametrize(
    "other,message",
    [
        (document((["a"], 0.1), (["b"], 0.1)), "1 groups against AdamW with 2"),
        (document((["a"], 0.5)), "different options"),
        (document((["a"], 0.1), a=2), "'step' of a differs"),
        (document((["a"], 0.1), a=1.0), "'step' of a differs"),
        (document((["a"], 0.1), a=RawTensor("I64", (), bytes(8))), "'step' of a differs"),
        ({**document((["a"], 0.1)), "class": "SGD"}, "SGD"),
    ],
)
def test_a_difference_is_an_error(other: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        merge_optimizer_documents([document((["a"], 0.1), a=1), other], "optimizer")


def test_a_parameter_in_two_groups_is_an_error() -> None:
    first, second = document((["a"], 0.1), (["b"], 0.2)), document((["b"], 0.1), (["a"], 0.2))
    with pytest.raises(UsageError, match="b is in param group 0 on one rank and in group 1"):
        merge_optimizer_documents([first, second], "optimizer")
