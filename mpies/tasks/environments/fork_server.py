"""The process beside the rank which forks one for each episode, and carries calls to these.

It imports the user's module once; an episode begins in a copy of it as it was then. So no episode can see
what another has done, or end it: what one draws, keeps in its module or breaks is its own. A call that takes
too long ends its episode's process, with all processes that this has started.

In come pickled requests, each after its length in 8 bytes; out go lines of JSON. It ends with its input.
What it has imported, the processes of all episodes carry along, so it imports no more than its kind needs.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import pickle
import resource
import select
import signal
import struct
import threading
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, BinaryIO

from mpies.errors import InputError
from mpies.signals import SIGNALS
from mpies.tasks.environments import contract, episode_process
from mpies.tasks.environments.children import Call, Children
from mpies.tasks.environments.descendants import adopt, kill_children
from mpies.tasks.environments.limits import Limits

if TYPE_CHECKING:
    from mpies.tasks.environments import agent_contract, tool_contract

LENGTH = struct.Struct("<Q")


@dataclass(frozen=True)
class Beginning:
    """What a process is started for."""

    limits: Limits
    text: str = ""
    """The user's class of plain text: FILE.py:CLASS or MODULE:CLASS."""
    factories: dict[str, str] = field(default_factory=dict)
    """Else: the user's classes of TRL's kind, by name,"""
    tools: list[str] = field(default_factory=list)
    """and functions."""
    agent: str = ""
    """Else: the user's agent, a function."""

    @property
    def names(self) -> str:
        """All of them, to speak of."""
        return self.agent or self.text or ", ".join([*self.factories.values(), *self.tools])

    @property
    def setting(self) -> str:
        """The full name of the one that they are set by."""
        if self.agent:
            from mpies.tasks.environments import agent_contract

            return agent_contract.SETTING
        if self.text:
            return contract.SETTING
        from mpies.tasks.environments import tool_contract

        return tool_contract.FACTORY if self.factories else tool_contract.TOOLS

    def load(self) -> contract.TextClass | tool_contract.ToolKit | agent_contract.Agent:
        """What episodes are begun from. Raises InputError."""
        if self.agent:
            from mpies.tasks.environments import agent_contract

            return agent_contract.Agent(self.agent)
        if self.text:
            return contract.TextClass(self.text)
        from mpies.tasks.environments import tool_contract

        return tool_contract.ToolKit(self.factories, self.tools)


@dataclass(frozen=True)
class Batch:
    """Calls to be made, and then episodes to be ended. Without calls, there is nothing to answer."""

    calls: list[Call]
    ended: list[int]


def packed(request: Beginning | Batch) -> bytes:
    """A request as it travels."""
    data = pickle.dumps(request)
    return LENGTH.pack(len(data)) + data


def main() -> None:
    status = 1
    try:
        _serve(*_own_pipes())
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        _leave(status)


def _leave(status: int) -> None:
    """With all that the user's module has started; a thread of its would keep this process."""
    try:
        kill_children(())
    finally:
        os._exit(status)


def _serve(requests: BinaryIO, answers: BinaryIO) -> None:
    _set_signals()
    adopt()
    beginning = _request(requests)
    if beginning is None:
        return
    try:
        with _no_longer_than_the_rank(requests):
            environment = beginning.load()
    except InputError as error:
        _say(answers, {"refused": str(error)})
        return
    _set_signals()  # whatever the user's module has made of them
    _raise_number_of_files()
    contract.seed_generators(0)  # loads NumPy's, so that no episode has to
    gc.collect()
    gc.freeze()  # pages that the collector does not touch stay common to all episodes
    children = Children(environment.start, beginning.limits, requests, answers)
    _say(answers, {})
    try:
        while (batch := _request(requests)) is not None:
            found = children.carry(batch.calls)
            children.end(batch.ended)
            if batch.calls:
                _say(answers, found)
    except (EOFError, BrokenPipeError):  # the rank has gone
        pass
    finally:
        children.end_all()


def _set_signals() -> None:
    """Those that are meant for the rank are heard, and nothing is done: a program that is started does not
    inherit that, as it would if they were ignored."""
    for number in SIGNALS:
        signal.signal(number, episode_process.hear)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)


@contextlib.contextmanager
def _no_longer_than_the_rank(requests: BinaryIO) -> Iterator[None]:
    """While something else than requests is waited for: end when the rank does."""
    over = threading.Event()

    def watch() -> None:
        poll = select.poll()
        poll.register(requests, 0)  # that the other end is closed is told in any case
        while not over.is_set():
            if poll.poll(100):
                _leave(1)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _own_pipes() -> tuple[BinaryIO, BinaryIO]:
    """The pipes to the rank, out of the way of what the user's code reads and prints."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    os.close(nothing)
    return requests, answers


def _request(requests: BinaryIO) -> Any:
    """The next one; None: there are no more."""
    head = requests.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    (length,) = LENGTH.unpack(head)
    data = requests.read(length)
    return pickle.loads(data) if len(data) == length else None


def _say(answers: BinaryIO, found: Any) -> None:
    answers.write(json.dumps(found).encode() + b"\n")
    answers.flush()


def _raise_number_of_files() -> None:
    """An episode takes one, and there may be thousands."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
