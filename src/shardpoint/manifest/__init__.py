"""What a checkpoint's documents say: the tagged JSON codec and the manifest."""

from shardpoint.manifest.codec import RawTensor, decode_document, encode_document
from shardpoint.manifest.document import (
    MANIFEST_NAME,
    FileEntry,
    Manifest,
    TensorEntry,
    check_relative_path,
    decode_manifest,
    encode_manifest,
)

__all__ = [
    "MANIFEST_NAME",
    "FileEntry",
    "Manifest",
    "RawTensor",
    "TensorEntry",
    "check_relative_path",
    "decode_document",
    "decode_manifest",
    "encode_document",
    "encode_manifest",
]
