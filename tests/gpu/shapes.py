"""Models with random weights in the shapes of known ones, made in seconds: nothing is fetched."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import tiny
import torch
from launching import REPOSITORY
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

# hidden, intermediate, layers, heads, heads of keys and values, vocabulary, tied: Qwen2.5's config.json.
QWEN = {
    "0.5B": (896, 4864, 24, 14, 2, 151936, True),
    "3B": (2048, 11008, 36, 16, 2, 151936, True),
    "7B": (3584, 18944, 28, 28, 4, 152064, False),
}
SHARD = 2**31  # bytes of a file
SPREAD = 0.02  # standard deviation of the weights
LEARNT = 8192  # tokens, of this project's documents; there are no others that a bare machine has


def make(folder: Path, name: str) -> Path:
    """The model's folder, below `folder`; made where it is not there. 'tiny' takes no second."""
    path = folder / name
    if (path / "config.json").is_file():
        return path
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    if name == "tiny":
        return tiny.save_model(path, kind="qwen2", tied=False, dtype=torch.bfloat16)
    _write(path, config_of(name))
    return path


def config_of(name: str) -> Qwen2Config:
    hidden, intermediate, layers, heads, narrow, vocabulary, tied = QWEN[name]
    return Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=narrow,
        max_position_embeddings=32768,
        rope_theta=1e6,
        tie_word_embeddings=tied,
        architectures=["Qwen2ForCausalLM"],
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        dtype="bfloat16",
    )


def _write(path: Path, config: Qwen2Config) -> None:
    """Files as transformers writes them; config.json comes last."""
    with torch.device("meta"):
        outline = AutoModelForCausalLM.from_config(config)
    shapes = {name: p.shape for name, p in outline.named_parameters(remove_duplicate=True)}
    random = _random(max(shape.numel() for shape in shapes.values()))
    places: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    for number, (name, shape) in enumerate(shapes.items()):
        # Cut out of the same numbers, at another place each: making all of them would take minutes.
        first = 7919 * number % (len(random) - shape.numel() + 1)
        shard[name] = random[first : first + shape.numel()].view(shape).clone()
        if name.endswith("norm.weight"):
            shard[name].fill_(1.0)
        if sum(tensor.nbytes for tensor in shard.values()) > SHARD:
            _save(path, shard, places)
    _save(path, shard, places)
    index: dict[str, Any] = {"metadata": {}, "weight_map": places}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    tokenizer(config.vocab_size).save_pretrained(path)
    config.save_pretrained(path)


def tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """So many tokens, at least 512, each of which is some text: a token that is none is left out of answers.

    Those of a random model would then be empty, and its rewards equal. The first are learnt, so that a
    prompt has about as many as a known model's tokenizer makes of it; the others are made up.
    """
    learnt = Tokenizer(models.BPE())
    learnt.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learnt.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(LEARNT, vocabulary),
        special_tokens=tiny.SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learnt.train([str(file) for file in sorted((REPOSITORY / "docs").glob("*.md"))], trainer)
    plain = json.loads(learnt.to_str())
    tokens = plain["model"]["vocab"]
    # Of lengths that differ: rewards of conciseness are lengths.
    tokens |= {f"\u0120q{number}{'x' * (number % 7)}": number for number in range(len(tokens), vocabulary)}
    assert len(tokens) == vocabulary
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(plain)),
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template=tiny.CHAT_TEMPLATE,
    )


def _save(path: Path, shard: dict[str, torch.Tensor], places: dict[str, str]) -> None:
    if not shard:
        return
    name = f"model-{len(set(places.values())) + 1:05}.safetensors"
    save_file(shard, path / name, {"format": "pt"})
    places.update(dict.fromkeys(shard, name))
    shard.clear()


def _random(count: int) -> torch.Tensor:
    """bfloat16 (count + a few,), normal: 2^24 numbers, again and again."""
    some = torch.randn(2**24, generator=torch.Generator().manual_seed(0)).mul_(SPREAD).bfloat16()
    return some.repeat(-(-(count + 2**20) // len(some)))


if __name__ == "__main__":
    print(make(Path(sys.argv[1]), sys.argv[2]))
