"""Episodes: what a model and a task say to one another, turn by turn, all episodes of a block together.

A task without an environment has episodes of one turn: its prompt, and an answer.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from mpies.engines.base import Completions, Conversations, Draws, Encoder, Engine, Prompt
from mpies.errors import InputError

Row = dict[str, Any]
Tokens = Callable[[Prompt], list[int]]
Clock = Callable[[str], contextlib.AbstractContextManager]
"""Takes the name of one of the phases (see phases.py)."""

# How an episode can end: by itself, at a limit of turns or of tokens, or because its environment failed.
DONE, TURNS, TOKENS, FAILED = "done", "turns", "tokens", "failed"


@dataclass(frozen=True)
class Start:
    """What an episode begins with."""

    row: Row
    seed: int = 0
    """Of what its environment draws: 0 to 2^32 - 1."""


@dataclass(frozen=True)
class Turn:
    """What the model was given, and its answer with the tokens that were generated."""

    prompt: Prompt
    text: str
    ids: list[int]
    truncated: bool = False
    """Did the answer end because it was as long as it may be?"""


@dataclass(frozen=True)
class Reply:
    """What a stage says to an answer, or to begin with."""

    conversation: Prompt
    """All that was said so far."""
    reward: float = 0.0
    done: bool = False
    error: str = ""
    """What went wrong, in a line: the episode is over."""
    calls: int = 0
    """Of tools."""
    bad_calls: int = 0
    """Of these, those that came to an error."""


@dataclass
class Episode:
    start: Start
    conversation: Prompt = ""
    turns: list[Turn] = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)
    ended: str = ""
    """How; empty: it goes on."""
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def prompt(self) -> Prompt:
        """What it began with."""
        return self.replies[0].conversation if self.replies else ""

    @property
    def text(self) -> str:
        """The last answer."""
        return self.turns[-1].text if self.turns else ""

    @property
    def said(self) -> str:
        """All answers, one after another."""
        return "\0".join(turn.text for turn in self.turns)

    @property
    def truncated(self) -> bool:
        """Was its last answer as long as it may be?"""
        return bool(self.turns) and self.turns[-1].truncated

    @property
    def ids(self) -> list[int]:
        """All tokens that the model has generated."""
        return [token for turn in self.turns for token in turn.ids]

    @property
    def tokens(self) -> int:
        return sum(len(turn.ids) for turn in self.turns)

    @property
    def reward(self) -> float:
        """The sum of all that its environment has given."""
        return math.fsum(reply.reward for reply in self.replies)

    @property
    def error(self) -> str:
        return self.replies[-1].error if self.replies else ""

    @property
    def completion(self) -> Prompt:
        """All that was said after the prompt: text, or messages."""
        return self.conversation[len(self.prompt) :]

    def take(self, reply: Reply) -> None:
        """A stage has said this."""
        self.replies.append(reply)
        self.conversation = reply.conversation
        if reply.error:
            self.ended = FAILED
        elif reply.done:
            self.ended = DONE


@dataclass(frozen=True)
class EpisodeLimits:
    """turns: of the model; tokens: of a whole conversation; new: of an answer. 0: no limit."""

    turns: int = 1
    tokens: int = 0
    new: int = 0


@dataclass(frozen=True)
class Tally:
    """What some episodes came to, in numbers."""

    tokens: int = 0
    turns: int = 0
    calls: int = 0
    bad_calls: int = 0
    cut: int = 0
    """Episodes that a limit has ended."""
    failed: int = 0
    """Episodes whose environment has failed."""
    replies: int = 0
    """64 bits of the SHA-256 of all that environments have answered; 0: there are none."""
    complaint: str = ""
    """What the first environment that failed has failed with."""

    @classmethod
    def of(cls, episodes: Sequence[Episode], in_environments: bool) -> Tally:
        replies = [reply for one in episodes for reply in one.replies]
        failed = [one for one in episodes if one.ended == FAILED]
        return cls(
            tokens=sum(one.tokens for one in episodes),
            turns=sum(len(one.turns) for one in episodes),
            calls=sum(reply.calls for reply in replies),
            bad_calls=sum(reply.bad_calls for reply in replies),
            cut=sum(one.ended in (TURNS, TOKENS) for one in episodes),
            failed=len(failed),
            replies=_digest(replies) if in_environments else 0,
            complaint=failed[0].error if failed else "",
        )


def _digest(replies: list[Reply]) -> int:
    total = hashlib.sha256(repr([(one.conversation, one.reward, one.done) for one in replies]).encode())
    return int.from_bytes(total.digest()[:8], "little")


class Environments(Protocol):
    """What a task's episodes are played in."""

    setting: str
    """The full name of the setting that names them."""
    limits: EpisodeLimits
    failure_reward: float
    """Of an episode whose environment has failed."""
    openings: list[Prompt]
    """What some episodes began with, when it was tried at the start."""

    def open(
        self, episodes: Sequence[Episode], text: Encoder | None
    ) -> contextlib.AbstractContextManager[Stage]:
        """The episodes' stage, as long as they are played and scored. `text`: what prompts are encoded with;
        None: no answer will be read."""


class Stage(Protocol):
    """Where a block's episodes are played; its methods take and give what all of them come to, by number."""

    def begin(self) -> dict[int, Reply]: ...

    def step(self, answers: dict[int, Turn]) -> dict[int, Reply]: ...

    def finish(self) -> None:
        """All episodes are over. What they still had to say is in their records."""

    @property
    def environments(self) -> Sequence[Any] | None:
        """Each episode's, as reward functions see it; None: they are not for them."""


class SingleAnswers:
    """The stage of tasks without an environment: a prompt, and whatever the answer is, it was the last."""

    def __init__(self, episodes: Sequence[Episode]):
        self.episodes = episodes

    def begin(self) -> dict[int, Reply]:
        return {i: Reply(one.start.row["prompt"]) for i, one in enumerate(self.episodes)}

    def step(self, answers: dict[int, Turn]) -> dict[int, Reply]:
        return {i: Reply(self.episodes[i].conversation, done=True) for i in answers}

    def finish(self) -> None:
        pass

    @property
    def environments(self) -> Sequence[Any] | None:
        return None


class Answering(Protocol):
    def __call__(self, which: list[int], prompts: list[Prompt], before: list[int]) -> Completions:
        """The model's answers in the episodes with these numbers, in which it has generated so many tokens
        before."""


def play(
    episodes: list[Episode],
    stage: Stage,
    answer: Answering,
    limits: EpisodeLimits,
    tokens_of: Tokens,
    clock: Clock = lambda phase: contextlib.nullcontext(),
) -> None:
    """Play the episodes to their ends, all of them in step: each turn is one call of `answer`.

    `tokens_of`: a prompt's tokens. Nothing that one episode comes to depends on another's, but for the
    company in which answers are generated.
    """
    with clock("reward"):
        replies = stage.begin()
    while True:
        for i, reply in replies.items():
            episodes[i].take(reply)
        with clock("generate"):
            live = [i for i, one in enumerate(episodes) if _goes_on(one, limits, tokens_of)]
            if not live:
                break
            prompts = [episodes[i].conversation for i in live]
            said = answer(live, prompts, [episodes[i].tokens for i in live])
        turns = [Turn(*one) for one in zip(prompts, said.texts, said.ids, said.truncated, strict=True)]
        for i, turn in zip(live, turns, strict=True):
            episodes[i].turns.append(turn)
        with clock("reward"):
            replies = stage.step(dict(zip(live, turns, strict=True)))
    with clock("reward"):
        stage.finish()


def _goes_on(episode: Episode, limits: EpisodeLimits, tokens_of: Tokens) -> bool:
    """Is there another turn? If not, it is noted why. A conversation that cannot be written has failed."""
    if not episode.ended and limits.turns and len(episode.turns) >= limits.turns:
        episode.ended = TURNS
    if not episode.ended and limits.tokens:
        try:
            if _is_full(episode, limits, tokens_of):
                episode.ended = TOKENS
        except InputError as error:  # the model's template may refuse what its own answer led to
            episode.take(Reply(episode.conversation, error=str(error)))
    return not episode.ended


def answers_of(engine: Engine, starts: int | None, draws: Draws | None) -> Answering:
    """An engine's answers by the members of a block, each of which has so many episodes, one member's after
    another's; None: by the unperturbed model, sampled if there are `draws`.

    What the engine keeps of these episodes from turn to turn goes when this does.
    """
    kept = engine.keep()

    def answer(which: list[int], prompts: list[Prompt], before: list[int]) -> Completions:
        turns = Conversations(kept, which) if kept else None
        if starts:
            return engine.generate_each(prompts, [i // starts for i in which], turns)
        if draws is None:
            return engine.generate(prompts, turns)
        own = draws.part(np.array(which))
        return engine.sample(prompts, replace(own, before=np.array(before, dtype=np.uint64)), turns)

    return answer


def figures(played: list[Episode]) -> dict[str, np.ndarray]:
    """Figures of each episode, by name: float64 (episodes,), NaN where it has none."""
    own = dict.fromkeys(name for one in played for name in one.metrics)
    return {name: np.array([one.metrics.get(name, math.nan) for one in played]) for name in own} | {
        "turns": np.array([float(len(one.turns)) for one in played]),
        "cut": np.array([float(one.ended in (TURNS, TOKENS)) for one in played]),
        "failed": np.array([float(one.ended == FAILED) for one in played]),
        "calls": np.array([float(sum(reply.calls for reply in one.replies)) for one in played]),
        "bad_calls": np.array([float(sum(reply.bad_calls for reply in one.replies)) for one in played]),
    }


def _is_full(episode: Episode, limits: EpisodeLimits, tokens_of: Tokens) -> bool:
    """Is there no room for another answer?"""
    return len(tokens_of(episode.conversation)) + limits.new > limits.tokens
