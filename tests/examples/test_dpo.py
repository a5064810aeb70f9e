"""Does the DPO example prefer, save both roles, die and go on to the last bit? On tiny random models.

The oracle of a resumed run is the run that nobody interrupted; that of a log-probability is plain arithmetic.
"""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.examples.resuming import (
    EXAMPLES,
    assert_goes_on_as_if_nothing_had_happened,
    committed,
    import_example,
    log_of,
    roles_of,
    tensors_of,
)


@pytest.fixture(scope="module")
def dpo() -> ModuleType:
    return import_example("dpo")


@pytest.mark.distributed
@pytest.mark.crash
@pytest.mark.parametrize("plugin", ["fsdp", pytest.param("ddp", marks=pytest.mark.nightly)])
def test_a_run_killed_in_a_save_goes_on_as_if_nothing_had_happened(plugin: str, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = ("--tiny", "--plugin", plugin, "--steps", "7", "--save-every", "3")
    assert_goes_on_as_if_nothing_had_happened("dpo", whole, killed, *options, kill="rank=0,step=6", saved=3)

    assert committed(whole) == ["epoch-0_step-3", "epoch-0_step-6"]
    first, last = tensors_of(whole / "epoch-0_step-3"), tensors_of(whole / "epoch-0_step-6")
    for checkpoint in committed(whole):
        assert roles_of(whole / checkpoint) == ["actor", "reference"]
    for (part, name), tensor in first.items():
        assert torch.equal(tensor, last[part, name]) == (part == "reference/modeling"), (part, name)
    log = log_of(whole)
    assert [line["step"] for line in log] == [1, 2, 3, 4, 5, 6, 7]
    assert log[0]["loss"] == pytest.approx(math.log(2))  # actor and reference are still equal
    assert log[0]["margin"] == 0
    assert len({checksum for line in log for checksum in line["tokens"]}) == 14  # each rank, each step: other samples


@pytest.mark.nightly
@pytest.mark.distributed
@pytest.mark.crash
@pytest.mark.timeout(3600)
def test_smollm2_learns_to_prefer_and_goes_on_after_a_kill(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = ("--plugin", "fsdp", "--steps", "16", "--save-every", "6")
    assert_goes_on_as_if_nothing_had_happened(
        "dpo", whole, killed, *options, kill="rank=1,step=12", saved=6, timeout_s=1800.0
    )
    margins = [line["margin"] for line in log_of(whole)]
    assert sum(margins[-4:]) > sum(margins[:4]) + 0.4


def test_the_likelihood_of_an_answer_is_that_of_its_tokens(dpo: ModuleType) -> None:
    class Bigram:
        """Token t is followed by token f with the log-probability table[t, f]."""

        table = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)).log_softmax(-1)

        def __call__(self, input_ids: torch.Tensor, **_: Any) -> Any:
            class Output:
                logits = self.table[input_ids]

            return Output

    ours, other = dpo.preferences(None)[0]
    batch = dpo.stack([(ours, other)])
    found = dpo.answer_log_probs(Bigram(), batch)
    for row, sample in zip(found, (ours, other), strict=True):
        tokens, labels = sample["input_ids"].tolist(), sample["labels"].tolist()
        expected = [Bigram.table[tokens[i - 1], tokens[i]].item() for i in range(1, len(tokens)) if labels[i] != -100]
        assert len(expected) > 20
        assert row.item() == pytest.approx(sum(expected), rel=1e-5)


def test_another_functions_answer_is_rejected(dpo: ModuleType) -> None:
    def learned(sample: dict[str, torch.Tensor]) -> bytes:
        return bytes(sample["labels"][sample["labels"] > 0].tolist())

    answers = [answer.encode() for _, answer in dpo.questions_and_answers()]
    rejections = 0
    for answer, (preferred, rejected) in zip(answers, dpo.preferences(None), strict=True):
        assert answer.startswith(learned(preferred))  # long samples are cut
        assert any(other.startswith(learned(rejected)) for other in answers)
        rejections += learned(rejected) != learned(preferred)
    assert rejections == len(answers)


def test_it_is_short_enough_to_read() -> None:
    assert len((EXAMPLES / "dpo.py").read_text().splitlines()) < 250
