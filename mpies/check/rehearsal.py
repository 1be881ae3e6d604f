"""One block of members a rank, evaluated and replayed by the program itself: what a generation takes."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mpies.check.report import Finding
from mpies.config import Settings
from mpies.errors import InputError, OrderlyError, reason
from mpies.es.population import Member, Population
from mpies.model.weights import Pull
from mpies.phases import Phases
from mpies.ranks.agreement import together
from mpies.ranks.collectives import allgather_objects
from mpies.ranks.memory import measure_peak
from mpies.replica import Replica
from mpies.run.block import evaluate_block
from mpies.run.exchange import Evaluated
from mpies.tasks.base import TrainerState
from mpies.tasks.episodes import Start
from mpies.text import duration

if TYPE_CHECKING:
    from mpi4py.MPI import Comm

SEEDS = 4  # that an update is timed with


@dataclass(frozen=True)
class Trial:
    """Seconds of a block, of an update per seed, of its pull, of a digest; a rank's, or the most of any."""

    block: float
    tokens: int
    """That the block generated; of all ranks, their sum."""
    memory: int | None
    """Bytes beyond the weights at the peak; None: nobody counts them."""
    seed: float
    pull: float
    digest: float


def rehearse(comm: Comm, settings: Settings, replica: Replica) -> tuple[Trial, list[Finding]]:
    """Evaluate a block on every rank, then replay some seeds. Raises RefusedError if that fails.

    What is returned is the most that any rank needed. Collective. The base weights are others afterwards.
    """
    es = settings.es
    members = es.block_size
    plan = Population(members * comm.size, es.seed, block=members).plan(0, comm.size)
    (block,) = plan.blocks[comm.rank]
    trial = together(comm, _refuse_errors, comm, lambda: _try_out(settings, replica, block))
    trials: list[Trial] = allgather_objects(comm, trial)
    most = Trial(
        block=max(one.block for one in trials),
        tokens=sum(one.tokens for one in trials),
        seed=max(one.seed for one in trials),
        pull=max(one.pull for one in trials),
        digest=max(one.digest for one in trials),
        memory=max((one.memory for one in trials if one.memory is not None), default=None),
    )
    speed = sum(one.tokens / one.block for one in trials)
    value = f"{duration(most.block)} for {members} member(s) on the slowest rank, {speed:.0f} tokens/s in all"
    return most, [Finding("evaluation", value)]


def _try_out(settings: Settings, replica: Replica, block: list[Member]) -> Trial:
    es, starts = settings.es, replica.task.starts(0)
    evaluated: list[Evaluated] = []

    def evaluate(some: list[Start]) -> None:
        nonlocal evaluated
        phases, state = Phases(replica.synchronize), TrainerState(0, es.generations)
        evaluated = evaluate_block(replica, some, block, es.sigma, state, phases)

    # What is compiled and loaded at the first call is no part of a generation.
    evaluate(starts[:1])
    memory = measure_peak(replica.device, lambda: evaluate(starts))
    seconds, tokens = sum(one.seconds for one in evaluated), sum(one.tokens for one in evaluated)
    _update(replica, 1)
    update, digest = _update(replica, SEEDS)
    pulling = 0.0
    if replica.anchor:
        pulling, _ = _update(replica, 0, replica.anchor.pulling(es.anchor_decay))
    return Trial(seconds, tokens, memory, update / SEEDS, pulling, digest)


def _update(replica: Replica, seeds: int, pull: Pull | None = None) -> tuple[float, float]:
    """Seconds of an update with so many seeds, and of the digest."""
    start = time.perf_counter()
    numbers = np.arange(1, seeds + 1, dtype=np.uint64)
    replica.weights.update(numbers, np.full(seeds, 1e-6, np.float32), pull)
    replica.synchronize()
    middle = time.perf_counter()
    replica.weights.digest()
    return middle - start, time.perf_counter() - middle


def _refuse_errors(comm: Comm, function: Callable[[], Any]) -> Any:
    """Call it; whatever it raises on this rank (a reward function's error, no memory) is refused by all."""
    try:
        return function()
    except OrderlyError:
        raise
    except Exception as error:
        traceback.print_exc()
        why = f"{type(error).__name__}: {reason(error)}"
        if "out of memory" in str(error).lower() or isinstance(error, MemoryError):
            why += "; a smaller engine.batch_size or engine.max_new_tokens needs less"
        raise InputError(f"evaluating a member failed on rank {comm.rank} with {why}") from error
