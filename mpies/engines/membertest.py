"""A test at every start: that the members of a block compute what their own weights say.

Where they do not, the modules at fault are computed in simpler ways, member by member in the end
(model/lowrank_ways.py); what is wrong even then is refused in one line.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from transformers import PreTrainedModel

from mpies.engines.probing import TOLERANCES, Probe, by_one_forward, decoded, rms, spread
from mpies.errors import InputError
from mpies.es.population import Member
from mpies.model.lowrank import LowRank
from mpies.model.lowrank_place import Unfit
from mpies.model.weights import Weights

FULL = "use es.perturbation=full"

# A member without a perturbation beside one with: their own weights are the base, and one set of others.
MEMBERS = [Member(0, 1, 0), Member(1, 2, -1)]
# Of low rank's sigma to a parameter's root mean square: matrices and vectors then have equal effects.
SHARE = 0.1
# The same where one parameter is perturbed alone: the first that has an effect of this size, in standard
# deviations of log-probabilities over tokens. 16 bits round away little of it.
STRONGER, VISIBLE = (1.0, 10.0), 0.3
ROOM = 2**25  # elements of members' own weights that may be in memory besides the largest tensor's


def check_members(
    model: PreTrainedModel,
    weights: Weights,
    lowrank: LowRank,
    probe: Probe,
    base: np.ndarray,
    alone: bool = False,
    reads: Callable[..., np.ndarray] | None = None,
) -> None:
    """The members of a block must compute what their own weights compute; `base`: what the base does.

    `alone`: one kind of parameter after another, since what 16 bits round of all of them is as much as one
    that is missing. `reads`: how they read given answers (probing.read), if they do. Modules that do not are
    computed in simpler ways from now on. Raises InputError if none is right.
    """
    for sigmas in sigmas_in_turn(model, weights, probe, base, alone):
        Attempt(model, weights, lowrank, probe, base, sigmas, reads).find_ways()


@dataclass(frozen=True)
class Attempt:
    """A block of two members, of which one differs from the base by these parameters."""

    model: PreTrainedModel
    weights: Weights
    lowrank: LowRank
    probe: Probe
    base: np.ndarray
    sigmas: dict[str, float]
    reads: Callable[..., np.ndarray] | None = None

    def find_ways(self) -> None:
        """Until the block computes what its members' weights do. Raises what is wrong if it never does."""
        with self.lowrank.ways.tried():
            while (wrong := self._attempt()) is not None:
                refusal, resort = wrong
                if not resort():
                    raise refusal

    def _attempt(self) -> tuple[Exception, Callable[[], bool]] | None:
        """What is wrong, and what may make it right; None if nothing is."""
        ways, names = self.lowrank.ways, list(self.sigmas)
        try:
            difference = self._difference(names)
            if difference is None:
                return None
            # Where unperturbed weights differ, it is not about these parameters.
            faulty = [] if "its unperturbed" in difference else self._faulty(names)
        except Unfit as unfit:
            return unfit, partial(ways.give_way, unfit)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # outside of what has a way of its own, but perhaps because of that
            return error, partial(ways.give_way_where, self._is_right)
        refusal = InputError(difference)
        if faulty:
            return refusal, partial(ways.give_way_of, faulty)
        return refusal, lambda: ways.give_way_where(self._is_right) or ways.give_way_of(names)

    def _faulty(self, names: list[str]) -> list[str]:
        """Which of them make a difference by themselves, by halves: most often it is one or two of many."""
        if len(names) < 2:
            return names
        middle = len(names) // 2
        halves = [half for half in (names[:middle], names[middle:]) if self._difference(half) is not None]
        return [name for half in halves for name in self._faulty(half)]

    def _is_right(self) -> bool:
        try:
            return self._difference(list(self.sigmas)) is None
        except torch.OutOfMemoryError:
            raise
        except Exception:
            return False

    def _difference(self, names: list[str]) -> str | None:
        """A refusal, if the block is not what the members' weights are; only `names` are perturbed."""
        tolerance = TOLERANCES[self.weights.dtype]
        unperturbed, perturbed, moved = self._apart(names)
        # Some parameters are never used, and have no effect.
        tolerated = max(tolerance.members * moved, tolerance.reading * spread(self.base))
        for those, difference in (("unperturbed", unperturbed), ("perturbed", perturbed)):
            if not difference <= tolerated:
                return (
                    f"es.perturbation: lowrank computes {type(self.model).__name__} otherwise than its"
                    f" {those} weights do (log-probabilities {difference:.2g} apart); {FULL}"
                )
        return None

    def _apart(self, names: list[str]) -> tuple[float, float, float]:
        """How far a block is from its weights, unperturbed and perturbed, in log-probabilities; the effect.

        The last is the difference between unperturbed and perturbed weights' log-probabilities.
        """
        weights, lowrank, probe = self.weights, self.lowrank, self.probe
        sigmas = {name: self.sigmas[name] for name in names}
        lowrank.set_each(MEMBERS, dict.fromkeys(weights.base, 0.0) | sigmas)
        try:
            told = decoded(self.model, probe, probe.tokens, len(MEMBERS), lowrank.rows)
            given = self.reads(self.model, probe, len(MEMBERS), lowrank.rows) if self.reads else None
        finally:
            lowrank.clear()
        unmoved, block = told[1::2]
        own = {name: weights_of_member(weights, name, sigma) for name, sigma in sigmas.items()}
        with weights.lending(own):
            expected = by_one_forward(self.model, probe)
        unperturbed, perturbed = rms(unmoved - self.base), rms(block - expected)
        if given is not None:
            unperturbed = max(unperturbed, rms(given[0] - probe.of_answer(self.base)))
            perturbed = max(perturbed, rms(given[1] - probe.of_answer(expected)))
        return unperturbed, perturbed, rms(expected - self.base)


def packs_of_kinds(
    model: torch.nn.Module, base: Mapping[str, torch.Tensor], alone: bool = False
) -> list[list[str]]:
    """One parameter of each kind, in packs with room for one at a time; or each alone.

    Parameters of different layers are of one kind if their names are equal but for numbers, and their
    modules are of one class.
    """
    kinds: dict[tuple[str, type], str] = {}
    for name in base:
        owner = model.get_submodule(name.rpartition(".")[0])
        kinds.setdefault((re.sub(r"\d+", "#", name), type(owner)), name)
    if alone:
        return [[name] for name in kinds.values()]
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


def sigmas_in_turn(
    model: PreTrainedModel, weights: Weights, probe: Probe, base: np.ndarray, alone: bool
) -> Iterator[dict[str, float]]:
    """What is perturbed at a time, and how strongly: a parameter of every kind, as far as there is room.

    `alone`: one of one kind at a time, so strongly that it is seen if it is not. `base`: log-probabilities
    without.
    """
    for names in packs_of_kinds(model, weights.base, alone):
        sizes = {name: typical(weights.base[name]) for name in names}
        if not alone:
            yield {name: SHARE * size for name, size in sizes.items()}
            continue
        ((name, size),) = sizes.items()

        def perturbed(sigma: float, name: str = name) -> AbstractContextManager[None]:
            return weights.lending({name: weights_of_member(weights, name, sigma)})

        yield {name: sigma_to_be_seen(model, probe, base, size, perturbed)}


def sigma_to_be_seen(
    model: PreTrainedModel,
    probe: Probe,
    base: np.ndarray,
    size: float,
    perturbed: Callable[[float], AbstractContextManager[None]],
) -> float:
    """The first with an effect that is seen, else the last that is finite: some parameters never have one.

    `size`: of the parameter; `perturbed`: within it, the model computes with that sigma. 0: none is finite.
    """
    found = 0.0
    for share in STRONGER:
        try:
            with perturbed(share * size):
                moved = rms(by_one_forward(model, probe) - base)
        except ArithmeticError:  # too strong
            break
        found = share * size
        if moved >= VISIBLE * spread(base):
            break
    return found


def weights_of_member(weights: Weights, name: str, sigma: float) -> torch.Tensor:
    """The second member's own weights of a parameter, with noise as an update adds it."""
    seed, factor = np.array([MEMBERS[1].seed], np.uint64), np.array([sigma * MEMBERS[1].sign], np.float32)
    return weights.updated(name, seed, factor).to(weights.dtype)


def typical(base: torch.Tensor) -> float:
    """The size of a parameter's elements, by some of them; 1 if they are 0, as biases may be."""
    return float(base.view(-1)[: 2**16].float().square().mean().sqrt()) or 1.0
