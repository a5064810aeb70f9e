from __future__ import annotations

import ast

import pytest

from tests.gates.sources import ROOT, place, references, shipped_files

# DCP's `.metadata` is a pickle: this file reads it with an unpickler of its own, which knows DCP's classes alone.
ONE_READER = ("src/shardpoint/integrations/dcp_metadata.py", {"pickle", "pickle._Unpickler"})

EXECUTABLE_FORMATS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}


def violations(source: str) -> list[tuple[str, ast.AST]]:
    """Find what writes or reads executable data."""
    tree = ast.parse(source)
    named = list(references(tree))
    safe_loads = {
        id(node.func)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg == "weights_only" and isinstance(keyword.value, ast.Constant) and keyword.value.value is True
    }
    found = [(name, node) for name, node in named if name.partition(".")[0] in EXECUTABLE_FORMATS]
    found += [(name, node) for name, node in named if name in {"torch.save", "torch.serialization.save"}]
    found += [
        (f"{name} without weights_only=True", node)
        for name, node in named
        if name in {"torch.load", "torch.serialization.load"} and id(node) not in safe_loads
    ]
    found += [
        ("allow_pickle", node)
        for node in ast.walk(tree)
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle"
    ]
    return found


def test_nothing_that_ships_reads_or_writes_pickles() -> None:
    bad = [
        f"{place(path, node)}: {what}"
        for path in shipped_files()
        for what, node in violations(path.read_text(encoding="utf-8"))
        if not (str(path.relative_to(ROOT)) == ONE_READER[0] and what in ONE_READER[1])
    ]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "def f():\n    from pickle import loads",
        "import torch\ntorch.save(1, 'x')",
        "import torch as t\nt.save(1, 'x')",
        "from torch import save",
        "import torch\ntorch.load('x')",
        "import torch\ntorch.load('x', weights_only=False)",
        "import torch\nload = torch.load",
        "import torch.serialization\ntorch.serialization.load('x')",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
    ],
)
def test_the_gate_sees(source: str) -> None:
    assert violations(source)


@pytest.mark.parametrize("source", ["import torch\ntorch.load('x', weights_only=True)", "import json\njson.load(f)"])
def test_the_gate_lets_pass(source: str) -> None:
    assert not violations(source)
