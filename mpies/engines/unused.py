"""What is not tuned: by its name, or since no answer to text can depend on it, as on an image tower."""

from __future__ import annotations

import numpy as np
import torch
from transformers import PreTrainedModel

from mpies.config import Settings
from mpies.engines.probing import Probe, by_one_forward
from mpies.errors import InputError
from mpies.model.beside import beside_decoder
from mpies.model.weights import Weights

AUTO = "auto"  # in es.leave_out, whose last it is here: what no answer depends on


def leaves_out(settings: Settings, images: bool) -> tuple[str, ...]:
    """Paths of the modules that are not tuned, by the settings; AUTO only where it is to be found out.

    `images`: has the task any? Raises InputError for what vLLM cannot do.
    """
    named = [path for path in settings.es.leave_out if path != AUTO]
    in_blocks = settings.engine.name == "vllm" and settings.es.perturbation == "lowrank"
    if named and in_blocks:
        raise InputError(
            "es.leave_out: vllm gives all of a model low-rank noise; use engine.name=hf, or es.leave_out=[]"
        )
    if named == settings.es.leave_out or in_blocks or images:
        return tuple(named)
    return (*named, AUTO)


def find_left_out(chosen: tuple[str, ...], model: PreTrainedModel, weights: Weights) -> tuple[str, ...]:
    """The same with the paths of what no answer depends on in place of AUTO."""
    if AUTO not in chosen:
        return chosen
    return tuple(dict.fromkeys([*chosen[:-1], *find_unused(model, weights)]))


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
