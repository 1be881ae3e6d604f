"""A test at every start: that engine and perturbation compute what this model's weights say.

transformers has hundreds of architectures, and what holds for most of them does not for some: norms that
add 1 to their weight, states that do not continue over several tokens, caches whose rows mix when one
leaves. So before anything is evaluated, some log-probabilities are computed in several ways, from the
live weights as they are, and a model for which they differ is refused in one line.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel

from mpies.engines import likelihood
from mpies.engines.base import Engine
from mpies.engines.decode import decode
from mpies.engines.hf import HfEngine
from mpies.errors import InputError, reason
from mpies.es.population import Member
from mpies.model.lowrank import LowRank
from mpies.model.perturbation import Perturbation
from mpies.model.weights import Tensors, Weights

INSTEAD = "use engine.name=vllm or another model"
FULL = "use es.perturbation=full"

# A member without a perturbation beside one with: their own weights are the base, and one set of others.
MEMBERS = [Member(0, 1, 0), Member(1, 2, -1)]
# Of low rank's sigma to a parameter's root mean square: matrices and vectors then have equal effects.
SHARE = 0.1
ROOM = 2**25  # elements of members' own weights that may be in memory besides the largest tensor's


class Tolerance(NamedTuple):
    """Up to which two ways of computing are one model: differences are root mean squares."""

    reading: float
    """Of log-probabilities, in standard deviations of log-probabilities over tokens."""
    members: float
    """Of log-probabilities of members, in parts of what their perturbation changes."""


# Measured at most, on tiny random models, one of each of 60 architectures, and on SmolLM2 (135M):
#            reading: tiny, SmolLM2    members: tiny, SmolLM2
# float32             4e-6, 2e-6                1e-5, 6e-6
# float16            0.004, 0.008               0.02, 0.01
# bfloat16            0.02, 0.03                0.10, 0.15
# Unsound ones: from 0.03 in reading; 2 to 7 as members, and 0.15 where one kind of matrix gets no noise.
TOLERANCES = {
    torch.float32: Tolerance(1e-3, 1e-3),
    torch.float16: Tolerance(0.03, 0.1),
    torch.bfloat16: Tolerance(0.1, 0.4),
}


def check(model: PreTrainedModel, weights: Weights, perturbation: Perturbation, engine: Engine) -> None:
    """Raise InputError if the hf engine, or low rank, computes this model otherwise than its weights do.

    Where live weights of 16 bits hide small faults in rounding, the model computes with the base, too.
    Base, digest and live weights, which are the base's, are afterwards what they were. Reading given
    answers in pieces is given up if it is wrong for this model and reading them at once is not.
    """
    if not isinstance(engine, HfEngine):
        return  # vLLM's compares itself with transformers
    perturbation.clear()
    probe, name = Probe.of(model), type(model).__name__
    live = str(weights.dtype).removeprefix("torch.")
    instead = INSTEAD
    if weights.dtype != torch.float32:  # some models have tables that stay in the checkpoint's dtype
        instead = INSTEAD.replace("use ", "use model.dtype=float32, ")
    with _computing(f"engine.name: hf cannot compute {name} in {live}", instead):
        base = check_reading(model, engine, probe)
    if isinstance(perturbation, LowRank):
        with _computing(f"es.perturbation: lowrank cannot compute {name} in {live}", FULL):
            check_members(model, weights, perturbation, probe, base)
    # Where the base is kept on the host, the device has no room for it.
    if weights.dtype != torch.float32 and not weights.storage.streams:
        # Some models cannot, whose buffers are in the checkpoint's dtype.
        with suppress(RuntimeError), weights.lending(weights.base):
            base = check_reading(model, engine, probe)
            if isinstance(perturbation, LowRank):
                check_members(model, weights, perturbation, probe, base)


@dataclass(frozen=True)
class Probe:
    """Two prompts with given answers: the first answer ends early, the second is told to its end."""

    prompts: list[list[int]]
    answers: list[list[int]]
    ends: int
    """Tokens of the first answer."""

    @classmethod
    def of(cls, model: PreTrainedModel) -> Probe:
        """Of tokens from all over the vocabulary. The second prompt is shorter: it is padded."""
        vocabulary, count = model.config.get_text_config().vocab_size, 12
        ids = [vocabulary * (i + 1) // (count + 2) for i in range(count)]
        return cls([ids[:4], ids[4:6]], [ids[6:9], ids[9:]], 2)

    @property
    def second(self) -> Probe:
        """That prompt alone."""
        return Probe(self.prompts[1:], self.answers[1:], len(self.answers[1]))

    @property
    def tokens(self) -> list[int]:
        """Those of the answers: their log-probabilities are compared at every place."""
        return [token for answer in self.answers for token in answer]


def check_reading(model: PreTrainedModel, engine: HfEngine, probe: Probe) -> np.ndarray:
    """Decoding and reading answers must not depend on the batch, or on how much is read at a time.

    Returns the log-probabilities `by_one_forward`.
    """
    name, alone = type(model).__name__, probe.second
    expected = by_one_forward(model, probe)
    tolerated = TOLERANCES[model.dtype].reading * spread(expected)

    def refuse_if_different(found: np.ndarray, when: str, expected: np.ndarray = expected) -> None:
        if not (apart := rms(found - expected)) <= tolerated:
            rounding = ", or model.dtype=float32 if this is rounding" if model.dtype.itemsize == 2 else ""
            raise InputError(
                f"engine.name: hf computes {name} otherwise {when} (log-probabilities {apart:.2g} apart);"
                f" {INSTEAD}{rounding}"
            )

    together = decoded(model, probe, probe.tokens)[1]
    if not rms(together - expected) <= tolerated:  # why?
        refuse_if_different(decoded(model, alone, probe.tokens)[0], "token by token than at once")
        refuse_if_different(
            together[: probe.ends], "beside a longer prompt than alone", expected[: probe.ends]
        )
        refuse_if_different(together, "where another answer has ended")
    told = expected[:, -len(alone.tokens) :].diagonal()
    if not rms(read(model, probe, engine.at_once) - told) <= tolerated:
        refuse_if_different(
            read(model, probe, at_once=True), "where it reads answers than where it decodes", told
        )
        engine.at_once = True
    return expected


def check_members(
    model: PreTrainedModel, weights: Weights, lowrank: LowRank, probe: Probe, base: np.ndarray
) -> None:
    """The members of a block must compute what their own weights compute; `base`: what the base does."""
    tolerance = TOLERANCES[model.dtype]
    for names in packs_of_kinds(model, weights.base):
        *apart, moved = members_apart(model, weights, lowrank, probe, base, names)
        # Some parameters are never used, and have no effect.
        tolerated = max(tolerance.members * moved, tolerance.reading * spread(base))
        for those, difference in zip(("unperturbed", "perturbed"), apart, strict=True):
            if not difference <= tolerated:
                raise InputError(
                    f"es.perturbation: lowrank computes {type(model).__name__} otherwise than its {those}"
                    f" weights do (log-probabilities {difference:.2g} apart); {FULL}"
                )


def packs_of_kinds(model: PreTrainedModel, base: Tensors) -> list[list[str]]:
    """One parameter of each kind, in packs with room for one at a time.

    Parameters of different layers are of one kind if their names are equal but for numbers, and their
    modules are of one class.
    """
    kinds: dict[tuple[str, type], str] = {}
    for name in base:
        owner = model.get_submodule(name.rpartition(".")[0])
        kinds.setdefault((re.sub(r"\d+", "#", name), type(owner)), name)
    room = max(tensor.numel() for tensor in base.values()) + ROOM
    packs: list[list[str]] = [[]]
    left = room
    for name in kinds.values():
        if base[name].numel() > left:
            packs.append([])
            left = room
        packs[-1].append(name)
        left -= base[name].numel()
    return packs


def members_apart(
    model: PreTrainedModel,
    weights: Weights,
    lowrank: LowRank,
    probe: Probe,
    base: np.ndarray,
    names: list[str],
) -> tuple[float, float, float]:
    """How far a block's log-probabilities are from its weights', unperturbed and perturbed ones; the effect.

    The last is the difference between unperturbed and perturbed weights' log-probabilities. Only the
    parameters `names` are perturbed.
    """
    sigmas = {name: SHARE * typical(weights.base[name]) for name in names}
    lowrank.set_each(MEMBERS, dict.fromkeys(weights.base, 0.0) | sigmas)
    try:
        unmoved, block = decoded(model, probe, probe.tokens, len(MEMBERS), lowrank.rows)[1::2]
    finally:
        lowrank.clear()
    with weights.lending({name: weights_of_member(weights, name, sigma) for name, sigma in sigmas.items()}):
        expected = by_one_forward(model, probe)
    return rms(unmoved - base), rms(block - expected), rms(expected - base)


def weights_of_member(weights: Weights, name: str, sigma: float) -> torch.Tensor:
    """The second member's own weights of a parameter, with noise as an update adds it."""
    seed, factor = np.array([MEMBERS[1].seed], np.uint64), np.array([sigma * MEMBERS[1].sign], np.float32)
    return weights.updated(name, seed, factor).to(weights.dtype)


def typical(base: torch.Tensor) -> float:
    """The size of a parameter's elements, by some of them; 1 if they are 0, as biases may be."""
    return float(base.view(-1)[: 2**16].float().square().mean().sqrt()) or 1.0


@torch.inference_mode()
def by_one_forward(model: PreTrainedModel, probe: Probe) -> np.ndarray:
    """By a forward pass over the second prompt and its answer, without cache, padding or other rows.

    Log-probabilities of the probe's tokens at each of the answer's places: float64 (places, tokens).
    """
    prompt, answer = probe.prompts[1], probe.answers[1]
    ids = torch.tensor([prompt + answer], device=model.device)
    logits = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    found = torch.log_softmax(logits.float(), dim=-1)[:, probe.tokens].double().cpu().numpy()
    if not np.isfinite(found).all():
        raise ArithmeticError("the log-probabilities are not finite")
    return found


def decoded(
    model: PreTrainedModel,
    probe: Probe,
    tokens: list[int],
    members: int = 1,
    on_rows: Callable[[torch.Tensor], None] = lambda members: None,
) -> np.ndarray:
    """The same while the answers are decoded: (members x answers, places, tokens).

    Not a number after the first answer's end, where its rows leave. `on_rows` gets the rows' members.
    """
    count = len(probe.prompts)
    answers = torch.tensor(probe.answers * members, device=model.device)
    found = torch.full((*answers.shape, len(tokens)), torch.nan, dtype=torch.float64)

    def tell(logits: torch.Tensor, rows: torch.Tensor, place: int) -> torch.Tensor:
        found[rows.cpu(), place] = torch.log_softmax(logits.float(), dim=-1)[:, tokens].double().cpu()
        return answers[rows, place]

    stops = {probe.answers[0][probe.ends - 1]}
    decode(model, probe.prompts * members, stops, answers.shape[1], lambda rows: on_rows(rows // count), tell)
    return found.numpy()


def read(model: PreTrainedModel, probe: Probe, at_once: bool = False) -> np.ndarray:
    """Log-probabilities of the second answer's own tokens, as both are read for KL divergence: (places,)."""
    return likelihood.of(model, probe.prompts, probe.answers, at_once=at_once)[1]


def spread(chances: np.ndarray) -> float:
    """The standard deviation of tokens' log-probabilities at a place: (places, tokens)."""
    return float(chances.std(axis=1).mean())


def rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


@contextmanager
def _computing(what: str, remedy: str) -> Iterator[None]:
    """Whatever is raised inside becomes one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{what} ({type(error).__name__}: {reason(error)}); {remedy}") from error
