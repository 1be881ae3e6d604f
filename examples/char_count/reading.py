"""The worked answers as a model reads them: how likely is their count?

For gradients.py, reach.py and follow.py.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

AT_ONCE = 16

Text = tuple[list[int], int]
"""The tokens of question and worked answer, and where among them those of the count begin."""
Told = tuple[torch.Tensor, torch.Tensor]
"""Log-probabilities where a count should follow, (tokens of the count, vocabulary), and these tokens."""


def load(path: str) -> tuple:
    """Tokenizer, model in float32, on one thread, and the training rows."""
    torch.set_num_threads(1)
    lines = (Path(__file__).parent / "train.jsonl").read_text().splitlines()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return tokenizer, model, [json.loads(line) for line in lines]


def cut(tokenizer, row: dict) -> Text:
    question = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
    solution = row["solution"]
    told = question + solution[: solution.rindex("{") + 1]
    before, ids = (
        tokenizer(text, add_special_tokens=False).input_ids for text in (told, question + solution)
    )
    first = next((i for i, (a, b) in enumerate(zip(before, ids)) if a != b), len(before))
    return ids, first


def read(model, texts: list[Text], autocast: bool = False) -> Iterator[list[Told]]:
    """Batches of similar length; `autocast`: products in bfloat16."""
    texts = sorted(texts, key=lambda text: len(text[0]))
    for first in range(0, len(texts), AT_ONCE):
        batch = texts[first : first + AT_ONCE]
        width = max(len(ids) for ids, _ in batch)
        # No token sees what follows it, padding neither.
        padded = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in batch])
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            hidden = model.model(input_ids=padded, use_cache=False).last_hidden_state
            logits = [
                model.lm_head(states[place - 1 : len(ids) - 1]) for states, (ids, place) in zip(hidden, batch)
            ]
        chances = [each.float().log_softmax(-1) for each in logits]
        yield [(each, torch.tensor(ids[place:])) for each, (ids, place) in zip(chances, batch)]


def probability(told: Told) -> torch.Tensor:
    """Of the count in the box, and what follows it."""
    chances, tokens = told
    return chances.gather(1, tokens[:, None]).sum().exp()


@torch.inference_mode()
def measure(model, tokenizer, rows: list[dict]) -> tuple[float, float]:
    """Mean probability of the right count, and the share of rows in which no other token is more likely."""
    found = [told for batch in read(model, [cut(tokenizer, row) for row in rows]) for told in batch]
    likely = sum(probability(told).item() for told in found)
    first = sum(bool((chances.argmax(1) == tokens).all()) for chances, tokens in found)
    return likely / len(found), first / len(found)
