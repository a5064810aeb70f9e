"""Where writers cannot share a file, is what two real ranks leave on disk the same, and does a failure reach both?"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.launch import run_ranks

pytestmark = pytest.mark.distributed

PROGRAM = """
import json, sys
import torch
import torch.distributed as dist
from torch import nn
from shardpoint import Booster, Checkpointer, PeerError, TrainState
from shardpoint.booster import TorchFSDPPlugin
from shardpoint.storage import LocalStore
from shardpoint.testing import Fault, FaultyStore

root = sys.argv[1]
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(33, 65), nn.ReLU(), nn.Linear(65, 7))
optimizer = torch.optim.AdamW(model.parameters())
booster = Booster(plugin=TorchFSDPPlugin(blocks=[nn.Linear]))
model, optimizer, *_ = booster.boost(model, optimizer)
booster.backward(model(torch.ones(2, 33)).sum(), optimizer)
optimizer.step()
state = TrainState(model=model, optimizer=optimizer)
for name, shared in (("shared", True), ("apart", False)):
    with Checkpointer(root, store=LocalStore(f"{root}/{name}", shared_files=shared)) as checkpointer:
        checkpointer.save(state, epoch=0, step=1, batch_size=1)
failures = []
for failing in range(2):
    store = LocalStore(f"{root}/apart", shared_files=False)
    faults = [Fault("write", path="*step-2-*/*.safetensors", nth=3 if failing == 0 else 1)]
    faulty = FaultyStore(store, faults if dist.get_rank() == failing else [])
    with Checkpointer(root, store=faulty) as checkpointer:
        try:
            checkpointer.save(state, epoch=0, step=2, batch_size=1)
        except PeerError as error:
            failures.append(error.failures[failing].type)
with Checkpointer(root, store=LocalStore(f"{root}/apart", shared_files=False)) as checkpointer:
    failures.append(checkpointer.resume(state).step)
print(json.dumps(failures))
dist.destroy_process_group()
"""


def files_of(checkpoint: Path) -> dict[str, bytes]:
    """Return every file but the manifest, which has an id and a time."""
    found = {str(path.relative_to(checkpoint)): path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()}
    del found["shardpoint.json"]
    return found


def test_two_ranks_with_a_file_each(tmp_path: Path) -> None:
    outcomes = run_ranks(PROGRAM, 2, timeout_s=120, args=[str(tmp_path)])
    reports = [outcome.report() for outcome in outcomes]
    assert reports[0] == reports[1] == ["StorageError", "StorageError", 1]
    shared = files_of(tmp_path / "shared" / "epoch-0_step-1")
    assert {"modeling/model-00001-of-00001.safetensors", "optimizer/optimizer-00001-of-00001.safetensors"} <= set(
        shared
    )
    assert files_of(tmp_path / "apart" / "epoch-0_step-1") == shared
    assert not (tmp_path / "apart" / "epoch-0_step-2").exists()
