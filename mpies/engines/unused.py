"""Parameters that no answer to text can depend on: those of an image tower, where there are no images."""

from __future__ import annotations

import numpy as np
import torch
from transformers import PreTrainedModel

from mpies.engines.probing import Probe, by_one_forward
from mpies.model.beside import beside_decoder
from mpies.model.weights import Weights


def find_unused(model: PreTrainedModel, weights: Weights) -> tuple[str, ...]:
    """Paths of the modules beside the decoder without which text is read.

    All their parameters become not a number for a moment: whatever is computed with one of them is none,
    either. So nothing is taken for unused because its effect is small, or hidden by rounding. Modules of
    the decoder itself are never looked at: an expert that some tokens do not choose is chosen by others.
    """
    within = {
        path: [name for name in weights.base if name.startswith(f"{path}.")] for path in beside_decoder(model)
    }
    within = {path: names for path, names in within.items() if names}  # of tied ones, one has the name
    if not within:
        return ()
    probe = Probe.of(model)
    try:
        expected = by_one_forward(model, probe)
    except ArithmeticError:  # the self-test tells what is wrong
        return ()
    return tuple(path for path, names in within.items() if _is_unused(model, weights, names, probe, expected))


def _is_unused(
    model: PreTrainedModel, weights: Weights, names: list[str], probe: Probe, expected: np.ndarray
) -> bool:
    nothing = torch.full((), torch.nan, dtype=weights.dtype, device=weights.device)
    with weights.lending({name: nothing.expand(weights.shapes[name]) for name in names}):
        try:
            return np.array_equal(by_one_forward(model, probe), expected)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # not finite, or a kernel that does not know such tensors: it was used
            return False
