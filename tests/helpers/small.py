"""Runs in this process, on one rank, of a tiny model's answers of four tokens, with a reward that can be
watched. A generation takes hundredths of a second."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from jobs import arguments
from mpies import config, train
from mpies.replica import Replica, build
from mpies.run.job import Job, set_up
from mpies.signals import SIGNALS

TRAIN = [{"prompt": "3 + 5 =", "tags": ["sum"]}, {"prompt": "Say it.", "tags": ["talk"]}]
HELD_OUT = [{"prompt": "Name a color:", "tags": []}]

calls: list[dict[str, Any]] = []
"""What `reward` was called with."""
events: dict[int, Callable[[], None]] = {}
"""What `reward` does in its n-th call, the first being 0."""


def reward(prompts, completions, **columns):
    """task.reward=small:reward"""
    event = events.get(len(calls))
    calls.append({"prompts": prompts, "completions": completions, **columns})
    if event:
        event()
    return list(map(score, completions))


def score(text: str) -> float:
    """Differs between almost any two answers."""
    return -(sum(i * ord(c) for i, c in enumerate(text, 1)) % 101) / 7


class Runs:
    """Jobs of one rank that write to `folder` / run, ended with the `with` block."""

    def __init__(self, comm: Any, model: Path, folder: Path):
        self.comm = comm
        self.model = model
        self.folder = folder / "run"
        self._rows = [folder / name for name in ("train.jsonl", "held_out.jsonl")]
        self._jobs: list[Job] = []

    def __enter__(self) -> Runs:
        for path, rows in zip(self._rows, (TRAIN, HELD_OUT), strict=True):
            path.write_text("\n".join(map(json.dumps, rows)))
        self._threads = torch.get_num_threads()
        self._handlers = {number: signal.getsignal(number) for number in SIGNALS}
        calls.clear()
        events.clear()
        return self

    def __exit__(self, *_) -> None:
        for job in self._jobs:
            if job.log and job.log.file:
                job.log.close()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        torch.set_num_threads(self._threads)

    def arguments(self, generations: int, **changes: object) -> list[str]:
        """A training command's settings; changes as section__key=value."""
        train_data, eval_data = self._rows
        own = {"es__population": 4, "engine__max_new_tokens": 4, "run__collective_timeout": 60}
        own |= {"task__reward": "small:reward", "task__train_data": train_data, "task__eval_data": eval_data}
        own |= {"run__evaluate_every": 0}
        return arguments(self.model, self.folder, generations, **(own | changes))

    def begin(self, generations: int, **changes: object) -> Job:
        """A job before its first generation."""
        job = set_up(self.comm, config.load(self.arguments(generations, **changes)))
        self._jobs.append(job)
        return job

    def build(self, **changes: object) -> Replica:
        """A replica with the initial weights, without a job."""
        return build(self.comm, config.load(self.arguments(1, **changes)))

    def train(self, generations: int, **changes: object) -> int:
        """The whole command; its exit code. `calls` are those of this job."""
        calls.clear()
        return train.main(self.comm, self.arguments(generations, **changes))
