"""Attacks on the manifest, sealed anew by the attacker: a CRC is no signature, so every field is checked by itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardpoint.checksum import crc64, to_hex
from shardpoint.errors import (
    ChecksumError,
    CorruptionError,
    ManifestError,
    TruncatedError,
    UnsupportedFormatError,
)
from shardpoint.manifest import decode_manifest

CRC = "0123456789abcdef"


def good() -> dict[str, Any]:
    tensor = {"part": "modeling", "fqn": "w", "state": None, "key": "w", "dtype": "F32", "shape": [2, 2], "file": 0}
    return {
        "format": "shardpoint",
        "version": [1, 0],
        "checkpoint_id": CRC * 2,
        "replaces": None,
        "sequence": "000000000001",
        "name": "epoch-0_step-4",
        "epoch": 0,
        "step": 4,
        "sample_start_index": 32,
        "created_utc": "2026-01-01T00:00:00Z",
        "library": "shardpoint 0.1.0",
        "world_size": 2,
        "roles": [""],
        "metrics": {"loss": 0.5, "reward": "nan"},
        "files": [
            {"path": "modeling/model.safetensors", "size_bytes": 4128, "crc64nvme": CRC},
            {"path": "running_states.json", "size_bytes": 63, "crc64nvme": CRC},
        ],
        "tensors": [
            {**tensor, "byte_offset": 4096, "num_bytes": 16, "crc64nvme": CRC},
            {**tensor, "fqn": "b", "key": "b", "byte_offset": 4112, "num_bytes": 16, "crc64nvme": CRC},
        ],
    }


def seal(text: str | bytes) -> bytes:
    """Close an object's text (without its last brace) with a seal that holds."""
    raw = text if isinstance(text, bytes) else text.encode()
    body = raw + b',\n "manifest_crc64nvme": "'
    return body + to_hex(crc64(body)).encode() + b'"\n}\n'


def sealed(tree: dict[str, Any]) -> bytes:
    return seal(json.dumps(tree, indent=1).removesuffix("\n}"))


def with_file(**fields: Any) -> bytes:
    tree = good()
    tree["files"][1] |= fields
    return sealed(tree)


def with_tensor(**fields: Any) -> bytes:
    tree = good()
    tree["tensors"][1] |= fields
    return sealed(tree)


def test_the_manifest_that_the_attacks_start_from_is_good() -> None:
    manifest = decode_manifest(sealed(good()))
    assert [entry.fqn for entry in manifest.tensors] == ["w", "b"]


PATHS = ["../x", "a/../../x", "..", ".", "", "/etc/passwd", "a//b", "a/", "/", "./a", "a/./b", "a\\..\\b", "a\0b", "\0"]


@pytest.mark.parametrize("path", [*PATHS, "shardpoint.json", "modeling/model.safetensors", "\ud800", 5, None, ["a"]])
def test_a_path_that_leads_out_or_is_listed_twice(path: Any) -> None:
    with pytest.raises(ManifestError):
        decode_manifest(with_file(path=path))


@pytest.mark.parametrize("name", [*PATHS, "a/b"])
def test_a_name_that_leads_out(name: str) -> None:
    # Recovery renames a displaced checkpoint to the name in its manifest.
    with pytest.raises(ManifestError):
        decode_manifest(sealed(good() | {"name": name}))


FIELDS: dict[str, list[Any]] = {
    "checkpoint_id": ["", "A" * 32, CRC * 2 + "\n", CRC, None, 5],
    "replaces": ["", "x" * 32, False],
    "sequence": ["1", "-00000000001", "000000000001\n", "\u0661" * 12, 1, None],
    "name": [None, 5],
    "epoch": [-1, 0.5, True, "0", 10**400, [0]],
    "step": [-4, 4.0, False],
    "sample_start_index": [-1, "32"],
    "created_utc": [None, 0],
    "library": [None],
    "world_size": [-1, None, 2.5, True],
    "roles": ["", None, [None], {"": ""}],
    "metrics": [[], None, {"a": "1"}, {"a": None}, {"a": True}, {"a": "Infinity"}],
    "files": [None, {}, [None], [[]], [{"path": "a"}]],
    "tensors": [None, {}, [None], [{}]],
}


@pytest.mark.parametrize(
    "field,value",
    [
        pytest.param(name, value, id=f"{name}-{number}")
        for name, values in FIELDS.items()
        for number, value in enumerate(values)
    ],
)
def test_a_field_of_another_type_or_range(field: str, value: Any) -> None:
    with pytest.raises(ManifestError):
        decode_manifest(sealed(good() | {field: value}))


SOUND: dict[str, Any] = {
    "kind": "not_finite", "part": "m", "fqn": "w", "state": None, "holders": [{"ranks": [0], "num_ranks": 1}],
    "num_bytes": 4,
}  # fmt: skip
WRONG: list[dict[str, Any]] = [
    {"kind": "other"}, {"part": None}, {"holders": []}, {"holders": [{"ranks": [-1], "num_ranks": 1}]},
    {"holders": [{"ranks": "0", "num_ranks": 1}]}, {"num_bytes": -1}, {"unknown": 1},
]  # fmt: skip


@pytest.mark.parametrize(
    "suspect",
    [
        True, [], {}, {"num_findings": 1}, {"num_findings": -1, "findings": []}, {"num_findings": 0, "findings": {}},
        {"num_findings": 0, "findings": [], "unknown": 1},
        *({"num_findings": 1, "findings": [SOUND | fields]} for fields in WRONG),
    ],
)  # fmt: skip
def test_a_suspicion_that_is_none(suspect: Any) -> None:
    assert decode_manifest(sealed(good() | {"suspect": {"num_findings": 1, "findings": [SOUND]}})).suspect is not None
    with pytest.raises(ManifestError):
        decode_manifest(sealed(good() | {"suspect": suspect}))


@pytest.mark.parametrize("field", sorted(set(good()) - {"format", "version"}))
def test_a_missing_field(field: str) -> None:
    tree = good()
    del tree[field]
    with pytest.raises(ManifestError):
        decode_manifest(sealed(tree))


@pytest.mark.parametrize(
    "fields",
    [
        {"size_bytes": -1},
        {"size_bytes": 1.5},
        {"size_bytes": True},
        {"size_bytes": "63"},
        {"crc64nvme": CRC.upper()},
        {"crc64nvme": CRC + "\n"},
        {"crc64nvme": "0x" + CRC[2:]},
        {"crc64nvme": 5},
        {"unknown": 1},
    ],
)
def test_a_file_entry_that_is_none(fields: dict[str, Any]) -> None:
    with pytest.raises(ManifestError):
        decode_manifest(with_file(**fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"byte_offset": -16},
        {"byte_offset": 4112.0},
        {"byte_offset": False},
        {"byte_offset": 10**4000},
        {"num_bytes": -16},
        {"num_bytes": 8},
        {"num_bytes": 10**30, "shape": [10**30]},
        {"file": 2},
        {"file": -1},
        {"file": True},
        {"file": 10**30},
        {"shape": [-2, -2]},
        {"shape": [4, True]},
        {"shape": [2.0, 2.0]},
        {"shape": 4},
        {"shape": None},
        {"shape": [2**62, 2**62, 0], "num_bytes": 0},
        {"shape": [2**62] * 100_000},
        {"shape": [10**4000, 10**4000]},
        {"dtype": None},
        {"dtype": ["F32"]},
        {"dtype": "C128"},
        {"state": 5},
        {"crc64nvme": None},
        {"unknown": 1},
        {"byte_offset": 4104},  # overlaps w
        {"byte_offset": 4096},  # the same bytes as w
        {"byte_offset": 4120},  # ends behind the file
        {"file": 1, "byte_offset": 48},  # likewise, in another file
        {"fqn": "w"},  # one tensor twice
        {"key": "w"},  # one name in the file twice
    ],
)
def test_a_tensor_entry_that_contradicts(fields: dict[str, Any]) -> None:
    with pytest.raises(ManifestError):
        decode_manifest(with_tensor(**fields))


def test_an_unknown_dtype_is_of_a_newer_release() -> None:
    with pytest.raises(UnsupportedFormatError, match="F31"):
        decode_manifest(with_tensor(dtype="F31"))


@pytest.mark.parametrize("version", [[2, 0], [1, 2], [0, 9], [10**400, 0], [-1, 0]])
def test_another_version_is_unsupported_whatever_it_holds(version: list[int]) -> None:
    with pytest.raises(UnsupportedFormatError, match="install a newer"):
        decode_manifest(sealed(good() | {"version": version, "unknown": {"$new": 1}, "files": "elsewhere"}))


def test_another_format_is_unsupported() -> None:
    for name in ("safetensors", None, 5):
        with pytest.raises(UnsupportedFormatError):
            decode_manifest(sealed(good() | {"format": name}))


@pytest.mark.parametrize("version", [None, [], [1], [1, 0, 0], "1.0", [1, True], [1.0, 0], {"1": 0}])
def test_a_version_that_is_none(version: Any) -> None:
    with pytest.raises(ManifestError):
        decode_manifest(sealed(good() | {"version": version}))


def test_an_unknown_field_of_this_version() -> None:
    with pytest.raises(ManifestError):
        decode_manifest(sealed(good() | {"unknown": 1}))


TEXT = json.dumps(good(), indent=1).removesuffix("\n}")
ATTACKS: dict[str, bytes] = {
    "a duplicate key": seal(TEXT + ',\n "step": 8'),
    "a duplicate key in a file": seal(TEXT.replace('"size_bytes": 63', '"size_bytes": 63, "size_bytes": 63')),
    "a duplicate seal": seal(TEXT + f',\n "manifest_crc64nvme": "{CRC}"'),
    "NaN": seal(TEXT.replace("0.5", "NaN")),
    "Infinity": seal(TEXT.replace("0.5", "-Infinity")),
    "beyond any float": seal(TEXT.replace("0.5", "1e999")),
    "a number of 5,000 digits": seal(TEXT.replace('"step": 4', '"step": ' + "4" * 5_000)),
    "not UTF-8": seal(TEXT.encode().replace(b"epoch-0", b"epoch-\xff")),
    "nested very deep": seal(TEXT.replace("0.5", "[" * 200_000)),
    "a leading byte order mark": seal(b"\xef\xbb\xbf" + TEXT.encode()),
}


def reseal(body: bytes) -> bytes:
    return body + to_hex(crc64(body)).encode() + b'"\n}\n'


ATTACKS["the seal under a longer name"] = reseal(TEXT.encode() + b',\n "x\\"manifest_crc64nvme": "')
ATTACKS["a list"] = reseal(b"[" + TEXT.encode() + b',\n "manifest_crc64nvme": "')
ATTACKS["the seal in an inner object"] = reseal(TEXT.encode() + b',\n "x": {"manifest_crc64nvme": "')


@pytest.mark.parametrize("name", ATTACKS)
def test_refused(name: str) -> None:
    with pytest.raises(ManifestError):
        decode_manifest(ATTACKS[name])


@pytest.mark.parametrize("cut", [0, 1, 2, 3, 10, 21, 100, 1_000])
def test_a_manifest_that_is_cut_short(cut: int) -> None:
    data = sealed(good())
    with pytest.raises(TruncatedError):
        decode_manifest(data[: len(data) - 1 - cut])


@pytest.mark.parametrize("tail", [b"\n", b" ", b"}", b"\0", b'"manifest_crc64nvme": "'])
def test_bytes_behind_the_seal(tail: bytes) -> None:
    with pytest.raises(TruncatedError):
        decode_manifest(sealed(good()) + tail)


def test_a_manifest_without_a_seal() -> None:
    with pytest.raises(TruncatedError):
        decode_manifest(json.dumps(good()).encode())


def test_an_edited_manifest() -> None:
    data = sealed(good())
    for old, new in ((b'"step": 4', b'"step": 8'), (b"0.5", b"0.6"), (b"\n ", b"\n\t")):
        with pytest.raises(ChecksumError) as caught:
            decode_manifest(data.replace(old, new, 1))
        assert caught.value.expected != caught.value.actual


def test_every_changed_byte_is_noticed() -> None:
    data = sealed(good())
    for at in range(len(data)):
        for bit in (1, 128):
            changed = bytearray(data)
            changed[at] ^= bit
            with pytest.raises((ChecksumError, TruncatedError)):
                decode_manifest(bytes(changed))


def decodes_or_refuses(data: bytes) -> None:
    try:
        decode_manifest(data)
    except (CorruptionError, UnsupportedFormatError):
        return


@given(st.binary(max_size=60))
def test_any_bytes(body: bytes) -> None:
    decodes_or_refuses(body)
    decodes_or_refuses(seal(b"{" + body))


@given(st.integers(0, len(TEXT) - 1), st.integers(0, 3), st.binary(max_size=3))
def test_any_change_under_a_seal_that_holds(at: int, drop: int, put: bytes) -> None:
    raw = TEXT.encode()
    decodes_or_refuses(seal(raw[:at] + put + raw[at + drop :]))


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 2**70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=3),
    st.lists(st.integers(-1, 5), max_size=3),
    st.just({}),
)
PLACES: list[Callable[[dict[str, Any]], Any]] = [
    lambda tree: tree,
    lambda tree: tree["files"][0],
    lambda tree: tree["tensors"][0],
]


@given(st.sampled_from(PLACES), st.data())
def test_any_value_in_any_field(place: Callable[[dict[str, Any]], Any], data: st.DataObject) -> None:
    tree = good()
    fields = place(tree)
    fields[data.draw(st.sampled_from(sorted(fields)))] = data.draw(VALUES)
    decodes_or_refuses(sealed(tree))
