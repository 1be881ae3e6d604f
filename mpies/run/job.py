"""The job around the generations: what is set up before them, done between them, and left at the end."""

from __future__ import annotations

import json
import math
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mpies import config
from mpies.config import Settings
from mpies.errors import RefusedError
from mpies.es.population import Population
from mpies.measure.statistics import over_prompts
from mpies.model.saving import save
from mpies.phases import Phases
from mpies.ranks.agreement import keep_on_root, on_root
from mpies.ranks.collectives import allgather_objects, barrier, named
from mpies.replica import InitialUse, Replica, Setup, load, settle
from mpies.run import checkpoint, continuity, milestones, resume
from mpies.run.advice import Advisor
from mpies.run.assignment import Assignment
from mpies.run.milestones import Milestone
from mpies.run.monitoring import Monitor
from mpies.run.screen import Screen
from mpies.run.stopping import RECENT, Stop, announce
from mpies.runfile import RUN_FILE, History, RunFile
from mpies.splits import TRAIN, spoken
from mpies.tasks.base import Task
from mpies.tasks.rewards import parts_of
from mpies.time_limit import seconds_of

if TYPE_CHECKING:
    from mpi4py.MPI import Comm


@dataclass
class Job:
    """What the generation loop works with, on every rank; `monitor` and `log` are there on rank 0 only."""

    comm: Comm
    settings: Settings
    replica: Replica
    population: Population
    assignment: Assignment
    phases: Phases
    stop: Stop
    screen: Screen
    advisor: Advisor
    monitor: Monitor | None
    log: RunFile | None
    first: int = 0
    """Generations that were committed when this job began."""
    evaluated: set[tuple[int, str]] = field(default_factory=set)
    """(generation, split) of the evaluations in the run file when this job began."""
    generation_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    """Of the run's latest generations, up to the comparison of the replicas, in which the ranks agree on
    whether to stop. Of those that another job made: as in the run file, with that comparison."""
    block_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=32))
    """Of this rank's latest blocks."""
    longest_batch: float = 0.0
    """Seconds of this rank's longest batch of an evaluation."""
    longest_checkpoint: float = 0.0
    """Seconds that rank 0 wrote at a checkpoint, at most."""

    @property
    def folder(self) -> Path:
        return Path(self.settings.run.directory)

    @property
    def task(self) -> Task:
        return self.replica.task

    def wants_to_stop(self) -> bool:
        """Did a signal ask this rank to stop, or would another generation not fit its time limit?"""
        needed = max(self.generation_seconds, default=0.0) + self.longest_checkpoint
        return self.stop.requested or not self.stop.fits(needed)

    def agree_to_stop(self) -> bool:
        """Does any rank want to stop? Collective."""
        return bool(barrier(self.comm, word=self.wants_to_stop()))

    def has_time_for(self, blocks: int) -> bool:
        """Is there time for so many more blocks on this rank?"""
        return self.stop.fits(max(self.block_seconds, default=0.0) * blocks)

    def has_time_for_batches(self, seconds: float, batches: int) -> bool:
        """Is there time for so many more batches of an evaluation, of which the longest took `seconds`?"""
        # Nothing is known of the first one: a block of members is much the same work.
        known = max(seconds, self.longest_batch) or max(self.block_seconds, default=0.0)
        self.longest_batch = max(seconds, self.longest_batch)
        return self.stop.fits(known * batches)

    def evaluate_if_due(self, generation: int) -> bool:
        """Evaluate and log what is due and not in the run file yet. Collective.

        Was anything? It may have taken minutes. Raises OutOfTimeError on all ranks if there is no time: the
        next start makes up for it.
        """
        if not milestones.is_due(generation, self.settings.run.evaluate_every, self.settings.es.generations):
            return False
        missing = [split for split in self.task.splits if (generation, split) not in self.evaluated]
        for milestone in milestones.evaluate(
            self.comm, self.replica, self.settings, generation, missing, self.has_time_for_batches
        ):
            self._note(milestone)
        return bool(missing)

    def _note(self, milestone: Milestone) -> None:
        """Into the run file."""
        split, mean = milestone.split, milestone.evaluation.reward_mean
        if math.isnan(mean):  # a reward function that is mended will have its say
            self.screen.say(f"warning: no answer to the {spoken(split)} prompts could be scored")
            return
        if split == TRAIN:
            self.advisor.unperturbed = mean
            error = over_prompts(milestone.evaluation.rewards[:, None]).error
            self.advisor.error = error if self.task.prompts_per_generation else 0.0
        if self.log:
            self.log.add_evaluation(*milestone.table_rows(self.settings.run.keep_samples))

    def refuse_unfit_weights(self, generation: int, alpha: float) -> None:
        """Raise RefusedError, on all ranks, if an update has made weights that none can compute with."""
        with self.phases("update"):
            unfit = self.replica.weights.find_unfit()
        if unfit:
            raise RefusedError(
                f"es.alpha: after generation {generation + 1}'s update with {alpha:g}, {unfit}. It is not"
                " committed; begin a new run with a smaller es.alpha"
            )

    def save_checkpoint_if_due(self, generation: int) -> None:
        """Every `run.checkpoint_every` generations, rank 0 writes its base weights."""
        every = self.settings.run.checkpoint_every
        if self.log and every and generation % every == 0:
            begun = time.monotonic()
            checkpoint.write(self.folder, self.replica.weights, self.log.run_uuid, generation)
            self.longest_checkpoint = max(self.longest_checkpoint, time.monotonic() - begun)

    def finish(self) -> None:
        """Save the tuned model and show what was reached. Collective."""
        if self.log:
            self.replica.perturbation.clear()
            digest = f"{self.replica.weights.digest():016x}"
            origin = {"run_uuid": self.log.run_uuid, "generation": self.log.committed, "digest": digest}
            save(self.replica.model, self.replica.tokenizer, self.folder / resume.TUNED, origin)
            self.log.close()
            self.screen.result(self.log.path)
            self.screen.next_steps(self.log.path, self.settings, self.comm.size)
        barrier(self.comm)
        if self.log:
            announce(f"{self.log.path}\n")

    def leave(self, done: int) -> None:
        """Stop early: everything is on disk already. Collective."""
        if self.log:
            self.log.close()
        reasons = allgather_objects(self.comm, self.stop.reason)
        rank, why = next((rank, reason) for rank, reason in enumerate(reasons) if reason)
        why += f" ({named(self.comm, [rank])})" if rank else ""
        self.screen.say(
            f"stopped by {why} after generation {done} of {self.settings.es.generations};"
            " the same command goes on from there"
        )


def set_up(comm: Comm, settings: Settings) -> Job:
    """Everything before the first generation. Bad input is refused before the model is loaded. Collective."""
    stop = Stop(None, settings.run.grace, tells=comm.rank == 0)
    stop.listen()
    screen = Screen(comm.rank != 0, settings.run.progress)
    log, history = _open_run(comm, settings, stop, screen)
    setup, replica = _bring_replica(comm, settings, history, screen)
    job = _make_job(comm, settings, replica, stop, screen, log, history)
    job.evaluated = on_root(comm, open_log, job, setup)
    return job


def _open_run(
    comm: Comm, settings: Settings, stop: Stop, screen: Screen
) -> tuple[RunFile | None, History | None]:
    """The run file that is there, on rank 0, and its history. What is odd in it or the settings is said.

    The time limit is rank 0's, too.
    """

    def look() -> tuple[RunFile | None, tuple[float | None, History | None]]:
        limit = seconds_of(settings.run.time_limit)
        log, history = resume.look(settings, Path(settings.run.directory) / RUN_FILE)
        return log, (limit, history)

    log, (limit, history) = keep_on_root(comm, look)
    stop.limit(limit)
    barrier(comm)
    if comm.rank == 0:
        announce()  # all ranks listen, since they have come to the barrier
    for line in config.remark(settings):
        screen.say(f"warning: {line}")
    if history and (jump := continuity.remark_on_schedule(history, settings.es)):
        screen.say(f"warning: {jump}")
    if history and history.damage.uncounted:
        screen.say(
            f"generation {history.generations + 1} was written, but not counted, when the job ended: it is"
            " made again"
        )
    return log, history


def _bring_replica(
    comm: Comm, settings: Settings, history: History | None, screen: Screen
) -> tuple[Setup, Replica]:
    """The replica, its base brought to the history's last generation. What is not the run's is refused."""
    folder = Path(settings.run.directory)
    screen.say(f"loading {settings.model.path} ...")
    setup = settle(comm, settings)
    if history:
        continuity.refuse_other_run(history, settings, setup)
        setup = setup.of_run(history)
    replica = load(comm, settings, setup, InitialUse.of_training(settings))
    screen.banner(settings, replica.facts, setup, folder / RUN_FILE)
    if history:
        resume.restore(comm, replica, history, folder, screen.say)
    return setup, replica


def _make_job(
    comm: Comm,
    settings: Settings,
    replica: Replica,
    stop: Stop,
    screen: Screen,
    log: RunFile | None,
    history: History | None,
) -> Job:
    es = settings.es
    population = Population(es.population, es.seed, es.antithetic, es.block_size)
    phases = Phases(replica.synchronize)
    dynamic = settings.run.assignment == "dynamic"
    job = Job(
        comm=comm,
        settings=settings,
        replica=replica,
        population=population,
        assignment=Assignment(comm, population, phases, dynamic, screen.say),
        phases=phases,
        stop=stop,
        screen=screen,
        advisor=Advisor(screen.say, parts_of(settings.task.reward), bool(settings.task.expects)),
        monitor=Monitor(settings, screen.say) if comm.rank == 0 else None,
        log=log,
    )
    if history:
        job.first = history.generations
        job.generation_seconds.extend(history.seconds.tolist())
        job.advisor.unperturbed = history.unperturbed
    return job


def open_log(job: Job, setup: Setup) -> set[tuple[int, str]]:
    """On rank 0: create the run file, if there is none, and note this start. Returns what is evaluated."""
    facts = job.replica.facts
    if job.monitor:
        job.monitor.begin(job.first)
    row = {
        "world_size": job.comm.size,
        "hosts": ",".join(place.host for place in setup.places),
        "devices": ",".join(place.device for place in setup.places),
        "versions": json.dumps(setup.versions),
        "reason": "resumed" if job.log else "new",
        "rewards": json.dumps(setup.reward_digests),
    }
    settings = job.settings.to_yaml()
    if job.log:
        job.log.start(settings, row)
    else:
        job.log = RunFile.create(
            job.folder / RUN_FILE,
            settings,
            row,
            population=job.population.size,
            generations=job.settings.es.generations,
            model_path=facts.model_path,
            model_digest=np.uint64(facts.model_digest),
            parameters=facts.parameters,
            **({"left_out": " ".join(facts.left_out)} if facts.left_out else {}),
            model_class=facts.model_class,
            dtype=facts.dtype,
            data_digest=job.task.digest,
            fitness=job.settings.es.fitness,
        )
    return job.log.evaluated()
