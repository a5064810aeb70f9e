from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from tests.distributed.launch import run_ranks

pytestmark = pytest.mark.distributed

WORLD_SIZE = 2
TIMEOUT_S = 240.0
PLUGINS = {
    "ddp": "TorchDDPPlugin()",
    "fsdp": "TorchFSDPPlugin()",
    "hsdp_2x1": "TorchFSDPPlugin(hsdp_shape=(2, 1))",
    "hsdp_1x2": "TorchFSDPPlugin(hsdp_shape=(1, 2), reshard_after_forward=True)",
}

# What a user would write; `llama`, `mlp`, `groups`, `optimizer` and the data below are the same text in the oracle.
SETUP = textwrap.dedent(
    """
    import torch
    from torch import nn
    from transformers import LlamaConfig, LlamaForCausalLM

    def llama():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(
            hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=256, tie_word_embeddings=True))

    class Mlp(nn.Module):  # sizes that two ranks cannot halve
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 5)])
            self.head = nn.Linear(5, 1)
        def forward(self, x):
            for layer in self.layers:
                x = torch.tanh(layer(x))
            return self.head(x)

    def mlp():
        torch.manual_seed(1)
        return Mlp().double()

    def groups(model):
        return [{"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
                {"params": [p for p in model.parameters() if p.ndim <= 1], "lr": 0.02}]

    def batches(num_steps, make):
        generator = torch.Generator().manual_seed(2)
        return [make(generator) for _ in range(num_steps)]

    def tokens(generator):
        return torch.randint(0, 256, (4, 12), generator=generator)

    def points(generator):
        return torch.randn(6, 5, generator=generator, dtype=torch.float64)
    """
)

TRAIN = SETUP + textwrap.dedent(
    """
    import json, sys
    from pathlib import Path
    import torch.distributed as dist
    from safetensors.torch import save_file
    from torch.distributed.tensor import DTensor
    from shardpoint.booster import Booster, DistCoordinator, TorchDDPPlugin, TorchFSDPPlugin

    out, plugins = Path(sys.argv[1]), json.loads(sys.argv[2])
    coordinator = DistCoordinator()
    report = {"initialised_before": dist.is_initialized()}

    def whole(model):
        return {name.removeprefix("module."): (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
                for name, p in model.named_parameters()}

    def mine(batch):
        return batch.chunk(coordinator.world_size)[coordinator.rank]

    def train(booster, model, optimizer, scheduler, data, loss_of):
        held = (optimizer.param_groups[0], optimizer.param_groups[0]["params"])
        boosted = booster.boost(model, optimizer, None, None, scheduler)
        facts = {
            "same_optimizer": boosted[1] is optimizer,
            "same_scheduler": boosted[4] is scheduler,
            "same_group": optimizer.param_groups[0] is held[0] and optimizer.param_groups[0]["params"] is held[1],
            "held_by_model": sorted(id(p) for g in optimizer.param_groups for p in g["params"])
                             == sorted(id(p) for p in boosted[0].parameters()),
            "placements": sorted({str(getattr(p, "placements", None)) for p in boosted[0].parameters()}),
            "mesh": sorted({str(p.device_mesh.mesh.tolist()) for p in boosted[0].parameters()
                            if isinstance(p, DTensor)}),
        }
        for batch in data:
            booster.backward(loss_of(boosted[0], mine(batch)), optimizer)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        facts["lr"] = [g["lr"] for g in optimizer.param_groups]
        return boosted[0], facts

    for name, text in plugins.items():
        booster = Booster(plugin=eval(text))

        model = llama()
        optimizer = torch.optim.SGD(groups(model), lr=0.1, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        model, facts = train(booster, model, optimizer, scheduler, batches(3, tokens),
                             lambda m, ids: m(input_ids=ids, labels=ids).loss)
        inner = getattr(model, "module", model)
        facts["tied"] = inner.lm_head.weight is inner.model.embed_tokens.weight
        weights = whole(model)

        model = mlp()
        optimizer = torch.optim.Adagrad(groups(model), lr=0.1, initial_accumulator_value=0.5)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        model, more = train(booster, model, optimizer, scheduler, batches(3, points), lambda m, x: m(x).square().mean())
        facts = {"llama": facts, "mlp": more}
        weights |= whole(model)

        # ranks that initialised differently are made equal
        torch.manual_seed(100 + coordinator.rank)
        uneven = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        uneven.register_buffer("mark", torch.tensor(
            [coordinator.rank, 7], dtype=torch.int32 if name == "ddp" else torch.int16))  # DDP on gloo refuses int16
        uneven, *_ = booster.boost(uneven)
        weights |= {f"synced.{key}": value for key, value in whole(uneven).items()}
        weights["synced.mark"] = getattr(uneven, "module", uneven).mark.clone()

        # two micro-batches, the first without synchronisation
        model = mlp()
        model, optimizer, *_ = booster.boost(model, torch.optim.SGD(model.parameters(), lr=0.1))
        first, second = batches(2, points)
        with booster.no_sync(model):
            booster.backward(model(mine(first)).square().mean(), optimizer)
        facts["grads_in_no_sync"] = [p.grad is not None for p in model.parameters()]
        for key, p in model.named_parameters():
            if p.grad is not None and not isinstance(p.grad, DTensor):
                weights["local." + key.removeprefix("module.")] = p.grad.clone()
        booster.backward(model(mine(second)).square().mean(), optimizer)
        for key, p in model.named_parameters():
            grad = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
            weights["grad." + key.removeprefix("module.")] = grad.clone()

        save_file({key: value.contiguous() for key, value in weights.items() if key != "lm_head.weight"},
                  out / f"{name}-{coordinator.rank}.safetensors")
        report[name] = facts
    coordinator.block_all()
    coordinator.destroy()
    print(json.dumps(report))
    """
)


def oracle_namespace() -> dict[str, Any]:
    namespace: dict[str, Any] = {}
    exec(SETUP, namespace)  # noqa: S102 - our own text, shared with the ranks
    return namespace


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Train with every plugin on two ranks, once for all tests here."""
    out = tmp_path_factory.mktemp("trained")
    outcomes = run_ranks(TRAIN, WORLD_SIZE, timeout_s=TIMEOUT_S, args=[str(out), json.dumps(PLUGINS)])
    for outcome in outcomes:
        assert outcome.returncode == 0, outcome.stderr
    return out, [outcome.report() for outcome in outcomes]


@pytest.fixture(scope="module")
def oracle() -> dict[str, torch.Tensor]:
    """Train in one process, on the whole batches, with nothing but torch."""
    given = oracle_namespace()
    weights: dict[str, torch.Tensor] = {}
    model = given["llama"]()
    optimizer: torch.optim.Optimizer = torch.optim.SGD(given["groups"](model), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for ids in given["batches"](3, given["tokens"]):
        logits = model(input_ids=ids).logits
        functional.cross_entropy(logits[:, :-1].reshape(-1, 256), ids[:, 1:].reshape(-1)).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    weights |= {name: p.detach() for name, p in model.named_parameters()}

    model = given["mlp"]()
    optimizer = torch.optim.Adagrad(given["groups"](model), lr=0.1, initial_accumulator_value=0.5)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for x in given["batches"](3, given["points"]):
        model(x).square().mean().backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    weights |= {name: p.detach() for name, p in model.named_parameters()}

    model = given["mlp"]()
    for x in given["batches"](2, given["points"]):
        model(x).square().mean().backward()
    weights |= {f"grad.{name}": p.grad for name, p in model.named_parameters()}
    return weights


@pytest.mark.parametrize("plugin", PLUGINS)
def test_training_equals_one_process_on_the_whole_batch(
    plugin: str, trained: tuple[Path, list[dict[str, Any]]], oracle: dict[str, torch.Tensor]
) -> None:
    for rank in range(WORLD_SIZE):
        found = load_file(trained[0] / f"{plugin}-{rank}.safetensors")
        named = {name for name in found if not name.startswith(("synced.", "local."))}
        assert named == set(oracle)
        for name, value in oracle.items():
            exact = value.dtype == torch.float64
            torch.testing.assert_close(
                found[name], value, rtol=1e-12 if exact else 1e-4, atol=1e-13 if exact else 1e-6, msg=f"{plugin} {name}"
            )


@pytest.mark.parametrize("plugin", PLUGINS)
def test_optimizer_scheduler_and_ties_are_preserved(plugin: str, trained: tuple[Path, list[dict[str, Any]]]) -> None:
    for report in trained[1]:
        assert report["initialised_before"] is False, "the plugin joined the ranks by itself"
        assert report[plugin]["llama"]["tied"]
        for facts in (report[plugin]["llama"], report[plugin]["mlp"]):
            kept = ("same_optimizer", "same_scheduler", "same_group", "held_by_model")
            assert [facts[key] for key in kept] == [True] * 4
            assert facts["lr"] == [0.0125, 0.0025]


@pytest.mark.parametrize(
    "plugin, placements, mesh",
    [
        ("ddp", ["None"], []),
        ("fsdp", ["(Shard(dim=0),)"], ["[0, 1]"]),
        ("hsdp_2x1", ["(Replicate(), Shard(dim=0))"], ["[[0], [1]]"]),
        ("hsdp_1x2", ["(Replicate(), Shard(dim=0))"], ["[[0, 1]]"]),
    ],
)
def test_placements(
    plugin: str, placements: list[str], mesh: list[str], trained: tuple[Path, list[dict[str, Any]]]
) -> None:
    for report in trained[1]:
        for facts in (report[plugin]["llama"], report[plugin]["mlp"]):
            assert (facts["placements"], facts["mesh"]) == (placements, mesh)


@pytest.mark.parametrize("plugin", PLUGINS)
def test_ranks_that_initialised_differently_get_the_first_ones_weights(
    plugin: str, trained: tuple[Path, list[dict[str, Any]]]
) -> None:
    torch.manual_seed(100)
    first = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    for rank in range(WORLD_SIZE):
        found = load_file(trained[0] / f"{plugin}-{rank}.safetensors")
        for name, value in first.named_parameters():
            assert torch.equal(found[f"synced.{name}"], value), (rank, name)
        assert found["synced.mark"].tolist() == [0, 7]


@pytest.mark.parametrize("plugin", PLUGINS)
def test_no_sync_keeps_gradients_apart(plugin: str, trained: tuple[Path, list[dict[str, Any]]]) -> None:
    given = oracle_namespace()
    for rank, report in enumerate(trained[1]):
        assert set(report[plugin]["grads_in_no_sync"]) == {plugin == "ddp"}, "FSDP2 keeps them whole, off the shards"
        if plugin == "ddp":
            model = given["mlp"]()
            model(given["batches"](2, given["points"])[0].chunk(WORLD_SIZE)[rank]).square().mean().backward()
            found = load_file(trained[0] / f"{plugin}-{rank}.safetensors")
            for name, parameter in model.named_parameters():
                torch.testing.assert_close(found[f"local.{name}"], parameter.grad, rtol=1e-12, atol=1e-13)


COORDINATE = textwrap.dedent(
    """
    import json, sys
    from pathlib import Path
    import torch.distributed as dist
    from shardpoint.booster import DistCoordinator
    from shardpoint.errors import UsageError

    mark = Path(sys.argv[1]) / "mark"
    coordinator = DistCoordinator()
    rank = coordinator.rank
    report = {"before": [rank, coordinator.world_size, coordinator.local_rank, coordinator.is_master(),
                         coordinator.is_node_master(), coordinator.is_last_process(), dist.is_initialized()]}

    with coordinator.priority_execution(executor_rank=1):  # joins the ranks
        report["saw_the_mark"] = mark.exists()
        mark.write_text("done")

    def attempt(executor, error):
        ran = False
        try:
            with coordinator.priority_execution(executor_rank=executor):
                ran = True
                if rank == executor:
                    raise error
        except BaseException as caught:
            failures = {str(r): f.type for r, f in getattr(caught, "failures", {}).items()}
            return [ran, type(caught).__name__, failures]
        return [ran, None, {}]

    report["raises"] = attempt(0, ValueError("no \\N{SNOWMAN} space left \\ud800" + "x" * 9000))
    coordinator.block_all()
    report["interrupted"] = attempt(1, KeyboardInterrupt())
    coordinator.block_all()
    for _ in range(2):
        with coordinator.priority_execution():
            continue
    coordinator.block_all()

    try:  # whoever follows may fail alone: nobody waits for it
        with coordinator.priority_execution():
            if rank == 1:
                raise RuntimeError("late")
    except RuntimeError as caught:
        report["late"] = str(caught)
    coordinator.block_all()

    group = dist.new_group([1])
    report["group"] = [coordinator.is_master(group), coordinator.is_last_process(group)]
    coordinator.block_all(group)
    coordinator.print_on_master("only the group's master", group)
    try:
        with coordinator.priority_execution(process_group=group):
            report["in_group"] = True
    except UsageError as caught:
        report["in_group"] = str(caught)
    coordinator.destroy(group)
    coordinator.block_all()

    coordinator.destroy()
    print(json.dumps(report))
    """
)


def test_coordinating_two_ranks(tmp_path: Path) -> None:
    zero, one = run_ranks(COORDINATE, WORLD_SIZE, timeout_s=120.0, args=[str(tmp_path)])
    assert (zero.returncode, one.returncode) == (0, 0), zero.stderr + one.stderr
    first, second = zero.report(), one.report()
    assert first["before"] == [0, 2, 0, True, True, False, False]
    assert second["before"] == [1, 2, 1, False, False, True, False]
    assert (first["saw_the_mark"], second["saw_the_mark"]) == (True, False), "the executor, rank 1, went first"
    assert first["raises"] == [True, "ValueError", {}]
    assert second["raises"] == [False, "PeerError", {"0": "ValueError"}]
    assert first["interrupted"] == [False, "PeerError", {"1": "KeyboardInterrupt"}]
    assert second["interrupted"] == [True, "KeyboardInterrupt", {}]
    assert "late" not in first
    assert second["late"] == "late"
    assert (first["group"], second["group"]) == ([False, False], [True, True])
    assert "only the group's master" in one.stdout
    assert "only the group's master" not in zero.stdout
    assert "not in the process_group" in first["in_group"]
    assert second["in_group"] is True


KILLED = textwrap.dedent(
    """
    import os, signal, sys, time
    from pathlib import Path
    from shardpoint.booster import DistCoordinator
    from shardpoint.errors import DistributedError

    arrived = Path(sys.argv[1]) / "arrived"
    coordinator = DistCoordinator()
    coordinator.block_all()
    if coordinator.rank == 1:
        arrived.touch()
    try:
        with coordinator.priority_execution():
            while not arrived.exists():  # not before the other rank is out of the barrier
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
    except DistributedError as caught:
        print(caught, flush=True)
    os._exit(0)  # gloo's threads sometimes abort an ordinary exit after a peer has died
    """
)


def test_the_executor_of_priority_execution_is_killed(tmp_path: Path) -> None:
    zero, one = run_ranks(KILLED, WORLD_SIZE, timeout_s=60.0, args=[str(tmp_path)])
    assert (zero.returncode, one.returncode) == (-9, 0), one.stderr
    assert "rank 0 ended without a word" in one.stdout
