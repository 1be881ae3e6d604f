"""From what one block of members took: a generation, the run, and the jobs that it needs."""

from __future__ import annotations

from dataclasses import dataclass

from mpies.check.rehearsal import Trial
from mpies.check.report import Finding
from mpies.config import Settings
from mpies.es.population import Population
from mpies.replica import Replica
from mpies.run.stopping import LEAVE, SAFETY
from mpies.tasks.base import Task
from mpies.text import duration, size

FULL = 0.9  # share of the memory from which on it is called full
UNEVEN = 0.9  # share of the ranks' time from which on down they are called idle


@dataclass(frozen=True)
class Forecast:
    """Seconds: of a start, of a generation, of a generation's update alone, which a replay repeats; of an
    evaluation of all splits."""

    start: float
    generation: float
    update: float
    blocks: tuple[int, ...]
    """Blocks of members that each rank evaluates."""
    evaluation: float = 0.0
    every: int = 0
    """Generations between evaluations; 0: at the first and the last only."""

    @property
    def paced(self) -> float:
        """Seconds of a generation with its share of the evaluations between the first and the last."""
        return self.generation + (self.evaluation / self.every if self.every else 0.0)


def forecast(settings: Settings, cost: Trial, task: Task, ranks: int, start: float) -> Forecast:
    es, batch = settings.es, settings.engine.batch_size
    plan = Population(es.population, es.seed, es.antithetic, es.block_size).plan(0, ranks)
    blocks = tuple(len(mine) for mine in plan.blocks)
    update = cost.seed * (es.population // 2 if es.antithetic else es.population) + cost.pull
    # An evaluation's answers take what a block's did, in whole batches.
    answer = cost.block / (len(task.rows(0)) * es.block_size)
    splits = list(task.splits.values())
    sampled = min(settings.run.kl_prompts, len(splits[-1])) * settings.run.kl_samples  # and read twice more
    batches = sum(-(-len(rows) // batch) for rows in splits) + 2 * -(-sampled // batch)
    longest = min(batch, max(sampled, *map(len, splits)))
    return Forecast(
        start=start,
        generation=max(blocks) * cost.block + update + cost.digest,
        update=update,
        blocks=blocks,
        evaluation=-(-batches // ranks) * longest * answer,
        every=settings.run.evaluate_every,
    )


def describe_start(imports: float, loading: float) -> list[Finding]:
    """Seconds of rank 0 to import libraries, and of the slowest rank to load the model and its engine."""
    parts = f"{duration(imports)} to import, {duration(loading)} to load and to test the model"
    return [Finding("start", f"{duration(imports + loading)} before the first generation: {parts}")]


def describe_memory(cost: Trial, replica: Replica, there: int) -> list[Finding]:
    """The engine's cache and all else that an evaluation needs beyond the weights; `there`: bytes."""
    weights, held = replica.weights, replica.engine.held
    if cost.memory is None:
        return []
    kept = [base for base in weights.base.values() if base.device.type == weights.device.type]
    tensors = [*kept, *replica.model.parameters()]  # live weights, and those of what is not tuned
    beyond = held + cost.memory
    peak = sum(tensor.nbytes for tensor in tensors) + beyond
    note = "little is left for longer prompts: a smaller engine.batch_size needs less"
    value = f"{size(beyond)} beyond the weights at the peak, {size(peak)} in all, {size(there)} there"
    return [Finding("cache", value, note=note if peak > FULL * there else "")]


def describe_generation(expected: Forecast) -> list[Finding]:
    """A generation, and how evenly the ranks share it."""
    value = (
        f"{duration(expected.generation)}: {max(expected.blocks)} such block(s) on the busiest rank,"
        f" update {100 * expected.update / expected.generation:.1f} %"
    )
    return [Finding("generation", value, note=_idleness(expected.blocks))]


def _idleness(blocks: tuple[int, ...]) -> str:
    total, ranks = sum(blocks), len(blocks)
    busy = total / (max(blocks) * ranks)
    if busy >= UNEVEN:
        return ""
    even = [str(n) for n in range(1, 2 * ranks + 1) if total % n == 0]
    return (
        f"{total} blocks on {ranks} ranks: they are idle {100 * (1 - busy):.0f} % of the time;"
        f" {', '.join(even)} rank(s) would share them evenly"
    )


def describe_run(settings: Settings, expected: Forecast, limit: float | None, done: int) -> list[Finding]:
    """How long the run takes, and whether it gets to its end in jobs of `limit` seconds (None: unlimited).

    `done`: generations that were made before.
    """
    total = settings.es.generations
    whole = expected.start + (total - done) * expected.paced + 2 * expected.evaluation
    each = duration(expected.evaluation)
    value = f"{total - done} generation(s) to go: {duration(whole)}; an evaluation takes {each}"
    if limit is None:
        return [Finding("time", f"{value}; no time limit")]
    if settings.run.time_limit == "auto":  # that of this job, of which some is spent already
        return [Finding("time", f"{value}; with run.time_limit=HH:MM:SS, the training job's: how many jobs")]
    jobs, reached = jobs_needed(expected, limit, done, total, settings.run.checkpoint_every)
    if reached == total:
        return [Finding("time", f"{value}; {jobs} job(s) of {duration(limit)}")]
    if jobs == 0:
        why = (
            f"not one generation of {duration(expected.generation)}, {duration(expected.start)} after the"
            f" start, fits into {duration(limit)}: ask for more time or more ranks, or set a smaller"
            " es.population or engine.max_new_tokens"
        )
    else:
        why = (
            f"jobs of {duration(limit)} get no further than generation {reached} of {total}, since each"
            " replays what was done before: ask for more time, or set run.checkpoint_every"
        )
    return [Finding("time", f"{value}; jobs of {duration(limit)}", problem=f"run.time_limit: {why}")]


def jobs_needed(
    expected: Forecast, limit: float, done: int, total: int, checkpoint_every: int
) -> tuple[int, int]:
    """How many jobs of `limit` seconds come how far: every one replays, then begins what will fit."""
    jobs = 0
    while done < total:
        replayed = done % checkpoint_every if checkpoint_every else done
        room = limit - expected.start - replayed * expected.update - LEAVE
        room -= expected.evaluation if done == 0 else 0.0
        fit = int(room / expected.paced - (SAFETY - 1))
        if fit < 1:
            break
        done, jobs = min(total, done + fit), jobs + 1
    return jobs, done
