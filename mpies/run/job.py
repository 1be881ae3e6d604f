"""The job around the generations: what is set up before them, done between them, and left at the end."""

from __future__ import annotations

import json
import math
from collections import deque
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mpies import replica as replicas
from mpies import tasks
from mpies.config import Settings
from mpies.es.population import Population
from mpies.measure.drift import drift
from mpies.measure.evaluation import HELD_OUT, Sampling, evaluate
from mpies.measure.kl import estimate
from mpies.model import initial
from mpies.model.anchor import Anchor
from mpies.model.saving import save
from mpies.phases import Phases
from mpies.ranks import collectives
from mpies.ranks.watchdog import watched
from mpies.replica import Replica
from mpies.run import checkpoint, resume
from mpies.run.advice import Guard
from mpies.run.screen import Screen
from mpies.run.stopping import Stop, announce
from mpies.runfile import History, RunFile
from mpies.tasks import rewards
from mpies.tasks.base import Row, Task, TrainerState
from mpies.time_limit import seconds_of

if TYPE_CHECKING:
    from mpi4py.MPI import Comm


@dataclass
class Job:
    """What the generation loop works with, on every rank; `log` is there on rank 0 only."""

    comm: Comm
    settings: Settings
    replica: Replica
    task: Task
    population: Population
    phases: Phases
    stop: Stop
    screen: Screen
    guard: Guard
    anchor: Anchor | None
    initial: initial.Files | initial.Loaded | None
    """Where to read the initial weights from, if evaluations compare with them."""
    log: RunFile | None
    first: int
    """Generations that were committed when this job began."""
    evaluated: set[tuple[int, str]]
    """(generation, split) of the evaluations in the run file when this job began."""
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=5))
    """Seconds of the run's latest generations."""
    recent_blocks: deque[float] = field(default_factory=lambda: deque(maxlen=32))
    """Seconds of this rank's latest blocks."""

    @property
    def folder(self) -> Path:
        return Path(self.settings.run.directory)

    def wants_to_stop(self) -> bool:
        """Did a signal ask this rank to stop, or would another generation not fit its time limit?"""
        return self.stop.requested or not self.stop.fits(max(self.recent, default=0.0))


def set_up(comm: Comm, settings: Settings) -> Job:
    """Everything before the first generation. Bad input is refused before the model is loaded."""
    limit = collectives.on_root(comm, seconds_of, settings.run.time_limit)
    stop = Stop(limit, settings.run.grace)
    stop.listen()
    collectives.barrier(comm)
    if comm.rank == 0:
        announce()
    path = Path(settings.run.directory) / "run.h5"
    log, history = resume.find(comm, settings, path)
    task = shared_task(comm, settings, history)
    screen = Screen(comm.rank != 0, settings.run.progress)
    screen.say(f"loading {settings.model.path} ...")
    replica = replicas.build(comm, settings, task)
    places = collectives.allgather_objects(comm, replicas.place(replica.device))
    facts = {**replica.facts, "run_file": path, "train": len(task.train), "held_out": len(task.held_out)}
    screen.banner(settings, facts, places)
    anchor, initial_weights = initial_of(comm, settings, replica)
    if history:
        resume.restore(comm, replica.weights, history, replica.facts, path.parent, anchor, screen.say)
    es = settings.es
    job = Job(
        comm=comm,
        settings=settings,
        replica=replica,
        task=task,
        population=Population(es.population, es.seed, es.antithetic, es.block_size),
        phases=Phases(replica.synchronize),
        stop=stop,
        screen=screen,
        guard=Guard(screen.say),
        anchor=anchor,
        initial=initial_weights,
        log=log,
        first=history.generations if history else 0,
        evaluated=set(),
    )
    if history:
        job.recent.extend(history.seconds[-5:].tolist())
        job.guard.unperturbed = history.unperturbed
    job.evaluated = collectives.on_root(comm, open_log, job, path, places)
    return job


def initial_of(
    comm: Comm, settings: Settings, replica: Replica
) -> tuple[Anchor | None, initial.Files | initial.Loaded | None]:
    """Where the initial weights are read from, for decay towards them and for KL and drift, if asked for."""
    es, run = settings.es, settings.run
    origin = settings.model.path, replica.weights, replica.facts["model_digest"]
    anchor = collectives.together(comm, Anchor, *origin) if es.anchor_decay else None
    compared = run.kl_samples or run.measure_drift
    return anchor, collectives.together(comm, initial.source, *origin) if compared else None


def shared_task(comm: Comm, settings: Settings, history: History | None) -> Task:
    """The task, after a check that it is the same on all ranks, and the run's. Collective.

    A call of its reward function lasts no longer than the ranks are set to wait for one another.
    """
    task = collectives.together(comm, tasks.make, settings.task, settings.es.seed)
    task = replace(task, reward=watched(comm, task.reward, f"the reward function of task {task.name}"))
    facts = {
        "task.train_data": task.digest,
        **collectives.together(comm, rewards.digests, settings.task.reward),
    }
    collectives.require_equal(comm, facts, "the files of task")
    if history:
        resume.refuse_other_data(history, task.digest)
    return task


def open_log(job: Job, path: Path, places: list[dict[str, Any]]) -> set[tuple[int, str]]:
    """On rank 0: create the run file, if there is none, and note this start. Returns what is evaluated."""
    facts = job.replica.facts
    row = {
        "world_size": job.comm.size,
        "hosts": ",".join(place["host"] for place in places),
        "devices": ",".join(place["device"] for place in places),
        "versions": json.dumps(replicas.versions(job.settings.engine.name)),
        "reason": "resumed" if job.log else "new",
    }
    settings = job.settings.to_yaml()
    if job.log:
        job.log.start(settings, row)
    else:
        job.log = RunFile.create(
            path,
            settings,
            row,
            population=job.population.size,
            generations=job.settings.es.generations,
            model_path=facts["model_path"],
            model_digest=np.uint64(facts["model_digest"]),
            parameters=facts["parameters"],
            dtype=facts["dtype"],
            data_digest=job.task.digest,
            fitness=job.settings.es.fitness,
        )
    return job.log.evaluated()


def save_checkpoint_if_due(job: Job, generation: int) -> None:
    """Every `run.checkpoint_every` generations, rank 0 writes its base weights."""
    every = job.settings.run.checkpoint_every
    if job.log and every and generation % every == 0:
        checkpoint.write(job.folder, job.replica.weights, job.log.run_uuid, generation)


def evaluate_if_due(job: Job, generation: int) -> None:
    """Evaluate the unperturbed model on training and held-out prompts, on all ranks, and log it.

    Due are the first and the last generation and every `run.evaluate_every`-th, unless they are in
    the run file already.
    """
    every, last = job.settings.run.evaluate_every, job.settings.es.generations
    if generation not in (0, last) and not (every and generation % every == 0):
        return
    due = {s: rows for s, rows in job.task.splits.items() if (generation, s) not in job.evaluated}
    job.replica.perturbation.clear()
    moved = drift(job.comm, job.replica, job.initial) if due and job.settings.run.measure_drift else None
    for split, rows in due.items():
        batch = job.settings.engine.batch_size
        result = evaluate(job.comm, job.replica.engine, job.task, rows, batch, TrainerState(generation, last))
        if split == "train":
            job.guard.unperturbed = result.reward_mean
        kl = kl_if_due(job, split, rows)
        if job.log:
            keep = job.settings.run.keep_samples
            job.log.add_evaluation(*result.table_rows(generation, split, keep, kl, moved))


def kl_if_due(job: Job, split: str, rows: list[Row]) -> float:
    """The KL divergence from the initial model, nat/token, if it is measured on these rows; else NaN."""
    run = job.settings.run
    if not run.kl_samples or split != list(job.task.splits)[-1]:
        return math.nan
    first = HELD_OUT if split == "held_out" else 0
    sampling = Sampling(run.kl_samples, 1.0, job.settings.es.seed, first)
    batch, rows = job.settings.engine.batch_size, rows[: run.kl_prompts]
    return estimate(job.comm, job.replica, job.initial, rows, batch, sampling).mean


def finish(job: Job) -> None:
    """Save the tuned model and show what was reached."""
    if job.log:
        job.replica.perturbation.clear()
        origin = {
            "run_uuid": job.log.run_uuid,
            "generation": job.log.committed,
            "digest": f"{job.replica.weights.digest():016x}",
        }
        save(job.replica.model, job.replica.tokenizer, job.folder / "model", origin)
        job.log.close()
        job.screen.result(job.folder / "run.h5")
        job.screen.next_steps(job.folder / "run.h5", job.settings.es.generations, job.comm.size)
    collectives.barrier(job.comm)


def leave(job: Job, done: int) -> None:
    """Stop early: everything is on disk already. Collective."""
    if job.log:
        job.log.close()
    reasons = collectives.allgather_objects(job.comm, job.stop.reason)
    rank, why = next((rank, reason) for rank, reason in enumerate(reasons) if reason)
    why += f" (rank {rank})" if rank else ""
    job.screen.say(
        f"stopped by {why} after generation {done} of {job.settings.es.generations};"
        " the same command goes on from there"
    )
