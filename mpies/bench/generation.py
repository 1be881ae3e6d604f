"""Whole generations on a model: low-rank and full perturbation, plain inference, and the paper's way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from mpies.bench import paper
from mpies.bench.timing import Case, Timings, in_turns
from mpies.engines.hf import HfEngine
from mpies.engines.text import Text
from mpies.es.population import Population
from mpies.model import linear_cpu, loading
from mpies.model.lowrank import LowRank
from mpies.model.perturbation import Full
from mpies.model.weights import take_over
from mpies.noise import Kernels
from mpies.phases import Phases
from mpies.tasks import conciseness

SIGMA = 0.01
SAMPLE = 4  # members that ways which evaluate one by one are timed on


@dataclass(frozen=True)
class Work:
    """What a generation evaluates: members x prompts x tokens, every answer of full length."""

    members: int
    prompts: int
    tokens: int

    def __str__(self):
        return f"{self.members} members x {self.prompts} prompts x {self.tokens} tokens"


class Subject:
    """A model to run generations with, and a second copy for the paper's way."""

    def __init__(self, path: str, dtype: torch.dtype, device: torch.device, kernels: Kernels):
        self.model, self.tokenizer = loading.load(path, allow_download=False)
        self.weights = take_over(self.model, dtype, device, kernels, rank=1)
        if device.type == "cpu":
            linear_cpu.install(self.model)
        self.full = Full(self.weights)
        self.lowrank = LowRank(self.model, self.weights, rank=1)
        original, _ = loading.load(path, allow_download=False)
        self.original = original.to(device=device, dtype=dtype)

    def engine(self, tokens: int, batch: int) -> HfEngine:
        """The program's engine, without an end of sequence."""
        engine = HfEngine(
            self.model,
            Text(self.model, self.tokenizer, bool(self.tokenizer.chat_template)),
            max_new_tokens=tokens,
            batch_size=batch,
            on_rows=self.lowrank.rows,
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
    subject: Subject, work: Work, repeats: int, synchronize: Callable[[], None], say
) -> tuple[Timings, Phases]:
    """Seconds of the same work done in each way, and the phases of the low-rank generations.

    Ways that evaluate members one by one are timed per member.
    """
    prompts = prompts_of(work.prompts)
    engine = subject.engine(work.tokens, work.members * work.prompts)
    ids = [engine.text.encode(prompt) for prompt in prompts]
    members = Population(work.members, seed=1).members(0)
    seeds = np.array([member.seed for member in members], np.uint64)
    few = members[:SAMPLE]
    tensors = [parameter.data for parameter in subject.original.parameters()]
    phases = Phases(synchronize)

    def lowrank():
        with phases("perturb"):
            subject.lowrank.set(members, SIGMA)
        with phases("generate"):
            engine.generate_block(prompts, work.members)
        with phases("update"):
            subject.update(seeds, rank=1)

    def full():
        for member in few:
            subject.full.set([member], SIGMA)
            engine.generate(prompts)

    def papers():
        for member in few:
            paper.add_noise(tensors, member.index, SIGMA)
            paper.generate(subject.original, ids, work.tokens)
            paper.add_noise(tensors, member.index, -SIGMA)

    small = [1e-9] * len(few)
    cases = {
        "plain": Case(lambda: engine.generate(prompts * work.members), before=subject.plain),
        "low rank": Case(lowrank, before=subject.stale),
        "full: a member": Case(full, len(few), before=subject.plain),
        "full: update": Case(lambda: subject.update(seeds, rank=0)),
        "paper: a member": Case(papers, len(few)),
        "paper: update, a member": Case(
            lambda: paper.update(tensors, [m.index for m in few], small), len(few)
        ),
    }
    return in_turns(cases, repeats, synchronize, say), phases


def share(subject: Subject, work: Work, repeats: int, synchronize: Callable[[], None], say) -> Timings:
    """Seconds of the parts of a generation with full perturbation, per member."""
    prompts = prompts_of(work.prompts)
    engine = subject.engine(work.tokens, work.prompts)
    members = Population(work.members, seed=1).members(0)
    seeds = np.array([member.seed for member in members], np.uint64)
    subject.plain()
    cases = {
        "perturb": Case(lambda: subject.full.set(members[:1], SIGMA)),
        "generate": Case(lambda: engine.generate(prompts)),
        "update": Case(lambda: subject.update(seeds, rank=0), work.members),
    }
    return in_turns(cases, repeats, synchronize, say)


def scaling(subject: Subject, comm, work: Work, repeats: int, synchronize, say) -> Timings:
    """Seconds of a low-rank generation on rank 0 alone, and spread over all ranks."""
    from mpies.ranks import collectives

    prompts = prompts_of(work.prompts)
    members = Population(work.members, seed=1).members(0)
    seeds = np.array([member.seed for member in members], np.uint64)
    block = max(1, work.members // comm.size)
    engine = subject.engine(work.tokens, block * work.prompts)
    blocks = [members[i : i + block] for i in range(0, work.members, block)]

    def evaluate(mine):
        for chosen in mine:
            subject.lowrank.set(chosen, SIGMA)
            engine.generate_block(prompts, len(chosen))

    def alone():
        """The other ranks wait, as if they were not there."""
        if comm.rank == 0:
            evaluate(blocks)
            subject.update(seeds, rank=1)
        collectives.barrier(comm)

    def together():
        evaluate(blocks[comm.rank :: comm.size])
        collectives.barrier(comm)
        subject.update(seeds, rank=1)
        collectives.barrier(comm)

    def start():
        subject.stale()
        collectives.barrier(comm)

    cases = {"1 rank": Case(alone, before=start), "all ranks": Case(together, before=start)}
    return in_turns(cases, repeats, synchronize, say)


def prompts_of(count: int) -> list[str]:
    """So many prompts of the task conciseness, from the start again if there are fewer."""
    known = [*conciseness.TRAIN, *conciseness.HELD_OUT]
    return [known[i % len(known)] for i in range(count)]
