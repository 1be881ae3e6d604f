"""Episodes' processes, as the process sees them that forks them: called in parallel, timed, killed."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import resource
import selectors
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, BinaryIO

from mpies.tasks.environments import episode_process
from mpies.tasks.environments.contract import Said, UsersEpisode
from mpies.tasks.environments.descendants import children_of, kill_children, kill_descendants, wait
from mpies.tasks.environments.limits import AT_ONCE, REPLY, Limits

LEAVING = 1.0  # seconds that processes have to end by themselves, all together, when their input ends
ROOM = 256  # numbers for files that threads of the user's module open later


@dataclass(frozen=True)
class Call:
    """Of an episode's environment. The first one begins the episode."""

    key: int
    """The episode's number."""
    name: str
    arguments: dict[str, Any]


class Children:
    """The processes, by their episodes' numbers."""

    def __init__(
        self, start: Callable[[], UsersEpisode], limits: Limits, requests: BinaryIO, answers: BinaryIO
    ):
        self._start = start
        self._limits = limits
        self._requests = requests
        self._pipes = requests.fileno(), answers.fileno()  # which are not for the children
        self._children: dict[int, Child] = {}
        self._others = children_of(os.getpid())
        """Processes that the user's module has started when it was imported, and what cannot be killed."""
        self._nothing = os.open(os.devnull, os.O_RDWR)
        self._lowest = lowest_of_sockets()
        """Of the numbers of sockets: above all files of the user's module. So an episode's process closes the
        others' by one call: thousands of calls in each of thousands would take long."""
        self._highest = self._lowest

    def carry(self, calls: list[Call]) -> list[Said]:
        """Make the calls, some at a time. Each one's answer, in their order; its `machine` says that no
        process could be had for it. Raises EOFError if the rank has gone."""
        found: dict[int, Said] = {}
        waiting = deque(calls)
        with selectors.DefaultSelector() as under_way:
            under_way.register(self._requests, selectors.EVENT_READ)
            while waiting or len(under_way.get_map()) > 1:
                while waiting and len(under_way.get_map()) <= AT_ONCE:
                    self._send(waiting.popleft(), under_way, found)
                self._collect(under_way, found)
        return [found[call.key] for call in calls]

    def end(self, keys: Iterable[int]) -> None:
        """End those episodes' processes, and what is left of others that have ended by themselves."""
        leaving = [child for key in keys if (child := self._children.pop(key, None))]
        for child in leaving:  # all of them first, for they end in parallel
            child.socket.close()
        deadline = time.monotonic() + LEAVING
        for child in leaving:
            child.leave(deadline)
        self._others |= kill_children(self._others | {child.pid for child in self._children.values()})

    def end_all(self) -> None:
        """At once, whatever they are at."""
        for child in self._children.values():
            child.end()
        self._children.clear()

    def _send(self, call: Call, under_way: selectors.BaseSelector, found: dict[int, Said]) -> None:
        try:
            if call.key not in self._children:
                self._children[call.key] = self._fork()
        except OSError as error:
            found[call.key] = {"machine": f"no process for an episode ({error.strerror})"}
            return
        child = self._children[call.key]
        child.begin(call, self._limits.of_call(call.name).clock)
        under_way.register(child.socket, selectors.EVENT_READ | selectors.EVENT_WRITE, call)

    def _collect(self, under_way: selectors.BaseSelector, found: dict[int, Said]) -> None:
        """Wait for the next answer, death or deadline of the calls that are under way."""
        calls = [key.data for key in under_way.get_map().values() if key.data]
        if not calls:
            return
        first = min(self._children[call.key].deadline for call in calls)
        for key, events in under_way.select(max(0.0, first - time.monotonic())):
            if key.data is None:  # while it waits, the rank says nothing but that it has ended
                raise EOFError
            call, child = key.data, self._children[key.data.key]
            if events & selectors.EVENT_WRITE and not child.send():
                under_way.modify(child.socket, selectors.EVENT_READ, call)
            answer = child.receive() if events & selectors.EVENT_READ else None
            if answer is not None or child.ended:
                under_way.unregister(child.socket)
                found[call.key] = {"error": self._why(call, child)} if answer is None else answer
        for call in calls:
            slow = self._children.get(call.key)
            if slow and call.key not in found and time.monotonic() >= slow.deadline:
                under_way.unregister(slow.socket)
                slow.late = True
                found[call.key] = {"error": self._why(call, slow)}

    def _why(self, call: Call, child: Child) -> str:
        """Why a call has no answer, in words; the process is no more then."""
        status = child.end()
        del self._children[call.key]
        if child.late:
            return f"{call.name} has not returned after {self._limits.clock:g} s"
        if status == -signal.SIGXCPU:
            return f"{call.name} took more than {self._limits.cpu} s of CPU time"
        if child.excessive:
            return f"{call.name} answered more than {REPLY:,} bytes"
        how = f"by {signal.Signals(-status).name}" if status < 0 else f"with exit status {status}"
        return f"{call.name} ended its process {how}"

    def _fork(self) -> Child:
        mine, its = self._sockets()
        had = episode_process.address_space()  # it grows and shrinks by what calls bring along
        try:
            pid = os.fork()
        except OSError:
            mine.close()
            its.close()
            raise
        if pid == 0:
            try:
                os.closerange(self._lowest, its.fileno())
                os.closerange(max(self._lowest, its.fileno() + 1), self._highest + 1)
                for number in self._pipes:
                    os.close(number)
                episode_process.serve(its.fileno(), self._start, self._limits, had, self._nothing)
            finally:
                os._exit(0)
        its.close()
        return Child(pid, mine)

    def _sockets(self) -> tuple[socket.socket, socket.socket]:
        """A pair of connected ones: this process's, and an episode's."""
        low, its = socket.socketpair()
        with low:
            try:
                number = fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, self._lowest)
            except OSError:
                its.close()
                raise
        self._highest = max(self._highest, number)
        its.setblocking(True)  # whatever the user's module has made the default
        return socket.socket(fileno=number), its


def lowest_of_sockets() -> int:
    """A number above those of all open files, with some room between, as far as there is any."""
    first = 1 + max(map(int, os.listdir("/dev/fd")))
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return first + ROOM
    return min(first + min(ROOM, max(0, limit - first) // 8), limit - 1)


class Child:
    """An episode's process."""

    def __init__(self, pid: int, connection: socket.socket):
        self.pid = pid
        self.socket = connection
        self.socket.setblocking(False)
        self.deadline = 0.0
        self.late = self.excessive = self.ended = False
        self._status: int | None = None
        self._found = bytearray()
        self._unsent = memoryview(b"")

    def begin(self, call: Call, seconds: float) -> None:
        """Have a call to send, and so long for it."""
        self.deadline = time.monotonic() + seconds
        self._unsent = memoryview(episode_process.packed(call.name, call.arguments))

    def send(self) -> bool:
        """As much as it takes now. Is there more?"""
        try:
            self._unsent = self._unsent[self.socket.send(self._unsent) :]
        except BlockingIOError:
            pass
        except OSError:  # that it has ended is found when its answer is read
            self._unsent = self._unsent[:0]
        return bool(self._unsent)

    def receive(self) -> Said | None:
        """Its answer, if it is complete now; else None: more will come, unless it has `ended`."""
        try:
            piece = self.socket.recv(2**16)
        except OSError:
            piece = b""
        self._found += piece
        self.excessive = len(self._found) > REPLY
        self.ended = self.excessive or not piece
        if self.ended or not self._found.endswith(b"\n"):
            return None
        line, self._found = self._found, bytearray()
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError):
            answer = None
        self.ended = not isinstance(answer, dict)  # it was not our code that wrote it
        return None if self.ended else answer

    def leave(self, deadline: float) -> None:
        """Its socket is closed, so that it ends, or is killed then if its code keeps it from that."""
        ended, _ = wait(self.pid, deadline - time.monotonic())
        if ended:
            self._signal(os.killpg, signal.SIGKILL)
        else:
            self.end()

    def end(self) -> int:
        """Kill what is left of it and of what it has started; its exit status, or minus a signal."""
        if self._status is None:
            # One whose socket is closed ends now, unless its code has closed it.
            done, status = wait(self.pid, LEAVING) if self.ended else (False, 0)
            if not done:
                self._signal(os.kill, signal.SIGSTOP)
                kill_descendants(self.pid)
                self._signal(os.kill, signal.SIGKILL)
            self._signal(os.killpg, signal.SIGKILL)
            if not done:
                done, status = wait(self.pid, LEAVING)
                status = status if done else signal.SIGKILL  # what it will have ended by
            self._status = os.waitstatus_to_exitcode(status)
            self.socket.close()
        return self._status

    def _signal(self, kill: Callable[[int, int], None], number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(self.pid, number)
