"""Some log-probabilities of a model, computed in several ways, and up to where they are the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel

from mpies.engines import likelihood
from mpies.engines.decode import decode
from mpies.engines.reading import Reading, take_shifts
from mpies.engines.turns import Past
from mpies.engines.vision import Inputs, for_rows


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


@dataclass(frozen=True)
class Probe:
    """Two prompts with given answers: the first answer ends early, the second is told to its end."""

    prompts: list[list[int]]
    answers: list[list[int]]
    ends: int
    """Tokens of the first answer."""
    inputs: list[Inputs] = field(default_factory=list)
    """What the model is given of the prompts' images, if they have any."""

    @classmethod
    def of(cls, model: PreTrainedModel) -> Probe:
        """Of tokens from all over the vocabulary. The second prompt is shorter: it is padded.

        The first has more tokens than a block of two members has rows: what is as long is one or the other.
        """
        vocabulary, count = model.config.get_text_config().vocab_size, 13
        ids = [vocabulary * (i + 1) // (count + 2) for i in range(count)]
        return cls([ids[:5], ids[5:7]], [ids[7:10], ids[10:]], 2)

    @classmethod
    def of_images(cls, model: PreTrainedModel, prompts: list[list[int]], inputs: list[Inputs]) -> Probe:
        """Of two prompts with images, and tokens that stand for none. The second prompt is the shorter."""
        order = sorted((0, 1), key=lambda i: -len(prompts[i]))
        text, vocabulary = model.config.get_text_config(), model.config.get_text_config().vocab_size
        special = {value for key, value in vars(model.config).items() if key.endswith("token_id")}
        special |= {value for key, value in vars(model.config).items() if key.endswith("token_index")}
        special |= {value for key, value in vars(text).items() if key.endswith("token_id")} - {None}
        ids = [token for i in range(64) if (token := vocabulary * (i + 1) // 66) not in special]
        answers = ids[:: max(1, len(ids) // 6)][:6]
        return cls([prompts[i] for i in order], [answers[:3], answers[3:]], 2, [inputs[i] for i in order])

    @property
    def second(self) -> Probe:
        """That prompt alone."""
        return Probe(self.prompts[1:], self.answers[1:], len(self.answers[1]), self.inputs[1:])

    @property
    def tokens(self) -> list[int]:
        """Those of the answers: their log-probabilities are compared at every place."""
        return [token for answer in self.answers for token in answer]

    def of_answer(self, found: np.ndarray) -> np.ndarray:
        """Of log-probabilities of all tokens, (places, tokens), the second answer's own: (places,)."""
        return found[:, -len(self.answers[1]) :].diagonal()


@torch.inference_mode()
def by_one_forward(model: PreTrainedModel, probe: Probe) -> np.ndarray:
    """By a forward pass over the second prompt and its answer, without cache, padding or other rows.

    Log-probabilities of the probe's tokens at each of the answer's places: float64 (places, tokens).
    """
    prompt, answer = probe.prompts[1], probe.answers[1]
    ids = torch.tensor([prompt + answer], device=model.device)
    given = for_rows(probe.inputs[1], 1, ids.shape[1], model) if probe.inputs else {}
    logits = model(ids, use_cache=False, **given).logits[0, len(prompt) - 1 : -1]
    take_shifts(model, ids[:, 0])
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
    prompts, inputs = probe.prompts * members, probe.inputs * members
    decode(model, prompts, stops, answers.shape[1], lambda rows: on_rows(rows // count), tell, inputs)
    return found.numpy()


def read(
    model: PreTrainedModel,
    probe: Probe,
    members: int = 1,
    on_rows: Callable[[torch.Tensor], None] = lambda members: None,
    *,
    at_once: bool = False,
) -> np.ndarray:
    """Log-probabilities of the second answer's own tokens, as given answers are read: (members, places).

    `on_rows` gets the rows' members.
    """
    count = len(probe.prompts)
    found = likelihood.of(
        model,
        probe.prompts * members,
        probe.answers * members,
        at_once=at_once,
        inputs=probe.inputs * members,
        on_rows=lambda rows: on_rows(rows // count),
    )
    return np.stack(found[1::count])


@torch.inference_mode()
def gone_on(model: PreTrainedModel, probe: Probe) -> np.ndarray:
    """Log-probabilities of the probe's tokens at the second answer's last two places, as a conversation's.

    It goes on, by a token, from what was kept of its prompt: beside another, longer one, of which the last
    tokens were written anew, and alone: float64 (2, places, tokens).
    """
    (longer, prompt), (other, answer) = probe.prompts, probe.answers
    last = answer[-2]
    found = []
    for now, kept in (
        ([longer[:3] + other, prompt + answer[:-2]], [3, len(prompt)]),
        ([prompt + answer[:-2]], [len(prompt)]),
    ):
        first = Reading(model, probe.prompts[-len(now) :], 0)
        first.begin()
        part = first.part(first.rows)
        pasts = [Past(part, row, tokens) for row, tokens in enumerate(kept)]
        second = Reading(model, now, 1, pasts=pasts)
        step = torch.tensor([[last]] * len(now), device=model.device)
        logits = [second.begin()[-1, -1], second.go_on(step)[-1, -1]]
        chances = torch.log_softmax(torch.stack(logits).float(), dim=-1)
        found.append(chances[:, probe.tokens].double().cpu().numpy())
    return np.stack(found)


def spread(chances: np.ndarray) -> float:
    """The standard deviation of tokens' log-probabilities at a place: (places, tokens)."""
    return float(chances.std(axis=1).mean())


def rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))
