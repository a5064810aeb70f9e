"""Do transformers' own classes open what stands beside the weights: the tokenizer, the generation config, the model?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from shardpoint import Checkpointer, TrainState
from tests.language import TEXTS, same_tokenizer, tied_llama, tokenizer
from tests.training import bits, on_disk


def how_it_generates(config: Any) -> dict[str, Any]:
    return {key: value for key, value in config.to_dict().items() if key != "transformers_version"}


def continued(model: Any, words: Any, text: str) -> str:
    """Return what a model makes of a text, without a pipeline."""
    ids = words(text, return_tensors="pt")
    with torch.no_grad():
        made: str = words.decode(model.generate(**ids)[0], skip_special_tokens=True)
    return made


@pytest.fixture
def trained() -> tuple[TrainState, Any]:
    words = tokenizer()
    model = tied_llama(len(words))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for text in TEXTS[:2]:
        ids = words(text, return_tensors="pt")["input_ids"]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return TrainState(model=model.eval(), optimizer=optimizer, tokenizer=words), words


def test_a_checkpoint_opens_and_generates(trained: tuple[TrainState, Any], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, pipeline

    state, words = trained
    model: Any = state.model
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(state, epoch=0, step=2, batch_size=1)
    directory = tmp_path / "epoch-0_step-2" / "modeling"
    assert same_tokenizer(AutoTokenizer.from_pretrained(directory), words)
    assert how_it_generates(GenerationConfig.from_pretrained(directory)) == how_it_generates(model.generation_config)
    opened, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    assert "lm_head.weight" not in on_disk(directory)
    assert opened.lm_head.weight is opened.model.embed_tokens.weight
    ids = words(TEXTS[2], return_tensors="pt")["input_ids"]
    assert bits(opened(input_ids=ids).logits) == bits(model(input_ids=ids).logits)

    expected = continued(model, words, TEXTS[0])
    assert continued(opened, AutoTokenizer.from_pretrained(directory), TEXTS[0]) == expected
    (answer,) = pipeline("text-generation", model=str(directory))(TEXTS[0])
    assert answer["generated_text"] == expected


def test_what_changes_between_saves_is_written_anew(trained: tuple[TrainState, Any], tmp_path: Path) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    state, words = trained
    model: Any = state.model
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(state, epoch=0, step=2, batch_size=1)
        model.generation_config.update(max_new_tokens=4, temperature=0.5, do_sample=True)
        words.add_tokens(["<tool>"])
        words.chat_template = "{{ messages[0]['content'] }}<tool>"
        checkpointer.save(state, epoch=0, step=3, batch_size=1)
    before, after = (tmp_path / f"epoch-0_step-{number}" / "modeling" for number in (2, 3))
    assert GenerationConfig.from_pretrained(before).max_new_tokens == 9
    assert how_it_generates(GenerationConfig.from_pretrained(after)) == how_it_generates(model.generation_config)
    old, new = AutoTokenizer.from_pretrained(before), AutoTokenizer.from_pretrained(after)
    assert new.tokenize("a<tool>") == words.tokenize("a<tool>") == ["a", "<tool>"]
    assert old.tokenize("a<tool>") != ["a", "<tool>"]
    assert new.chat_template == words.chat_template != old.chat_template
