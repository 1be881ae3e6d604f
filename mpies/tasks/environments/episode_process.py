"""An episode's process: the user's environment, within limits, called by what comes through a socket."""

from __future__ import annotations

import json
import math
import os
import pickle
import resource
import signal
import struct
import threading
from collections.abc import Callable
from typing import Any

from mpies.signals import SIGNALS
from mpies.tasks.environments.contract import Said, UsersEpisode
from mpies.tasks.environments.descendants import adopt, die_with_parent
from mpies.tasks.environments.limits import FILE, Limits

LENGTH = struct.Struct("<Q")


def packed(name: str, arguments: dict[str, Any]) -> bytes:
    """A call as it travels."""
    data = pickle.dumps((name, arguments))
    return LENGTH.pack(len(data)) + data


def serve(connection: int, start: Callable[[], UsersEpisode], limits: Limits, had: int, nothing: int) -> None:
    """Answer calls until there are no more: the body of the process.

    `connection`: the number of a socket. `had`: bytes of addresses that it was forked with. `nothing`: the
    number of a file that takes what is printed.
    """
    _enclose(nothing)
    episode = start()
    requests = os.fdopen(connection, "rb", closefd=False)
    while head := requests.read(LENGTH.size):
        name, arguments = pickle.loads(requests.read(*LENGTH.unpack(head)))
        allowed = limits.of_call(name)
        _allow_seconds(allowed.cpu)
        _limit(resource.RLIMIT_AS, had + allowed.memory)
        line = _as_json(episode.answer(name, arguments)) + b"\n"
        _allow_seconds(None)  # until the next call, the time is the model's
        left = memoryview(line)
        while left:
            left = left[os.write(connection, left) :]


def _as_json(said: Said) -> bytes:
    """A line, of text that can be written everywhere: the user's may have half of a character."""
    try:
        return json.dumps(said, ensure_ascii=False).encode(errors="replace")
    except (TypeError, ValueError, RecursionError) as error:  # a value that a reward function asked for
        return json.dumps({"error": f"it cannot be written as JSON ({str(error)[:200]})"}).encode()


def hear(number: int, frame: object) -> None:
    """What comes of signals that are meant for the rank."""


def _enclose(nothing: int) -> None:
    """A process group of its own, which ends with the one that forked it; less to take, nothing to print."""
    os.setsid()
    adopt()
    die_with_parent()
    _let_signals_end_forks()
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_FSIZE, FILE)


def _let_signals_end_forks() -> None:
    """The signals end processes that the user's code forks, as is usual, also if they come at once."""
    before = threading.local()

    def hold() -> None:
        before.mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

    def release() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, before.mask)

    def heed() -> None:
        for number in SIGNALS:
            if signal.getsignal(number) is hear:
                signal.signal(number, signal.SIG_DFL)
        release()

    os.register_at_fork(before=hold, after_in_parent=release, after_in_child=heed)


def address_space() -> int:
    """Bytes that this process has."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return 2 * 2**30


def _allow_seconds(seconds: int | None) -> None:
    """So many more of CPU time, from now on; then the kernel ends the process. None: any number."""
    if seconds is None:
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (hard, hard))
        return
    spent = resource.getrusage(resource.RUSAGE_SELF)
    _limit(resource.RLIMIT_CPU, math.ceil(spent.ru_utime + spent.ru_stime) + seconds)


def _limit(what: int, value: int) -> None:
    """Set a soft limit, as far as the hard one allows."""
    _, hard = resource.getrlimit(what)
    resource.setrlimit(what, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))
