"""What dpo.py, ppo.py and grpo.py have in common: models, sampled answers and their likelihood, rules, the log.

The model, the data and the store that kills are those of sft.py.
"""

from __future__ import annotations

import argparse
import copy
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaForTokenClassification, set_seed

from sft import MODEL_DIR, convert_model, make_model
from shardpoint import DistCoordinator
from shardpoint.data import StatefulDistributedSampler

INSTRUCTION = "Answer in one short sentence."
NUM_ANSWER_TOKENS = (
    24  # every rank samples as many: under FSDP2 a rank that stopped earlier would leave the others hanging
)
T = TypeVar("T")
NUM_WORDS = 10  # of an answer that the rules like best


def parse_arguments(description: str | None, *, steps: int, save_every: int, batch: int) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="directory of checkpoints; the log goes to ROOT.jsonl beside it")
    parser.add_argument("--plugin", choices=["ddp", "fsdp"], default="fsdp")
    parser.add_argument("--steps", type=int, default=steps, help="optimizer steps, counted from the start")
    parser.add_argument("--save-every", type=int, default=save_every, metavar="STEPS")
    parser.add_argument("--batch", type=int, default=batch, metavar="N", help="samples of one rank and step")
    parser.add_argument("--tiny", action="store_true", help="tiny random models over bytes instead of SmolLM2")
    parser.add_argument("--kill", default="", metavar="rank=R,step=S", help="SIGKILL rank R in the middle of a save")
    return parser.parse_args()


def make_actor(*, tiny: bool) -> tuple[Any, Any]:
    """Return the model to be trained and its tokenizer, equal on every rank."""
    torch.set_num_threads(1)  # sums in the same order in every run
    set_seed(0)  # of python, numpy and torch
    with DistCoordinator().priority_execution():  # one rank converts, the others wait and find it done
        if not tiny and not MODEL_DIR.exists():
            convert_model()
    return make_model(tiny=tiny)


def frozen_copy(model: Any) -> Any:
    """Return a model of its own that is never trained: made before the original is boosted."""
    return copy.deepcopy(model).requires_grad_(requires_grad=False).eval()


def make_scorer(model: Any, num_layers: int) -> Any:
    """Return the first layers of a language model with a head that gives every token one number, at first 0."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers, config.num_labels = num_layers, 1
    config.classifier_dropout, config.token_classification_bias = 0.0, False
    scorer = LlamaForTokenClassification(config)
    scorer.model.load_state_dict(model.model.state_dict(), strict=False)  # the other layers are left over
    torch.nn.init.zeros_(scorer.score.weight)
    return scorer


# ---- sampling ------------------------------------------------------------------------------------------------------


@dataclass
class Texts:
    """Prompts with their answers, `[batch, prompt + NUM_ANSWER_TOKENS]`; the prompts end at the same place.

    Attributes:
        tokens: int64.
        mask: int64, 1 for a token that counts: no padding, nothing after the end of an answer.
    """

    tokens: torch.Tensor
    mask: torch.Tensor

    @property
    def answer_mask(self) -> torch.Tensor:
        """The answers' part of the mask, float32 `[batch, NUM_ANSWER_TOKENS]`."""
        return self.mask[:, -NUM_ANSWER_TOKENS:].float()

    def inputs(self) -> dict[str, torch.Tensor]:
        """Return what a model is called with."""
        return {"input_ids": self.tokens, "attention_mask": self.mask, "position_ids": positions(self.mask)}

    def answers(self, tokenizer: Any) -> list[tuple[str, bool]]:
        """Return each answer's text, and whether the model ended it by itself."""
        answers = []
        for row, mask in zip(self.tokens.tolist(), self.mask.tolist(), strict=True):
            ids = [token for token, counts in zip(row, mask, strict=True) if counts][-sum(mask[-NUM_ANSWER_TOKENS:]) :]
            ended = ids[-1] == end_token(tokenizer)
            kept = ids[:-1] if ended else ids
            answers.append(
                (bytes(kept).decode(errors="replace") if tokenizer is None else tokenizer.decode(kept), ended)
            )
        return answers


def positions(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


def end_token(tokenizer: Any) -> int:
    return 0 if tokenizer is None else int(tokenizer.eos_token_id)


def encode_prompt(tokenizer: Any, question: str) -> list[int]:
    """Return the tokens of a question, up to where the answer begins."""
    if tokenizer is None:
        return list(f"{question}\n".encode())
    chat = [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    return list(tokenizer(text).input_ids)


def encode_answer(tokenizer: Any, answer: str) -> list[int]:
    """Return the tokens of an answer, with its end."""
    return [*(answer.encode() if tokenizer is None else tokenizer(answer).input_ids), end_token(tokenizer)]


def padded(rows: list[list[int]], filler: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows that end at the same place, and their mask."""
    length = max(map(len, rows))
    tokens = torch.tensor([[filler] * (length - len(row)) + row for row in rows])
    return tokens, torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])


def next_samples(sampler: StatefulDistributedSampler, rows: Sequence[T]) -> list[T]:
    """Return this rank's share of the next samples, and move the sampler on past everybody's."""
    if sampler.start_index + sampler.batch_size > sampler.num_samples:
        sampler.set_epoch(sampler.epoch + 1)
        sampler.set_start_index(0)
    order = iter(sampler)
    chosen = [rows[next(order)] for _ in range(sampler.micro_batch_size)]
    sampler.set_start_index(sampler.start_index + sampler.batch_size)
    return chosen


def bare(model: Any) -> Any:
    """Return the module in a DDP wrapper, for a forward without a backward: nothing is exchanged there."""
    return model.module if isinstance(model, DistributedDataParallel) else model


@contextmanager
def whole_weights(model: Any) -> Iterator[None]:
    """Under FSDP2, gather the weights once for many forwards, instead of once for each token; then free them."""
    groups = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for group in groups:
        group.set_reshard_after_forward(False, recurse=False)
        group.unshard()
    try:
        yield
    finally:
        for group in groups:
            group.set_reshard_after_forward(True, recurse=False)
            group.reshard()


@torch.no_grad()
def sample(model: Any, tokenizer: Any, prompts: list[list[int]]) -> Texts:
    """Sample an answer to each prompt, from the random state of this rank."""
    model, end = bare(model), end_token(tokenizer)
    tokens, mask = padded(prompts, end)
    new, cache, running = tokens, None, torch.ones(len(prompts), 1, dtype=torch.int64)
    with whole_weights(model):
        for _ in range(NUM_ANSWER_TOKENS):
            place = positions(mask)[:, -new.shape[1] :]
            output = model(
                input_ids=new,
                attention_mask=mask,
                position_ids=place,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = output.past_key_values
            drawn = torch.multinomial(output.logits[:, -1].float().softmax(-1), 1)
            new = torch.where(running == 1, drawn, end)
            tokens, mask = torch.cat([tokens, new], 1), torch.cat([mask, running], 1)
            running = running * (new != end)
    return Texts(tokens, mask)


def answer_log_probs(model: Any, texts: Texts) -> torch.Tensor:
    """Return how likely a model finds each token of the answers, float32 `[batch, NUM_ANSWER_TOKENS]`."""
    logits: torch.Tensor = model(**texts.inputs(), use_cache=False, logits_to_keep=NUM_ANSWER_TOKENS + 1).logits
    chosen = texts.tokens[:, -NUM_ANSWER_TOKENS:, None]
    return logits[:, :-1].float().log_softmax(-1).gather(-1, chosen).squeeze(-1)


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (values * mask).sum() / mask.sum()


def reward_by_rules(answer: str, *, ended: bool) -> float:
    """Score an answer between 0 and 1 by its form: plain prose, about NUM_WORDS words, ended by the model itself."""
    plain = sum(character.isalpha() or character in " ,.'" for character in answer) / max(len(answer), 1)
    length = max(0.0, 1.0 - abs(len(answer.split()) - NUM_WORDS) / NUM_WORDS)
    return 0.3 * plain + 0.3 * length + 0.4 * (ended and answer.endswith("."))


# ---- the log -------------------------------------------------------------------------------------------------------


def gathered(value: float) -> list[float]:
    """Return every rank's value; exact, and equal on all ranks."""
    values = torch.zeros(dist.get_world_size(), dtype=torch.float64)
    values[dist.get_rank()] = value
    dist.all_reduce(values)  # the other ranks hold zeros in this rank's place, so the sum is exact
    return values.tolist()


def mean_over_ranks(values: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Return the means over the ranks, equal on all of them."""
    return {name: sum(gathered(value.item())) / dist.get_world_size() for name, value in values.items()}


class StepLog:
    """One line of JSON for each step, written by rank 0; lines after the step resumed from are removed."""

    def __init__(self, root: str, resumed: int) -> None:
        self._path = Path(f"{root}.jsonl")
        if dist.get_rank() == 0:
            lines = self._path.read_text().splitlines() if self._path.exists() else []
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text("".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= resumed))

    def write(self, step: int, values: Mapping[str, float], tokens: torch.Tensor) -> None:
        """Write a step's values, and the CRC-32 of each rank's tokens."""
        checksums = gathered(zlib.crc32(tokens.numpy().tobytes()))
        line = {"step": step, **values, "tokens": [int(checksum) for checksum in checksums]}
        if dist.get_rank() == 0:
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")
