"""What an agent is, and how it is run, in its episode's own process.

    def run(row, base_url, api_key) -> reward                       # or {"reward": reward, name: number, ...}

It may be `async`. At `base_url` there is an endpoint of OpenAI's kind, whose only model is the member. The
rank calls the process with an answer, and is told the next request, or what the agent has returned: so all
agents of a block ask in step, whenever their requests come.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mpies.tasks import users_code
from mpies.tasks.environments import chat_completions
from mpies.tasks.environments.contract import (
    NonsenseError,
    Said,
    UsersEpisode,
    checked_number,
    seed_generators,
    shown,
)
from mpies.tasks.environments.endpoint import LOOPBACK, Endpoint, Pending
from mpies.tasks.environments.tool_contract import takes_by_name

SETTING = "task.agent"
RETURNED = "needed is a reward: a number, or a mapping of names to numbers with `reward`"


@dataclass(frozen=True)
class Returned:
    """What an agent has returned."""

    value: Any


class Agent:
    """The user's function. Raises InputError if it is not there."""

    def __init__(self, name: str):
        self.run = users_code.load(name, SETTING)

    def start(self) -> AgentEpisode:
        return AgentEpisode(self.run)


class AgentEpisode(UsersEpisode):
    """One run of an agent, in a thread beside the one that the rank calls."""

    def __init__(self, run: Callable[..., Any]):
        super().__init__()
        self.run = run
        self.endpoint: Endpoint
        self.pending: Pending | None = None
        self.over = ""
        """Why no more is answered."""
        self.answers = 0

    def _run(self, **told: Any) -> Said:
        """Told a `row` and a `seed`, it begins; told the `answer` to its request, a `refusal` of it, or that
        all is `over`, it goes on: what it asks next, or what it has returned."""
        if "row" in told:
            self._begin(told["row"], told["seed"])
        elif "answer" in told:
            self._answer(**told["answer"])
        else:
            self.over = told.get("over", "")
            self._take().refuse(self.over or told["refusal"])
        return self._heard()

    def _begin(self, row: dict[str, Any], seed: int) -> None:
        seed_generators(seed)
        self.endpoint = Endpoint()
        for name in ("no_proxy", "NO_PROXY"):  # a cluster's proxy would be asked for the loopback address
            os.environ[name] = ",".join(filter(None, [os.environ.get(name), LOOPBACK]))
        threading.Thread(target=self._make_run, args=(row, seed), daemon=True).start()

    def _make_run(self, row: dict[str, Any], seed: int) -> None:
        more = {"seed": seed} if takes_by_name(self.run, "seed") else {}
        try:
            found = self.value(self.run(row, self.endpoint.url, self.endpoint.token, **more))
            self.endpoint.events.put(Returned(found))
        except BaseException as error:  # whatever the agent does to end itself, too
            self.endpoint.events.put(error)

    def _take(self) -> Pending:
        """The request that the rank speaks of."""
        pending, self.pending = self.pending, None
        assert pending  # the rank knows of one
        return pending

    def _answer(self, message: dict[str, Any], why: str, tokens: list[int]) -> None:
        pending = self._take()
        if pending.left:
            raise NonsenseError("run has not waited for an answer; requests need to have no time-out")
        self.answers += 1
        pending.answer(chat_completions.answered(pending.question, message, self.answers, why, tokens))

    def _heard(self) -> Said:
        """What comes next."""
        while True:
            event = self.endpoint.events.get()
            if isinstance(event, BaseException):
                raise event
            if isinstance(event, Returned):
                return _rewarded(event.value)
            if not self.over:
                self.pending = event
                asked = event.question
                return {
                    "messages": asked.messages,
                    "tools": asked.tools,
                    "most": asked.most,
                    "stops": asked.stops,
                }
            event.refuse(self.over)


def _rewarded(found: Any) -> Said:
    if not isinstance(found, Mapping):
        return {"reward": _number(found, "run's value"), "metrics": {}}
    numbers = {str(name)[:100]: _number(value, f"run's {name}") for name, value in found.items()}
    if "reward" not in numbers:
        raise NonsenseError(f"run returned {shown(found)}; {RETURNED}")
    return {"reward": numbers.pop("reward"), "metrics": numbers}


def _number(found: Any, what: str) -> float:
    if found is None:
        raise NonsenseError(f"{what} is None; {RETURNED}")
    return checked_number(found, what)
