"""The task and the model, loaded on every rank as a run loads them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from mpies import replica as replicas
from mpies.check.report import Finding
from mpies.config import Settings
from mpies.model.anchor import Anchor
from mpies.ranks import collectives
from mpies.replica import Replica
from mpies.run.job import initial_of, shared_task
from mpies.runfile import History
from mpies.tasks.base import Task
from mpies.text import duration

if TYPE_CHECKING:
    from mpi4py.MPI import Comm


def task(comm: Comm, settings: Settings, history: History | None) -> tuple[Task, list[Finding]]:
    """Prompts and the reward function."""
    made = shared_task(comm, settings, history)
    rows = f"{len(made.train)} training, {len(made.held_out)} held-out prompts"
    return made, [Finding("task", f"{made.name}: {rows}")]


def replica(
    comm: Comm, settings: Settings, task: Task
) -> tuple[tuple[Replica, Anchor | None, float], list[Finding]]:
    """The replica, what its updates pull it to, and the seconds that the slowest rank took to load them."""
    start = time.perf_counter()
    built = replicas.build(comm, settings, task)
    anchor, _ = initial_of(comm, settings, built)
    seconds = max(collectives.allgather_objects(comm, time.perf_counter() - start))
    facts = built.facts
    value = (
        f"{facts['model_name']}, digest {facts['model_digest']:016x}, live {facts['dtype']}"
        f" ({facts['dtype_reason']}); {duration(seconds)} to load on every rank"
    )
    return (built, anchor, seconds), [Finding("model", value)]
