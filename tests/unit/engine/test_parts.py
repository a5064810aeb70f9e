"""Do single parts (a model, an optimizer, a scheduler, an adapter) round trip as directories and as files?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from shardpoint import Booster, Checkpointer, TrainState
from shardpoint.adapters.lora import base_model
from shardpoint.errors import (
    AlreadyExistsError,
    ChecksumError,
    ManifestError,
    MismatchError,
    NotFoundError,
    TruncatedError,
    UsageError,
)
from tests.training import bits, flip, net, on_disk, optimizer_state, same_bits, train, weights

MIB = 2**20


def llama(seed: int = 0, *, tied: bool = True, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).to(dtype)


def opened(path: Path) -> Any:
    """Open a directory as transformers does, with no name missing or left over."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    return model


def boosted(seed: int) -> tuple[Booster, nn.Module, torch.optim.Optimizer]:
    booster = Booster()
    model = net(seed)
    model, optimizer, *_ = booster.boost(model, torch.optim.AdamW(model.parameters(), lr=0.05))
    return booster, model, optimizer


@pytest.mark.parametrize("shard", [True, False], ids=["directory", "file"])
def test_model_and_optimizer_round_trip(shard: bool, tmp_path: Path) -> None:
    booster, model, optimizer = boosted(0)
    train(model, optimizer, range(3))
    booster.save_model(model, tmp_path / "model", shard=shard)
    booster.save_optimizer(optimizer, tmp_path / "optimizer", shard=shard)
    expected = weights(model), optimizer_state(model, optimizer), train(model, optimizer, range(3, 6))
    other_booster, other, other_optimizer = boosted(4)
    other_booster.load_model(other, tmp_path / "model")
    other_booster.load_optimizer(other_optimizer, tmp_path / "optimizer")
    assert same_bits(weights(other), expected[0])
    assert same_bits(optimizer_state(other, other_optimizer), expected[1])
    assert train(other, other_optimizer, range(3, 6)) == expected[2]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".shardpoint", "model", "optimizer"]
    booster.save_model(model, tmp_path / "model", shard=shard)  # over the one that is there
    other_booster.load_model(other, tmp_path / "model")
    assert same_bits(weights(other), weights(model))


def test_parts_of_a_training_checkpoint(tmp_path: Path) -> None:
    booster, model, optimizer = boosted(0)
    train(model, optimizer, range(2))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(TrainState(model=model, optimizer=optimizer), epoch=0, step=2, batch_size=1)
        checkpointer.save({"actor": TrainState(model=model)}, epoch=0, step=3, batch_size=1)
    for path in ("epoch-0_step-2/modeling", "epoch-0_step-2", "epoch-0_step-3/actor/modeling"):
        other_booster, other, other_optimizer = boosted(4)
        other_booster.load_model(other, tmp_path / path)
        assert same_bits(weights(other), weights(model))
    for path in ("epoch-0_step-2/optimizer", "epoch-0_step-2"):
        other_booster.load_optimizer(other_optimizer, tmp_path / path)
        assert same_bits(optimizer_state(other, other_optimizer), optimizer_state(model, optimizer))
    with pytest.raises(MismatchError):
        other_booster.load_optimizer(other_optimizer, tmp_path / "epoch-0_step-3")
    flip(tmp_path / "epoch-0_step-2" / "modeling" / "model-00001-of-00001.safetensors")
    with pytest.raises(ChecksumError):
        booster.load_model(model, tmp_path / "epoch-0_step-2" / "modeling")


def test_lr_schedulers(tmp_path: Path) -> None:
    booster, model, optimizer = boosted(0)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 3, 3])
    optimizer.step()
    scheduler.step()
    booster.save_lr_scheduler(scheduler, tmp_path / "lr_scheduler")
    other = torch.optim.lr_scheduler.MultiStepLR(torch.optim.SGD(model.parameters(), lr=0.1), [9])
    booster.load_lr_scheduler(other, tmp_path / "lr_scheduler")
    assert other.state_dict() == scheduler.state_dict()
    assert type(other.milestones) is type(scheduler.milestones)
    another = torch.optim.lr_scheduler.StepLR(torch.optim.SGD(model.parameters(), lr=0.1), 9)
    before = another.state_dict()
    with pytest.raises(MismatchError, match="the state of MultiStepLR, the target is StepLR"):
        booster.load_lr_scheduler(another, tmp_path / "lr_scheduler")
    assert another.state_dict() == before
    (tmp_path / "lr_scheduler").write_bytes(b"[")
    with pytest.raises(ManifestError):
        booster.load_lr_scheduler(other, tmp_path / "lr_scheduler")
    with pytest.raises(NotFoundError):
        booster.load_lr_scheduler(other, tmp_path / "nothing")


def test_not_strict_loads_what_both_have(tmp_path: Path) -> None:
    one, two = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2))
    two.add_module("new", nn.Linear(3, 3))
    booster = Booster()
    booster.save_model(one, tmp_path / "m", shard=True)
    before = weights(two)
    with pytest.raises(MismatchError) as caught:
        booster.load_model(two, tmp_path / "m")
    assert caught.value.missing == [": new.weight", ": new.bias"]
    assert caught.value.unexpected == [": 1.weight", ": 1.bias"]
    assert same_bits(weights(two), before)
    booster.load_model(two, tmp_path / "m", strict=False)
    after = weights(two)
    assert bits(after["0.weight"]) == bits(weights(one)["0.weight"])
    assert bits(after["new.weight"]) == bits(before["new.weight"])
    two[0] = nn.Linear(2, 3)
    with pytest.raises(MismatchError, match=r"0\.weight"):
        booster.load_model(two, tmp_path / "m", strict=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_directory_opens_with_transformers(tied: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    model = llama(tied=tied, dtype=dtype)
    model.config.quantization_config = {"quant_method": "gguf"}
    Booster().save_model(model, tmp_path / "m", shard=True, size_per_shard=1)
    again = opened(tmp_path / "m")
    assert same_bits(weights(again), weights(model))
    assert type(again) is type(model)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert (config["architectures"], config["dtype"]) == (["LlamaForCausalLM"], str(dtype).removeprefix("torch."))
    assert "quantization_config" not in config
    assert model.config.quantization_config == {"quant_method": "gguf"}
    assert ("lm_head.weight" in on_disk(tmp_path / "m")) is not tied


def test_large_models_are_cut_into_files(tmp_path: Path) -> None:
    model = nn.Sequential(*[nn.Linear(400, 400) for _ in range(4)])  # 0.6 MiB each
    Booster().save_model(model, tmp_path / "m", shard=True, size_per_shard=1)
    files = sorted(path.name for path in (tmp_path / "m").glob("*.safetensors"))
    assert files == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    assert len(files) >= 3
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in model.parameters())
    assert same_bits(on_disk(tmp_path / "m"), weights(model))


@pytest.mark.parametrize("max_shard_size", ["20KB", "5GB"])
def test_a_plain_hugging_face_directory_loads(max_shard_size: str, tmp_path: Path) -> None:
    model, other = llama(0), llama(1)
    model.save_pretrained(tmp_path / "plain", max_shard_size=max_shard_size)
    Booster().load_model(other, tmp_path / "plain")
    assert same_bits(weights(other), weights(model))
    files = sorted((tmp_path / "plain").glob("*.safetensors"))
    files[0].unlink()
    with pytest.raises((TruncatedError, NotFoundError)):
        Booster().load_model(other, tmp_path / "plain")


def test_a_plain_file_loads(tmp_path: Path) -> None:
    one, two = nn.Linear(3, 2), nn.Linear(3, 2)
    save_file(one.state_dict(), tmp_path / "w.safetensors")
    Booster().load_model(two, tmp_path / "w.safetensors")
    assert same_bits(weights(one), weights(two))
    save_file(one.state_dict(), tmp_path / "o.safetensors", {"shardpoint_states": "[1]"})
    with pytest.raises(ManifestError, match=r"o\.safetensors"):
        Booster().load_model(two, tmp_path / "o.safetensors")


def test_places(tmp_path: Path) -> None:
    booster = Booster()
    model = nn.Linear(2, 2)
    (tmp_path / "theirs").mkdir()
    with pytest.raises(AlreadyExistsError):
        booster.save_model(model, tmp_path / "theirs", shard=True)
    with pytest.raises(NotFoundError):
        booster.load_model(model, tmp_path / "nothing")
    with pytest.raises(NotFoundError):
        booster.load_model(model, tmp_path / "theirs")


def test_tokenizer_files_go_along(tmp_path: Path) -> None:
    class Tokenizer:
        def save_pretrained(self, directory: str) -> None:
            (Path(directory) / "tokenizer.json").write_text("{}")
            (Path(directory) / "config.json").write_text("never over the model's")

    source = tmp_path / "source"
    llama(0).save_pretrained(source)
    (source / "tokenizer_config.json").write_text('{"from": "disk"}')
    model = opened(source)
    with Checkpointer(tmp_path / "root") as checkpointer:
        checkpointer.save(TrainState(model=model), epoch=0, step=1, batch_size=1)
        state = TrainState(model=model, tokenizer=Tokenizer())
        checkpointer.save(state, epoch=0, step=2, batch_size=1)
        with pytest.raises(UsageError, match="save_pretrained"):
            checkpointer.save(TrainState(model=model, tokenizer=object()), epoch=0, step=3, batch_size=1)
    first, second = (tmp_path / "root" / f"epoch-0_step-{number}" / "modeling" for number in (1, 2))
    assert (first / "tokenizer_config.json").read_text() == '{"from": "disk"}'
    assert (second / "tokenizer.json").read_text() == "{}"
    assert json.loads((second / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


# ---- adapters


def adapted(seed: int, modules_to_save: list[str] | None = None) -> Any:
    from peft import LoraConfig, get_peft_model

    model = llama(seed, tied=False)
    config = LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", modules_to_save=modules_to_save
    )
    model = get_peft_model(model, config)
    torch.manual_seed(seed + 50)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("modules_to_save", [None, ["lm_head"]], ids=["lora", "with_head"])
def test_adapters_stand_beside_a_plain_model(modules_to_save: list[str] | None, tmp_path: Path) -> None:
    from peft import PeftModel

    model = adapted(0, modules_to_save)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    state = TrainState(model=model, optimizer=optimizer)
    ids = torch.arange(8).reshape(1, 8)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    model.eval()
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(state, epoch=0, step=1, batch_size=1)
        directory = tmp_path / "epoch-0_step-1"
        plain = opened(directory / "modeling")
        assert type(plain).__name__ == "LlamaForCausalLM"
        untouched = {
            k: v for k, v in weights(llama(0, tied=False)).items() if k != "lm_head.weight" or not modules_to_save
        }
        assert same_bits({k: v for k, v in weights(plain).items() if k in untouched}, untouched)
        assert not (directory / "modeling" / "adapter_config.json").exists()
        again = PeftModel.from_pretrained(plain, str(directory / "adapter" / "default"))
        again.eval()
        trained = {k: v for k, v in weights(model).items() if "lora_" in k or "modules_to_save" in k}
        assert same_bits({k: v for k, v in weights(again).items() if k in trained}, trained)
        assert bits(again(input_ids=ids).logits) == bits(model(input_ids=ids).logits)

        other = adapted(7, modules_to_save)
        other_optimizer = torch.optim.AdamW([p for p in other.parameters() if p.requires_grad], lr=0.3)
        checkpointer.resume(TrainState(model=other, optimizer=other_optimizer))
        assert same_bits(weights(other), weights(model))
        assert same_bits(optimizer_state(other, other_optimizer), optimizer_state(model, optimizer))
        with pytest.raises(MismatchError) as caught:
            checkpointer.resume(TrainState(model=llama(0, tied=False)))
        assert any("adapter/default" in name and "lora_A" in name for name in caught.value.unexpected)
    Booster().save_lora_as_pretrained(model, tmp_path / "alone")
    alone = PeftModel.from_pretrained(opened(directory / "modeling"), str(tmp_path / "alone"))
    assert same_bits({k: v for k, v in weights(alone).items() if k in trained}, trained)
    assert base_model(model) is model.get_base_model()


def adapter_config(kind: str) -> Any:
    from peft import LoraConfig, VeraConfig

    if kind == "vera":
        return VeraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    more: dict[str, dict[str, Any]] = {
        "dora": {"use_dora": True},
        "embeddings": {"modules_to_save": ["embed_tokens"]},
        "two": {},
        "tied": {"modules_to_save": ["lm_head"], "ensure_weight_tying": True},
        "tied_tokens": {"trainable_token_indices": {"embed_tokens": [1, 5]}},
    }
    return LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **more[kind])


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("kind", ["dora", "embeddings", "two", "vera", "tied", "tied_tokens"])
def test_every_kind_of_adapter_goes_on_and_opens_with_peft(kind: str, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    def made(seed: int) -> tuple[Any, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        model: Any = get_peft_model(
            llama(seed, tied=kind in ("embeddings", "tied", "tied_tokens")), adapter_config(kind)
        )
        if kind == "two":
            model.add_adapter("other", LoraConfig(r=3, target_modules=["v_proj"], task_type="CAUSAL_LM"))
            model.set_adapter("default")
        return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)

    def steps(model: Any, optimizer: torch.optim.Optimizer, numbers: range) -> list[float]:
        losses = []
        for number in numbers:
            ids = torch.randint(0, 32, (2, 8), generator=torch.Generator().manual_seed(number))
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    model, optimizer = made(0)
    steps(model, optimizer, range(2))
    at_save = {}
    for adapter in [*model.peft_config][::-1]:  # the last one is that which is trained
        model.set_adapter(adapter)
        at_save[adapter] = model.eval()(input_ids=torch.arange(8).reshape(1, 8)).logits.detach()
    model.train()
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(TrainState(model=model, optimizer=optimizer), epoch=0, step=2, batch_size=1)
        expected, whole = weights(model), steps(model, optimizer, range(2, 5))
        other, other_optimizer = made(3)
        checkpointer.resume(TrainState(model=other, optimizer=other_optimizer))
    assert same_bits(weights(other), expected)
    assert steps(other, other_optimizer, range(2, 5)) == whole
    directory = tmp_path / "epoch-0_step-2"
    if kind.startswith("tied"):
        model.save_pretrained(tmp_path / "peft")
        assert on_disk(directory / "adapter" / "default").keys() == on_disk(tmp_path / "peft").keys()
        assert "lm_head.weight" not in on_disk(directory / "modeling")
    for adapter in other.peft_config:
        plain = PeftModel.from_pretrained(opened(directory / "modeling"), str(directory / "adapter" / adapter))
        held = {k.replace(f".{adapter}", ".default"): v for k, v in expected.items() if f".{adapter}" in k}
        assert held
        assert same_bits({k: v for k, v in weights(plain).items() if k in held}, held)
        ids = torch.arange(8).reshape(1, 8)
        assert bits(plain.eval()(input_ids=ids).logits) == bits(at_save[adapter])


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_modules_to_save_that_were_not_tied_are_not_mixed_into_tied_ones(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    def made(*, tied: bool) -> Any:
        modules = ["lm_head", "embed_tokens"]
        config = LoraConfig(
            r=2, target_modules=["q_proj"], modules_to_save=modules, task_type="CAUSAL_LM", ensure_weight_tying=tied
        )
        return get_peft_model(llama(0), config)

    apart, tied = made(tied=False), made(tied=True)
    head = apart.get_parameter("base_model.model.lm_head.modules_to_save.default.weight")
    before = weights(tied)
    with Checkpointer(tmp_path / "apart") as checkpointer:
        checkpointer.save(TrainState(model=apart), epoch=0, step=1, batch_size=1)
        checkpointer.resume(TrainState(model=tied))  # nothing was trained: both are what they are tied to
        with torch.no_grad():
            head.add_(1)
        checkpointer.save(TrainState(model=apart), epoch=0, step=2, batch_size=1)
        with pytest.raises(MismatchError, match=r"lm_head\.modules_to_save\.default\.weight is tied to .*other values"):
            checkpointer.resume(TrainState(model=tied))
    assert same_bits(weights(tied), before)


def test_adapters_that_are_merged_are_not_counted_twice(tmp_path: Path) -> None:
    model = adapted(0, None)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(TrainState(model=model), epoch=0, step=1, batch_size=1)
        model.merge_adapter()
        before = weights(model)
        with pytest.raises(UsageError, match=r"q_proj has its adapters merged.*call unmerge_adapter"):
            checkpointer.save(TrainState(model=model), epoch=0, step=2, batch_size=1)
        with pytest.raises(UsageError, match="call unmerge_adapter"):
            checkpointer.resume(TrainState(model=model))
        assert same_bits(weights(model), before)
        model.unmerge_adapter()
        checkpointer.save(TrainState(model=model), epoch=0, step=3, batch_size=1)


def test_an_optimizer_without_state_fits_into_a_file(tmp_path: Path) -> None:
    booster, model = Booster(), net(0)
    model, optimizer, *_ = booster.boost(model, torch.optim.SGD(model.parameters(), lr=0.05))
    booster.save_optimizer(optimizer, tmp_path / "sgd.safetensors")
    optimizer.param_groups[0]["lr"] = 1.0
    booster.load_optimizer(optimizer, tmp_path / "sgd.safetensors")
    assert optimizer.param_groups[0]["lr"] == 0.05


def test_trainable_tokens_leave_the_plain_model_its_names(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", trainable_token_indices=[1, 3])
    model = get_peft_model(llama(0, tied=False), config)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(TrainState(model=model), epoch=0, step=1, batch_size=1)
    plain = opened(tmp_path / "epoch-0_step-1" / "modeling")
    assert same_bits(weights(plain), weights(llama(0, tied=False)))
