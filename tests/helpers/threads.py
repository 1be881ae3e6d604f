"""Ranks that are threads of this process: what ranks do together, seen without a launcher.

`Rank` has those methods of MPI's communicators that mpies.ranks.collectives uses.
"""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from mpi4py import MPI

from mpies.ranks.collectives import Patience


class Request:
    """An operation that is done once `attempt` succeeds."""

    def __init__(self, attempt: Callable[[], bool]):
        self._attempt, self._done = attempt, False

    def Test(self) -> bool:
        self._done = self._done or self._attempt()
        return self._done


class World:
    """What the ranks share: messages on their way, and what each brought to each collective."""

    def __init__(self, size: int):
        self.size = size
        self.lock = threading.Lock()
        self.messages: dict[tuple, deque] = defaultdict(deque)
        self.brought: dict[int, dict[int, bytes]] = defaultdict(dict)


class Rank:
    """A communicator as one rank sees it; `patience` is what it carries."""

    def __init__(self, world: World, rank: int, patience: Patience):
        self.size, self.rank = world.size, rank
        self._world, self._collectives = world, 0
        self._attributes: dict[int, Patience] = {}
        self._patience = patience
        self.sent: list[tuple[str, int]] = []
        """What this rank has called, and with how many bytes of its own."""

    def Get_attr(self, key: int) -> Patience:
        return self._attributes.get(key, self._patience)

    def Set_attr(self, key: int, value: Patience) -> None:
        self._attributes[key] = value

    def Isend(self, values: np.ndarray, to: int, tag: int) -> Request:
        self.sent.append(("Isend", values.nbytes))
        with self._world.lock:
            self._world.messages[self.rank, to, tag].append(values.copy())
        return Request(lambda: True)

    def Irecv(self, values: np.ndarray, source: int, tag: int) -> Request:
        def attempt() -> bool:
            with self._world.lock:
                waiting = self._world.messages[source, self.rank, tag]
                if waiting:
                    values[:] = waiting.popleft()
                    return True
            return False

        return Request(attempt)

    def Iprobe(self, source: int, tag: int) -> bool:
        with self._world.lock:
            return bool(self._world.messages[source, self.rank, tag])

    def Iallgatherv(self, values: np.ndarray, into: list | None) -> Request:
        def take(brought: dict[int, bytes]) -> None:
            if into:
                buffer, counts = into
                parts = [brought[rank] for rank in range(self.size)]
                assert [len(part) for part in parts] == list(counts)
                buffer[:] = np.frombuffer(b"".join(parts), np.uint8)

        return self._collective("Iallgatherv", values, take)

    def Igatherv(self, values: np.ndarray, into: list | None) -> Request:
        return self.Iallgatherv(values, into)

    def Iallreduce(self, values: np.ndarray, into: np.ndarray, op: Any) -> Request:
        def take(brought: dict[int, bytes]) -> None:
            everyone = np.array([np.frombuffer(brought[rank], values.dtype) for rank in range(self.size)])
            into[:] = everyone.max(axis=0) if op == MPI.MAX else everyone.sum(axis=0)

        return self._collective("Iallreduce", values, take)

    def Ibcast(self, values: np.ndarray, root: int) -> Request:
        def take(brought: dict[int, bytes]) -> None:
            values[:] = np.frombuffer(brought[root], values.dtype)

        return self._collective("Ibcast", values, take)

    def _collective(self, name: str, values: np.ndarray, take: Callable[[dict[int, bytes]], None]) -> Request:
        """Done once all have brought something."""
        self.sent.append((name, values.nbytes))
        with self._world.lock:
            brought = self._world.brought[self._collectives]
            brought[self.rank] = values.tobytes()
        self._collectives += 1

        def attempt() -> bool:
            with self._world.lock:
                if len(brought) < self.size:
                    return False
            take(brought)
            return True

        return Request(attempt)


def run(
    ranks: int, function: Callable[[Rank], Any], *, timeout: float = 20, hosts: Sequence[str] = ()
) -> list[Any]:
    """What the function returns on each rank, or the exception that it raises there.

    The ranks have so much patience, and are on these hosts.
    """
    world = World(ranks)

    def call(rank: int) -> Any:
        try:
            return function(Rank(world, rank, Patience(timeout, tuple(hosts))))
        except Exception as error:
            return error

    with ThreadPoolExecutor(ranks) as threads:
        return list(threads.map(call, range(ranks)))
