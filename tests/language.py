"""Which language model and which tokenizer do tests save that open a checkpoint with transformers? Made here."""

from __future__ import annotations

from typing import Any

import torch

TEXTS = ["the cat sat on the mat", "a bird in the hand", "naïve café, 名前 and 😀", "two  spaces\nand a line"]
CHAT = [{"role": "user", "content": "where is the cat?"}, {"role": "assistant", "content": "on the mat"}]
_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tokenizer() -> Any:
    """Train a byte-level BPE tokenizer, with special tokens and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    roles = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    inner = Tokenizer(models.BPE(unk_token=roles["unk_token"]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = [*roles.values(), "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(TEXTS * 3, trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        **roles,
        extra_special_tokens=special[4:],
        padding_side="left",
        model_max_length=77,
    )
    made.chat_template = _TEMPLATE
    return made


def same_tokenizer(one: Any, other: Any) -> bool:
    """Tell whether two tokenizers make the same of texts, of a chat and of tokens."""
    chats = [each.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False) for each in (one, other)]
    batches = [each(TEXTS, padding=True)["input_ids"] for each in (one, other)]
    texts = [each.batch_decode(batches[0], skip_special_tokens=True) for each in (one, other)]
    how = [(each.padding_side, each.model_max_length, each.special_tokens_map) for each in (one, other)]
    assert chats[0].startswith("<|user|>where is")
    return all(found[0] == found[1] for found in (chats, batches, texts, how))


def tied_llama(vocabulary: int, seed: int = 0) -> Any:
    """Return a small model whose head is its embedding, and which generates otherwise than its class does."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocabulary,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    )
    model = LlamaForCausalLM(config)
    model.generation_config.update(max_new_tokens=9, repetition_penalty=1.3, do_sample=False, no_repeat_ngram_size=3)
    return model
