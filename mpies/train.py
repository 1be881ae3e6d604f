"""Fine-tune a language model with evolution strategies (arXiv 2509.24372).

    mpirun -n N python -m mpies.train [CONFIG.yaml] [section.key=value ...]

Without a configuration file, the embedded quickstart. --help lists all settings.
"""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mpies import config, fitness, parallel
from mpies.errors import DivergedError, RefusedError
from mpies.phases import PHASES, Phases
from mpies.population import Member, Population, directions
from mpies.stopping import Stop, seconds_of

if TYPE_CHECKING:
    from mpi4py.MPI import Comm

    from mpies.replica import Replica
    from mpies.runfile import RunFile
    from mpies.screen import Screen
    from mpies.tasks.base import Task

PAIR = np.dtype([("seed", "<u8"), ("reward", "<f8")])
WORDS = np.dtype([("digest", "<u8"), ("stop", "<i8")])


RESUMABLE = 75  # exit code: stopped early, the same command goes on (EX_TEMPFAIL of sysexits.h)


@dataclass
class Job:
    """What the generation loop works with, on every rank; `log` is there on rank 0 only."""

    comm: Comm
    settings: config.Settings
    replica: Replica
    task: Task
    population: Population
    phases: Phases
    stop: Stop
    screen: Screen
    log: RunFile | None
    hosts: list[str]
    first: int
    """Generations that were committed when this job began."""
    evaluated: set[tuple[int, str]]
    """(generation, split) of the evaluations in the run file when this job began."""
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=5))
    """Seconds of this job's latest generations."""

    @property
    def folder(self) -> Path:
        return Path(self.settings.run.directory)

    def meet(self) -> None:
        """Wait for all ranks; give up after run.collective_timeout."""
        parallel.barrier(self.comm, self.settings.run.collective_timeout, self.hosts)


@dataclass
class Evaluated:
    """A member after its evaluation."""

    member: Member
    reward: float
    tokens: int
    seconds: float


def main(comm: Comm, arguments: list[str]) -> int:
    settings = parallel.together(comm, config.load, arguments)
    parallel.require_equal(comm, settings.flat(), "settings")
    job = set_up(comm, settings)
    generations = settings.es.generations
    evaluate_if_due(job, job.first)
    job.screen.begin(job.first, generations)
    for generation in range(job.first, generations):
        committed, stop = evolve(job, generation)
        done = generation + committed
        if stop and done < generations:
            return leave(job, done)
        save_checkpoint_if_due(job, done)
        evaluate_if_due(job, done)
    job.screen.end()
    finish(job)
    return 0


def evolve(job: Job, generation: int) -> tuple[bool, bool]:
    """One generation (paper, section 3): evaluate, exchange (seed, reward), update, commit.

    Returns (was it committed, have the ranks agreed to stop).
    """
    start = time.perf_counter()
    es, weights = job.settings.es, job.replica.weights
    plan = [job.population.blocks_of(r, job.comm.size, generation) for r in range(job.comm.size)]

    mine = list(evaluate_members(job, plan[job.comm.rank]))
    members, rewards = exchange(job, plan, mine)
    if rewards is None:  # a rank had to leave before its last block
        return False, True
    if np.isnan(rewards).all():
        raise RefusedError("no answer of this generation could be scored; see the reward function")

    seeds = np.array([m.seed for m in members], dtype=np.uint64)
    signs = np.array([m.sign for m in members], dtype=np.int8)
    coefficients = fitness.coefficients(rewards, es.alpha)
    with job.phases("update"):
        weights.update(*directions(seeds, signs, coefficients))  # every seed is replayed
        digest = weights.digest()
    job.recent.append(time.perf_counter() - start)
    with job.phases("communicate"):
        stop = check_replicas(job, digest, generation)

    columns = {"seed": seeds, "sign": signs, "reward": rewards, "coefficient": coefficients}
    record(job, plan, mine, digest, columns, start)
    return True, stop


def evaluate_members(job: Job, blocks: list[list[Member]]) -> Iterator[Evaluated]:
    """Perturb, generate, score each member of the blocks."""
    from mpies.tasks.base import member_reward

    weights, phases, rows = job.replica.weights, job.phases, job.task.train
    prompts = [row["prompt"] for row in rows]
    members = [member for block in blocks for member in block]
    slowest = 0.0
    for done, member in enumerate(members):
        if not job.stop.fits(slowest * (len(members) - done)):
            return
        start = time.perf_counter()
        with phases("perturb"):  # live <- cast(base + sigma * sign * noise(seed))
            weights.perturb(member.seed, job.settings.es.sigma * member.sign)
        with phases("generate"):
            answers = job.replica.engine.generate(prompts)
        with phases("reward"):
            reward = member_reward(job.task.score(rows, answers.texts))
        seconds = time.perf_counter() - start
        slowest = max(slowest, seconds)
        yield Evaluated(member, reward, sum(answers.tokens), seconds)


def exchange(
    job: Job, plan: list[list[list[Member]]], mine: list[Evaluated]
) -> tuple[list[Member], np.ndarray | None]:
    """All members and their rewards (float64, (N,)), in member order: 16 bytes a member travel.

    The rewards are None if a rank left members unevaluated; they travel with seed 0.
    """
    counts = _counts(plan)
    pairs = np.zeros(counts[job.comm.rank], dtype=PAIR)
    pairs[: len(mine)] = [(e.member.seed, e.reward) for e in mine]
    with job.phases("wait"):
        job.meet()
    with job.phases("communicate"):
        pairs = parallel.allgather_rows(job.comm, pairs, counts)
    order, members = _member_order(plan)
    pairs = pairs[order]
    complete = [m.seed for m in members] == pairs["seed"].tolist()
    return members, pairs["reward"].copy() if complete else None


def check_replicas(job: Job, digest: int, generation: int) -> bool:
    """Compare the replicas' digests; stop the job if a rank has diverged.

    With its digest, each rank says whether it wants to stop after this generation, for a signal or
    because another one would not fit the time limit: 16 bytes a rank. Returns whether any does.
    """
    wish = job.stop.requested or not job.stop.fits(max(job.recent))
    words = np.array([(digest, wish)], dtype=WORDS)
    words = parallel.allgather_rows(job.comm, words, [1] * job.comm.size)
    differing = parallel.diverged(words["digest"].tolist())
    if differing:
        named = ", ".join(f"rank {rank} on {job.hosts[rank]}" for rank in differing)
        raise DivergedError(
            f"generation {generation + 1}: the base weights of {named} differ from the others';"
            " this generation is not committed. Memory errors or mixed software do this"
        )
    return bool(words["stop"].any())


def record(
    job: Job,
    plan: list[list[list[Member]]],
    mine: list[Evaluated],
    digest: int,
    columns: dict[str, np.ndarray],
    start: float,
) -> None:
    """Gather the telemetry on rank 0, which writes and commits the generation and shows it."""
    comm, es = job.comm, job.settings.es
    spent = job.phases.take()
    seconds = np.array([spent[phase] for phase in PHASES])
    seconds = parallel.gather_rows(comm, seconds, [len(PHASES)] * comm.size)
    tokens = parallel.gather_rows(comm, np.array([e.tokens for e in mine], "i8"), _counts(plan))
    times = parallel.gather_rows(comm, np.array([e.seconds for e in mine], "f8"), _counts(plan))
    if job.log is None:
        return
    order, _ = _member_order(plan)
    columns["rank"] = np.repeat(np.arange(comm.size), _counts(plan))[order]
    columns["tokens"] = tokens[order]
    columns["seconds"] = times[order]
    row = {
        **_reward_statistics(columns["reward"]),
        **_time_statistics(seconds.reshape(comm.size, len(PHASES))),
        "sigma": es.sigma,
        "alpha": es.alpha,
        "digest": digest,
        "seconds": time.perf_counter() - start,
        "tokens": int(tokens.sum()),
        "bytes_communicated": len(tokens) * PAIR.itemsize + comm.size * WORDS.itemsize,
    }
    with job.phases("log"):
        job.log.append(row, columns)
    job.log.log_seconds(job.phases.seconds["log"])
    job.screen.generation(row)


def save_checkpoint_if_due(job: Job, generation: int) -> None:
    """Every `run.checkpoint_every` generations, rank 0 writes its base weights."""
    every = job.settings.run.checkpoint_every
    if job.log and every and generation % every == 0:
        from mpies import checkpoint

        checkpoint.write(job.folder, job.replica.weights, job.log.run_uuid, generation)


def evaluate_if_due(job: Job, generation: int) -> None:
    """Evaluate the unperturbed model on training and held-out prompts, on all ranks, and log it.

    Due are the first and the last generation and every `run.evaluate_every`-th, unless they are in
    the run file already.
    """
    from mpies.evaluate import evaluate

    every, last = job.settings.run.evaluate_every, job.settings.es.generations
    if generation not in (0, last) and not (every and generation % every == 0):
        return
    job.replica.weights.show_base()
    for split, rows in {"train": job.task.train, "held_out": job.task.held_out}.items():
        if (generation, split) in job.evaluated:
            continue
        batch = job.settings.engine.batch_size
        result = evaluate(job.comm, job.replica.engine, job.task, rows, batch, job.meet)
        if job.log:
            job.log.add_evaluation(*result.table_rows(generation, split, job.settings.run.keep_samples))


def finish(job: Job) -> None:
    """Save the tuned model and show what was reached."""
    from mpies.weights import save

    if job.log:
        job.replica.weights.show_base()
        save(job.replica.model, job.replica.tokenizer, job.folder / "model")
        job.log.close()
        job.screen.result(job.folder / "run.h5")
        job.screen.next_steps(job.folder / "model")
    job.meet()


def leave(job: Job, done: int) -> int:
    """Stop early: everything is on disk already."""
    job.screen.end()
    if job.log:
        job.log.close()
    why = job.stop.reason or "a signal to another rank"
    job.screen.say(
        f"stopped by {why} after generation {done} of {job.settings.es.generations};"
        " the same command goes on from there"
    )
    return RESUMABLE


def set_up(comm: Comm, settings: config.Settings) -> Job:
    """Everything before the first generation. Bad input is refused before the model is loaded."""
    from mpies import replica as replicas
    from mpies import resume, tasks
    from mpies.screen import Screen

    limit = parallel.on_root(comm, seconds_of, settings.run.time_limit)
    stop = Stop(limit, settings.run.grace)
    stop.listen()
    path = Path(settings.run.directory) / "run.h5"
    log, history = resume.find(comm, settings, path)
    task = parallel.together(comm, tasks.make, settings.task.name)
    screen = Screen(comm.rank != 0, settings.run.progress)
    screen.say(f"loading {settings.model.path} ...")
    replica = replicas.build(comm, settings)
    places = parallel.allgather_objects(comm, replicas.place(replica.device))
    facts = {**replica.facts, "run_file": path, "train": len(task.train), "held_out": len(task.held_out)}
    screen.banner(settings, facts, places)
    if history:
        resume.restore(comm, replica.weights, history, replica.facts, path.parent, screen.say)
    es = settings.es
    job = Job(
        comm=comm,
        settings=settings,
        replica=replica,
        task=task,
        population=Population(es.population, es.seed, es.antithetic),
        phases=Phases(replica.synchronize),
        stop=stop,
        screen=screen,
        log=log,
        hosts=[place["host"] for place in places],
        first=history.generations if history else 0,
        evaluated=set(),
    )
    job.evaluated = parallel.on_root(comm, open_log, job, path, places)
    return job


def open_log(job: Job, path: Path, places: list[dict[str, Any]]) -> set[tuple[int, str]]:
    """On rank 0: create the run file, if there is none, and note this start. Returns what is evaluated."""
    from mpies.replica import versions
    from mpies.runfile import RunFile

    facts = job.replica.facts
    reason = "resumed" if job.log else "new"
    if job.log is None:
        job.log = RunFile.create(
            path,
            population=job.population.size,
            generations=job.settings.es.generations,
            model_path=facts["model_path"],
            model_digest=np.uint64(facts["model_digest"]),
            parameters=facts["parameters"],
            dtype=facts["dtype"],
        )
    row = {
        "world_size": job.comm.size,
        "hosts": ",".join(job.hosts),
        "devices": ",".join(place["device"] for place in places),
        "versions": json.dumps(versions()),
        "reason": reason,
    }
    job.log.start(job.settings.to_yaml(), row)
    return job.log.evaluated()


def _counts(plan: list[list[list[Member]]]) -> list[int]:
    """Members per rank."""
    return [sum(map(len, blocks)) for blocks in plan]


def _member_order(plan: list[list[list[Member]]]) -> tuple[np.ndarray, list[Member]]:
    """The permutation from rank order to member order, and the members in member order."""
    members = [member for blocks in plan for block in blocks for member in block]
    order = np.argsort([member.index for member in members])
    return order, [members[i] for i in order]


def _reward_statistics(rewards: np.ndarray) -> dict[str, Any]:
    scored = rewards[~np.isnan(rewards)]
    return {
        "reward_mean": scored.mean(),
        "reward_std": scored.std(),
        "reward_min": scored.min(),
        "reward_max": scored.max(),
        "unscored": len(rewards) - len(scored),
    }


def _time_statistics(seconds: np.ndarray) -> dict[str, float]:
    """Means over ranks of the phases' seconds (ranks, phases), and the imbalance of evaluation."""
    evaluation = seconds[:, : PHASES.index("reward") + 1].sum(axis=1)
    return {
        **{f"seconds_{phase}": mean for phase, mean in zip(PHASES, seconds.mean(axis=0), strict=True)},
        "imbalance": evaluation.max() / evaluation.mean(),
    }


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(f"{__doc__}\n{config.describe()}")
    else:
        parallel.run(main, sys.argv[1:])
