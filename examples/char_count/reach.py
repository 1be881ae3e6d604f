"""How far the gradient of the reward reaches: along it, how likely the right count is to be found.

    python examples/char_count/reach.py START [--gains 0.05 0.2] [--directions gradient sign matrices alike]

The gradient of the probability of the right count after the worked answer, of some rows; then that
probability for other rows, at weights that were moved in a direction until a linear reward would have risen
by `gain`. ES with the same sigma for all parameters follows the gradient itself, on the average. Beside it:
its sign, as Adam does at first; that of matrices alone, without norms and embeddings; and that of each tensor
divided by its root mean square. Prints the slope, the distance, the probability, and the share of rows whose
count is the most likely one.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from gradients import Gradient, cut, gradient_of
from transformers import AutoModelForCausalLM, AutoTokenizer

CLIMBED, MEASURED = slice(200, 296), slice(1000, 1096)  # rows
AT_ONCE = 16
GAINS = 0.05, 0.2, 0.5

KINDS = {
    "gradient": lambda name, gradient: gradient,
    "sign": lambda name, gradient: gradient.sign(),
    "matrices": lambda name, gradient: gradient if is_matrix(name) else torch.zeros_like(gradient),
    "alike": lambda name, gradient: gradient / gradient.square().mean().sqrt(),
}


def is_matrix(name: str) -> bool:
    return "norm" not in name and "embed" not in name


def product(a: Gradient, b: Gradient) -> float:
    return sum(float((a[name] * b[name]).sum()) for name in a)


@torch.inference_mode()
def measure(model, tokenizer, rows: list[dict]) -> tuple[float, float]:
    """Mean probability of the right count, and the share of rows in which no other token is more likely."""
    texts = sorted((cut(tokenizer, row) for row in rows), key=lambda text: len(text[0]))
    likely = torch.cat(list(read(model, texts)))
    return tuple(likely.mean(0).tolist())


def read(model, texts: list[tuple[list[int], int]]) -> Iterator[torch.Tensor]:
    for first in range(0, len(texts), AT_ONCE):
        batch = texts[first : first + AT_ONCE]
        width = max(len(ids) for ids, _ in batch)
        padded = torch.tensor(
            [ids + [0] * (width - len(ids)) for ids, _ in batch]
        )  # no token sees what follows
        hidden = model.model(input_ids=padded, use_cache=False).last_hidden_state
        for states, (ids, place) in zip(hidden, batch):
            told = torch.tensor(ids[place:])
            chances = model.lm_head(states[place - 1 : len(ids) - 1]).log_softmax(-1)
            own = chances.gather(1, told[:, None]).sum().exp()
            yield torch.stack([own, (chances.argmax(1) == told).all().float()])[None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--gains", nargs="+", type=float, default=GAINS)
    parser.add_argument("--directions", nargs="+", choices=KINDS, default=list(KINDS))
    given = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
    lines = (Path(__file__).parent / "train.jsonl").read_text().splitlines()
    climbed, measured = ([json.loads(line) for line in lines[rows]] for rows in (CLIMBED, MEASURED))
    gradient, _, _ = gradient_of(model, tokenizer, climbed)
    base = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    print(
        "start: P(right) {:.4f}, most likely {:.3f}".format(*measure(model, tokenizer, measured)), flush=True
    )
    for name in given.directions:
        direction = {key: KINDS[name](key, value) for key, value in gradient.items()}
        length = product(direction, direction) ** 0.5
        slope = product(gradient, direction) / length
        for gain in given.gains:
            with torch.no_grad():
                for key, parameter in model.named_parameters():
                    parameter.copy_(base[key] + gain / slope / length * direction[key])
            found = measure(model, tokenizer, measured)
            print(
                f"{name}: slope {slope:.2f}, gain {gain:g} at {gain / slope:.4f}:"
                f" P(right) {found[0]:.4f}, most likely {found[1]:.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
