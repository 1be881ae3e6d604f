"""Environments for tests: games that even a random model's answers tell apart."""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import signal
import subprocess
import threading
import time
from pathlib import Path

seen: list[str] = []
"""What an episode has left in its module: none may find anything here."""


itself = open(__file__)  # noqa: SIM115
"""What a module has opened is there for its episodes."""

given: dict = {}
"""What `more` was called with last."""


def more(prompts, completions, **columns):
    """A reward function, for which not every episode is scored."""
    given.update(columns, prompts=prompts, completions=completions)
    return [None if i == 1 else 1.0 for i in range(len(prompts))]


class Echo:
    """Ends after row["turns"] answers; rewards differ between almost any two; says what it has drawn."""

    def reset(self, turns: int = 3, **row) -> str:
        self.left, self.first = turns, random.random()
        seen.append("reset")
        return f"Say {random.randint(100, 999)}."

    def step(self, answer: str) -> tuple[str, float, bool]:
        self.left -= 1
        seen.append(answer)
        reward = sum(i * ord(c) for i, c in enumerate(answer, 1)) % 101 / 7
        return f"{len(seen)} {len(answer)} {random.randint(0, 9)}", reward, self.left <= 0

    def metrics(self) -> dict[str, float]:
        return {"accuracy": float(self.first < 0.5), "left": self.left}


class Single(Echo):
    """One question as a task without an environment would ask it."""

    def reset(self, prompt: str, **row) -> str:
        self.left, self.first = 1, 0.0
        return prompt


def leave_behind():
    """Processes in one's own group, in a session of their own, and one whose parent has gone."""
    sleep = ["sleep", "1000"]
    subprocess.Popen(sleep)
    subprocess.Popen(sleep, start_new_session=True)
    subprocess.run(["sh", "-c", "setsid sleep 1000 &"])


def wait_if_told(row: dict, seed: int) -> None:
    """Where the file row["wait"] has the seed of this episode: it leaves processes behind, says so by a file
    with its number, and does not go on."""
    told = Path(row["wait"])
    if told.exists() and told.read_text() == str(seed):
        leave_behind()
        told.with_name(f"waits-{os.getpid()}").touch()
        time.sleep(1000)


class Silent(Echo):
    """Says nothing between two answers, so that the assistant speaks twice."""

    def step(self, answer: str):
        _, reward, done = super().step(answer)
        return None, reward, done


class Wicked:
    """Does what the row says."""

    def reset(self, what: str, when: str = "step", size: int = 0, **row) -> str:
        self.what, self.when, self.size = what, when, size
        if when == "reset":
            self.do()
        return what

    def step(self, answer: str):
        return self.do() or ("fine", 1.0, True)

    def do(self):
        return getattr(self, f"_{self.what}")()

    def _nothing(self):
        return None

    def _busy(self):
        def compute():
            while time.process_time() < 3:
                pass

        threading.Thread(target=compute, daemon=True).start()

    def _stopped(self):
        threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGSTOP]).start()

    def _parent(self):
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(1000)

    def _terminates(self):
        """What it has started, and a process that it forks, as multiprocessing does."""
        program = subprocess.Popen(["sleep", "1000"])
        program.terminate()
        program.wait()
        for _ in range(20):
            copy = os.fork()
            if not copy:
                time.sleep(1000)
            os.kill(copy, signal.SIGTERM)
            os.waitpid(copy, 0)
        return "ended", 1.0, True

    def _needs(self):
        try:
            return f"{len(mmap.mmap(-1, self.size))}", 1.0, True
        except OSError:
            raise MemoryError from None

    def _started(self):
        leave_behind()

    def _files(self):
        """Whether the module's is open, and how many sockets are."""
        files = [file.readlink() for file in Path("/proc/self/fd").iterdir() if file.is_symlink()]
        sockets = [file for file in files if str(file).startswith("socket:")]
        return f"{os.pread(itself.fileno(), 3, 0).decode()} {len(sockets)}", 1.0, True

    def _half(self):
        raise ValueError("no \ud800")

    def _blank(self):
        raise ValueError(" \n ")

    def _huge(self):
        return "fine", 1e308, True

    def _orphans(self):
        leave_behind()
        os._exit(3)

    def _raise(self):
        raise ValueError("no such\nmove")

    def _leave(self):
        raise SystemExit(3)

    def _exit(self):
        os._exit(3)

    def _crash(self):
        ctypes.string_at(0)

    def _spin(self):
        while True:
            pass

    def _sleep(self):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        leave_behind()
        time.sleep(1000)

    def _memory(self):
        return "x" * 2**33

    def _nonsense(self):
        return "what?", 1.0

    def _nan(self):
        return "fine", float("nan"), True

    def _long(self):
        return "x" * 10**6, 1.0, True

    def _halves(self):
        return "\ud800\0", 1.0, True

    def _print(self):
        print("noise" * 1000)
        os.system("echo noise; echo noise >&2")

    def _flood(self):
        for number in range(3, 50):
            try:
                for _ in range(200):
                    os.write(number, b"x" * 2**16)
            except OSError:
                pass


class IncrementEnv:
    """As in TRL's documentation."""

    def reset(self, **kwargs) -> str | None:
        self.counter = 0
        self.target = random.randint(1, 6)
        return f"Increment the counter by {self.target}."

    def get_reward(self) -> float:
        return float(self.counter == self.target)

    def increment(self, step: int) -> int:
        """
        Increment the internal counter.

        Args:
            step: Value to add to the counter.

        Returns:
            The updated counter value.
        """
        self.counter += step
        return self.counter


class Patient:
    """Its methods are `async`; it has state for reward functions to look at."""

    async def reset(self, target: int, **kwargs) -> None:
        self.target, self.told = target, []

    async def get_reward(self) -> float:
        return -float(self.target)

    async def note(self, text: str) -> str:
        """
        Notes a text.

        Args:
            text: The text.
        """
        self.told.append(text)
        return f"{len(self.told)} noted"

    def _count(self, more: int = 0) -> int:
        return len(self.told) + more


class Short:
    """Few words, for a model that has few positions."""

    def reset(self, **row) -> str:
        return "a"

    def ping(self) -> str:
        """P."""
        return "pong"


class Sum:
    """Few words, too. What it gives differs between almost any two ways to call it."""

    def reset(self, seed, **row) -> str:
        self.seed, self.row, self.total = seed, row, random.randint(0, 9)
        return str(self.total)

    def add(self, n: int) -> int:
        """
        Adds.

        Args:
            n: It.
        """
        wait_if_told(self.row, self.seed)
        self.total = (3 * self.total + n) % 101
        return self.total

    def get_reward(self) -> float:
        return self.total / 7


SUMS = tuple(f'<tool_call>{{"name": "add", "arguments": {{"n": {n}}}}}</tool_call>' for n in range(90))
"""Calls of it, as words of a model that says nothing but words and characters."""


def multiply(a: int, b: int) -> int:
    """
    Multiplies two integers.

    Args:
        a: The first integer.
        b: The second integer.

    Returns:
        The product of the two integers.
    """
    return a * b


def note(text: str) -> str:
    """
    Notes a text, too.

    Args:
        text: The text.
    """
    return text


def hang(seconds: int) -> str:
    """
    Takes its time.

    Args:
        seconds: How long.
    """
    time.sleep(seconds)
    return "done"


def looks(completions, environments, **columns):
    """A reward function that looks at environments."""
    given.update(columns, completions=completions)
    return [len(one.told) + one._count(more=10) + one.target / 100 for one in environments]


class Spacious(IncrementEnv):
    """Takes more addresses than an episode may have; torch for CUDA does, where it is imported."""

    def __init__(self) -> None:
        self.room = mmap.mmap(-1, 5 * 2**30, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
