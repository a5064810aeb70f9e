"""What a checkpoint's documents say: the tagged JSON codec and the manifest."""

from shardpoint.manifest.codec import RawTensor, decode_document, encode_document
from shardpoint.manifest.document import (
    FORMAT_MAJOR,
    FORMAT_MINOR,
    FORMAT_NAME,
    MANIFEST_NAME,
    NEXT_SAMPLES_NAME,
    FileEntry,
    Finding,
    Holders,
    Manifest,
    Suspect,
    TensorEntry,
    check_relative_path,
    decode_manifest,
    encode_manifest,
    metric_value,
)

__all__ = [
    "FORMAT_MAJOR",
    "FORMAT_MINOR",
    "FORMAT_NAME",
    "MANIFEST_NAME",
    "NEXT_SAMPLES_NAME",
    "FileEntry",
    "Finding",
    "Holders",
    "Manifest",
    "RawTensor",
    "Suspect",
    "TensorEntry",
    "check_relative_path",
    "decode_document",
    "decode_manifest",
    "encode_document",
    "encode_manifest",
    "metric_value",
]
