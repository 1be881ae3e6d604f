"""What exact gradients would gain in steps as long as those of ES: gradient ascent of the same reward.

    python examples/char_count/follow.py START [--length 0.0005] [--steps 20] [--questions 64]

The reward is the probability of the right count after the worked answer. A step of ES moves the weights by
alpha along the gradient of its generation's questions, as far as the reward is linear, beside its noise; here
they move by `length` along it, without noise. Prints the questions' own mean probability, their gradient's
norm, and every five steps what it is for 64 others, and the share of those whose count is most likely.
"""

import argparse
import json
from pathlib import Path

import torch
from gradients import cut
from reach import AT_ONCE, measure
from transformers import AutoModelForCausalLM, AutoTokenizer

from mpies.model.loading import choose_dtype

MEASURED, FIRST = slice(1000, 1064), 2000  # rows; those from FIRST on are climbed
EVERY = 5


def climb(model, texts: list[tuple[list[int], int]], autocast: bool) -> float:
    """Leaves the gradient of the mean probability, which is returned, in the parameters."""
    model.zero_grad()
    texts, total = sorted(texts, key=lambda text: len(text[0])), 0.0
    for first in range(0, len(texts), AT_ONCE):
        batch = texts[first : first + AT_ONCE]
        width = max(len(ids) for ids, _ in batch)
        padded = torch.tensor(
            [ids + [0] * (width - len(ids)) for ids, _ in batch]
        )  # no token sees what follows
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            hidden = model.model(input_ids=padded, use_cache=False).last_hidden_state
            logits = [
                model.lm_head(states[place - 1 : len(ids) - 1]) for states, (ids, place) in zip(hidden, batch)
            ]
        told = [torch.tensor(ids[place:])[:, None] for ids, place in batch]
        chances = [each.float().log_softmax(-1).gather(1, own) for each, own in zip(logits, told)]
        mean = sum(chance.sum().exp() for chance in chances) / len(texts)
        mean.backward()
        total += mean.item()
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--length", type=float, default=0.0005)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--questions", type=int, default=64)
    given = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
    autocast = choose_dtype("auto", torch.device("cpu"))[0] == torch.bfloat16
    lines = (Path(__file__).parent / "train.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    print("start: others {:.4f}, most likely {:.3f}".format(*measure(model, tokenizer, rows[MEASURED])))
    for step in range(given.steps):
        first = FIRST + given.questions * step
        texts = [cut(tokenizer, row) for row in rows[first : first + given.questions]]
        mean = climb(model, texts, autocast)
        norm = sum(float(parameter.grad.square().sum()) for parameter in model.parameters()) ** 0.5
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(parameter.grad, alpha=given.length / norm)
        told = f"step {step + 1}: {mean:.3f}, norm {norm:.1f}"
        if (step + 1) % EVERY == 0:
            told += "; others {:.4f}, most likely {:.3f}".format(*measure(model, tokenizer, rows[MEASURED]))
        print(told, flush=True)


if __name__ == "__main__":
    main()
