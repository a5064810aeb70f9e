"""What makes a directory of weights a plain Hugging Face model directory: config, generation config, tokenizer files.

transformers is not imported: whatever has a `config` with `to_json_string` counts as its model. The config is a
corrected copy: `architectures` names the class without the prefix that FSDP2 gives it, `dtype` is that of the weights,
and a GGUF file's `quantization_config` is dropped, since the weights are no longer quantized.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shardpoint.adapters.names import NamedTensor, class_name
from shardpoint.errors import UsageError

_MAX_MADE = 8

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
)


def model_documents(model: nn.Module, tensors: list[NamedTensor], tokenizer: Any) -> dict[str, bytes]:
    """Return the files that belong beside the weights: name -> contents.

    Args:
        model: without wrappers; any module.
        tensors: its tensors, whose dtype `config.json` must name.
        tokenizer: anything with `save_pretrained`, or None: then the tokenizer files are copied from the directory that
            the model was loaded from, if it was one.

    Raises:
        UsageError: the tokenizer has no `save_pretrained`.
    """
    documents: dict[str, bytes] = {}
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_json_string"):
        generation: Any = getattr(model, "generation_config", None)
        documents |= _configs(model, config, generation, _dtype(tensors))
    if tokenizer is not None:
        documents |= {name: data for name, data in _tokenizer_files(tokenizer).items() if name not in documents}
    elif config is not None:
        source = Path(str(getattr(config, "_name_or_path", "") or ""))
        if source.is_dir() and str(source) != ".":
            documents |= {name: (source / name).read_bytes() for name in TOKENIZER_FILES if (source / name).is_file()}
    return documents


def _dtype(tensors: list[NamedTensor]) -> str | None:
    """Return the dtype that most of the weights have."""
    dtypes: Counter[torch.dtype] = Counter()
    for named in tensors:
        if named.is_parameter and named.tensor.is_floating_point():
            dtypes[named.tensor.dtype] += named.tensor.numel()
    return str(dtypes.most_common(1)[0][0]).removeprefix("torch.") if dtypes else None


_made: dict[str, tuple[Any, dict[str, bytes]]] = {}  # of the last models: turning configs into text takes milliseconds


def _configs(model: nn.Module, config: Any, generation: Any, dtype: str | None) -> dict[str, bytes]:
    """Return `config.json` and `generation_config.json`; those of the last time where nothing in them has changed."""
    kind = class_name(model)
    looks = (repr(vars(config)), repr(vars(generation)) if hasattr(generation, "__dict__") else "", dtype)
    known = _made.get(kind)
    if known is not None and known[0] == looks:
        return known[1]
    documents = {"config.json": _config(kind, config, dtype)}
    if hasattr(generation, "to_json_string"):
        documents["generation_config.json"] = generation.to_json_string().encode()
    if len(_made) >= _MAX_MADE:
        _made.clear()
    _made[kind] = looks, documents
    return documents


def _config(kind: str, config: Any, dtype: str | None) -> bytes:
    fields: dict[str, Any] = json.loads(config.to_json_string())
    fields["architectures"] = [kind]
    if dtype is not None:
        fields["torch_dtype" if "torch_dtype" in fields and "dtype" not in fields else "dtype"] = dtype
    quantization = fields.get("quantization_config")
    if isinstance(quantization, dict) and quantization.get("quant_method") == "gguf":
        del fields["quantization_config"]
    return (json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _tokenizer_files(tokenizer: Any) -> dict[str, bytes]:
    if not hasattr(tokenizer, "save_pretrained"):
        text = f"the tokenizer is a {type(tokenizer).__name__}, which has no save_pretrained"
        raise UsageError(text)
    with tempfile.TemporaryDirectory() as directory:
        tokenizer.save_pretrained(directory)
        root = Path(directory)
        return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}
