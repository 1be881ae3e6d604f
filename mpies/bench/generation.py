"""Whole generations on a model: low-rank and full perturbation, plain inference, and the paper's way."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mpies import config
from mpies.bench import paper
from mpies.bench.timing import Case, Timings, in_turns
from mpies.engines.base import Prompt
from mpies.engines.hf import HfEngine
from mpies.engines.text import Text
from mpies.es.population import Member, Population
from mpies.model import loading
from mpies.model.perturbation import Full
from mpies.phases import Phases
from mpies.ranks.collectives import barrier
from mpies.replica import build
from mpies.tasks import conciseness
from mpies.tasks.base import Task

if TYPE_CHECKING:
    from mpi4py.MPI import Comm

SIGMA = 0.01
SAMPLE = 4  # members that ways which evaluate one by one are timed on
MANY = 512  # directions, as of 1024 members in pairs: each takes less time than one of a few does


@dataclass(frozen=True)
class Work:
    """What a generation evaluates: members x prompts x tokens, every answer of full length."""

    members: int
    prompts: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.members} members x {self.prompts} prompts x {self.tokens} tokens"


class Rig:
    """A replica to run generations with, low rank and full, and a second copy for the paper's way.

    `chosen`: settings of the replica's beside those of the work.
    """

    def __init__(
        self,
        comm: Comm,
        given: argparse.Namespace,
        dtype: str,
        work: Work,
        chosen: Mapping[str, Any] = MappingProxyType({}),
    ):
        lowrank = {"es.perturbation": "lowrank", "es.rank": 1, "es.block": work.members}
        self.replica = build(comm, settings_of(given, dtype, work, {**lowrank, **chosen}), task_of(work))
        self.weights = self.replica.weights
        self.lowrank = self.replica.perturbation
        self.full = Full(self.weights)
        original, _ = loading.load(given.model, allow_download=False)
        self.original = original
        torch.nn.Module.to(original, device=self.replica.device, dtype=getattr(torch, dtype))

    def engine(self, tokens: int, batch: int, version: Callable[[], int] | None = None) -> HfEngine:
        """The program's engine, without an end of sequence. `version`: as the engine takes it."""
        engine = HfEngine(
            self.replica.model,
            Text(self.replica.model, self.replica.tokenizer, bool(self.replica.tokenizer.chat_template)),
            max_new_tokens=tokens,
            batch_size=batch,
            on_rows=self.lowrank.rows,
            version=version,
        )
        engine.text.stops = set()
        return engine

    def update(self, seeds: np.ndarray, rank: int) -> None:
        """An update as after a generation, too small to change much, and the digest."""
        self.weights.rank = rank
        self.weights.update(seeds, np.full(len(seeds), 1e-9, np.float32))
        self.weights.digest()

    def stale(self) -> None:
        """As after an update: the next block has to show the new base."""
        self.lowrank.clear()
        self.update(np.ones(1, np.uint64), rank=1)

    def plain(self) -> None:
        """The unperturbed model."""
        self.lowrank.clear()


def compare(
    rig: Rig, work: Work, repeats: int, synchronize: Callable[[], None], say
) -> tuple[Timings, Phases]:
    """Seconds of the same work done in each way, and the phases of the low-rank generations.

    Ways that evaluate members one by one are timed per member.
    """
    prompts = prompts_of(work.prompts)
    engine = rig.engine(work.tokens, work.members * work.prompts)
    ids = [engine.text.encode(prompt) for prompt in prompts]
    members = Population(work.members, seed=1).members(0)
    seeds = seeds_of(members)
    few = members[:SAMPLE]
    tensors = [parameter.data for parameter in rig.original.parameters()]
    phases = Phases(synchronize)

    def lowrank():
        with phases("perturb"):
            rig.lowrank.set(members, SIGMA)
        with phases("generate"):
            engine.generate_block(prompts, work.members)
        with phases("update"):
            rig.update(seeds, rank=1)

    def full():
        for member in few:
            rig.full.set([member], SIGMA)
            engine.generate(prompts)

    def papers():
        for member in few:
            paper.add_noise(tensors, member.index, SIGMA)
            paper.generate(rig.original, ids, work.tokens)
            paper.add_noise(tensors, member.index, -SIGMA)

    small = [1e-9] * len(few)
    cases = {
        "plain": Case(lambda: engine.generate(prompts * work.members), before=rig.plain),
        "low rank": Case(lowrank, before=rig.stale),
        "low rank: a direction's update": Case(
            lambda: rig.update(np.arange(1, MANY + 1, dtype=np.uint64), rank=1), MANY
        ),
        "full: a member": Case(full, len(few), before=rig.plain),
        "full: update": Case(lambda: rig.update(seeds, rank=0)),
        "paper: a member": Case(papers, len(few)),
        "paper: update, a member": Case(
            lambda: paper.update(tensors, [m.index for m in few], small), len(few)
        ),
    }
    return in_turns(cases, repeats, synchronize, say, phases.take), phases


def share(rig: Rig, work: Work, repeats: int, synchronize: Callable[[], None], say) -> Timings:
    """Seconds of the parts of a generation with full perturbation, per member."""
    prompts = prompts_of(work.prompts)
    engine = rig.engine(work.tokens, work.prompts)
    members = Population(work.members, seed=1).members(0)
    seeds = seeds_of(members)
    rig.plain()
    cases = {
        "perturb": Case(lambda: rig.full.set(members[:1], SIGMA)),
        "generate": Case(lambda: engine.generate(prompts)),
        "update": Case(lambda: rig.update(seeds, rank=0), work.members),
    }
    return in_turns(cases, repeats, synchronize, say)


def scaling(rig: Rig, comm, work: Work, repeats: int, synchronize, say) -> Timings:
    """Seconds of a low-rank generation on rank 0 alone, and spread over all ranks."""
    prompts = prompts_of(work.prompts)
    members = Population(work.members, seed=1).members(0)
    seeds = seeds_of(members)
    block = max(1, work.members // comm.size)
    engine = rig.engine(work.tokens, block * work.prompts)
    blocks = [members[i : i + block] for i in range(0, work.members, block)]

    def evaluate(mine):
        for chosen in mine:
            rig.lowrank.set(chosen, SIGMA)
            engine.generate_block(prompts, len(chosen))

    def alone():
        """The other ranks wait, as if they were not there."""
        if comm.rank == 0:
            evaluate(blocks)
            rig.update(seeds, rank=1)
        barrier(comm)

    def together():
        evaluate(blocks[comm.rank :: comm.size])
        barrier(comm)
        rig.update(seeds, rank=1)
        barrier(comm)

    def start():
        rig.stale()
        barrier(comm)

    cases = {"1 rank": Case(alone, before=start), "all ranks": Case(together, before=start)}
    return in_turns(cases, repeats, synchronize, say)


def seeds_of(members: list[Member]) -> np.ndarray:
    """uint64 (members,)."""
    return np.array([member.seed for member in members], np.uint64)


def settings_of(given: argparse.Namespace, dtype: str, work: Work, chosen: dict[str, Any]) -> config.Settings:
    """The settings of a job that does the work as `given` and `chosen` say."""
    values = {
        "model.path": given.model,
        "model.dtype": dtype,
        "model.device": given.device,
        "task.chat_template": False,
        "es.population": work.members,
        "es.antithetic": False,
        "engine.batch_size": work.prompts,
        "engine.max_new_tokens": work.tokens,
        "run.threads": given.threads,
        **chosen,
    }
    return config.load([f"{key}={value}" for key, value in values.items()])


def task_of(work: Work) -> Task:
    """Prompts to answer; nothing scores the answers."""
    rows = [{"prompt": prompt} for prompt in prompts_of(work.prompts)]
    return Task("bench", rows, [], lambda *_, **__: [])


def prompts_of(count: int) -> list[Prompt]:
    """So many prompts of the task conciseness, from the start again if there are fewer."""
    known = [*conciseness.TRAIN, *conciseness.HELD_OUT]
    return [known[i % len(known)] for i in range(count)]
