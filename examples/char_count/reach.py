"""How far the gradient of the reward reaches: along it, how likely the right count is to be found.

    python examples/char_count/reach.py START [--gains 0.05 0.2 0.5] [--directions gradient sign ...]

The gradient of the probability of the right count after the worked answer, of some rows; then that
probability for other rows, at weights that were moved in a direction until a linear reward would have risen
by `gain`. ES with the same sigma for all parameters follows the gradient itself, on the average. Beside it:
its sign, as Adam does at first; that of matrices alone, without norms and embeddings; and that of each tensor
divided by its root mean square. Prints the slope, the distance, the probability, and the share of rows whose
count is the most likely one.
"""

import argparse

import torch
from gradients import gradient_of, products
from reading import load, measure

CLIMBED, MEASURED = slice(200, 296), slice(1000, 1096)  # rows
GAINS = 0.05, 0.2, 0.5

KINDS = {
    "gradient": lambda name, gradient: gradient,
    "sign": lambda name, gradient: gradient.sign(),
    "matrices": lambda name, gradient: gradient if is_matrix(name) else torch.zeros_like(gradient),
    "alike": lambda name, gradient: gradient / gradient.square().mean().sqrt(),
}


def is_matrix(name: str) -> bool:
    return "norm" not in name and "embed" not in name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--gains", nargs="+", type=float, default=GAINS)
    parser.add_argument("--directions", nargs="+", choices=KINDS, default=list(KINDS))
    given = parser.parse_args()
    tokenizer, model, rows = load(given.model)
    measured = rows[MEASURED]
    gradient, _, _ = gradient_of(model, tokenizer, rows[CLIMBED])
    base = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    print(
        "start: P(right) {:.4f}, most likely {:.3f}".format(*measure(model, tokenizer, measured)), flush=True
    )
    for name in given.directions:
        direction = {key: KINDS[name](key, value) for key, value in gradient.items()}
        length = sum(products(direction, direction).values()) ** 0.5
        slope = sum(products(gradient, direction).values()) / length
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
