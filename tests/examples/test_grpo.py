"""Does the GRPO example sample the same answers after a kill, under DDP as under FSDP2? On tiny random models.

The oracle of a resumed run is the run that nobody interrupted; that of sampling is the model called without a cache.
"""

from __future__ import annotations

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
    run_example,
    tensors_of,
)


@pytest.fixture(scope="module")
def rlhf() -> ModuleType:
    return import_example("rlhf")


@pytest.fixture(scope="module")
def grpo() -> ModuleType:
    return import_example("grpo")


@pytest.mark.distributed
@pytest.mark.crash
def test_a_ddp_run_killed_in_a_save_goes_on_and_fsdp_samples_alike(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = ("--tiny", "--plugin", "ddp", "--steps", "7", "--save-every", "3")
    assert_goes_on_as_if_nothing_had_happened("grpo", whole, killed, *options, kill="rank=0,step=6", saved=3)

    assert committed(whole) == ["epoch-0_step-3", "epoch-0_step-6"]
    first, last = (tensors_of(whole / name) for name in committed(whole))
    for checkpoint in committed(whole):
        assert roles_of(whole / checkpoint) == ["actor", "reference"]
    for (part, name), tensor in first.items():
        assert torch.equal(tensor, last[part, name]) == (part == "reference/modeling"), (part, name)
    log = log_of(whole)
    assert [line["step"] for line in log] == [1, 2, 3, 4, 5, 6, 7]
    assert len({checksum for line in log for checksum in line["tokens"]}) == 14  # each rank, each step: other answers

    sharded = tmp_path / "sharded"
    run_example("grpo", sharded, "--tiny", "--plugin", "fsdp", "--steps", "1", "--save-every", "1")
    assert log_of(sharded)[0]["tokens"] == log[0]["tokens"]


@pytest.mark.nightly
@pytest.mark.distributed
@pytest.mark.crash
@pytest.mark.timeout(7200)
def test_smollm2_earns_more_and_goes_on_after_a_kill(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = ("--plugin", "fsdp", "--steps", "30", "--save-every", "10")
    assert_goes_on_as_if_nothing_had_happened(
        "grpo", whole, killed, *options, kill="rank=1,step=20", saved=10, timeout_s=3600.0
    )
    rewards = [line["reward"] for line in log_of(whole)]
    assert sum(rewards[-5:]) > sum(rewards[:5]) + 0.5


def test_an_answer_is_compared_with_its_group(grpo: ModuleType) -> None:
    rewards = torch.tensor([0.0, 1.0, 1.0, 0.0, 0.5, 0.5, 0.5, 0.5])
    found = grpo.advantages_in_groups(rewards)
    assert found.tolist() == pytest.approx([-1.0, 1.0, 1.0, -1.0, 0.0, 0.0, 0.0, 0.0], abs=1e-3)


def test_sampling_follows_the_models_distribution_and_the_random_state(rlhf: ModuleType) -> None:
    actor, _ = rlhf.make_actor(tiny=True)
    with torch.no_grad():
        for parameter in actor.parameters():
            parameter.mul_(10.0 if parameter.ndim == 2 else 1.0)  # far from a uniform distribution: context counts
    prompts = [list(b"a long question?\n"), list(b"why?\n")]
    torch.manual_seed(5)
    texts = rlhf.sample(actor, None, prompts)
    torch.manual_seed(5)
    rows = [list(prompt) for prompt in prompts]  # the oracle: no padding, no cache, one row at a time
    with torch.no_grad():
        for _ in range(rlhf.NUM_ANSWER_TOKENS):
            logits = torch.cat([actor(input_ids=torch.tensor([row])).logits[:, -1] for row in rows])
            for row, token in zip(rows, torch.multinomial(logits.softmax(-1), 1).tolist(), strict=True):
                row.extend(token)
    for row, prompt, tokens in zip(rows, prompts, texts.tokens.tolist(), strict=True):
        answer = row[len(prompt) :]
        until = answer.index(0) + 1 if 0 in answer else len(answer)
        assert tokens[-rlhf.NUM_ANSWER_TOKENS :][:until] == answer[:until]

    expected = torch.zeros(2, rlhf.NUM_ANSWER_TOKENS)
    with torch.no_grad():
        for index, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
            log_probs = actor(input_ids=torch.tensor([row])).logits[0].log_softmax(-1)
            places = torch.arange(len(prompt), len(row))
            expected[index] = log_probs[places - 1, torch.tensor(row)[places]]
        found = rlhf.answer_log_probs(actor, texts)
    assert torch.allclose(found * texts.answer_mask, expected * texts.answer_mask, atol=1e-3)


def test_nothing_counts_after_the_end_of_an_answer(rlhf: ModuleType) -> None:
    class EndsAtOnce(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, **_: object) -> object:
            class Output:
                logits = torch.full((len(input_ids), 1, 256), -100.0).index_fill_(2, torch.tensor([0]), 100.0)
                past_key_values = None

            return Output

    texts = rlhf.sample(EndsAtOnce(), None, [list(b"why?\n")])
    assert texts.answer_mask.tolist() == [[1.0] + [0.0] * (rlhf.NUM_ANSWER_TOKENS - 1)]
    assert texts.answers(None) == [("", True)]


def test_the_rules_like_short_plain_sentences_that_end(rlhf: ModuleType) -> None:
    good = rlhf.reward_by_rules("Return a new list of the names in this table.", ended=True)
    assert good == pytest.approx(1.0)
    unended = rlhf.reward_by_rules("Return a new list of the names in this table.", ended=False)
    code = rlhf.reward_by_rules("{`x[1]`: (2, 3)}", ended=True)
    assert unended == pytest.approx(0.6)
    assert rlhf.reward_by_rules("", ended=True) == 0.0
    assert 0 < code < unended < good


def test_prompts_go_on_in_the_next_epoch(rlhf: ModuleType) -> None:
    def seen(sampler: Any, steps: int) -> list[int]:
        return [one for _ in range(steps) for one in rlhf.next_samples(sampler, list(range(10)))]

    def sampler() -> Any:
        return rlhf.StatefulDistributedSampler(range(10), 1, 0, drop_last=True, micro_batch_size=4)

    whole = seen(sampler(), 6)
    for epoch in (whole[0:8], whole[8:16], whole[16:24]):  # two steps of four: the last two of ten are left out
        assert len(set(epoch)) == 8
    before, after = sampler(), sampler()
    begun = seen(before, 2)
    after.load_state_dict(before.state_dict())
    assert begun + seen(after, 4) == whole


def test_they_are_short_enough_to_read() -> None:
    for name in ("grpo", "rlhf"):
        assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 250
