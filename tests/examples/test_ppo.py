"""Does the PPO example keep four models, their experience and its KL weight together through a kill? On tiny models.

The oracle of a resumed run is the run that nobody interrupted; that of an advantage is the sum it is defined by.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

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
def ppo() -> ModuleType:
    return import_example("ppo")


@pytest.mark.distributed
@pytest.mark.crash
@pytest.mark.parametrize("plugin", ["fsdp", pytest.param("ddp", marks=pytest.mark.nightly)])
def test_a_run_killed_in_a_save_goes_on_with_the_experience_it_had(plugin: str, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = ("--tiny", "--plugin", plugin, "--steps", "7", "--save-every", "3")
    # Two steps for each rollout: the save of step 3 falls between the two.
    _, resumed = assert_goes_on_as_if_nothing_had_happened(
        "ppo", whole, killed, *options, kill="rank=0,step=6", saved=3
    )
    assert "with experience for 1 more steps" in resumed

    assert committed(whole) == ["epoch-0_step-3", "epoch-0_step-6"]
    first, last = (tensors_of(whole / name) for name in committed(whole))
    for checkpoint in committed(whole):
        assert roles_of(whole / checkpoint) == ["actor", "critic", "reference", "reward"]
    for (part, name), tensor in first.items():
        is_frozen = part in {"reference/modeling", "reward/modeling"}
        assert torch.equal(tensor, last[part, name]) == is_frozen, (part, name)
    assert {part for part, _ in first} >= {"actor/optimizer", "critic/optimizer"}
    log = log_of(whole)
    assert [line["step"] for line in log] == [1, 2, 3, 4, 5, 6, 7]
    tokens = [tuple(line["tokens"]) for line in log]
    assert tokens[0::2] == [*tokens[1::2], tokens[6]]  # each rollout for two steps
    assert len({checksum for pair in tokens for checksum in pair}) == 8  # each rank, each rollout: other tokens
    assert len({line["kl_weight"] for line in log}) == 4


@pytest.mark.nightly
@pytest.mark.distributed
@pytest.mark.crash
@pytest.mark.timeout(7200)
def test_smollm2_earns_more_and_goes_on_after_a_kill(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = ("--plugin", "fsdp", "--steps", "30", "--save-every", "9")
    assert_goes_on_as_if_nothing_had_happened(
        "ppo", whole, killed, *options, kill="rank=1,step=18", saved=9, timeout_s=3600.0
    )
    rewards = [line["reward"] for line in log_of(whole)]
    assert sum(rewards[-6:]) > sum(rewards[:6]) + 0.5


def test_a_buffer_and_a_kl_weight_come_back_as_they_were(ppo: ModuleType) -> None:
    buffer = ppo.ExperienceBuffer()
    assert buffer.uses_left == 0
    buffer.fill({"tokens": torch.tensor([[1, 2]])})
    other = ppo.ExperienceBuffer()
    other.load_state_dict(buffer.state_dict())
    assert other.uses_left == ppo.STEPS_PER_ROLLOUT
    assert torch.equal(other.experience["tokens"], torch.tensor([[1, 2]]))
    kl, restored = ppo.AdaptiveKL(), ppo.AdaptiveKL()
    kl.update(10 * ppo.KL_TARGET)
    restored.load_state_dict(json.loads(json.dumps(kl.state_dict())))
    assert restored.weight == kl.weight == pytest.approx(1.1 * ppo.AdaptiveKL().weight)
    kl.update(-1.0)
    assert kl.weight == pytest.approx(0.99 * ppo.AdaptiveKL().weight)


def test_an_advantage_is_the_decaying_sum_of_the_surprises_to_come(ppo: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(3, 6, generator=generator), torch.randn(3, 6, generator=generator)
    lengths = [6, 4, 1]
    mask = torch.tensor([[1.0] * length + [0.0] * (6 - length) for length in lengths])
    found = ppo.generalized_advantages(rewards * mask, values, mask)
    for row, length in enumerate(lengths):
        for index in range(6):
            expected = sum(
                ppo.GAE_LAMBDA ** (later - index)
                * float(
                    rewards[row, later] - values[row, later] + (values[row, later + 1] if later + 1 < length else 0)
                )
                for later in range(index, length)
            )
            assert found[row, index].item() == pytest.approx(expected, abs=1e-5)


def test_it_is_short_enough_to_read() -> None:
    assert len((EXAMPLES / "ppo.py").read_text().splitlines()) < 250
