"""A block's episodes of agents: each turn is a request that an agent makes, and its answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mpies.engines.base import Encoder
from mpies.engines.tools import Chat, Message
from mpies.errors import InputError
from mpies.tasks.environments.contract import Said
from mpies.tasks.environments.nursery import Nursery
from mpies.tasks.environments.stage import ProcessStage
from mpies.tasks.episodes import TOKENS, TURNS, Episode, Reply, Turn

TOLD = ("role", "content", "tool_calls", "name")  # of a message; its agent is not told what was thought
REFUSED = 16  # requests of an episode that no prompt can be made of
OVER = {
    TURNS: "this episode has had all its answers (task.max_turns)",
    TOKENS: "this request leaves no room for an answer (task.episode_tokens)",
}


@dataclass(frozen=True)
class Answered:
    """An answer as its agent gets it. `why` it ended, as OpenAI names it; `used`: its tokens."""

    message: Message
    why: str
    used: int
    calls: int = 0
    bad_calls: int = 0


@dataclass
class Heard:
    """What was said in an episode: requests that go on with the one before are told once."""

    messages: list[Message] = field(default_factory=list)
    asked: Said = field(default_factory=dict)
    """The request that waits for its answer."""
    refused: int = 0
    _first: int = 0  # of the messages, where the conversation begins that goes on

    def ask(self, asked: Said) -> None:
        known = [{k: v for k, v in one.items() if k in TOLD} for one in self.messages[self._first :]]
        if asked["messages"][: len(known)] == known:
            self.messages += asked["messages"][len(known) :]
        else:
            self._first = len(self.messages)
            self.messages += asked["messages"]
        self.asked = asked


class AgentStage(ProcessStage):
    """`text`: what requests are encoded with; None: none will be answered."""

    def __init__(self, nursery: Nursery, episodes: Sequence[Episode], text: Encoder | None):
        super().__init__(nursery, episodes)
        self._text = text
        self._heard = [Heard() for _ in episodes]

    def begin(self) -> dict[int, Reply]:
        return self._gone_on(self.beginnings, {})

    def step(self, answers: dict[int, Turn]) -> dict[int, Reply]:
        read = {i: self._read(turn, self._heard[i].asked) for i, turn in answers.items()}
        told = {}
        for i, one in read.items():
            self._heard[i].messages.append(one.message)
            tokens = [self._tokens(answers[i].prompt), one.used]
            told[i] = {"answer": {"message": one.message, "why": one.why, "tokens": tokens}}
        return self._gone_on(told, read)

    def finish(self) -> None:
        """Agents over a limit are answered no more; what they return then counts."""
        cut = {i: {"over": OVER[one.ended]} for i, one in enumerate(self.episodes) if one.ended in OVER}
        for i, said in self.called("run", cut).items():
            if "error" in said:
                said = {"error": f"{said['error']}, when told: {cut[i]['over']}"}
            self.episodes[i].take(self._ended(i, said, done=False))

    def _gone_on(self, told: dict[int, dict[str, Any]], read: dict[int, Answered]) -> dict[int, Reply]:
        """What agents ask or return when they are told this. Requests that no prompt can be made of are
        refused, and their agents go on."""
        replies = {}
        while told:
            found = self.called("run", told)
            told = {}
            for i, said in found.items():
                why = self._problem_of(said)
                if why and self._heard[i].refused < REFUSED:
                    self._heard[i].refused += 1
                    told[i] = {"refusal": why}
                else:
                    said = {"error": f"run has asked what cannot be told the model: {why}"} if why else said
                    replies[i] = self._reply(i, said, read.get(i))
        return replies

    def _problem_of(self, said: Said) -> str:
        """Why no prompt can be made of a request, in words."""
        if self._text is None or "messages" not in said:
            return ""
        try:
            return "" if self._text.encode(_chat(said)) else "it has no tokens"
        except InputError as error:
            return str(error)

    def _reply(self, i: int, said: Said, answered: Answered | None) -> Reply:
        counts = (answered.calls, answered.bad_calls) if answered else (0, 0)
        if "messages" not in said:
            return self._ended(i, said, True, *counts)
        self._heard[i].ask(said)
        return Reply(_chat(said), calls=counts[0], bad_calls=counts[1])

    def _ended(self, i: int, said: Said, done: bool, calls: int = 0, bad_calls: int = 0) -> Reply:
        told = self._heard[i].messages or self.episodes[i].start.row.get("prompt") or ""
        if "error" in said:
            return Reply(told, error=said["error"], calls=calls, bad_calls=bad_calls)
        self.episodes[i].metrics.update(said["metrics"])
        return Reply(told, said["reward"], done, calls=calls, bad_calls=bad_calls)

    def _read(self, turn: Turn, asked: Said) -> Answered:
        """An answer, as short as it was asked for: greedy tokens are the same, whatever follows."""
        assert self._text and isinstance(turn.prompt, Chat)
        most = asked["most"]
        ids, text, cut = turn.ids, turn.text, turn.truncated
        if most and most < len(ids):
            ids, cut = ids[:most], True
            text = str(self._text.tools.tokenizer.decode(ids, skip_special_tokens=True))
        ends = [place for stop in asked["stops"] if (place := text.find(stop)) >= 0]
        if ends:
            text, cut = text[: min(ends)], False
        message: Message = {"role": "assistant", "content": text}
        problems: list[str] = []
        if turn.prompt.tools:
            message, problems = self._text.tools.read(ids, text, turn.prompt)
        calls = len(message.get("tool_calls", []))
        why = "tool_calls" if calls else "length" if cut else "stop"
        return Answered(message, why, len(ids), calls + len(problems), len(problems))

    def _tokens(self, prompt: Any) -> int:
        assert self._text
        return len(self._text.encode(prompt))


def _chat(asked: Said) -> Chat:
    return Chat(asked["messages"], asked["tools"])
