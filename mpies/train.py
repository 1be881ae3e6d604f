"""Fine-tune a language model with evolution strategies (arXiv 2509.24372).

    mpirun -n N python -m mpies.train [CONFIG.yaml] [section.key=value ...]

Without a configuration file, the embedded quickstart. --help lists all settings.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from mpies import config
from mpies.errors import DivergedError, RefusedError
from mpies.es import fitness, schedule
from mpies.es.population import Member, Plan, directions
from mpies.ranks import collectives, launch
from mpies.run import telemetry
from mpies.run.exchange import PAIR, WORDS, Evaluated
from mpies.tasks.base import TrainerState, member_reward

if TYPE_CHECKING:
    from mpi4py.MPI import Comm

    from mpies.run.job import Job

RESUMABLE = 75  # exit code: stopped early, the same command goes on (EX_TEMPFAIL of sysexits.h)


def main(comm: Comm, arguments: list[str]) -> int:
    settings = collectives.together(comm, config.load, arguments)
    collectives.agree(comm, settings)
    # torch comes along: only once the settings are good
    from mpies.run.job import evaluate_if_due, finish, leave, save_checkpoint_if_due, set_up

    job = set_up(comm, settings)
    generations = settings.es.generations
    with job.screen.progress(job.first, generations):
        evaluate_if_due(job, job.first)
        done = job.first
        stop = any(collectives.allgather_objects(comm, job.wants_to_stop()))
        while done < generations and not stop:
            committed, stop = evolve(job, done)
            done += committed
            if committed:
                save_checkpoint_if_due(job, done)
            if not stop or done == generations:
                evaluate_if_due(job, done)
    if done < generations:
        leave(job, done)
        return RESUMABLE
    finish(job)
    return 0


def evolve(job: Job, generation: int) -> tuple[bool, bool]:
    """One generation (paper, section 3): evaluate, exchange (seed, reward), update, commit.

    Returns (was it committed, have the ranks agreed to stop).
    """
    start = time.perf_counter()
    weights = job.replica.weights
    plan = job.population.plan(generation, job.comm.size)
    step = schedule.step(job.settings.es, generation)

    mine = list(evaluate_members(job, plan.blocks[job.comm.rank], generation, step.sigma))
    rewards = exchange(job, plan, mine)
    if rewards is None:  # a rank had to leave before its last block
        return False, True
    if np.isnan(rewards).all():
        raise RefusedError("no answer of this generation could be scored; see the reward function")

    coefficients = fitness.coefficients(rewards, step.alpha, job.settings.es.fitness)
    with job.phases("update"):
        pull = job.anchor and partial(job.anchor.pull, decay=step.anchor_decay)
        weights.update(*directions(plan.seeds, plan.signs, coefficients), pull)  # every seed is replayed
        digest = weights.digest()
    job.recent.append(time.perf_counter() - start)
    with job.phases("wait"):
        collectives.barrier(job.comm)
    with job.phases("communicate"):
        stop = check_replicas(job, digest, generation)

    cost = telemetry.gather(job.comm, plan, job.phases, mine)
    if job.log:
        row, members = telemetry.rows(step, plan, rewards, coefficients, digest, cost)
        row["seconds"] = time.perf_counter() - start
        row["bytes_communicated"] = rewards.size * PAIR.itemsize + job.comm.size * WORDS.itemsize
        with job.phases("log"):
            job.log.append(row, members)
        job.log.log_seconds(job.phases.seconds["log"])
        job.screen.generation(row)
        job.guard.look(generation, rewards, coefficients)
    return True, stop


def evaluate_members(
    job: Job, blocks: list[list[Member]], generation: int, sigma: float
) -> Iterator[Evaluated]:
    """Perturb, generate, score each block of members."""
    phases, rows, replica = job.phases, job.task.rows(generation), job.replica
    state = TrainerState(generation, job.settings.es.generations)
    prompts = [row["prompt"] for row in rows]
    for done, block in enumerate(blocks):
        if not job.stop.fits(max(job.recent_blocks, default=0.0) * (len(blocks) - done)):
            return
        start = time.perf_counter()
        with phases("perturb"):  # the model computes with base + sigma * sign * noise(seed)
            replica.perturbation.set(block, sigma)
        with phases("generate"):
            answers = replica.engine.generate_block(prompts, len(block))
        with phases("reward"):
            scores = [job.task.score(rows, answer.texts, answer.ids, state) for answer in answers]
            rewards = [member_reward(score) for score in scores]
        seconds = time.perf_counter() - start
        job.recent_blocks.append(seconds)
        for member, reward, answer in zip(block, rewards, answers, strict=True):
            yield Evaluated(member, reward, sum(answer.tokens), seconds / len(block))


def exchange(job: Job, plan: Plan, mine: list[Evaluated]) -> np.ndarray | None:
    """All members' rewards, float64 (N,), in member order: 16 bytes a member travel.

    None if a rank left members unevaluated; those travel with seed 0.
    """
    pairs = np.zeros(plan.counts[job.comm.rank], dtype=PAIR)
    pairs[: len(mine)] = [(e.member.seed, e.reward) for e in mine]
    with job.phases("wait"):
        collectives.barrier(job.comm)
    with job.phases("communicate"):
        pairs = collectives.allgather_rows(job.comm, pairs, plan.counts)[plan.order]
    complete = np.array_equal(pairs["seed"], plan.seeds)
    return pairs["reward"].copy() if complete else None


def check_replicas(job: Job, digest: int, generation: int) -> bool:
    """Compare the replicas' digests; stop the job if a rank has diverged.

    With its digest, each rank says whether it wants to stop after this generation, for a signal or
    because another one would not fit the time limit: 16 bytes a rank. Returns whether any does.
    """
    words = np.array([(digest, job.wants_to_stop())], dtype=WORDS)
    words = collectives.allgather_rows(job.comm, words, [1] * job.comm.size)
    differing = collectives.diverged(words["digest"].tolist())
    if differing:
        named = collectives.named(job.comm, differing)
        raise DivergedError(
            f"generation {generation + 1}: the base weights of {named} differ from the others';"
            " this generation is not committed. Memory errors or mixed software do this"
        )
    return bool(words["stop"].any())


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):
        if launch.is_first():
            print(f"{__doc__}\n{config.describe()}")
    else:
        launch.run(main, sys.argv[1:])
