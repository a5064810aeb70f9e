"""How is an example run on two ranks, killed in a save, resumed, and compared with a run that nobody interrupted?"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.launch import REPO, run_ranks

EXAMPLES = REPO / "examples"


def import_example(name: str) -> ModuleType:
    """Import an example as a module; its directory is on the path meanwhile, as when it is run."""
    pytest.importorskip("transformers")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        return importlib.import_module(name)


def run_example(name: str, root: Path, *options: str, timeout_s: float = 200.0, survives: bool = True) -> str:
    """Run an example on two ranks; return what rank 0 printed.

    Torchrun starts the ranks only where one is to die: it ends the others then, and it takes seconds to start.
    """
    program = EXAMPLES / f"{name}.py"
    args = ("--root", str(root), *options)
    outcomes = run_ranks(program, 2, timeout_s=timeout_s, torchrun=not survives, args=args)
    for outcome in outcomes:
        assert (outcome.returncode == 0) == survives, outcome.stderr[-4000:]
    return outcomes[0].stdout


def log_of(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(f"{root}.jsonl").read_text().splitlines()]


def committed(root: Path) -> list[str]:
    return sorted(path.parent.name for path in root.glob("*/shardpoint.json"))


def roles_of(checkpoint: Path) -> list[str]:
    return sorted(path.parent.name for path in checkpoint.glob("*/modeling"))


def tensors_of(checkpoint: Path) -> dict[tuple[str, str], torch.Tensor]:
    """Return every tensor of a checkpoint by its part and name, as the safetensors library reads it."""
    found: dict[tuple[str, str], torch.Tensor] = {}
    for path in sorted(checkpoint.rglob("*.safetensors")):
        part = str(path.parent.relative_to(checkpoint))
        found |= {(part, name): tensor for name, tensor in load_file(path).items()}
    return found


def documents_of(checkpoint: Path) -> Iterator[tuple[str, bytes]]:
    """Yield every other file of a checkpoint but the manifest, which has an id and a time of its own."""
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and path.suffix != ".safetensors" and path.name != "shardpoint.json":
            yield str(path.relative_to(checkpoint)), path.read_bytes()


def assert_equal_checkpoints(one: Path, other: Path) -> None:
    """Compare two checkpoints: each tensor's bits, each document's bytes."""
    ours, theirs = tensors_of(one), tensors_of(other)
    assert ours.keys() == theirs.keys()
    differing = [name for name, tensor in ours.items() if not torch.equal(bits(tensor), bits(theirs[name]))]
    assert not differing, f"these tensors differ: {differing}"
    ours_too, theirs_too = dict(documents_of(one)), dict(documents_of(other))
    names = sorted(ours_too.keys() | theirs_too.keys())
    differing_too = [name for name in names if ours_too.get(name) != theirs_too.get(name)]
    assert not differing_too, f"these documents differ: {differing_too}"


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).contiguous().view(torch.uint8)


def assert_goes_on_as_if_nothing_had_happened(
    name: str, whole: Path, killed: Path, *options: str, kill: str, saved: int, timeout_s: float = 200.0
) -> tuple[str, str]:
    """Run an example to its end, kill another run of it in a save, resume that one, and compare everything.

    Args:
        name: the example.
        whole: the root of the run that nobody interrupts.
        killed: the other root.
        options: the example's.
        kill: the example's `--kill`.
        saved: the step of the last checkpoint before the kill.
        timeout_s: for each of the three runs.

    Returns:
        What the uninterrupted run and the resumed run printed.
    """
    printed = run_example(name, whole, *options, timeout_s=timeout_s)
    run_example(name, killed, *options, "--kill", kill, timeout_s=timeout_s, survives=False)
    assert committed(killed) == [f"epoch-0_step-{saved}"]
    before = log_of(killed)
    assert before == log_of(whole)[: len(before)]
    assert len(before) > saved  # the killed run had gone farther than it had saved
    resumed = run_example(name, killed, *options, timeout_s=timeout_s)
    assert f"resumed from step {saved}" in resumed
    for line, expected in zip(log_of(killed), log_of(whole), strict=True):
        assert line == expected, f"after the resume a step differs: {line}, uninterrupted {expected}"
    assert committed(killed) == committed(whole)
    for checkpoint in committed(whole):
        assert_equal_checkpoints(whole / checkpoint, killed / checkpoint)
    return printed, resumed
