"""Is a checkpoint of format 1.0 still read, to the last bit? It was made by `make_golden.py` and must never change."""

from __future__ import annotations

import json
import math
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import deserialize, safe_open
from torch import nn

from shardpoint import Checkpointer, TrainState
from shardpoint.catalog import open_path, verify
from shardpoint.manifest import RawTensor, decode_document, decode_manifest, encode_document, encode_manifest

GOLDEN = Path(__file__).parent / "golden" / "format-1.0" / "epoch-1_step-4"

ONE = RawTensor("F32", (), struct.pack("<f", 1.0))
WEIGHTS: dict[str, tuple[str, list[int], bytes]] = {
    "weight": ("F32", [2, 3], struct.pack("<6f", -0.625, -0.375, -0.125, 0.125, 0.375, 0.625)),
    "low": ("BF16", [3], bytes.fromhex("803f00c0203e")),
    "scale": ("F32", [], struct.pack("<f", 0.5)),
    "seen": ("I64", [2], struct.pack("<2q", 7, 2**40)),
}
STATES: dict[str, tuple[str, list[int], bytes]] = {
    "weight.exp_avg": ("F32", [2, 3], struct.pack("<f", 0.5) * 6),
    "weight.exp_avg_sq": ("F32", [2, 3], struct.pack("<f", 1.0) * 6),
    "low.exp_avg": ("BF16", [3], bytes.fromhex("c03f") * 3),
    "low.exp_avg_sq": ("BF16", [3], bytes.fromhex("003f") * 3),
}
FILES = {"modeling/model-00001-of-00001": WEIGHTS, "optimizer/optimizer-00001-of-00001": STATES}


def document(name: str) -> Any:
    return decode_document((GOLDEN / name).read_bytes(), name)


def test_it_verifies() -> None:
    report = verify(*open_path(GOLDEN))
    assert report.problems == ()
    assert (report.num_files, report.num_tensors, report.num_bytes) == (8, 8, 24_244)


def test_the_manifest() -> None:
    data = (GOLDEN / "shardpoint.json").read_bytes()
    manifest = decode_manifest(data)
    assert (manifest.format, manifest.version) == ("shardpoint", (1, 0))
    assert manifest.checkpoint_id == "58ce28559b5945aab78cad299792ea6d"
    assert (manifest.epoch, manifest.step, manifest.sample_start_index) == (1, 4, 32)
    assert (manifest.commit_sequence, manifest.name, manifest.replaces) == (1, "epoch-1_step-4", None)
    assert (manifest.world_size, manifest.roles) == (1, [""])
    assert manifest.metric_values == {"loss": 0.125, "reward": -math.inf}
    assert {(t.part, t.fqn, t.state) for t in manifest.tensors} == {
        *(("modeling", name, None) for name in WEIGHTS),
        *(("optimizer", *name.rsplit(".", 1)) for name in STATES),
    }
    # Within one version the writer gives the same bytes for the same facts.
    assert encode_manifest(manifest) == data


@pytest.mark.parametrize("name", FILES)
def test_the_raw_library_reads_the_tensors(name: str) -> None:
    path = GOLDEN / f"{name}.safetensors"
    found = dict(deserialize(path.read_bytes()))  # type: ignore[no-untyped-call]
    assert {key: (f["dtype"], f["shape"], bytes(f["data"])) for key, f in found.items()} == FILES[name]
    with safe_open(path, framework="np") as opened:
        assert opened.metadata() == {"format": "pt"}
    index = json.loads((GOLDEN / f"{name.split('-', 1)[0]}.safetensors.index.json").read_text())
    assert index["weight_map"] == dict.fromkeys(FILES[name], path.name)


def test_the_documents() -> None:
    assert document("lr_scheduler.json") == {
        "class": "MultiStepLR",
        "state": {
            "milestones": Counter({2: 1, 5: 2}),
            "gamma": 0.5,
            "base_lrs": [0.25],
            "last_epoch": 1,
            "_step_count": 2,
            "_is_initial": False,
            "_get_lr_called_within_step": False,
            "_last_lr": [0.25],
            "best": math.inf,
        },
    }
    assert type(document("lr_scheduler.json")["state"]["milestones"]) is Counter
    groups = document("optimizer/param_groups.json")
    assert groups["class"] == "AdamW"
    assert [group["params"] for group in groups["groups"]] == [["weight", "low", "scale"]]
    assert groups["groups"][0]["options"]["betas"] == (0.5, 0.75)
    assert groups["states"] == {
        "weight": {"step": ONE},
        "low": {"step": ONE},
        "scale": {
            "step": ONE,
            "exp_avg": RawTensor("F32", (), struct.pack("<f", 2.5)),
            "exp_avg_sq": RawTensor("F32", (), struct.pack("<f", 0.25)),
        },
    }
    assert json.loads((GOLDEN / "running_states.json").read_text()) == {
        "epoch": 1,
        "step": 4,
        "sample_start_index": 32,
    }


def test_the_random_state() -> None:
    state = document("rng/rank-00000.json")
    assert state["python"]["words"].shape == (625,)
    expected = np.random.RandomState(2).get_state(legacy=False)
    assert np.array_equal(state["numpy"]["state"]["key"], expected["state"]["key"])
    generator = torch.Generator().manual_seed(3)
    assert state["torch"] == RawTensor("U8", (5056,), generator.get_state().numpy().tobytes())


@pytest.mark.parametrize("name", ["lr_scheduler.json", "optimizer/param_groups.json", "rng/rank-00000.json"])
def test_the_writer_still_gives_these_bytes(name: str) -> None:
    assert encode_document(document(name)) == (GOLDEN / name).read_bytes()


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 3))
        self.low = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
        self.scale = nn.Parameter(torch.zeros(()))
        self.register_buffer("seen", torch.zeros(2, dtype=torch.int64))


def test_a_run_resumes_from_it(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for file in GOLDEN.rglob("*.*"):
        target = root / GOLDEN.name / file.relative_to(GOLDEN)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    model = Tiny()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1])
    with Checkpointer(root) as checkpointer:
        run = checkpointer.resume(TrainState(model=model, optimizer=optimizer, lr_scheduler=scheduler))
    assert run is not None
    assert (run.epoch, run.step, run.sample_start_index) == (1, 4, 32)
    for name, tensor in model.state_dict().items():
        assert tensor.reshape(-1).view(torch.uint8).numpy().tobytes() == WEIGHTS[name][2]
    state = optimizer.state[model.scale]
    assert (state["step"].item(), state["exp_avg"].item(), state["exp_avg_sq"].item()) == (1.0, 2.5, 0.25)
    assert optimizer.state[model.low]["exp_avg"].tolist() == [1.5] * 3
    assert optimizer.state[model.low]["exp_avg"].dtype == torch.bfloat16
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["betas"]) == (0.25, (0.5, 0.75))
    assert scheduler.state_dict()["milestones"] == Counter({2: 1, 5: 2})
