"""How a language model is trained by PPO so that a killed run goes on where it was: four models, one checkpoint.

    torchrun --nproc-per-node 2 examples/ppo.py --plugin fsdp --root runs/ppo --steps 30 --save-every 5

The actor answers questions about Python's standard library. Rules (plain prose, short, ended properly) and a reward
model, which tells a sentence from mixed-up words, score the answers. The critic foresees the scores, and the frozen
reference, which is the actor as it was, keeps the actor near by a KL penalty whose weight adapts. What was sampled is
used for two steps, so a save often falls between the two: then the experience is in the checkpoint too, and a resumed
run takes its second step on these very answers. A checkpoint has all four models of the same step, or is not there.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from tqdm import tqdm
from transformers import set_seed

from rlhf import (
    NUM_ANSWER_TOKENS,
    StepLog,
    Texts,
    answer_log_probs,
    bare,
    encode_answer,
    encode_prompt,
    end_token,
    frozen_copy,
    make_actor,
    make_scorer,
    masked_mean,
    mean_over_ranks,
    next_samples,
    padded,
    parse_arguments,
    positions,
    reward_by_rules,
    sample,
)
from sft import PLUGINS, killing_store, questions_and_answers
from shardpoint import Booster, Checkpointer, DistCoordinator, Every, Latest, TrainState
from shardpoint.data import StatefulDistributedSampler

STEPS_PER_ROLLOUT = 2
ACTOR_LEARNING_RATE, CRITIC_LEARNING_RATE = 1e-5, 5e-5
CLIP = 0.2  # how far a step may move the ratio of the new policy to the one that sampled
GAE_LAMBDA = 0.95
KL_TARGET = 0.05  # per token
REWARD_MODEL_WEIGHT = 0.2
RIDGE = 0.01  # how much the reward model's fit is held back


class ExperienceBuffer:
    """What this rank sampled and how good it was, until it has been used up."""

    def __init__(self) -> None:
        self.uses_left = 0
        self.experience: dict[str, torch.Tensor] = {}

    def fill(self, experience: dict[str, torch.Tensor]) -> None:
        """Take new experience, to be used STEPS_PER_ROLLOUT times."""
        self.uses_left, self.experience = STEPS_PER_ROLLOUT, experience

    def state_dict(self) -> dict[str, Any]:
        """Return what this rank must have again to take its next step on the same experience."""
        return {"uses_left": self.uses_left, "experience": self.experience}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with experience that was saved."""
        self.uses_left, self.experience = state["uses_left"], state["experience"]


class AdaptiveKL:
    """The weight of the KL penalty: more where the actor has gone too far, less where it could go farther."""

    def __init__(self) -> None:
        self.weight = 0.1

    def update(self, kl: float) -> None:
        """Adapt to a measured divergence, equal on every rank."""
        self.weight *= 1 + 0.1 * min(max(kl / KL_TARGET - 1, -1.0), 1.0)

    def state_dict(self) -> dict[str, float]:
        """Return the weight."""
        return {"weight": self.weight}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on with a weight that was saved."""
        self.weight = state["weight"]


@torch.no_grad()
def fit_reward_model(scorer: Any, tokenizer: Any) -> None:
    """Fit the head by least squares: 1 at the end of a docstring's sentence, -1 where its words are mixed up."""
    pairs = questions_and_answers()[::4]
    words = [answer.removesuffix(".").split() for _, answer in pairs]
    mixed = [" ".join(answer[1::2] + answer[::2]) + "." for answer in words]
    texts = [*pairs, *((question, answer) for (question, _), answer in zip(pairs, mixed, strict=True))]
    rows = [encode_prompt(tokenizer, question) + encode_answer(tokenizer, answer) for question, answer in texts]
    tokens, mask = padded(rows, end_token(tokenizer))
    hidden = scorer.model(input_ids=tokens, attention_mask=mask, position_ids=positions(mask)).last_hidden_state
    ends = hidden[:, -1].double()
    wanted = torch.tensor([1.0] * len(pairs) + [-1.0] * len(pairs)).double()
    ridge = ends.T @ ends + RIDGE * ends.square().sum(-1).mean() * torch.eye(ends.shape[1])
    scorer.score.weight.copy_(torch.linalg.solve(ridge, ends.T @ wanted)[None])


def answer_values(scorer: Any, texts: Texts) -> torch.Tensor:
    """Return a number for each token of the answers, from what stands before it; float32 `[batch, NUM_ANSWER_TOKENS]`.

    The last column, one more, is from the whole answer.
    """
    values: torch.Tensor = scorer(**texts.inputs(), use_cache=False).logits.squeeze(-1)
    return values[:, -NUM_ANSWER_TOKENS - 1 :]


def generalized_advantages(rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the advantage of each token of the answers (Schulman et al. 2016), without a discount."""
    advantages, following, next_value = torch.zeros_like(rewards), torch.zeros(len(rewards)), torch.zeros(len(rewards))
    for index in reversed(range(rewards.shape[1])):
        surprise = rewards[:, index] + next_value - values[:, index]
        following = (surprise + GAE_LAMBDA * following) * mask[:, index]
        next_value = values[:, index] * mask[:, index]
        advantages[:, index] = following
    return advantages


@torch.no_grad()
def collect(
    models: dict[str, Any], tokenizer: Any, prompts: list[list[int]], kl: AdaptiveKL
) -> dict[str, torch.Tensor]:
    """Sample answers, and find out how good each of their tokens was."""
    texts = sample(models["actor"], tokenizer, prompts)
    mask, ends = texts.answer_mask, texts.answer_mask.sum(-1).long()
    log_probs = answer_log_probs(bare(models["actor"]), texts)
    divergence = log_probs - answer_log_probs(models["reference"], texts)
    values = answer_values(bare(models["critic"]), texts)[:, :-1]
    judged = answer_values(models["reward"], texts)[torch.arange(len(ends)), ends]  # after an answer's last token
    by_rules = [reward_by_rules(answer, ended=ended) for answer, ended in texts.answers(tokenizer)]
    scores = torch.tensor(by_rules) + REWARD_MODEL_WEIGHT * judged.tanh()
    rewards = -kl.weight * divergence
    rewards[torch.arange(len(ends)), ends - 1] += scores
    advantages = generalized_advantages(rewards, values, mask)
    return {
        "tokens": texts.tokens,
        "mask": texts.mask,
        "log_probs": log_probs,
        "advantages": advantages,
        "returns": advantages + values,
        "reward": scores.mean(),
        "reward_by_rules": torch.tensor(by_rules).mean(),
        "kl": masked_mean(divergence, mask),
    }


def losses(actor: Any, critic: Any, experience: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the actor's and the critic's loss, with gradients."""
    texts = Texts(experience["tokens"], experience["mask"])
    mask, advantages = texts.answer_mask, experience["advantages"]
    mean = masked_mean(advantages, mask)
    advantages = (advantages - mean) / (masked_mean((advantages - mean).square(), mask).sqrt() + 1e-4)
    ratio = (answer_log_probs(actor, texts) - experience["log_probs"]).exp()
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
    values = answer_values(critic, texts)[:, :-1]
    return -masked_mean(gain, mask), masked_mean((values - experience["returns"]).square(), mask) / 2


def train(args: argparse.Namespace) -> None:
    """Train up to a step, from the last committed checkpoint or from the start."""
    coordinator = DistCoordinator()
    rank, world_size = coordinator.rank, coordinator.world_size
    actor, tokenizer = make_actor(tiny=args.tiny)
    num_layers = 1 if args.tiny else 6  # of the critic and the reward model
    reference, critic, judge = frozen_copy(actor), make_scorer(actor, num_layers), make_scorer(actor, num_layers)
    fit_reward_model(judge, tokenizer)
    booster = Booster(plugin=PLUGINS[args.plugin]())
    actor_optimizer = torch.optim.AdamW(actor.parameters(), lr=ACTOR_LEARNING_RATE, weight_decay=0.0)
    critic_optimizer = torch.optim.AdamW(critic.parameters(), lr=CRITIC_LEARNING_RATE, weight_decay=0.0)
    actor, actor_optimizer, *_ = booster.boost(actor, actor_optimizer)
    critic, critic_optimizer, *_ = booster.boost(critic, critic_optimizer)
    reference, *_ = booster.boost(reference)
    judge, *_ = booster.boost(frozen_copy(judge))
    models = {"actor": actor, "critic": critic, "reference": reference, "reward": judge}

    prompts = [encode_prompt(tokenizer, question) for question, _ in questions_and_answers()]
    sampler = StatefulDistributedSampler(prompts, world_size, rank, drop_last=True, micro_batch_size=args.batch)
    buffer, kl = ExperienceBuffer(), AdaptiveKL()
    set_seed(1 + rank)  # each rank samples answers of its own; a resume puts this random state back
    state = {
        "actor": TrainState(
            model=actor,
            optimizer=actor_optimizer,
            sampler=sampler,
            tokenizer=tokenizer,
            extras={"experience": buffer, "kl": kl},
        ),
        "critic": TrainState(model=critic, optimizer=critic_optimizer),
        "reference": TrainState(model=reference, frozen=True),
        "reward": TrainState(model=judge, frozen=True),
    }
    store = killing_store(args.root, rank, args.kill)
    with Checkpointer(args.root, save=[Every(steps=args.save_every)], keep=[Latest(2)], store=store) as checkpointer:
        run = checkpointer.resume(state)
        resumed = run.step if run else 0
        coordinator.print_on_master(f"resumed from step {resumed}, with experience for {buffer.uses_left} more steps")
        log = StepLog(args.root, resumed)
        for step in tqdm(range(resumed + 1, args.steps + 1), initial=resumed, total=args.steps, disable=rank != 0):
            if buffer.uses_left == 0:
                buffer.fill(collect(models, tokenizer, next_samples(sampler, prompts), kl))
                kl.update(mean_over_ranks({"kl": buffer.experience["kl"]})["kl"])
            actor_loss, critic_loss = losses(actor, critic, buffer.experience)
            for model, optimizer, loss in (
                (actor, actor_optimizer, actor_loss),
                (critic, critic_optimizer, critic_loss),
            ):
                booster.backward(loss, optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            buffer.uses_left -= 1

            told = {name: buffer.experience[name] for name in ("reward", "reward_by_rules", "kl")}
            told |= {"actor_loss": actor_loss, "critic_loss": critic_loss, "kl_weight": torch.tensor(kl.weight)}
            metrics = mean_over_ranks(told)
            log.write(step, metrics, buffer.experience["tokens"])
            checkpointer.save(state, epoch=sampler.epoch, step=step, batch_size=sampler.batch_size, metrics=metrics)


if __name__ == "__main__":
    train(parse_arguments(__doc__, steps=30, save_every=5, batch=8))
    DistCoordinator().destroy()  # after the models are gone: a gloo group that DDP is the last to hold can hang there
