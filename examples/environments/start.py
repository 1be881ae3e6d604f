"""A tiny start for a game of this folder: a model of 0.13 million parameters, trained from nothing on what
imperfect players did (players.py), in minutes on one core.

    python examples/environments/start.py sudoku runs/start/sudoku

OUTPUT is a Hugging Face folder for model.path. It depends on the seed, and on the kind of processor, only.
"""

import argparse
import math
import re
from collections.abc import Iterator
from pathlib import Path
from random import Random

import players
import torch
from calculator import calculator
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import get_json_schema

STEPS = {"number": 200, "sudoku": 700, "calculator": 700}
NUMBERS = {"number": " ?[0-9]+", "sudoku": " ?[0-9]", "calculator": "[0-9]"}  # which stand alone
BATCH = 32  # episodes a step
RATE, WARM_UP = 3e-3, 20
BEGIN, END = "<begin>", "<end>"
WHOLE = ["<tool_call>", "</tool_call>", "<answer>", "</answer>"]  # one token each, as in Qwen 2.5
# Qwen 2.5's calls, without its words around them.
TEMPLATE = (
    "{% if tools %}Tools:{% for t in tools %} {{ t.function.name }}{% endfor %}\n{% endif %}"
    "{% for m in messages %}<begin>{{ m.role }}\n{{ m.content }}"
    '{% for c in m.tool_calls or [] %}<tool_call>\n{"name": "{{ c.function.name }}", "arguments": '
    "{{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}<end>{% endfor %}"
    "{% if add_generation_prompt %}<begin>assistant\n{% endif %}"
)


def episodes(game: str, seed: int, text: PreTrainedTokenizerFast) -> Iterator[list[tuple[str, str]]]:
    """Endless: what is said, with the template where it is a chat, and the player's answer, turn by turn."""
    draw = Random(seed)
    while True:
        if game == "calculator":
            yield [written(text, *turn) for turn in players.compute(players.small_problem(draw), draw)]
        else:
            yield list(players.plays(game, draw))


def written(text: PreTrainedTokenizerFast, messages: list[dict], answer: dict) -> tuple[str, str]:
    given = {"tools": [get_json_schema(calculator)], "tokenize": False}
    said = text.apply_chat_template(messages, add_generation_prompt=True, **given)
    return said, text.apply_chat_template([*messages, answer], **given)[len(said) :].removesuffix(END)


def tokenizer(vocabulary: Tokenizer) -> PreTrainedTokenizerFast:
    special = {"pad_token": "<pad>", "bos_token": BEGIN, "eos_token": END}
    return PreTrainedTokenizerFast(tokenizer_object=vocabulary, chat_template=TEMPLATE, **special)


def untrained(game: str) -> Tokenizer:
    """Of bytes. Numbers stand alone, so that what the games say between them becomes few tokens."""
    made = Tokenizer(models.BPE())
    numbers = pre_tokenizers.Split(Regex(NUMBERS[game]), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([numbers, pre_tokenizers.ByteLevel(False, use_regex=False)])
    made.decoder = decoders.ByteLevel()
    return made


def trained(game: str, seed: int) -> PreTrainedTokenizerFast:
    vocabulary = untrained(game)
    source = episodes(game, seed, tokenizer(untrained(game)))
    said = ["".join(next(source)[-1]) for _ in range(1000)]
    special = ["<pad>", BEGIN, END]
    parts = (part for one in said for part in re.split("|".join([*special, *WHOLE]), one))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        min_frequency=50,
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    vocabulary.train_from_iterator(parts, trainer)
    vocabulary.add_tokens(WHOLE)
    return tokenizer(vocabulary)


def encoded(text: PreTrainedTokenizerFast, turns: list[tuple[str, str]]) -> tuple[list[int], list[int]]:
    """Tokens of an episode, and what follows each: the next token of an answer, its end, or -100 for nothing
    to learn. In a plain text, an answer's end is not among what is read later."""
    tokens, next_ones, done = [], [], ""
    for said, answer in turns:
        new, own = (text(part, add_special_tokens=False).input_ids for part in (said[len(done) :], answer))
        tokens += new + own
        next_ones += [-100] * (len(new) - 1) + own + [text.eos_token_id]
        done = said + answer
    return tokens, next_ones


def loss_of(model, batch: list[tuple[list[int], list[int]]]) -> torch.Tensor:
    width = max(len(tokens) for tokens, _ in batch)
    tokens, next_ones = (
        torch.tensor([row[part] + [fill] * (width - len(row[part])) for row in batch])
        for part, fill in ((0, 0), (1, -100))
    )
    logits = model(input_ids=tokens).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), next_ones.flatten())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("game", choices=STEPS)
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, help="of training; the default leaves room to learn")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    steps = STEPS[options.game] if options.steps is None else options.steps
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    text = trained(options.game, options.seed)
    config = LlamaConfig(
        vocab_size=len(text), hidden_size=64, intermediate_size=192, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=1024, tie_word_embeddings=True,
        bos_token_id=text.bos_token_id, eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, betas=(0.9, 0.95))
    source = episodes(options.game, options.seed, text)
    for step in range(steps):
        share = min(1, (step + 1) / WARM_UP) * (0.05 + 0.95 * math.cos(math.pi / 2 * step / steps) ** 2)
        optimizer.param_groups[0]["lr"] = RATE * share
        loss = loss_of(model, [encoded(text, next(source)) for _ in range(BATCH)])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0 or step + 1 == steps:
            print(f"step {step + 1} of {steps}: loss {loss.item():.4f}", flush=True)
    model.save_pretrained(options.output)
    text.save_pretrained(options.output)


if __name__ == "__main__":
    main()
