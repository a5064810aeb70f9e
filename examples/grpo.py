"""How a language model is trained by GRPO so that a killed run goes on where it was, with the same answers.

    torchrun --nproc-per-node 2 examples/grpo.py --plugin fsdp --root runs/grpo --steps 30 --save-every 5

Each rank asks its share of questions about Python's standard library, samples a group of answers to each, and scores
them by rules (plain prose, short, ended properly). An answer that is better than its group becomes likelier; the frozen
reference, which is the actor as it was, keeps the actor near. A checkpoint has both roles, and the same command after a
crash resumes: each rank's random state comes back with the weights, so the resumed run samples the very answers that
the uninterrupted one would have.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from tqdm import tqdm
from transformers import set_seed

from rlhf import (
    StepLog,
    Texts,
    answer_log_probs,
    encode_prompt,
    frozen_copy,
    make_actor,
    masked_mean,
    mean_over_ranks,
    next_samples,
    parse_arguments,
    reward_by_rules,
    sample,
)
from sft import PLUGINS, killing_store, questions_and_answers
from shardpoint import Booster, Checkpointer, DistCoordinator, Every, Latest, TrainState
from shardpoint.data import StatefulDistributedSampler

GROUP = 4  # answers to one prompt
LEARNING_RATE = 1e-5
KL_WEIGHT = 0.04


def advantages_in_groups(rewards: torch.Tensor) -> torch.Tensor:
    """Return how much better each answer is than its group, float32 `[batch]`, a group being GROUP neighbours."""
    groups = rewards.view(-1, GROUP)
    deviation = groups.std(dim=1, keepdim=True, correction=0)
    return ((groups - groups.mean(dim=1, keepdim=True)) / (deviation + 1e-4)).flatten()


def grpo_loss(actor: Any, reference: Any, texts: Texts, rewards: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss, with gradients, and the mean KL divergence from the reference."""
    with torch.no_grad():
        expected = answer_log_probs(reference, texts)
    log_probs = answer_log_probs(actor, texts)
    # An answer is used for one step, so the policy that sampled it is the actor itself: a ratio of 1, with a gradient.
    ratio = (log_probs - log_probs.detach()).exp()
    difference = expected - log_probs
    kl = masked_mean(difference.exp() - difference - 1, texts.answer_mask)  # unbiased, and never negative
    gain = masked_mean(ratio * advantages_in_groups(rewards)[:, None], texts.answer_mask)
    return KL_WEIGHT * kl - gain, kl.detach()


def train(args: argparse.Namespace) -> None:
    """Train up to a step, from the last committed checkpoint or from the start."""
    coordinator = DistCoordinator()
    rank, world_size = coordinator.rank, coordinator.world_size
    actor, tokenizer = make_actor(tiny=args.tiny)
    reference = frozen_copy(actor)
    optimizer = torch.optim.AdamW(actor.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    booster = Booster(plugin=PLUGINS[args.plugin]())
    actor, optimizer, *_ = booster.boost(actor, optimizer)
    reference, *_ = booster.boost(reference)

    prompts = [encode_prompt(tokenizer, question) for question, _ in questions_and_answers()]
    share = args.batch // GROUP  # prompts of one rank and step
    sampler = StatefulDistributedSampler(prompts, world_size, rank, drop_last=True, micro_batch_size=share)
    set_seed(1 + rank)  # each rank samples answers of its own; a resume puts this random state back
    state = {
        "actor": TrainState(model=actor, optimizer=optimizer, sampler=sampler, tokenizer=tokenizer),
        "reference": TrainState(model=reference, frozen=True),
    }
    store = killing_store(args.root, rank, args.kill)
    with Checkpointer(args.root, save=[Every(steps=args.save_every)], keep=[Latest(2)], store=store) as checkpointer:
        run = checkpointer.resume(state)
        resumed = run.step if run else 0
        coordinator.print_on_master(f"resumed from step {resumed}")
        log = StepLog(args.root, resumed)
        for step in tqdm(range(resumed + 1, args.steps + 1), initial=resumed, total=args.steps, disable=rank != 0):
            asked = [prompt for prompt in next_samples(sampler, prompts) for _ in range(GROUP)]
            texts = sample(actor, tokenizer, asked)
            answers = texts.answers(tokenizer)
            rewards = torch.tensor([reward_by_rules(answer, ended=ended) for answer, ended in answers])

            loss, kl = grpo_loss(actor, reference, texts, rewards)
            booster.backward(loss, optimizer)
            torch.nn.utils.clip_grad_norm_(actor.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

            told = mean_over_ranks({"reward": rewards.mean(), "loss": loss, "kl": kl})
            log.write(step, told, texts.tokens)
            if step % 10 == 1:
                coordinator.print_on_master(f"step {step}: {answers[0][0]!r}")
            checkpointer.save(state, epoch=sampler.epoch, step=step, batch_size=sampler.batch_size, metrics=told)


if __name__ == "__main__":
    train(parse_arguments(__doc__, steps=30, save_every=5, batch=8))
    DistCoordinator().destroy()  # after the models are gone: a gloo group that DDP is the last to hold can hang there
