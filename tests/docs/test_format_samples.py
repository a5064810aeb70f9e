"""Are the samples in docs/spec/FORMAT.md what the code reads and writes, and together one whole checkpoint?"""

from __future__ import annotations

import ast
import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import msgspec
import numpy as np
import pytest
from awscrt import checksums
from safetensors import safe_open

from shardpoint.adapters import rng
from shardpoint.adapters.nesting import is_skeleton, put_together
from shardpoint.adapters.restored import next_samples
from shardpoint.catalog import LOADED_SUFFIXES, open_path, verify
from shardpoint.checksum import crc64, to_hex
from shardpoint.commit.attempt import MAX_NAME_BYTES
from shardpoint.container import DATA_ALIGNMENT_BYTES, layout_file
from shardpoint.dtypes import ITEMSIZE_BYTES
from shardpoint.engine.evidence import MAX_FINDINGS
from shardpoint.engine.training import optimizer_document
from shardpoint.journal import JOURNAL_NAME, Life, Step, read_journal, samples_of
from shardpoint.manifest import (
    FORMAT_MAJOR,
    FORMAT_MINOR,
    Finding,
    Manifest,
    RawTensor,
    Suspect,
    codec,
    decode_document,
    decode_manifest,
    encode_document,
    encode_manifest,
)
from shardpoint.storage import LocalStore
from tests.docs.test_code_blocks import Block, blocks_of
from tests.gates.sources import PACKAGE, ROOT

FILE = "docs/spec/FORMAT.md"
TEXT = (ROOT / FILE).read_text(encoding="utf-8")
BLOCKS = [block for block in blocks_of(TEXT, FILE) if block.info]
NO_NEWLINE_AT_END = {"running_states.json"}  # as ColossalChat writes it
NAMES = {"np": np, "math": math, "Counter": Counter, "RawTensor": RawTensor}


def chosen(kind: str) -> dict[str, Block]:
    """Return the blocks whose info string has `kind=<path>`, or is `<language> kind`, by path."""
    found = {}
    for block in BLOCKS:
        name, _, path = block.info.partition(" ")[2].partition("=")
        if name == kind:
            found[path] = block
    return found


def file_bytes(path: str, block: Block) -> bytes:
    return block.body.removesuffix("\n" if path in NO_NEWLINE_AT_END else "").encode()


def tensor_file(path: str) -> bytes:
    """Put a tensor file together from its two samples, as the document says."""
    header = chosen("header")[path].body.removesuffix("\n").encode()
    length = -(-(8 + len(header)) // DATA_ALIGNMENT_BYTES) * DATA_ALIGNMENT_BYTES - 8
    return length.to_bytes(8, "little") + header.ljust(length) + bytes.fromhex(chosen("data")[path].body)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    directory = tmp_path / "epoch-0_step-4"
    contents = {path: file_bytes(path, block) for path, block in chosen("file").items()}
    contents |= {path: tensor_file(path) for path in chosen("header")}
    for path, data in contents.items():
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_bytes(data)
    return directory


def test_the_samples_together_are_one_intact_checkpoint(checkpoint: Path) -> None:
    report = verify(*open_path(checkpoint))
    assert report.problems == ()
    assert report.num_tensors == 3
    assert report.num_files == len([path for path in checkpoint.rglob("*") if path.is_file()]) - 1


def test_the_safetensors_library_reads_the_tensor_files(checkpoint: Path) -> None:
    manifest = decode_manifest((checkpoint / "shardpoint.json").read_bytes())
    for tensor in manifest.tensors:
        with safe_open(checkpoint / manifest.files[tensor.file].path, framework="numpy") as file:
            data = file.get_tensor(tensor.key)
            assert file.metadata()["format"] == "pt"
        assert data.shape == tensor.shape
        assert to_hex(checksums.crc64nvme(data.tobytes())) == tensor.crc64nvme


@pytest.mark.parametrize("path", chosen("header"))
def test_the_writer_lays_a_file_out_like_the_sample(path: str) -> None:
    fields = json.loads(chosen("header")[path].body)
    del fields["__metadata__"]
    layout = layout_file((name, f["dtype"], tuple(f["shape"])) for name, f in fields.items())
    assert tensor_file(path)[: len(layout.header)] == layout.header
    assert layout.num_bytes == len(tensor_file(path))


@pytest.mark.parametrize("part", ["modeling", "optimizer"])
def test_an_index_names_the_keys_and_the_bytes(part: str, checkpoint: Path) -> None:
    (path,) = (checkpoint / part).glob("*.index.json")
    index = json.loads(path.read_text())
    tensors = [t for t in decode_manifest((checkpoint / "shardpoint.json").read_bytes()).tensors if t.part == part]
    assert index["metadata"]["total_size"] == sum(t.num_bytes for t in tensors)
    assert list(index["weight_map"]) == sorted(t.key for t in tensors)


def test_the_manifest_is_written_as_the_sample() -> None:
    data = file_bytes("", chosen("file")["shardpoint.json"])
    manifest = decode_manifest(data)
    assert encode_manifest(manifest) == data
    assert manifest.version == (FORMAT_MAJOR, FORMAT_MINOR)
    assert f"version {FORMAT_MAJOR}.{FORMAT_MINOR}" in TEXT.splitlines()[0]


def test_the_findings_of_a_suspect_checkpoint_are_told() -> None:
    sample = msgspec.json.decode(chosen("suspect")[""].body, type=Suspect, strict=True)
    (finding,) = json.loads(chosen("suspect")[""].body)["findings"]
    assert set(finding) == {field.name for field in msgspec.structs.fields(Finding)}
    manifest = decode_manifest(file_bytes("", chosen("file")["shardpoint.json"]))
    marked = msgspec.structs.replace(manifest, suspect=sample)
    assert decode_manifest(encode_manifest(marked)) == marked
    assert f"the first {MAX_FINDINGS} of them" in TEXT
    kinds = get_args(msgspec.structs.fields(Finding)[0].type)
    assert all(f'`"{kind}"`' in TEXT for kind in kinds)


def test_every_field_of_the_manifest_is_told() -> None:
    table = TEXT.partition("## The manifest")[2].partition("\n- ")[0]
    told = {name for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    fields = {field.name for field in msgspec.structs.fields(Manifest)}
    assert told == fields | {"manifest_crc64nvme"}


@pytest.mark.parametrize("path", [p for p in chosen("file") if p.endswith(".json") and "index" not in p])
def test_documents_come_back_as_they_are(path: str) -> None:
    if path in {"shardpoint.json", "running_states.json"}:
        assert isinstance(json.loads(chosen("file")[path].body), dict)
        return
    data = file_bytes(path, chosen("file")[path])
    assert encode_document(decode_document(data, path)) == data
    if path.endswith("param_groups.json"):
        assert optimizer_document(data, path)


def test_running_states_are_the_three_fields(checkpoint: Path) -> None:
    states = json.loads((checkpoint / "running_states.json").read_text())
    assert list(states) == ["epoch", "step", "sample_start_index"]
    manifest = decode_manifest((checkpoint / "shardpoint.json").read_bytes())
    assert states == {name: getattr(manifest, name) for name in states}
    assert checkpoint.name == manifest.name == f"epoch-{states['epoch']}_step-{states['step']}"


def test_the_random_state_has_the_fields_of_a_real_one() -> None:
    sample = decode_document(chosen("document")[""].body.encode())
    real = rng.read_rng()

    def shape_of(value: Any) -> Any:
        return {key: shape_of(item) for key, item in value.items()} if isinstance(value, dict) else type(value)

    assert shape_of({**sample, "cuda": None}) == shape_of({**real, "cuda": None})


def rows() -> list[tuple[str, str]]:
    table = TEXT.partition("| value in Python | document |\n| --- | --- |\n")[2].partition("\n\n")[0]
    return [(value, document) for value, document in re.findall(r"^\| `(.*?)` \| `(.*?)` \|$", table, re.MULTILINE)]


@pytest.mark.parametrize("value, document", rows(), ids=[document for _, document in rows()])
def test_each_codec_example(value: str, document: str) -> None:
    expected = eval(value, dict(NAMES))  # noqa: S307 - the document's own expressions
    decoded = decode_document(document.encode())
    assert type(decoded) is type(expected)
    if isinstance(expected, np.ndarray):
        assert (decoded.dtype, decoded.tolist()) == (expected.dtype, expected.tolist())
    elif isinstance(expected, float) and math.isnan(expected):
        assert math.isnan(decoded)
    else:
        assert decoded == expected
    assert json.loads(encode_document(expected)) == json.loads(document)


def test_every_tag_of_the_codec_has_an_example() -> None:
    source = (PACKAGE / "manifest" / "codec.py").read_text(encoding="utf-8")
    literals = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)]
    tags = {text for text in literals if isinstance(text, str) and re.fullmatch(r"\$[a-z]+", text)}
    assert {tag for tag in tags if any(f'"{tag}"' in document for _, document in rows())} == tags


def test_numbers_and_names_in_the_text_are_the_codes() -> None:
    assert f"nested deeper than {codec.MAX_BRACKETS} levels" in " ".join(TEXT.split())
    for name in ITEMSIZE_BYTES:
        assert f"`{name}`" in TEXT
    assert f"at most {MAX_NAME_BYTES} bytes" in TEXT
    for suffix in LOADED_SUFFIXES:
        assert f"`{suffix}`" in TEXT


def test_the_checksum_sample() -> None:
    text, _, crc = chosen("crc")[""].body.strip().partition(" -> ")
    assert to_hex(crc64(text.encode())) == crc


def test_the_owner_sample_has_the_fields_of_a_real_one(tmp_path: Path) -> None:
    from shardpoint.commit import acquire_root
    from shardpoint.storage import LocalStore

    owner = acquire_root(LocalStore(tmp_path / "root"))
    owner.release()
    real = json.loads((tmp_path / "root" / owner.key / "owner.json").read_text())
    sample = json.loads(chosen("owner")[""].body)
    assert {key: type(value) for key, value in sample.items()} == {key: type(value) for key, value in real.items()}
    assert {path.name for path in (tmp_path / "root" / owner.key).iterdir()} == {"lock", "heartbeat", "owner.json"}


def test_a_nested_state_is_described() -> None:
    (skeletons,) = json.loads(chosen("nested")[""].body).values()
    factors = {"shampoo/factors/0": 1, "shampoo/factors/1": 2}
    assert is_skeleton(skeletons["shampoo"])
    state = put_together(skeletons["shampoo"], factors, lambda value, _: value, "shampoo")
    assert state == {"factors": [1, 2], "rank": 2}


def test_every_sample_is_tested() -> None:
    kinds = {block.info.partition(" ")[2].partition("=")[0] for block in BLOCKS}
    assert kinds == {"header", "data", "file", "document", "crc", "owner", "next", "journal", "suspect", "nested"}


def test_the_journal_is_read_and_written_as_the_sample(tmp_path: Path) -> None:
    text = chosen("journal")[""].body
    (tmp_path / JOURNAL_NAME).write_text(text)
    contents = read_journal(LocalStore(tmp_path))
    assert (contents.torn, contents.damaged) == ([], [])
    first, second = contents.lives
    assert [msgspec.json.encode(entry).decode() for entry in (first.life, *first.steps, second.life)] == text.split(
        "\n"
    )[:-1]
    assert first.steps[0].samples == samples_of([17, 4, 11])
    assert (second.number, second.origin) == (2, (0, 4))


def test_the_tables_of_the_journal_name_every_field() -> None:
    section = TEXT.partition("## The journal")[2].partition("## Checksums")[0]
    for kind, entry in (("life", Life), ("step", Step)):
        table = section.partition(f"| `{kind}`")[2].partition("\n\n")[0]
        named = [
            name for row in re.findall(r"^\| (`[^|]*) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)
        ]
        assert sorted(named) == sorted(entry.__struct_fields__)


def test_the_document_of_the_samples_that_come_next() -> None:
    document = decode_document(chosen("next")[""].body.encode())

    class Three:
        def peek(self, num_samples: int) -> list[int]:
            assert num_samples == document["asked"]
            return [17, 4, 11]

    assert next_samples(Three(), "data/next.json") == chosen("next")[""].body.encode()
