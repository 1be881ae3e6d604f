"""What exact gradients would gain in steps as long as those of ES: gradient ascent of the same reward.

    python examples/char_count/follow.py START [--length 0.0005] [--steps 20] [--questions 64]

The reward is the probability of the right count after the worked answer. A step of ES moves the weights by
alpha along the gradient of its generation's questions, as far as the reward is linear, beside its noise; here
they move by `length` along it, without noise. Prints the questions' own mean probability, their gradient's
norm, and every five steps what it is for 64 others, and the share of those whose count is most likely.
"""

import argparse

import torch
from reading import Text, cut, load, measure, probability, read

from mpies.model.loading import choose_dtype

MEASURED, FIRST = slice(1000, 1064), 2000  # rows; those from FIRST on are climbed
EVERY = 5


def climb(model, texts: list[Text], autocast: bool) -> float:
    """Leaves the gradient of the mean probability, which is returned, in the parameters."""
    model.zero_grad()
    total = 0.0
    for batch in read(model, texts, autocast):
        mean = sum(probability(told) for told in batch) / len(texts)
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
    tokenizer, model, rows = load(given.model)
    autocast = choose_dtype("auto", torch.device("cpu"))[0] == torch.bfloat16
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
