from __future__ import annotations

import json

import pytest

from shardpoint import container
from shardpoint.container import alignment_bytes, header_size_bytes, layout_file, parse_header
from shardpoint.errors import UsageError


def test_an_empty_file_is_a_header() -> None:
    layout = layout_file([])
    assert (layout.num_bytes, len(layout.header), layout.tensors) == (4096, 4096, ())
    assert parse_header(layout.header, 4096, "x") == layout


def test_the_header_is_padded_with_spaces_and_says_pt() -> None:
    layout = layout_file([("w", "F32", (2,))], {"a": "b"})
    assert int.from_bytes(layout.header[:8], "little") == 4088
    text = layout.header[8:].decode()
    assert text.rstrip(" ") == (
        '{"__metadata__":{"format":"pt","a":"b"},"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    )
    assert layout.num_bytes == 4104
    assert layout.metadata == {"format": "pt", "a": "b"}


def test_a_header_just_over_a_block_takes_another() -> None:
    bare = len(json.dumps({"__metadata__": {"format": "pt", "a": ""}}, separators=(",", ":")))
    assert len(layout_file([], {"a": "x" * (4088 - bare)}).header) == 4096
    assert len(layout_file([], {"a": "x" * (4089 - bare)}).header) == 8192


def test_large_aligned_tensors_come_first_and_equals_keep_their_order() -> None:
    layout = layout_file(
        [("c", "U8", (3,)), ("a", "F32", (1024,)), ("s", "F32", ()), ("b", "F32", (2048,)), ("t", "F32", (1,))]
    )
    assert [tensor.name for tensor in layout.tensors] == ["a", "b", "s", "t", "c"]
    assert [tensor.byte_offset - 4096 for tensor in layout.tensors] == [0, 4096, 12288, 12292, 12296]
    assert alignment_bytes(0) == 4096


def test_names_that_are_not_ascii_stay_as_they_are() -> None:
    layout = layout_file([("\u00fc\n\0", "U8", (1,))])
    assert parse_header(layout.header, layout.num_bytes, "x").tensors[0].name == "\u00fc\n\0"


@pytest.mark.parametrize("names", [["a", "a"], ["__metadata__"], ["\ud800"]])
def test_names_that_a_file_cannot_have(names: list[str]) -> None:
    with pytest.raises(UsageError):
        layout_file((name, "U8", (1,)) for name in names)


def test_a_header_beyond_the_formats_limit_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container, "MAX_HEADER_BYTES", 8_000)
    layout_file([("n" * 3_000, "U8", (1,))])
    with pytest.raises(UsageError, match="smaller"):
        layout_file([("n" * 9_000, "U8", (1,))])


def test_a_file_by_another_writer_is_read() -> None:
    # Not padded, no metadata, in another order than that of the offsets.
    text = b'{"b":{"dtype":"U8","shape":[4],"data_offsets":[4,8]},"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}'
    text = text.ljust(-(-len(text) // 8) * 8)
    header = len(text).to_bytes(8, "little") + text
    assert header_size_bytes(header, len(header) + 8, "x") == len(header)
    layout = parse_header(header, len(header) + 8, "x")
    assert [(t.name, t.byte_offset - len(header), t.num_bytes) for t in layout.tensors] == [("a", 0, 4), ("b", 4, 4)]
    assert layout.metadata == {}
