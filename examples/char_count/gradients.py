"""How much of the reward's gradient members share, by sigma.

    python examples/char_count/gradients.py START 0 0.0005 0.001 0.002

A step of ES climbs the reward averaged over the noise, whose gradient is E[g(theta + sigma z)]. Here g is
that of the probability of the right count after the worked answer. Four groups of rows, each with a z of
its own, have a mean gradient each; products of two groups' gradients estimate |E g|^2 without the bias that
a square has. Prints it with its standard error over the six pairs, and which parameters and layers it lies
in; and a question's own square, E |g_k|^2: of the |g| that could be had, an update from M questions climbs
|g|^2 / sqrt(|g|^2 + (E |g_k|^2 - |g|^2) / M).
"""

import argparse
import itertools
import re
import statistics
from collections import Counter

import torch
from reading import cut, load, probability, read

ROWS = slice(200, 296)
GROUPS = 4
LAYERS = 5  # told of together

Gradient = dict[str, torch.Tensor]


def products(a: Gradient, b: Gradient) -> dict[str, float]:
    return {name: float((a[name] * b[name]).sum()) for name in a}


def gradient_of(model, tokenizer, rows: list[dict]) -> tuple[Gradient, float, float]:
    """Of the mean probability, and that, and the mean square of a row's own gradient."""
    total = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    mean, square = 0.0, 0.0
    for row in rows:
        model.zero_grad()
        [[told]] = read(model, [cut(tokenizer, row)])
        value = probability(told)
        value.backward()
        mean += value.item() / len(rows)
        for name, parameter in model.named_parameters():
            total[name] += parameter.grad / len(rows)
            square += float((parameter.grad**2).sum()) / len(rows)
    return total, mean, square


def at(
    model, tokenizer, rows: list[dict], base: Gradient, sigma: float
) -> tuple[list[Gradient], float, float]:
    """Each group's gradient at theta + sigma z, z its own; the mean probability, and a row's mean square."""
    gradients, means, squares = [], [], []
    for group in range(GROUPS):
        torch.manual_seed(1000 + group)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(base[name] + sigma * torch.randn_like(parameter))
        gradient, mean, square = gradient_of(model, tokenizer, rows[group::GROUPS])
        gradients.append(gradient)
        means.append(mean)
        squares.append(square)
    return gradients, statistics.mean(means), statistics.mean(squares)


def show(sigma: float, gradients: list[Gradient], mean: float, square: float) -> None:
    squares, kinds, layers = [], Counter(), Counter()
    pairs = list(itertools.combinations(gradients, 2))
    for a, b in pairs:
        each = products(a, b)
        squares.append(sum(each.values()))
        for name, value in each.items():
            layer = re.search(r"layers\.(\d+)\.(.*)", name)
            kinds[layer[2] if layer else name] += value / len(pairs)
            layers[int(layer[1]) // LAYERS * LAYERS if layer else -1] += value / len(pairs)
    error = statistics.stdev(squares) / len(squares) ** 0.5
    print(
        f"sigma {sigma:g}: P(right) {mean:.3f}, |E g|^2 {statistics.mean(squares):.1f} +- {error:.1f},"
        f" a question's own {square:.0f}"
    )
    print("  of it", {name: round(value, 1) for name, value in kinds.most_common()})
    print("  from layer", {first: round(value, 1) for first, value in sorted(layers.items())}, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("sigmas", nargs="+", type=float)
    given = parser.parse_args()
    tokenizer, model, rows = load(given.model)
    base = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for sigma in given.sigmas:
        show(sigma, *at(model, tokenizer, rows[ROWS], base, sigma))


if __name__ == "__main__":
    main()
