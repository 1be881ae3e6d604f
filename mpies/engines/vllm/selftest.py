"""A test at every start: that vLLM computes what the live weights, or a block's members, say.

Low rank: two members answer two prompts in one batch, one member without a perturbation beside one with,
and vLLM tells the log-probabilities of the tokens that it finds likeliest. transformers computes them from
the base, and from the member's own weights. A member index that is wrong, a layer whose noise is not where it
should be, or a part of the model that reads weights past its layers, makes them differ.

Full noise: live weights are overwritten, and transformers computes with them, too. What vLLM made of those
before, and keeps, makes them differ.

In 16 bits, where rounding would hide one kind of parameter, one after another is perturbed, and strongly.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from mpies.engines.membertest import (
    MEMBERS,
    SHARE,
    STRONGER,
    packs_of_kinds,
    sigma_to_be_seen,
    sigmas_in_turn,
    typical,
    weights_of_member,
)
from mpies.engines.probing import TOLERANCES, Probe, by_one_forward, rms, spread
from mpies.engines.vllm import INSTEAD, WITHOUT_BLOCKS
from mpies.engines.vllm.engine import Told, VllmEngine
from mpies.engines.vllm.lowrank import BlocksInVllm
from mpies.engines.vllm.windows import refuse_other_windows
from mpies.errors import InputError
from mpies.model.weights import Weights

TOKENS, LIKELIEST = 3, 20


# Root mean square of differences, nat, that is tolerated in float32 whatever a perturbation changes.
LEAST = 1e-4
# Of the base's own difference, what is tolerated of perturbed weights': a mixture's experts may be others.
ROUNDING = 3.0


def check_vllm(
    model: PreTrainedModel, weights: Weights, blocks: BlocksInVllm | None, engine: Any, reads: bool = False
) -> None:
    """Raise InputError if vLLM computes a block's members, or without one live weights, otherwise.

    `reads`: do members read given answers (task.expects)?
    """
    refuse_other_windows(model, engine.llm, engine.most_tokens)
    if blocks:
        check_members(model, weights, blocks, engine, reads)
    else:
        check_live_weights(model, weights, engine)


def check_members(
    model: PreTrainedModel,
    weights: Weights,
    lowrank: BlocksInVllm,
    engine: VllmEngine,
    reads: bool = False,
) -> None:
    """Raise InputError if members of a block compute otherwise than their weights say.

    model: transformers', on the same live weights. Base and live weights are afterwards what they were.
    """
    probe, base = Probe.of(model), LogProbabilities(model)
    prompts, plain = probe.prompts, by_one_forward(model, probe)
    least = _least(weights, plain)
    for sigmas in sigmas_in_turn(model, weights, probe, plain, alone=_alone(weights)):
        lowrank.set_each(MEMBERS, dict.fromkeys(weights.base, 0.0) | sigmas)
        try:
            told = engine.tell(prompts, len(MEMBERS), TOKENS, LIKELIEST)
            if reads:
                told = [*told, *_read_given(engine, told)]
        finally:
            lowrank.clear()
        unmoved, moved = ([one for one in told if one.member == member] for member in range(len(MEMBERS)))
        unperturbed = base.of(moved)
        with weights.lending(dict(_own(weights, sigmas))):
            expected = LogProbabilities(model).of(moved)
        effect = rms(expected - unperturbed)
        tolerated = max(TOLERANCES[weights.dtype].members * effect, least)
        for those, answers, right in (
            ("unperturbed", unmoved, base.of(unmoved)),
            ("perturbed", moved, expected),
        ):
            if not (apart := rms(_values(answers) - right)) <= tolerated:
                raise InputError(
                    f"es.perturbation: lowrank in vLLM computes {type(model).__name__} otherwise than its"
                    f" {those} weights do (log-probabilities {apart:.2g} apart, the perturbation's effect is"
                    f" {effect:.2g}); {WITHOUT_BLOCKS}"
                )


def _read_given(engine: VllmEngine, told: list[Told]) -> list[Told]:
    """Each answer backwards, which none would give: what the same member finds of its tokens."""
    answers = [one.answer[::-1] for one in told]
    members = [one.member for one in told]
    found = engine.read([one.prompt for one in told], answers, members)
    return [
        Told(one.prompt, answer, [{t: v} for t, v in zip(answer, values, strict=True)], one.member)
        for one, answer, values in zip(told, answers, found, strict=True)
    ]


def check_live_weights(model: PreTrainedModel, weights: Weights, engine: VllmEngine) -> None:
    """Raise InputError if vLLM goes on with weights that were overwritten.

    model: transformers', on the same live weights. They are afterwards the base's.
    """
    probe, base = Probe.of(model), LogProbabilities(model)
    plain, told = by_one_forward(model, probe), engine.tell(probe.prompts, 1, TOKENS, LIKELIEST)
    least = max(_least(weights, plain), ROUNDING * rms(_values(told) - base.of(told)))
    for names in packs_of_kinds(model, weights.base, alone=_alone(weights)):
        try:
            _perturb(model, weights, probe, plain, names)
            told = engine.tell(probe.prompts, 1, TOKENS, LIKELIEST)
            expected = LogProbabilities(model).of(told)
        finally:
            weights.show_base()
        effect = rms(expected - base.of(told))
        tolerated = max(TOLERANCES[weights.dtype].members * effect, least)
        if not (apart := rms(_values(told) - expected)) <= tolerated:
            raise InputError(
                f"engine.name: vllm computes {type(model).__name__} otherwise than transformers once its"
                f" weights are perturbed (log-probabilities {apart:.2g} apart, the perturbation's effect is"
                f" {effect:.2g}); {INSTEAD}"
            )


def _perturb(
    model: PreTrainedModel, weights: Weights, probe: Probe, base: np.ndarray, names: list[str]
) -> None:
    """These parameters, in place, as a member's are: no device has room for a copy besides.

    So strongly that it is seen if it is not; `base`: log-probabilities without.
    """
    seed, sign = MEMBERS[1].seed, MEMBERS[1].sign
    sizes = {name: typical(weights.base[name]) for name in names}

    def perturbed(share: float) -> nullcontext[None]:
        """From now on, not only within it."""
        weights.perturb_each(seed, {name: share * sign * size for name, size in sizes.items()})
        return nullcontext()

    share = SHARE
    if _alone(weights):  # one that is finite at no size is refused for what it computes
        share = sigma_to_be_seen(model, probe, base, 1.0, perturbed) or STRONGER[0]
    perturbed(share)


def _alone(weights: Weights) -> bool:
    return weights.dtype != torch.float32


def _own(weights: Weights, sigmas: dict[str, float]) -> Iterator[tuple[str, torch.Tensor]]:
    return ((name, weights_of_member(weights, name, sigma)) for name, sigma in sigmas.items())


def _least(weights: Weights, base: np.ndarray) -> float:
    """What is tolerated in any case, nat: in 16 bits as much as in reading, a third of what is visible.

    `base`: log-probabilities of the unperturbed model.
    """
    return TOLERANCES[weights.dtype].reading * spread(base) if _alone(weights) else LEAST


def _values(answers: list[Told]) -> np.ndarray:
    return np.array([value for told in answers for place in told.places for value in place.values()])


class LogProbabilities:
    """What transformers computes with the weights of now; of the same tokens once."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self._known: dict[tuple[int, ...], torch.Tensor] = {}

    def of(self, answers: list[Told]) -> np.ndarray:
        """Of those answers' tokens, in the order of `_values`."""
        found: list[float] = []
        for told in answers:
            chances = self._at_places(told)
            for place, tokens in enumerate(told.places):
                found += chances[place, list(tokens)].tolist()
        return np.array(found)

    @torch.inference_mode()
    def _at_places(self, told: Told) -> torch.Tensor:
        """(answer's tokens, vocabulary), on a CPU."""
        ids = told.prompt + told.answer
        if (known := tuple(ids)) not in self._known:
            logits = self.model(torch.tensor([ids], device=self.model.device), use_cache=False).logits
            chances = torch.log_softmax(logits[0, len(told.prompt) - 1 : -1].float(), dim=-1)
            self._known[known] = chances.cpu()
        return self._known[known]
