"""A test at every start: that vLLM computes with a block's members what their own weights compute.

Two members answer two prompts in one batch, one member without a perturbation beside one with, and vLLM
tells the log-probabilities of the tokens that it finds likeliest. transformers computes them from the
base, and from the member's own weights. A member index that is wrong, a layer whose noise is not where
it should be, or a part of the model that reads weights past its layers, makes them differ.
"""

from __future__ import annotations

import numpy as np
import torch
from transformers import PreTrainedModel

from mpies.engines.membertest import MEMBERS, SHARE, packs_of_kinds, typical, weights_of_member
from mpies.engines.probing import TOLERANCES, Probe, rms
from mpies.engines.vllm import WITHOUT_BLOCKS
from mpies.engines.vllm.engine import Told, VllmEngine
from mpies.engines.vllm.lowrank import BlocksInVllm
from mpies.errors import InputError
from mpies.model.weights import Weights

TOKENS, LIKELIEST = 3, 20


# Root mean squares of differences, nat, that are tolerated whatever a perturbation changes.
LEAST = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}


def check_members(
    model: PreTrainedModel, weights: Weights, lowrank: BlocksInVllm, engine: VllmEngine
) -> None:
    """Raise InputError if members of a block compute otherwise than their weights say.

    model: transformers', on the same live weights. Base and live weights are afterwards what they were.
    """
    prompts = Probe.of(model).prompts
    for names in packs_of_kinds(model, weights.base):
        sigmas = {name: SHARE * typical(weights.base[name]) for name in names}
        lowrank.set_each(MEMBERS, dict.fromkeys(weights.base, 0.0) | sigmas)
        try:
            told = engine.tell(prompts, len(MEMBERS), TOKENS, LIKELIEST)
        finally:
            lowrank.clear()
        unmoved, moved = told[: len(prompts)], told[len(prompts) :]
        base_of_both = [_expected(model, answer) for answer in (unmoved, moved)]
        own = {name: weights_of_member(weights, name, sigma) for name, sigma in sigmas.items()}
        with weights.lending(own):
            expected = _expected(model, moved)
        effect = rms(expected - base_of_both[1])
        tolerated = max(TOLERANCES[weights.dtype].members * effect, LEAST[weights.dtype])
        for those, found, right in (
            ("unperturbed", _values(unmoved), base_of_both[0]),
            ("perturbed", _values(moved), expected),
        ):
            if not (apart := rms(found - right)) <= tolerated:
                raise InputError(
                    f"es.perturbation: lowrank in vLLM computes {type(model).__name__} otherwise than its"
                    f" {those} weights do (log-probabilities {apart:.2g} apart, the perturbation's effect is"
                    f" {effect:.2g}); {WITHOUT_BLOCKS}"
                )


def _values(answers: list[Told]) -> np.ndarray:
    return np.array([value for told in answers for place in told.places for value in place.values()])


@torch.inference_mode()
def _expected(model: PreTrainedModel, answers: list[Told]) -> np.ndarray:
    """What transformers computes for those answers, in the order of `_values`."""
    found: list[float] = []
    for told in answers:
        ids = torch.tensor([told.prompt + told.answer], device=model.device)
        logits = model(ids, use_cache=False).logits[0, len(told.prompt) - 1 : -1]
        chances = torch.log_softmax(logits.float(), dim=-1)
        for place, tokens in enumerate(told.places):
            found += chances[place, list(tokens)].tolist()
    return np.array(found)
