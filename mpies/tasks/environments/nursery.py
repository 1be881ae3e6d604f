"""The rank's end of the process that forks its episodes' processes."""

from __future__ import annotations

import itertools
import json
import signal
import threading
import time
import weakref
from collections.abc import Sequence

from mpies.errors import HelperError, InputError
from mpies.tasks.environments.children import Call
from mpies.tasks.environments.contract import Said
from mpies.tasks.environments.fork_server import Batch, Beginning, packed
from mpies.tasks.environments.limits import AT_ONCE
from mpies.tasks.processes import HelperProcess

STARTING = 600  # seconds that the import of the user's module may take
GRACE = 5  # seconds to end the processes of a round of calls in
ENDING = 60  # and of all episodes: if it is itself ended before, what they have started stays


class Nursery:
    """Episodes' processes, by numbers, for as long as these are not ended. Started at once.

    Raises InputError, in a line, if the user's class cannot be had.
    """

    def __init__(self, beginning: Beginning):
        self._limits, self._setting = beginning.limits, beginning.setting
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        # Sets of texts would be in another order in each process else.
        self._process = HelperProcess("mpies.tasks.environments.fork_server:main", PYTHONHASHSEED="0")
        self._end = weakref.finalize(self, self._process.let_end, ENDING)
        self._process.tell(packed(beginning), STARTING)
        line = self._process.line(STARTING)
        if not line:
            raise InputError(f"{self._setting}: {beginning.names} cannot be imported: {self._how_it_ended()}")
        found = json.loads(line)
        if "refused" in found:
            self.close()
            raise InputError(found["refused"])

    def numbers(self, episodes: int) -> list[int]:
        """Numbers for so many new ones."""
        return list(itertools.islice(self._numbers, episodes))

    def call(self, calls: Sequence[Call], ended: Sequence[int] = ()) -> list[Said]:
        """Make the calls, one or more, then end those episodes. Each call's answer, in their order.

        Raises HelperError if no process can be had, or the one that forks them is no more.
        """
        rounds = -(-len(calls) // AT_ONCE) + 1
        patience = rounds * (self._limits.clock + GRACE) + STARTING
        with self._lock:
            if not self._end.alive:
                raise HelperError(f"{self._setting}: the process of its episodes has ended")
            deadline = time.monotonic() + patience
            taken = self._process.tell(packed(Batch(list(calls), list(ended))), patience)
            line = self._process.line(deadline - time.monotonic()) if taken else b""
            is_late = time.monotonic() >= deadline
        if not line:
            by_itself = self._how_it_ended()
            how = f"has not answered for {patience:g} s" if is_late else by_itself
            raise HelperError(f"{self._setting}: the process of its episodes {how}")
        answers = json.loads(line)
        for answer in answers:
            if "machine" in answer:
                raise HelperError(
                    f"{self._setting}: {answer['machine']}; use fewer task.prompts_per_generation, a smaller"
                    " es.block, or fewer ranks on a node"
                )
        return answers

    def end(self, episodes: Sequence[int]) -> None:
        """Have them ended, without waiting for it. All have, where the process that forked them has."""
        with self._lock:
            if self._end.alive and not self._process.tell(packed(Batch([], list(episodes))), STARTING):
                self._how_it_ended()

    def close(self) -> None:
        self._end()

    def _how_it_ended(self) -> str:
        status = self._process.let_end(0)
        self._end.detach()
        return (
            f"ended by {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"
        )
