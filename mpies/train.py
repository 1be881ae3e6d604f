"""Fine-tune a language model with evolution strategies (arXiv 2509.24372).

    mpirun -n N python -m mpies.train [CONFIG.yaml] [section.key=value ...]

Without a configuration file, the embedded quickstart. --help lists all settings.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mpies import config
from mpies.command_line import EXIT_CODES_OF_RUNS, fill
from mpies.es import fitness, schedule
from mpies.es.directions import directions
from mpies.es.schedule import Step
from mpies.ranks import launch
from mpies.ranks.agreement import agree_on_settings
from mpies.run.block import evaluate_block
from mpies.run.exchange import Evaluated, compare_replicas, end_evaluation, exchange_rewards
from mpies.run.inputs import load_settings
from mpies.run.telemetry import Outcome, record
from mpies.tasks.base import TrainerState
from mpies.time_limit import OutOfTimeError

if TYPE_CHECKING:
    from mpi4py.MPI import Comm

    from mpies.run.job import Job

RESUMABLE = 75  # exit code: stopped early, the same command goes on (EX_TEMPFAIL of sysexits.h)


def main(comm: Comm, arguments: list[str]) -> int:
    settings = agree_on_settings(comm, load_settings, arguments)
    from mpies.run.job import set_up  # torch comes along: only once the settings are good

    job = set_up(comm, settings)
    with job.assignment, job.screen.progress(job.first, settings.es.generations):
        done, complete = evolve(job)
    if not complete:
        job.leave(done)
        return RESUMABLE
    job.finish()
    return 0


def evolve(job: Job) -> tuple[int, bool]:
    """The generations that are missing, or as many as there is time for, with the evaluations between them.

    Returns how many generations there are then, and whether all is done.
    """
    done, last = job.first, job.settings.es.generations
    try:
        job.evaluate_if_due(done)
        stop = job.agree_to_stop()
        while done < last and not stop:
            stop = make_generation(job, done)
            done += 1
            job.save_checkpoint_if_due(done)
            if not stop or done == last:
                stop = (job.evaluate_if_due(done) and job.agree_to_stop()) or stop
    except OutOfTimeError:
        return done, False
    return done, done == last


def make_generation(job: Job, generation: int) -> bool:
    """One generation (paper, section 3, algorithm 2). Have the ranks agreed to stop after it?

    Raises OutOfTimeError on all ranks if a rank has no time for its members: then it is not made.
    """
    job.phases.begin()
    step = schedule.step(job.settings.es, generation)
    mine, complete = evaluate_members(job, generation, step.sigma)
    end_evaluation(job.comm, job.phases, complete)
    plan = job.assignment.plan(generation)
    rewards = exchange_rewards(job.comm, job.phases, plan, mine)
    coefficients = fitness.coefficients(rewards, step.alpha, job.settings.es.fitness)
    digest = update(job, directions(plan.seeds, plan.signs, coefficients), step)
    job.generation_seconds.append(job.phases.elapsed)
    stop = compare_replicas(job.comm, job.phases, digest, job.wants_to_stop, generation)
    job.refuse_unfit_weights(generation, step.alpha)
    record(job, Outcome(generation, plan, step, rewards, coefficients, digest), mine)
    return stop


def evaluate_members(job: Job, generation: int, sigma: float) -> tuple[list[Evaluated], bool]:
    """Perturb, generate, score each of this rank's blocks of members, as long as there is time for those
    that are left. Was there, for all of them?"""
    starts = job.task.starts(generation)
    state = TrainerState(generation, job.settings.es.generations)
    evaluated: list[Evaluated] = []
    for block, left in job.assignment.blocks(generation):
        if not job.has_time_for(left):
            return evaluated, False
        members = evaluate_block(job.replica, starts, block, sigma, state, job.phases)
        job.block_seconds.append(sum(member.seconds for member in members))
        evaluated += members
    return evaluated, True


def update(job: Job, terms: tuple[np.ndarray, np.ndarray], step: Step) -> int:
    """base <- base + sum of coefficient * noise(seed): every rank replays every seed. The base's digest."""
    weights, anchor = job.replica.weights, job.replica.anchor
    with job.phases("update"):
        weights.update(*terms, anchor.pulling(step.anchor_decay) if anchor else None)
        return weights.digest()


def show_help() -> None:
    print(f"{fill(__doc__ or '')}\n\n{config.describe()}\n\n{fill(EXIT_CODES_OF_RUNS)}")


if __name__ == "__main__":
    launch.start("train", main, show_help)
