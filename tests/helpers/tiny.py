"""Small random-weight models with a tokenizer of their own, built in a second."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]
CHARACTERS = [chr(c) for c in range(32, 127)]
CHAT_TEMPLATE = (
    "{% for m in messages %}<bos>{{ m.role }}: {{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant: {% endif %}"
)
CONFIGS = {"qwen2": Qwen2Config, "llama": LlamaConfig}


def tokenizer(words: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """One token per printable ASCII character, and per word."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *CHARACTERS, *words])}
    fast = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    parts = "|".join([*map(re.escape, words), "."])
    fast.pre_tokenizer = pre_tokenizers.Split(Regex(parts), "isolated")
    fast.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
    )


def byte_tokenizer(chat_template: str) -> PreTrainedTokenizerFast:
    """One token per byte, so that nothing is lost of what a chat template writes."""
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    fast = Tokenizer(models.BPE(vocabulary, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    return PreTrainedTokenizerFast(tokenizer_object=fast, chat_template=chat_template, **special)


def save_model(
    folder: Path,
    kind: str = "llama",
    tied: bool = True,
    dtype: torch.dtype = torch.float32,
    hidden: int = 32,
    seed: int = 0,
    words: Sequence[str] = (),
    positions: int = 512,
    text: PreTrainedTokenizerFast | None = None,
) -> Path:
    """A Hugging Face folder of a random model with 2 layers; `kind` is llama or qwen2. `words`: tokens that
    it may say beside characters; `text`: another tokenizer."""
    torch.manual_seed(seed)
    text = text or tokenizer(words)
    config = CONFIGS[kind](
        vocab_size=len(text),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        tie_word_embeddings=tied,
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
        pad_token_id=text.pad_token_id,
        initializer_range=0.2,
    )
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    model.config.dtype = dtype
    model.save_pretrained(folder)
    text.save_pretrained(folder)
    return folder
