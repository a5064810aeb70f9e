from __future__ import annotations

import json

import pytest

from shardpoint.errors import UsageError
from shardpoint.planning import MergedTable, PartNaming, Table, TensorFact, index_document, merge_tables, plan_files

MODEL, OPTIMIZER = PartNaming("model"), PartNaming("optimizer")


def fact(part: str, key: str, num_bytes: int) -> TensorFact:
    return TensorFact(part, key, None, key, "U8", (num_bytes,))


def table(*facts: TensorFact) -> MergedTable:
    return merge_tables([([0], Table((), facts))], 1)


def test_names_are_those_of_transformers() -> None:
    assert MODEL.file_name(2, 13) == "model-00002-of-00013.safetensors"
    assert MODEL.index_name == "model.safetensors.index.json"
    variant = PartNaming("model", variant="fp16")
    assert variant.file_name(1, 1) == "model.fp16-00001-of-00001.safetensors"
    assert variant.index_name == "model.safetensors.index.fp16.json"
    assert PartNaming("adapter_model", single=True).file_name(1, 1) == "adapter_model.safetensors"


def test_a_file_is_closed_before_it_would_grow_too_large() -> None:
    facts = [fact("m", key, size) for key, size in (("a", 60), ("b", 40), ("c", 1), ("d", 500), ("e", 0), ("f", 100))]
    layout = plan_files(table(*facts), {"m": MODEL}, 100)
    assert [sorted(t.name for t in file.layout.tensors) for file in layout.files] == [
        ["a", "b"],
        ["c"],
        ["d"],
        ["e", "f"],
    ]
    assert [file.path for file in layout.files] == [f"m/model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]


def test_a_single_file_is_never_closed() -> None:
    layout = plan_files(
        table(fact("a", "x", 60), fact("a", "y", 60)), {"a": PartNaming("adapter_model", single=True)}, 100
    )
    assert [file.path for file in layout.files] == ["a/adapter_model.safetensors"]


def test_a_part_without_a_name_stands_at_the_top() -> None:
    assert plan_files(table(fact("", "x", 1)), {"": MODEL}, 100).files[0].path == "model-00001-of-00001.safetensors"


def test_the_order_of_the_namings_does_not_matter() -> None:
    facts = table(fact("m", "a", 10), fact("o", "a", 10), fact("m", "b", 10))
    one = plan_files(facts, {"m": MODEL, "o": OPTIMIZER}, 100)
    other = plan_files(facts, {"o": OPTIMIZER, "m": MODEL}, 100)
    assert one == other
    assert one.digest == other.digest
    assert [file.part for file in one.files] == ["m", "o"]


def test_the_digest_is_of_names_headers_and_places() -> None:
    facts = table(fact("m", "a", 60), fact("m", "b", 60))
    layouts = [
        plan_files(facts, {"m": MODEL}, 100),
        plan_files(facts, {"m": MODEL}, 1000),
        plan_files(facts, {"m": PartNaming("model", variant="x")}, 100),
        plan_files(facts, {"m": PartNaming("model", single=True, metadata={"a": "b"})}, 100),
        plan_files(facts, {"m": PartNaming("model", single=True, metadata={"a": "c"})}, 100),
        plan_files(table(fact("m", "a", 60), fact("m", "b", 61)), {"m": MODEL}, 100),
    ]
    assert len({layout.digest for layout in layouts}) == len(layouts)
    assert plan_files(facts, {"m": MODEL}, 100).digest == layouts[0].digest


def test_a_part_without_naming_is_refused() -> None:
    with pytest.raises(UsageError, match=r"\['o'\]"):
        plan_files(table(fact("m", "a", 1), fact("o", "a", 1)), {"m": MODEL}, 100)


@pytest.mark.parametrize("size", [0, -1])
def test_a_greatest_size_that_is_none(size: int) -> None:
    with pytest.raises(UsageError, match="positive"):
        plan_files(table(), {}, size)


def test_the_index_is_the_parts_alone() -> None:
    facts = [fact("m", "b", 60), fact("m", "a", 60), fact("o", "c", 7)]
    layout = plan_files(table(*facts), {"m": MODEL, "o": OPTIMIZER}, 100)
    assert json.loads(index_document(layout, "m")) == {
        "metadata": {"total_size": 120},
        "weight_map": {"a": "model-00002-of-00002.safetensors", "b": "model-00001-of-00002.safetensors"},
    }
