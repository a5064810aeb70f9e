from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest

from shardpoint.checksum import crc64, to_hex
from shardpoint.errors import ManifestError
from shardpoint.manifest import (
    FORMAT_MAJOR,
    FORMAT_MINOR,
    FORMAT_NAME,
    FileEntry,
    Manifest,
    TensorEntry,
    check_relative_path,
    decode_manifest,
    encode_manifest,
    metric_value,
)

CRC = to_hex(255)


@dataclass(frozen=True)
class Ids:
    checkpoint_id: str = "0" * 32
    sequence: int = 1
    crc: str = CRC


def manifest(ids: Ids = Ids(), **changes: Any) -> Manifest:
    made = Manifest(
        format=FORMAT_NAME,
        version=(FORMAT_MAJOR, FORMAT_MINOR),
        checkpoint_id=ids.checkpoint_id,
        replaces=None,
        sequence=f"{ids.sequence:012d}",
        name="epoch-0_step-4",
        epoch=0,
        step=4,
        sample_start_index=32,
        created_utc="2026-01-01T00:00:00Z",
        library="shardpoint 0.1.0",
        world_size=2,
        roles=[""],
        metrics={},
        files=[FileEntry("m/x.safetensors", 4104, ids.crc), FileEntry("a.json", 2, ids.crc)],
        tensors=[TensorEntry("m", "w", None, "w", "F32", (2,), 0, 4096, 8, ids.crc)],
    )
    return msgspec.structs.replace(made, **changes)


def test_it_is_one_line_for_each_file_and_tensor_and_ends_with_its_seal() -> None:
    data = encode_manifest(manifest())
    lines = data.decode().splitlines()
    assert lines[0] == "{"
    assert sum('"path":' in line for line in lines) == 2
    assert sum('"fqn":' in line for line in lines) == 1
    body, _, digits = data.removesuffix(b'"\n}\n').rpartition(b'"')
    assert to_hex(crc64(body + b'"')) == digits.decode()


def test_its_size_does_not_vary_between_runs() -> None:
    one, other = manifest(), manifest(Ids("f" * 32, 123_456_789, "f" * 16))
    assert len(encode_manifest(one)) == len(encode_manifest(other))


def test_it_comes_back_equal_with_its_totals() -> None:
    found = decode_manifest(encode_manifest(manifest(metrics={"loss": 1, "b": "nan"})))
    assert found.total_bytes == 4106
    assert found.commit_sequence == 1
    assert found.file("a.json") == FileEntry("a.json", 2, CRC)
    assert found.file("b.json") is None
    assert found.metric_values["loss"] == 1.0
    assert math.isnan(found.metric_values["b"])


def test_a_directory_that_is_no_training_checkpoint() -> None:
    empty = manifest(files=[], tensors=[], epoch=None, step=None, sample_start_index=None)
    assert decode_manifest(encode_manifest(empty)) == empty


def test_an_empty_tensor_may_lie_at_the_end_of_a_file_or_between_two() -> None:
    tensors = [
        TensorEntry("m", "a", None, "a", "F32", (0,), 0, 4096, 0, CRC),
        TensorEntry("m", "b", None, "b", "F32", (2,), 0, 4096, 8, CRC),
        TensorEntry("m", "c", "s", "c", "F32", (7, 0), 0, 4104, 0, CRC),
    ]
    assert len(decode_manifest(encode_manifest(manifest(tensors=tensors))).tensors) == 3
    inside = msgspec.structs.replace(tensors[2], byte_offset=4100)
    with pytest.raises(ManifestError, match="overlaps"):
        decode_manifest(encode_manifest(manifest(tensors=[*tensors[:2], inside])))


def test_one_state_name_may_occur_in_several_tensors_and_parts() -> None:
    one = TensorEntry("optimizer", "w", "exp_avg", "w.exp_avg", "F32", (2,), 0, 4096, 8, CRC)
    other = msgspec.structs.replace(one, part="critic/optimizer", file=1, byte_offset=0)
    files = [FileEntry("m/x.safetensors", 4104, CRC), FileEntry("n/x.safetensors", 8, CRC)]
    assert decode_manifest(encode_manifest(manifest(files=files, tensors=[one, other]))).tensors == [one, other]
    again = msgspec.structs.replace(one, key="x", file=1, byte_offset=0)
    with pytest.raises(ManifestError, match="twice"):
        decode_manifest(encode_manifest(manifest(files=files, tensors=[one, again])))


@pytest.mark.parametrize(
    "value,held",
    [(1, 1.0), (-0.5, -0.5), (math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf"), (True, 1.0)],
)
def test_metrics_that_json_has_no_form_for(value: float, held: float | str) -> None:
    assert metric_value(value) == held
    assert type(metric_value(value)) is type(held)


def test_plain_relative_paths_pass() -> None:
    for path in ("a", "a/b.c", "...", "a/..b", "\u00fc", " ", "-", "a:b"):
        check_relative_path(path)
