"""Fine-tune a language model with evolution strategies (arXiv 2509.24372).

    mpirun -n N python -m mpies.train [CONFIG.yaml] [section.key=value ...]

Without a configuration file, the embedded quickstart. --help lists all settings.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mpies import config, fitness, parallel
from mpies.errors import RefusedError
from mpies.phases import PHASES, Phases
from mpies.population import Member, Population, directions

if TYPE_CHECKING:
    from mpi4py.MPI import Comm

    from mpies.evaluate import Evaluation
    from mpies.replica import Replica
    from mpies.runfile import RunFile
    from mpies.screen import Screen
    from mpies.tasks.base import Task

PAIR = np.dtype([("seed", "<u8"), ("reward", "<f8")])


@dataclass
class Job:
    """What the generation loop works with, on every rank; `log` is there on rank 0 only."""

    comm: Comm
    settings: config.Settings
    replica: Replica
    task: Task
    population: Population
    phases: Phases
    screen: Screen
    log: RunFile | None


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
    before = evaluate_base(job, 0)
    job.screen.begin(0, generations)
    for generation in range(generations):
        evolve(job, generation)
        if _evaluation_due(settings, generation + 1):
            evaluate_base(job, generation + 1)
    job.screen.end()
    after = evaluate_base(job, generations) if generations else before
    finish(job, before, after)
    return 0


def evolve(job: Job, generation: int) -> None:
    """One generation (paper, section 3): evaluate, exchange (seed, reward), update, commit."""
    start = time.perf_counter()
    es, weights = job.settings.es, job.replica.weights
    plan = [job.population.blocks_of(r, job.comm.size, generation) for r in range(job.comm.size)]

    mine = list(evaluate_members(job, plan[job.comm.rank]))
    members, rewards = exchange(job, plan, mine)
    if np.isnan(rewards).all():
        raise RefusedError("no answer of this generation could be scored; see the reward function")

    seeds = np.array([m.seed for m in members], dtype=np.uint64)
    signs = np.array([m.sign for m in members], dtype=np.int8)
    coefficients = fitness.coefficients(rewards, es.alpha)
    with job.phases("update"):
        weights.update(*directions(seeds, signs, coefficients))  # every seed is replayed
        digest = weights.digest()
    with job.phases("communicate"):
        check_replicas(job.comm, digest, generation)

    columns = {"seed": seeds, "sign": signs, "reward": rewards, "coefficient": coefficients}
    record(job, plan, mine, digest, columns, start)


def evaluate_members(job: Job, blocks: list[list[Member]]) -> Iterator[Evaluated]:
    """Perturb, generate, score each member of the blocks."""
    from mpies.tasks.base import member_reward

    weights, phases, rows = job.replica.weights, job.phases, job.task.train
    prompts = [row["prompt"] for row in rows]
    for member in (member for block in blocks for member in block):
        start = time.perf_counter()
        with phases("perturb"):  # live <- cast(base + sigma * sign * noise(seed))
            weights.perturb(member.seed, job.settings.es.sigma * member.sign)
        with phases("generate"):
            answers = job.replica.engine.generate(prompts)
        with phases("reward"):
            reward = member_reward(job.task.score(rows, answers.texts))
        yield Evaluated(member, reward, sum(answers.tokens), time.perf_counter() - start)


def exchange(
    job: Job, plan: list[list[list[Member]]], mine: list[Evaluated]
) -> tuple[list[Member], np.ndarray]:
    """All members and their rewards (float64, (N,)), in member order: 16 bytes a member travel."""
    pairs = np.array([(e.member.seed, e.reward) for e in mine], dtype=PAIR)
    with job.phases("wait"):
        parallel.barrier(job.comm)
    with job.phases("communicate"):
        pairs = parallel.allgather_rows(job.comm, pairs, _counts(plan))
    order, members = _member_order(plan)
    pairs = pairs[order]
    if [m.seed for m in members] != pairs["seed"].tolist():
        raise RuntimeError("ranks evaluated other seeds than this generation's")
    return members, pairs["reward"].copy()


def check_replicas(comm: Comm, digest: int, generation: int) -> None:
    """Compare the replicas' digests (8 bytes a rank); stop the job if a rank has diverged."""
    digests = parallel.allgather_rows(comm, np.array([digest], dtype=np.uint64), [1] * comm.size)
    differing = parallel.diverged(digests.tolist())
    if differing:
        hosts = parallel.allgather_objects(comm, parallel.host())
        named = ", ".join(f"rank {rank} on {hosts[rank]}" for rank in differing)
        raise parallel.DivergedError(
            f"generation {generation}: the base weights of {named} differ from the others';"
            " this generation is not committed. Memory errors or mixed software do this"
        )


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
        "bytes_communicated": len(tokens) * PAIR.itemsize + 8 * comm.size,
    }
    with job.phases("log"):
        job.log.append(row, columns)
    job.log.log_seconds(job.phases.seconds["log"])
    job.screen.generation(row)


def set_up(comm: Comm, settings: config.Settings) -> Job:
    """Everything before the first generation. Bad input is refused before the model is loaded."""
    from mpies import replica as replicas
    from mpies import tasks
    from mpies.runfile import RunFile
    from mpies.screen import Screen

    path = Path(settings.run.directory) / "run.h5"
    parallel.on_root(comm, RunFile.refuse_existing, path)
    task = parallel.together(comm, tasks.make, settings.task.name)
    screen = Screen(comm.rank != 0, settings.run.progress)
    screen.say(f"loading {settings.model.path} ...")
    replica = replicas.build(comm, settings)
    es = settings.es
    population = Population(es.population, es.seed, es.antithetic)
    places = parallel.allgather_objects(comm, replicas.place(replica.device))
    facts = {
        **replica.facts,
        "run_file": path,
        "train": len(task.train),
        "held_out": len(task.held_out),
    }
    screen.banner(settings, facts, places)
    phases = Phases(replica.synchronize)
    job = Job(comm, settings, replica, task, population, phases, screen, None)
    parallel.on_root(comm, _open_log, job, path, places)
    return job


def _open_log(job: Job, path: Path, places: list[dict[str, Any]]) -> None:
    from mpies.replica import versions
    from mpies.runfile import RunFile

    facts = job.replica.facts
    job.log = RunFile.create(
        path,
        population=job.population.size,
        model_path=facts["model_path"],
        model_digest=np.uint64(facts["model_digest"]),
        parameters=facts["parameters"],
    )
    job.log.start(
        job.settings.to_yaml(),
        {
            "world_size": job.comm.size,
            "hosts": ",".join(place["host"] for place in places),
            "devices": ",".join(place["device"] for place in places),
            "versions": json.dumps(versions()),
            "reason": "new",
        },
    )


def evaluate_base(job: Job, generation: int) -> dict[str, Evaluation]:
    """Evaluate the unperturbed model on training and held-out prompts, on all ranks; log it."""
    from mpies.evaluate import evaluate

    job.replica.weights.show_base()
    batch = job.settings.engine.batch_size
    splits = {"train": job.task.train, "held_out": job.task.held_out}
    results = {}
    for split, rows in splits.items():
        result = evaluate(job.comm, job.replica.engine, job.task, rows, batch)
        results[split] = result
        if job.log:
            job.log.add_evaluation(*result.table_rows(generation, split, job.settings.run.keep_samples))
    return results


def finish(job: Job, before: dict[str, Evaluation], after: dict[str, Evaluation]) -> None:
    """Save the tuned model and show what was reached."""
    from mpies.weights import save

    if job.log:
        folder = Path(job.settings.run.directory) / "model"
        save(job.replica.model, job.replica.tokenizer, folder)
        job.log.close()
        job.screen.before_and_after(before, after)
        job.screen.time_split(Path(job.settings.run.directory) / "run.h5")
        job.screen.next_steps(folder)
    parallel.barrier(job.comm)


def _evaluation_due(settings: config.Settings, generation: int) -> bool:
    every = settings.run.evaluate_every
    return bool(every) and generation % every == 0 and generation < settings.es.generations


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
