"""The vLLM engine: prompts to a vLLM in this process, whose parameters are the live weights."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mpies.engines import likelihood
from mpies.engines.base import Completions, Conversations, Draws, Engine, Prompt, owners
from mpies.engines.hf import HfEngine
from mpies.engines.text import Text
from mpies.engines.vllm import INSTEAD
from mpies.engines.vllm.members import of_member
from mpies.errors import InputError, reason

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams

    from mpies.engines.vllm.host import Host

# Mean difference of log-probabilities, nat, up to which two ways of computing are one model.
ALIKE = {2: 0.3, 4: 0.01}
PROBE = 16  # tokens


class Told(NamedTuple):
    """One answer: its prompt, its tokens, and at each place {token: log-probability} of some tokens."""

    prompt: list[int]
    answer: list[int]
    places: list[dict[int, float]]
    member: int = 0
    """Whose of the block."""


class VllmEngine(Engine):
    """Decodes with vLLM; `log_probabilities` are computed by `hf`, whose model has the same memory.

    Nothing that was computed from weights is used with others: they are packed anew once they were written,
    and a finished request's keys and values are read again in the next turn of its conversation only. vLLM
    looks for them by tokens and a salt, which each conversation has of its own, and every other request. So
    nothing needs clearing when the weights change. Prompts have up to as many tokens, with their answers, as
    `host` has room for.
    """

    def __init__(
        self,
        host: Host,
        text: Text,
        hf: HfEngine,
        *,
        max_new_tokens: int,
    ):
        assert host.llm is not None, "it holds the weights already"
        self.llm, self.packing = host.llm, host.packing
        self.held = host.cache + host.packing.bytes
        self.in_blocks = host.noise is not None
        self.text = text
        self.hf = hf
        self.max_new_tokens = max_new_tokens
        self.most_tokens = host.room.tokens
        self.most_given = min(filter(None, (self.most_tokens, hf.most_given)))
        self.cached = host.turns
        """Does vLLM look for what it has read before?"""
        self._plays, self._alone = itertools.count(1), itertools.count()
        self._told: set[str] = set()
        """Salts of the conversations that are played."""
        self._refuse_other_answers()
        self.keeps = self.cached and self._goes_on()

    def keep(self) -> int | None:
        """A number that no conversations before have had."""
        self._told.clear()
        return next(self._plays) if self.keeps else None

    def generate(self, prompts: list[Prompt], turns: Conversations | None = None) -> Completions:
        return self._answered(prompts, [self.parameters()] * len(prompts), turns)

    def sample(self, prompts: list[Prompt], draws: Draws, turns: Conversations | None = None) -> Completions:
        from mpies.engines.vllm.plugins import CounterBased

        each = [self.parameters(CounterBased.parameters(draws, row)) for row in range(len(prompts))]
        return self._answered(prompts, each, turns)

    def log_probabilities(
        self,
        prompts: list[Prompt],
        answers: list[list[int]],
        temperature: float = 1.0,
        *,
        members: list[int] | None = None,
        after: list[int] | None = None,
    ) -> list[np.ndarray]:
        """Of a block's members, by vLLM, which alone knows their noise: at temperature 1."""
        if members is None or not self.in_blocks:
            return self.hf.log_probabilities(prompts, answers, temperature, after=after)
        assert temperature == 1, "vLLM tells log-probabilities of its own logits"
        parts = list(zip(answers, [0] * len(prompts) if after is None else after, strict=True))
        before = [self.text.encode(p) + a[:place] for p, (a, place) in zip(prompts, parts, strict=True)]
        return self.read(before, [answer[place:] for answer, place in parts], members)

    def read(
        self, prompts: list[list[int]], answers: list[list[int]], members: list[int]
    ) -> list[np.ndarray]:
        """Log-probabilities of given answers' tokens, which vLLM is made to say, each by its member: nat."""
        from mpies.engines.vllm.plugins import Forced

        if not prompts:
            return []
        longest = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
        if longest > self.most_tokens:
            raise InputError(
                f"a prompt has {longest} tokens with its answer, but vLLM was started for up to"
                f" {self.most_tokens}"
            )
        each = [
            self.parameters(
                of_member(member) | Forced.parameters(answer),
                max_tokens=len(answer),
                logprobs=0,
                stop_token_ids=None,
            )
            for member, answer in zip(members, answers, strict=True)
        ]
        outputs = self._run(prompts, each)
        return [_of_tokens(answer, output) for answer, output in zip(answers, outputs, strict=True)]

    def generate_each(
        self, prompts: list[Prompt], members: list[int], turns: Conversations | None = None
    ) -> Completions:
        return self._answered(prompts, self._of_members(members), turns)

    def tell(self, prompts: list[list[int]], members: int, tokens: int, likeliest: int) -> list[Told]:
        """Each member's answers to token ids, so long, and at each place log-probabilities of tokens, nat.

        Of those that are likeliest: from vLLM's own logits.
        """
        options = {"max_tokens": tokens, "logprobs": likeliest, "stop_token_ids": None}
        whose, given, told = owners(len(prompts), members), prompts * members, []
        each = self._of_members(whose, **options)
        for prompt, member, output in zip(given, whose, self._run(given, each), strict=True):
            (answer,) = output.outputs
            places = [{token: one.logprob for token, one in place.items()} for place in answer.logprobs]
            told.append(Told(prompt, list(answer.token_ids), places, member))
        return told

    def _answered(
        self, prompts: list[Prompt], parameters: list[SamplingParams], turns: Conversations | None
    ) -> Completions:
        salts = [f"{turns.kept} {number}" for number in turns.numbers] if turns else None
        return self.text.completions(self._answer([self.text.encode(p) for p in prompts], parameters, salts))

    def _answer(
        self, encoded: list[list[int]], parameters: list[SamplingParams], salts: list[str] | None
    ) -> list[list[int]]:
        """Tokens of the answers, in the prompts' order, however vLLM mixes them."""
        if not encoded:
            return []
        longest = max(map(len, encoded))
        if longest + self.max_new_tokens > self.most_tokens:
            raise InputError(
                f"a prompt has {longest} tokens, but vLLM was started for prompts of up to"
                f" {self.most_tokens - self.max_new_tokens}"
            )
        outputs = self._run(encoded, parameters, salts)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def _run(
        self,
        encoded: list[list[int]],
        parameters: list[SamplingParams],
        salts: list[str] | None = None,
    ) -> list[RequestOutput]:
        """`salts`: of the conversations that the prompts are turns of; without, nothing goes on from them."""
        self.packing.refresh()
        given: list[dict[str, Any]] = [{"prompt_token_ids": tokens} for tokens in encoded]
        if not self.cached:
            return self.llm.generate(given, parameters, use_tqdm=False)
        salts = salts or [f"alone {next(self._alone)}" for _ in encoded]
        salted = [one | {"cache_salt": salt} for one, salt in zip(given, salts, strict=True)]
        outputs = self.llm.generate(salted, parameters, use_tqdm=False)
        for salt, output in zip(salts, outputs, strict=True):
            if output.num_cached_tokens and salt not in self._told:
                raise InputError(f"engine.name: vllm goes on from what was another's prompt; {INSTEAD}")
        self._told.update(salts)
        return outputs

    def parameters(self, extra: dict | None = None, **others: Any) -> SamplingParams:
        """How every prompt is answered; `others` are vLLM's own words for what is otherwise."""
        from vllm import SamplingParams

        options = {
            "temperature": 0.0,  # greedy; sampled tokens are chosen by a logits processor
            "max_tokens": self.max_new_tokens,
            "stop_token_ids": sorted(self.text.stops),
            "ignore_eos": True,  # it is among the stop tokens, if the hf engine stops there
            "detokenize": False,
            "extra_args": extra,
        }
        return SamplingParams(**(options | others))

    def _of_members(self, members: list[int], **others: Any) -> list[SamplingParams]:
        """Of requests that are these members'."""
        if not self.in_blocks:
            return [self.parameters(**others)] * len(members)
        own = {member: self.parameters(of_member(member), **others) for member in set(members)}
        return [own[member] for member in members]

    def _probe(self, count: int) -> list[int]:
        """So many tokens from all over the vocabulary."""
        vocabulary = len(next(self.hf.model.get_input_embeddings().parameters()))
        return [vocabulary * (i + 1) // (count + 2) for i in range(count)]

    def _refuse_other_answers(self) -> None:
        """Raise InputError if vLLM and transformers do not compute the same with the same weights."""
        from vllm import SamplingParams

        ids = self._probe(min(PROBE, self.most_tokens - 1))
        asked = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        try:
            (output,) = self._run([ids], [asked])
        except Exception as error:
            why = f"{type(error).__name__}: {reason(error)}"
            raise InputError(
                f"engine.name: vllm cannot compute this model ({why}); use engine.name=hf"
            ) from error
        found = [place[token].logprob for token, place in zip(ids[1:], output.prompt_logprobs[1:])]
        (expected,) = likelihood.of(self.hf.model, [ids[:1]], [ids[1:]])
        apart = float(np.abs(np.array(found) - expected).mean())
        if not apart <= ALIKE[self.hf.model.dtype.itemsize]:
            raise InputError(
                "engine.name: vllm computes this model otherwise than transformers does: log-probabilities"
                f" are {apart:.2g} apart; use engine.name=hf"
            )

    def _goes_on(self) -> bool:
        """Is what goes on from a prefix that was read before as good as reading it anew?

        It costs nothing but time if not; nor if no conversation fills a block of vLLM's cache.
        """
        block = self.llm.llm_engine.vllm_config.cache_config.block_size
        if block + 2 > self.most_tokens:
            return False
        ids = self._probe(block + 1)
        asked = self.parameters(max_tokens=1, logprobs=PROBE, stop_token_ids=None)
        _, again, anew = (self._run([ids], [asked], [salt])[0] for salt in ("first", "first", "other"))
        found, right = (one.outputs[0].logprobs[0] for one in (again, anew))
        apart = [abs(found[token].logprob - right[token].logprob) for token in found if token in right]
        return again.num_cached_tokens > 0 and bool(np.mean(apart) <= ALIKE[self.hf.model.dtype.itemsize])


def _of_tokens(told: list[int], output: RequestOutput) -> np.ndarray:
    """Log-probabilities of the answer's tokens, which are those that were told: nat, float64 (tokens,)."""
    (answer,) = output.outputs
    if list(answer.token_ids) != told:
        raise InputError(f"engine.name: vllm goes on with other tokens than it is told; {INSTEAD}")
    places = zip(told, answer.logprobs, strict=True)
    return np.array([place[token].logprob for token, place in places], dtype=np.float64)
