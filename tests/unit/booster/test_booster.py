from __future__ import annotations

import copy
import gc
import inspect
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from shardpoint.booster import Booster, TorchDDPPlugin, TorchFSDPPlugin
from shardpoint.booster import booster as booster_module
from shardpoint.errors import NotFoundError, UsageError

MIB = 1024 * 1024


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def decay_groups(model: nn.Module) -> list[dict[str, Any]]:
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    return [{"params": weights, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]


PLUGINS = [lambda: None, TorchDDPPlugin, TorchFSDPPlugin, lambda: TorchFSDPPlugin(hsdp_shape=(1, 1))]
PLUGIN_IDS = ["none", "ddp", "fsdp", "hsdp"]


# ---- boost


@pytest.mark.parametrize("make_plugin", PLUGINS, ids=PLUGIN_IDS)
def test_the_optimizer_and_its_scheduler_follow_the_model(make_plugin: Callable[[], Any]) -> None:
    model = mlp()
    oracle = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(decay_groups(model), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    groups, lists = list(optimizer.param_groups), [group["params"] for group in optimizer.param_groups]
    criterion, loader = nn.MSELoss(), object()

    booster = Booster(plugin=make_plugin())
    boosted = booster.boost(model, optimizer, criterion, loader, scheduler)

    assert isinstance(boosted, list)
    assert boosted[1:] == [optimizer, criterion, loader, scheduler]
    assert all(a is b for a, b in zip(boosted[1:], [optimizer, criterion, loader, scheduler], strict=True))
    assert all(a is b for a, b in zip(optimizer.param_groups, groups, strict=True))
    assert all(a["params"] is b for a, b in zip(optimizer.param_groups, lists, strict=True))
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in boosted[0].parameters())
    assert booster.model_of(optimizer) is boosted[0]

    oracle_optimizer = torch.optim.AdamW(decay_groups(oracle), lr=0.1)
    oracle_scheduler = torch.optim.lr_scheduler.StepLR(oracle_optimizer, step_size=1, gamma=0.5)
    x, y = torch.randn(6, 5), torch.randn(6, 3)
    for _ in range(3):
        booster.backward(criterion(boosted[0](x), y), optimizer)
        functional.mse_loss(oracle(x), y).backward()
        for one, schedule in ((optimizer, scheduler), (oracle_optimizer, oracle_scheduler)):
            one.step()
            schedule.step()
            one.zero_grad()
    assert [group["lr"] for group in optimizer.param_groups] == [0.0125, 0.0125]
    for mine, theirs in zip(boosted[0].parameters(), oracle.parameters(), strict=True):
        full = mine.full_tensor() if isinstance(mine, DTensor) else mine
        torch.testing.assert_close(full, theirs, rtol=1e-6, atol=1e-7)


def test_nothing_but_a_model_is_needed() -> None:
    model = mlp()
    assert Booster().boost(model) == [model, None, None, None, None]


def test_tied_weights_stay_tied(llama: Callable[..., nn.Module]) -> None:
    model = llama(tied=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    num_parameters = len(list(model.parameters()))
    booster = Booster(plugin=TorchFSDPPlugin())
    boosted, *_ = booster.boost(model, optimizer)
    assert boosted.lm_head.weight is boosted.model.embed_tokens.weight
    assert len(list(boosted.parameters())) == num_parameters
    before = boosted.lm_head.weight.full_tensor().clone()
    ids = torch.arange(8).reshape(1, 8)
    booster.backward(boosted(input_ids=ids, labels=ids).loss, optimizer)
    optimizer.step()
    assert boosted.lm_head.weight is boosted.model.embed_tokens.weight
    assert not torch.equal(boosted.lm_head.weight.full_tensor(), before)


def test_initial_state_is_sharded_along() -> None:
    model = mlp()
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1, initial_accumulator_value=0.25)
    steps = [optimizer.state[p]["step"] for p in model.parameters()]
    Booster(plugin=TorchFSDPPlugin()).boost(model, optimizer)
    assert set(optimizer.state) == set(model.parameters())
    for parameter, step in zip(model.parameters(), steps, strict=True):
        state = optimizer.state[parameter]
        assert state["step"] is step
        assert isinstance(state["sum"], DTensor)
        assert isinstance(parameter, DTensor)
        assert state["sum"].placements == parameter.placements
        assert torch.equal(state["sum"].full_tensor(), torch.full(parameter.shape, 0.25))


def test_state_of_earlier_steps_is_sharded_along() -> None:
    model, x = mlp(), torch.ones(2, 5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, amsgrad=True)
    model(x).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    oracle = copy.deepcopy(model)
    oracle_optimizer = torch.optim.AdamW(oracle.parameters(), lr=0.1, amsgrad=True)
    oracle_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    booster = Booster(plugin=TorchFSDPPlugin())
    booster.boost(model, optimizer)
    booster.backward(model(2 * x).square().sum(), optimizer)
    optimizer.step()
    oracle(2 * x).square().sum().backward()
    oracle_optimizer.step()
    for mine, theirs in zip(model.parameters(), oracle.parameters(), strict=True):
        assert isinstance(mine, DTensor)
        torch.testing.assert_close(mine.full_tensor(), theirs, rtol=0, atol=0)


def test_state_of_another_shape_is_refused_and_nothing_changes() -> None:
    model = mlp()
    optimizer = torch.optim.Adafactor(model.parameters())
    model(torch.ones(2, 5)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    held = list(optimizer.param_groups[0]["params"])
    with pytest.raises(UsageError, match=r"'row_var' of 0.weight has shape \[7, 1\]"):
        Booster(plugin=TorchFSDPPlugin()).boost(model, optimizer)
    assert all(a is b for a, b in zip(optimizer.param_groups[0]["params"], held, strict=True))
    assert all(a is b for a, b in zip(model.parameters(), held, strict=True))


@pytest.mark.parametrize("make_plugin", PLUGINS, ids=PLUGIN_IDS)
def test_a_parameter_of_another_model_is_refused(make_plugin: Callable[[], Any]) -> None:
    model, stranger = mlp(), nn.Parameter(torch.ones(2, 2))
    groups = [{"params": list(model.parameters())}, {"params": [stranger]}]
    with pytest.raises(UsageError, match=r"parameter 0 of the optimizer's group 1 \(shape \[2, 2\]\)"):
        Booster(plugin=make_plugin()).boost(model, torch.optim.SGD(groups, lr=0.1))
    assert not any(isinstance(p, DTensor) for p in model.parameters())


def test_a_frozen_parameter_may_be_in_the_optimizer_and_a_trained_one_may_be_missing() -> None:
    model = mlp()
    model[0].weight.requires_grad_(requires_grad=False)  # type: ignore[index]
    optimizer = torch.optim.SGD([model[0].weight, model[2].bias], lr=0.1)  # type: ignore[index]
    Booster(plugin=TorchFSDPPlugin()).boost(model, optimizer)
    assert optimizer.param_groups[0]["params"][0] is model[0].weight  # type: ignore[index]
    assert optimizer.param_groups[0]["params"][1] is model[2].bias  # type: ignore[index]
    assert not model[0].weight.requires_grad  # type: ignore[index]


def test_an_optimizer_around_another_is_refused() -> None:
    class Lookahead(torch.optim.SGD):
        def __init__(self, inner: torch.optim.Optimizer, parameters: Any) -> None:
            super().__init__(parameters, lr=0.1)
            self.inner = inner

    model = mlp()
    optimizer = Lookahead(torch.optim.AdamW(model.parameters()), model.parameters())
    with pytest.raises(UsageError, match=r"AdamW.*'inner'"):
        Booster(plugin=TorchFSDPPlugin()).boost(model, optimizer)


def test_lbfgs_keeps_its_own_reference_to_the_list() -> None:
    model = mlp()
    optimizer = torch.optim.LBFGS(model.parameters())
    Booster(plugin=TorchFSDPPlugin()).boost(model, optimizer)
    assert all(isinstance(p, DTensor) for p in optimizer._params)


def test_a_second_optimizer_joins_by_a_second_call_even_while_the_root_is_unsharded() -> None:
    booster = Booster(plugin=TorchFSDPPlugin())
    model, *_ = booster.boost(mlp())
    first = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.no_grad():
        model(torch.ones(1, 5))  # leaves the root unsharded: other parameter objects
    booster.boost(model, first)
    assert booster.model_of(first) is model
    with torch.no_grad():
        model(torch.ones(1, 5))
    late = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(UsageError, match="is not a parameter of the model"):
        booster.boost(model, late)


def test_kinds_are_checked() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    other = torch.optim.lr_scheduler.StepLR(torch.optim.SGD(model.parameters(), lr=0.1), 1)
    booster = Booster()
    for arguments in ((lambda x: x,), (model, object()), (model, optimizer, None, None, other)):
        with pytest.raises(UsageError):
            booster.boost(*arguments)
    with pytest.raises(UsageError, match="plugin"):
        Booster(plugin="ddp")  # type: ignore[arg-type]


def test_the_booster_keeps_neither_model_nor_optimizer_alive() -> None:
    booster, model = Booster(), mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(UsageError, match="boost it first"):
        booster.model_of(optimizer)
    with pytest.raises(UsageError, match="boost it first"):
        booster.backward(torch.ones((), requires_grad=True), optimizer)
    booster.boost(model, optimizer)
    assert booster.model_of(optimizer) is model
    with pytest.raises(UsageError, match="boost it first"):
        Booster().model_of(optimizer)
    del model
    gc.collect()
    with pytest.raises(UsageError, match="keep the model"):
        booster.model_of(optimizer)
    del optimizer
    gc.collect()
    assert not booster._models


def test_the_device_moves_model_and_state() -> None:
    model = mlp()
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
    Booster(device="meta").boost(model, optimizer)
    assert all(p.is_meta for p in model.parameters())
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in model.parameters()}
    assert all(optimizer.state[p]["sum"].is_meta for p in model.parameters())


# ---- no_sync


def test_no_sync_finds_the_model() -> None:
    booster = Booster(plugin=TorchDDPPlugin())
    first = mlp()
    one, optimizer, *_ = booster.boost(first, torch.optim.SGD(first.parameters(), lr=0.1))
    for context in (booster.no_sync(one), booster.no_sync(optimizer=optimizer), booster.no_sync()):
        with context:
            assert one.require_backward_grad_sync is False
        assert one.require_backward_grad_sync is True
    second = mlp()
    other = booster.boost(second, torch.optim.SGD(second.parameters(), lr=0.1))
    with pytest.raises(UsageError, match="2 models"):
        booster.no_sync()
    del other
    with Booster().no_sync():
        pass


def test_no_sync_of_fsdp_nests_and_survives_errors() -> None:
    booster = Booster(plugin=TorchFSDPPlugin())
    model = mlp()
    _, optimizer, *_ = booster.boost(model, torch.optim.SGD(model.parameters(), lr=0.1))
    x = torch.ones(2, 5)
    with booster.no_sync(model):
        with pytest.raises(ZeroDivisionError), booster.no_sync(model):
            raise ZeroDivisionError
        booster.backward(model(x).sum(), optimizer)
        assert all(p.grad is None for group in optimizer.param_groups for p in group["params"])
    booster.backward(model(x).sum(), optimizer)
    oracle = mlp()
    (2 * oracle(x).sum()).backward()
    for mine, theirs in zip(model.parameters(), oracle.parameters(), strict=True):
        assert isinstance(mine.grad, DTensor)
        torch.testing.assert_close(mine.grad.full_tensor(), theirs.grad)


# ---- mixed precision


@pytest.mark.parametrize("make_plugin", [lambda: None, TorchDDPPlugin], ids=["none", "ddp"])
def test_bf16_runs_forward_and_criterion_under_autocast(make_plugin: Callable[[], Any]) -> None:
    seen: list[torch.dtype] = []

    def criterion(out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Measure."""
        seen.append(out.dtype)
        return functional.mse_loss(out, target)

    bare = mlp()
    booster = Booster(mixed_precision="bf16", plugin=make_plugin())
    optimizer = torch.optim.SGD(bare.parameters(), lr=0.1)
    model, _, measured, *_ = booster.boost(bare, optimizer, criterion)
    loss = measured(model(torch.ones(2, 5)), torch.ones(2, 3))
    booster.backward(loss, optimizer)
    assert seen == [torch.bfloat16]
    assert loss.dtype == torch.float32, "autocast computes losses in float32"
    assert measured.__doc__ == "Measure."
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    names = [name.removeprefix("module.") for name, _ in model.named_parameters()]
    assert names == [name for name, _ in mlp().named_parameters()]
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    assert type(inner) is nn.Sequential


def test_a_copy_of_a_bf16_model_computes_with_its_own_weights(llama: Callable[..., nn.Module]) -> None:
    plain = llama()
    signature = inspect.signature(plain.forward)
    model, *_ = Booster(mixed_precision="bf16").boost(plain)
    Booster(mixed_precision="bf16").boost(model)
    assert inspect.signature(model.forward) == signature
    ids = torch.arange(6).reshape(1, 6)
    before = model(input_ids=ids).logits
    assert before.dtype == torch.bfloat16
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        assert torch.count_nonzero(twin(input_ids=ids).logits) == 0
        assert torch.equal(model(input_ids=ids).logits, before)


def test_a_criterion_module_is_changed_in_place() -> None:
    criterion = nn.CrossEntropyLoss()
    _, _, boosted, *_ = Booster(mixed_precision="bf16").boost(mlp(), None, criterion)
    assert boosted is criterion
    loss = criterion(torch.zeros(2, 3, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.long))
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("given", ["fp8", torch.bfloat16])
def test_other_precisions_are_refused(given: Any) -> None:
    with pytest.raises(UsageError, match="neither"):
        Booster(mixed_precision=given)


def test_precision_belongs_to_fsdp() -> None:
    with pytest.raises(UsageError, match=r"TorchFSDPPlugin\(mixed_precision='bf16'\)"):
        Booster(mixed_precision="bf16", plugin=TorchFSDPPlugin())


# ---- LoRA


def test_new_adapters_train_under_fsdp(llama: Callable[..., nn.Module]) -> None:
    from peft import LoraConfig, PeftModel

    booster = Booster(plugin=TorchFSDPPlugin())
    bare = llama()
    bare.bfloat16()
    model = booster.enable_lora(bare, lora_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    assert isinstance(model, PeftModel)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1)
    model, *_ = booster.boost(model, optimizer)
    ids = torch.arange(8).reshape(1, 8)
    booster.backward(model(input_ids=ids, labels=ids).loss, optimizer)
    optimizer.step()
    held = {id(p) for p in optimizer.param_groups[0]["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}
    assert any(torch.count_nonzero(p.full_tensor()) for n, p in model.named_parameters() if "lora_B" in n)


def test_saved_adapters_go_on(llama: Callable[..., nn.Module], tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    saved = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj"]))
    with torch.no_grad():
        for name, parameter in saved.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.5)
    saved.save_pretrained(tmp_path)
    model = Booster().enable_lora(llama(), pretrained_dir=str(tmp_path))
    adapters = {n: p for n, p in model.named_parameters() if "lora_" in n}
    assert adapters
    assert all(p.requires_grad for p in adapters.values())
    assert all(torch.equal(p, torch.full_like(p, 0.5)) for n, p in adapters.items() if "lora_B" in n)


def test_lora_arguments(llama: Callable[..., nn.Module], tmp_path: Path) -> None:
    from peft import LoraConfig

    booster, config = Booster(plugin=TorchFSDPPlugin()), LoraConfig(r=2, target_modules=["q_proj"])
    with pytest.raises(UsageError, match="give lora_config"):
        booster.enable_lora(llama())
    with pytest.raises(UsageError, match="give lora_config"):
        booster.enable_lora(llama(), str(tmp_path), config)
    with pytest.raises(UsageError, match="not a peft config"):
        booster.enable_lora(llama(), lora_config={"r": 2})
    with pytest.raises(NotFoundError, match="no adapter"):
        booster.enable_lora(llama(), pretrained_dir=str(tmp_path))
    with pytest.raises(NotFoundError, match="no adapter"):
        booster.enable_lora(llama(), pretrained_dir="./missing/adapter")
    for quantised in ({"quantize": True}, {"bnb_quantization_config": object()}):
        with pytest.raises(UsageError, match="quantised"):
            booster.enable_lora(llama(), lora_config=config, **quantised)
    boosted, *_ = booster.boost(llama())
    with pytest.raises(UsageError, match="before boost"):
        booster.enable_lora(boosted, lora_config=config)
    with pytest.raises(UsageError, match="no adapters"):
        booster.save_lora_as_pretrained(boosted, str(tmp_path))


# ---- saving and loading: what reaches the engine


class Engine:
    """Notes which function of the engine was called with what."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        def note(*args: Any, **kwargs: Any) -> str:
            self.calls.append((name, args, kwargs))
            return "evidence"

        return note


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    made = Engine()
    monkeypatch.setattr(booster_module, "engine", made)
    return made


@pytest.fixture
def boosted() -> tuple[Booster, nn.Module, torch.optim.Optimizer]:
    booster, model = Booster(), mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    booster.boost(model, optimizer)
    return booster, model, optimizer


Boosted = tuple[Booster, nn.Module, torch.optim.Optimizer]


def test_saving_and_loading_reach_the_engine(engine: Engine, boosted: Boosted, tmp_path: Path) -> None:
    booster, model, optimizer = boosted
    scheduler, place = object(), tmp_path / "x"
    results = [
        booster.save_model(model, str(place), True, True, "v1", 2, True, False),  # type: ignore[func-returns-value]
        booster.save_model(model, place),  # type: ignore[func-returns-value]
        booster.load_model(model, place, False, low_cpu_mem_mode=False, num_threads=4),  # type: ignore[func-returns-value]
        booster.save_optimizer(optimizer, place, shard=True, size_per_shard=0.5),  # type: ignore[func-returns-value, arg-type]
        booster.save_optimizer(optimizer, place),  # type: ignore[func-returns-value]
        booster.load_optimizer(optimizer, place),  # type: ignore[func-returns-value]
        booster.save_lr_scheduler(scheduler, place),  # type: ignore[func-returns-value]
        booster.load_lr_scheduler(scheduler, place),  # type: ignore[func-returns-value]
    ]
    assert results == [None] * 8
    for _, _, kwargs in engine.calls:
        assert kwargs.pop("comm").world_size == 1
    assert engine.calls == [
        ("save_model_directory", (model, place), {"max_file_bytes": 2 * MIB, "variant": "v1"}),
        ("save_model_file", (model, place), {}),
        ("load_model", (model, place), {"strict": False}),
        ("save_optimizer_directory", (optimizer, model, place), {"max_file_bytes": MIB // 2, "variant": None}),
        ("save_optimizer_file", (optimizer, model, place), {}),
        ("load_optimizer", (optimizer, model, place), {}),
        ("save_lr_scheduler", (scheduler, place), {}),
        ("load_lr_scheduler", (scheduler, place), {}),
    ]


def test_adapters_reach_the_engine(engine: Engine, llama: Callable[..., nn.Module], tmp_path: Path) -> None:
    from peft import LoraConfig

    booster = Booster()
    model = booster.enable_lora(llama(), lora_config=LoraConfig(r=2, target_modules=["q_proj"]))
    booster.save_lora_as_pretrained(model, tmp_path)
    name, args, kwargs = engine.calls[0]
    assert (name, args, set(kwargs)) == ("save_adapter_directory", (model, tmp_path), {"comm"})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"use_async": True}, "use_async"),
        ({"gather_dtensor": False}, "gather_dtensor"),
        ({"shard": True, "size_per_shard": 0}, "size_per_shard"),
        ({"shard": True, "size_per_shard": -1}, "size_per_shard"),
        ({"shard": True, "size_per_shard": True}, "size_per_shard"),
        ({"shard": True, "size_per_shard": float("nan")}, "size_per_shard"),
        ({"shard": True, "size_per_shard": float("inf")}, "size_per_shard"),
        ({"shard": True, "size_per_shard": "1GB"}, "size_per_shard"),
        ({"prefix": "v1"}, "prefix"),
        ({"shard": True, "prefix": "../v1"}, "prefix"),
        ({"shard": True, "prefix": ""}, "prefix"),
    ],
)
@pytest.mark.parametrize("kind", ["model", "optimizer"])
def test_options_without_meaning_are_errors(
    kind: str, options: dict[str, Any], message: str, engine: Engine, boosted: Boosted
) -> None:
    booster, model, optimizer = boosted
    save: Callable[..., None] = booster.save_model if kind == "model" else booster.save_optimizer
    with pytest.raises(UsageError, match=message):
        save(model if kind == "model" else optimizer, "x", **options)
    assert not engine.calls


@pytest.mark.parametrize("name", ["m.bin", "m.pt", "m.pth", "m.pkl"])
def test_a_name_that_promises_a_pickle_is_refused(name: str, engine: Engine, boosted: Boosted) -> None:
    booster, model, optimizer = boosted
    with pytest.raises(UsageError, match=r"name it \*\.safetensors"):
        booster.save_model(model, name)
    with pytest.raises(UsageError, match=r"name it \*\.safetensors"):
        booster.save_optimizer(optimizer, name)
    with pytest.raises(UsageError, match=r"name it \*\.json"):
        booster.save_lr_scheduler(object(), name)
    assert not engine.calls


def test_paths_and_unknown_optimizers(engine: Engine, boosted: Boosted) -> None:
    booster, model, _ = boosted
    with pytest.raises(UsageError, match="empty path"):
        booster.save_model(model, "")
    with pytest.raises(UsageError, match="not a path"):
        booster.load_model(model, 7)  # type: ignore[arg-type]
    stranger = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(UsageError, match="boost it first"):
        booster.save_optimizer(stranger, "x.safetensors")
    with pytest.raises(UsageError, match="boost it first"):
        booster.load_optimizer(stranger, "x.safetensors")
    assert not engine.calls


def test_the_signatures_are_the_originals() -> None:
    expected = {
        "boost": "model optimizer criterion dataloader lr_scheduler",
        "backward": "loss optimizer",
        "no_sync": "model optimizer",
        "enable_lora": "model pretrained_dir lora_config bnb_quantization_config quantize",
        "save_lora_as_pretrained": "model checkpoint use_safetensors",
        "save_model": "model checkpoint shard gather_dtensor prefix size_per_shard use_safetensors use_async",
        "load_model": "model checkpoint strict low_cpu_mem_mode num_threads",
        "save_optimizer": "optimizer checkpoint shard gather_dtensor prefix size_per_shard use_async",
        "load_optimizer": "optimizer checkpoint low_cpu_mem_mode num_threads",
        "save_lr_scheduler": "lr_scheduler checkpoint",
        "load_lr_scheduler": "lr_scheduler checkpoint",
    }
    for method, names in expected.items():
        parameters = list(inspect.signature(getattr(Booster, method)).parameters)
        assert parameters == ["self", *names.split()], method
