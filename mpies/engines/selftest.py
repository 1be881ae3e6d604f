"""A test at every start: that engine and perturbation compute what this model's weights say.

transformers has hundreds of architectures, and what holds for most of them does not for some: norms that
add 1 to their weight, states that do not continue over several tokens, caches whose rows mix when one
leaves. So before anything is evaluated, some log-probabilities are computed in several ways, from the
live weights as they are, and a model for which they differ is refused in one line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from transformers import PreTrainedModel

from mpies.engines.base import Engine, Prompt
from mpies.engines.hf import HfEngine
from mpies.engines.membertest import FULL, check_members
from mpies.engines.probing import TOLERANCES, Probe, by_one_forward, decoded, gone_on, read, rms, spread
from mpies.errors import InputError, reason
from mpies.model.lowrank import LowRank
from mpies.model.perturbation import Perturbation
from mpies.model.weights import Weights

INSTEAD = "use engine.name=vllm or another model"
INSTEAD_OF = "leave task.expects out, or use another model"


def check(
    model: PreTrainedModel,
    weights: Weights,
    perturbation: Perturbation,
    engine: Engine,
    images: Sequence[Prompt] = (),
    reads: bool = False,
) -> None:
    """Raise InputError if the hf engine, or low rank, computes this model otherwise than its weights do.

    Where live weights of 16 bits hide small faults in rounding, the model computes with the base, too; or,
    where the base is no better or cannot be computed with, with one kind of parameter perturbed at a time.
    Base, digest and live weights, which are the base's, are afterwards what they were. Reading given
    answers in pieces is given up if it is wrong for this model and reading them at once is not; so is keeping
    anything from turn to turn.
    `images`: two prompts with images, if there are any among the task's, which are computed as well; `reads`:
    do members read given answers (task.expects)?
    """
    name = type(model).__name__
    if not isinstance(engine, HfEngine):  # vLLM's compares itself with transformers, which reads for it
        if reads:
            with _computing(f"task.expects: transformers cannot read with {name}", INSTEAD_OF):
                check_reading(model, engine.hf, Probe.of(model))  # type: ignore[attr-defined]
        return
    perturbation.clear()
    probes = [Probe.of(model)]
    if images:
        asked = [engine.text.encode(prompt) for prompt in images]
        probes.append(Probe.of_images(model, asked, [engine.text.inputs(prompt) for prompt in images]))
    live, instead = str(weights.dtype).removeprefix("torch."), INSTEAD
    if weights.dtype != torch.float32:  # some models have tables that stay in the checkpoint's dtype
        instead = INSTEAD.replace("use ", "use model.dtype=float32, ")
    with _computing(f"engine.name: hf cannot compute {name} in {live}", instead):
        bases = [check_reading(model, engine, probe) for probe in probes]
    reading = partial(read, at_once=engine.at_once) if reads else None
    if isinstance(perturbation, LowRank):
        with _computing(f"es.perturbation: lowrank cannot compute {name} in {live}", FULL):
            pairs = list(zip(probes, bases, strict=True))
            # Again, since ways that are simpler for images' sake have to be right for text, too.
            for probe, base in [*pairs, *pairs[:-1]]:
                check_members(model, weights, perturbation, probe, base, reads=reading)
    if weights.dtype == torch.float32 or _checked_by_base(
        model, weights, perturbation, engine, probes, reading
    ):
        return
    if isinstance(perturbation, LowRank):
        with _computing(f"es.perturbation: lowrank cannot compute {name} in {live}", FULL):
            for probe, base in zip(probes, bases, strict=True):
                check_members(model, weights, perturbation, probe, base, alone=True, reads=reading)


def _checked_by_base(
    model: PreTrainedModel,
    weights: Weights,
    perturbation: Perturbation,
    engine: HfEngine,
    probes: list[Probe],
    reading: Callable[..., np.ndarray] | None,
) -> bool:
    """Has the same been compared with the float32 base's weights? Raises InputError if it is otherwise.

    Not where the base is kept in 16 bits as well, or on the host: the device has no room for it then. And
    some models cannot, whose buffers are in the checkpoint's dtype.
    """
    if weights.master != torch.float32 or weights.storage.streams:
        return False
    try:
        with weights.lending(weights.base):
            for probe in probes:
                base = check_reading(model, engine, probe)
                if isinstance(perturbation, LowRank):
                    check_members(model, weights, perturbation, probe, base, reads=reading)
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"model: the device has no memory for the test at the start, in float32 ({reason(error)}); use"
            " model.base=host, model.master=live or a larger device"
        ) from error
    except RuntimeError:
        return False
    return True


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
    told, when = probe.of_answer(expected), "where it reads answers than where it decodes"
    if not rms(read(model, probe, at_once=engine.at_once)[0] - told) <= tolerated:
        if probe.inputs:
            refuse_if_different(read(model, probe)[0], when, told)
        refuse_if_different(read(model, probe, at_once=True)[0], when, told)
        engine.at_once = True
    if engine.keeps and not probe.inputs:
        engine.keeps = _goes_on(model, probe, expected, tolerated)
    return expected


def _goes_on(model: PreTrainedModel, probe: Probe, expected: np.ndarray, tolerated: float) -> bool:
    """Is what was kept of a conversation as good as reading it anew? It costs nothing but time if not."""
    try:
        found = gone_on(model, probe)
    except torch.OutOfMemoryError:
        raise
    except Exception:
        return False
    return rms(found - expected[-2:]) <= tolerated


@contextmanager
def _computing(what: str, remedy: str) -> Iterator[None]:
    """Whatever is raised inside becomes one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{what} ({type(error).__name__}: {reason(error)}); {remedy}") from error
