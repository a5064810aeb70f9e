"""What could somebody write into a checkpoint to make a reader do harm? One function for each attack.

Each takes the directory of an intact checkpoint and makes it hostile. Checksums are made to fit again, as an attacker
would: what has to stop the attack is the reader's own check, not a checksum.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from awscrt import checksums

Attack = Callable[[Path], None]

WEIGHTS = "modeling/model-00001-of-00001.safetensors"
GROUPS = "optimizer/param_groups.json"


def crc(data: bytes) -> str:
    return f"{checksums.crc64nvme(data):016x}"


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads((checkpoint / "shardpoint.json").read_text())
    return tree


def seal(checkpoint: Path, text: str) -> None:
    """Write a manifest, given up to its seal, with a seal that fits."""
    body = f'{text}, "manifest_crc64nvme": "'.encode()
    (checkpoint / "shardpoint.json").write_bytes(body + f'{crc(body)}"\n}}\n'.encode())


def write_manifest(checkpoint: Path, tree: dict[str, Any]) -> None:
    tree = {name: value for name, value in tree.items() if name != "manifest_crc64nvme"}
    seal(checkpoint, json.dumps(tree)[:-1])


def write_file(checkpoint: Path, path: str, data: bytes) -> None:
    """Replace a file, and let the manifest say that this is what was committed."""
    (checkpoint / path).write_bytes(data)
    tree = read_manifest(checkpoint)
    for entry in tree["files"]:
        if entry["path"] == path:
            entry["size_bytes"], entry["crc64nvme"] = len(data), crc(data)
    write_manifest(checkpoint, tree)


def manifest(change: Callable[[dict[str, Any]], object]) -> Attack:
    def attack(checkpoint: Path) -> None:
        tree = read_manifest(checkpoint)
        change(tree)
        write_manifest(checkpoint, tree)

    return attack


def header(change: Callable[[str], str]) -> Attack:
    """Change the text of a tensor file's header; its length stays, by padding."""

    def attack(checkpoint: Path) -> None:
        data = (checkpoint / WEIGHTS).read_bytes()
        length = int.from_bytes(data[:8], "little")
        text = change(data[8 : 8 + length].decode().rstrip(" ")).encode()
        write_file(checkpoint, WEIGHTS, data[:8] + text.ljust(length) + data[8 + length :])

    return attack


def claims(length: int) -> Attack:
    """Let a tensor file claim a header of some length."""

    def attack(checkpoint: Path) -> None:
        data = (checkpoint / WEIGHTS).read_bytes()
        write_file(checkpoint, WEIGHTS, length.to_bytes(8, "little") + data[8:])

    return attack


def document(text: str) -> Attack:
    return lambda checkpoint: write_file(checkpoint, GROUPS, text.encode())


def state_step(value: object) -> Attack:
    """Put a value where the optimizer's first `step` is."""

    def attack(checkpoint: Path) -> None:
        tree = json.loads((checkpoint / GROUPS).read_text())
        next(iter(tree["states"].values()))["step"] = value
        write_file(checkpoint, GROUPS, json.dumps(tree).encode())

    return attack


def first_file(path: str) -> Attack:
    return manifest(lambda tree: tree["files"][0].update(path=path))


def first_tensor(**fields: object) -> Attack:
    return manifest(lambda tree: tree["tensors"][0].update(fields))


def raw_manifest(text: str) -> Attack:
    return lambda checkpoint: seal(checkpoint, text)


def twice_in_the_header(text: str) -> str:
    tree = json.loads(text)
    name = next(name for name in tree if name != "__metadata__")
    return text[:-1] + f',"{name}":{json.dumps(tree[name])}}}'


DATA = base64.b64encode(b"\0\0\0\0").decode()

# Seen by `verify`, and by a load.
ON_THE_MANIFEST: dict[str, Attack] = {
    "path-to-the-parent": first_file("../../secret"),
    "path-absolute": first_file("/etc/hostname"),
    "path-through-a-dot": first_file("modeling/./x"),
    "path-with-a-backslash": first_file("modeling\\..\\x"),
    "path-with-a-nul": first_file("modeling/\0"),
    "path-twice": manifest(lambda tree: tree["files"].append(tree["files"][0])),
    "path-of-the-manifest": first_file("shardpoint.json"),
    "name-to-the-parent": manifest(lambda tree: tree.update(name="../x")),
    "file-number-out-of-range": first_tensor(file=10**6),
    "shape-beyond-memory": first_tensor(shape=[2**40, 2**40]),
    "shape-negative": first_tensor(shape=[-1, -4]),
    "offset-beyond-the-file": first_tensor(byte_offset=2**62),
    "bytes-beyond-the-file": first_tensor(num_bytes=2**62),
    "dtype-unknown": first_tensor(dtype="PICKLE"),
    "tensor-twice": manifest(lambda tree: tree["tensors"].append(tree["tensors"][0])),
    "field-unknown": manifest(lambda tree: tree.update(execute="rm")),
    "format-of-the-future": manifest(lambda tree: tree.update(version=[2, 0])),
    "format-another": manifest(lambda tree: tree.update(format="pickle")),
    "nested-deeply": raw_manifest('{"format": ' + "[" * 100_000),
    "key-twice": raw_manifest('{"format": "shardpoint", "format": "shardpoint"'),
    "a-string-that-never-ends": raw_manifest('{"format": "' + "\\\\" * 100_000),
    "a-number-of-a-million-digits": raw_manifest('{"format": ' + "9" * 10**6),
}

# Seen by `verify`; a load goes by the manifest and does not read them.
ON_A_HEADER: dict[str, Attack] = {
    "header-of-exabytes": claims(2**62),
    "header-of-the-whole-file": claims(4200),
    "header-empty": claims(0),
    "header-nested-deeply": header(lambda _: '{"x":' + "[" * 2000),
    "header-name-twice": header(twice_in_the_header),
    "header-hole": header(lambda text: text.replace('"data_offsets":[0,', '"data_offsets":[4,')),
    "header-shape-beyond-memory": header(lambda text: text.replace('"shape":[2,2]', '"shape":[9223372036854775807,2]')),
    "header-dtype-a-list": header(lambda text: text.replace('"dtype":"F32"', '"dtype":["F32"]')),
    "header-tensor-a-number": header(lambda text: text[:-1] + ',"evil":5}'),
    "header-metadata-not-texts": header(lambda text: text.replace('"format":"pt"', '"format":{}')),
    "header-leading-space": header(lambda text: " " + text),
    "header-not-text": header(lambda text: text.replace("weight", "weig\0t")),
}

# Seen by a load; for `verify` a document is bytes with a checksum.
ON_A_DOCUMENT: dict[str, Attack] = {
    "document-nested-deeply": document('{"class": ' + "[" * 100_000),
    "document-key-twice": document('{"class": "AdamW", "class": "AdamW"}'),
    "document-not-an-object": document("[]"),
    "document-infinity": document('{"class": Infinity}'),
    "document-unknown-tag": state_step({"$pickle": "gASVAAAA"}),
    "document-tag-and-more": state_step({"$tuple": [], "x": 1}),
    "tensor-of-exabytes": state_step({"$tensor": {"dtype": "F32", "shape": [2**60], "data": DATA}}),
    "array-of-exabytes": state_step({"$array": {"dtype": "<f4", "shape": [2**60], "data": DATA}}),
    "array-of-objects": state_step({"$array": {"dtype": "|O", "shape": [1], "data": DATA}}),
    "scalar-of-strings": state_step({"$scalar": {"dtype": "<U1", "shape": [], "data": DATA}}),
    "tensor-of-an-unknown-dtype": state_step({"$tensor": {"dtype": "PICKLE", "shape": [], "data": DATA}}),
    "bytes-not-base64": state_step({"$bytes": "!!!!"}),
}
