"""How a language model is trained by DPO so that a killed run goes on where it was: one file, read from top to bottom.

    torchrun --nproc-per-node 2 examples/dpo.py --plugin fsdp --root runs/dpo --steps 30 --save-every 5

Each question about Python's standard library has two answers: the first sentence of the function's own docstring, which
is preferred, and that of another function. The actor learns to find the first likelier, compared with the frozen
reference, which is the actor as it was. A checkpoint has both roles, and the same command after a crash resumes.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch.nn.functional import logsigmoid
from tqdm import tqdm

from rlhf import StepLog, frozen_copy, make_actor, mean_over_ranks, next_samples, parse_arguments
from sft import PLUGINS, encode, killing_store, questions_and_answers
from shardpoint import Booster, Checkpointer, DistCoordinator, Every, Latest, TrainState
from shardpoint.data import StatefulDistributedSampler

BETA = 0.1  # how much a log-ratio to the reference counts
LEARNING_RATE = 5e-6
Batch = dict[str, torch.Tensor]


def preferences(tokenizer: Any) -> list[tuple[Batch, Batch]]:
    """Return (preferred, rejected) for every question; the rejected answer is that of a question half the list away."""
    pairs = questions_and_answers()
    others = [pairs[(index + len(pairs) // 2) % len(pairs)][1] for index in range(len(pairs))]
    return [
        (encode(tokenizer, question, answer), encode(tokenizer, question, other))
        for (question, answer), other in zip(pairs, others, strict=True)
    ]


def stack(samples: list[tuple[Batch, Batch]]) -> Batch:
    """Return one batch: all preferred answers, then all rejected ones."""
    rows = [preferred for preferred, _ in samples] + [rejected for _, rejected in samples]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def answer_log_probs(model: Any, batch: Batch) -> torch.Tensor:
    """Return how likely a model finds each answer as a whole, float32 `[batch]`."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits: torch.Tensor = model(**inputs, use_cache=False).logits
    labels = batch["labels"][:, 1:]  # a token is foreseen from those before it
    chosen = logits[:, :-1].float().log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    return (chosen * (labels >= 0)).sum(-1)


def dpo_loss(actor: Any, reference: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss (Rafailov et al. 2023), with gradients, and the margin of each pair in (implicit) reward."""
    with torch.no_grad():
        expected = answer_log_probs(reference, batch)
    preferred, rejected = (BETA * (answer_log_probs(actor, batch) - expected)).chunk(2)
    margins = preferred - rejected
    return -logsigmoid(margins).mean(), margins.detach()


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

    pairs = preferences(tokenizer)
    sampler = StatefulDistributedSampler(pairs, world_size, rank, drop_last=True, micro_batch_size=args.batch)
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
            batch = stack(next_samples(sampler, pairs))
            loss, margins = dpo_loss(actor, reference, batch)
            booster.backward(loss, optimizer)
            torch.nn.utils.clip_grad_norm_(actor.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

            told = mean_over_ranks({"loss": loss, "margin": margins.mean(), "accuracy": (margins > 0).float().mean()})
            log.write(step, told, batch["input_ids"])
            checkpointer.save(state, epoch=sampler.epoch, step=step, batch_size=sampler.batch_size, metrics=told)


if __name__ == "__main__":
    train(parse_arguments(__doc__, steps=30, save_every=5, batch=2))
    DistCoordinator().destroy()  # after the models are gone: a gloo group that DDP is the last to hold can hang there
