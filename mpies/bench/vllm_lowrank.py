"""Low rank in vLLM: against vLLM's own generation of the same rows, and against every other way.

All ways but multi-LoRA compute with one copy of the live weights, and take turns.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

from mpies.bench import paper
from mpies.bench.generation import SAMPLE, SIGMA, Rig, Work, prompts_of, seeds_of
from mpies.bench.timing import Case, Timings, in_turns
from mpies.engines.base import Prompt
from mpies.engines.vllm.engine import VllmEngine
from mpies.es.population import Member, Population
from mpies.model.lowrank import LowRank
from mpies.phases import Phases
from mpies.tasks import conciseness

if TYPE_CHECKING:
    from mpi4py.MPI import Comm


def rig_for(comm: Comm, given: argparse.Namespace, dtype: str, work: Work) -> Rig:
    """A rig whose engine is vLLM, for all rows at once."""
    chosen = {
        "engine.name": "vllm",
        "engine.batch_size": work.members * work.prompts,
        "task.chat_template": True,
    }
    return Rig(comm, given, dtype, work, chosen)


def larger(work: Work) -> Work:
    """Eight times the rows, and answers a third longer: 128 x 4 x 64 for 32 x 2 x 48."""
    return Work(4 * work.members, 2 * work.prompts, work.tokens * 4 // 3)


class Generation:
    """What a generation of low rank in vLLM does, everything included, on a rig whose engine is vLLM."""

    def __init__(self, rig: Rig, work: Work, synchronize: Callable[[], None]):
        engine = rig.replica.engine
        assert isinstance(engine, VllmEngine)
        engine.text.stops = set()
        engine.max_new_tokens = work.tokens
        self.rig, self.work, self.engine = rig, work, engine
        self.phases = Phases(synchronize)
        self.prompts: list[Prompt] = prompts_of(work.prompts)
        self.members: list[Member] = Population(work.members, seed=1).members(0)
        self.seeds = seeds_of(self.members)
        self.ids = encode(rig, work)

    def lowrank(self) -> None:
        """Draw, answer, score, update, digest."""
        with self.phases("perturb"):
            self.rig.lowrank.set(self.members, SIGMA)
        with self.phases("generate"):
            answers = self.engine.generate_block(self.prompts, self.work.members)
        with self.phases("reward"):
            score(self.prompts, [text for one in answers for text in one.texts])
        with self.phases("update"):
            self.rig.update(self.seeds, rank=1)

    def alone(self) -> None:
        """vLLM's own generation of as many rows, by the weights as they are packed."""
        rows = [{"prompt_token_ids": ids} for ids in self.ids] * self.work.members
        self.engine.llm.generate(rows, self.engine.parameters(), use_tqdm=False)

    def rest(self) -> None:
        """The unperturbed model, its weights packed."""
        self.rig.plain()
        self.engine.packing.refresh()

    def cases(self) -> dict[str, Case]:
        return {
            "vLLM alone": Case(self.alone, before=self.rest),
            "low rank": Case(self.lowrank, before=self.rig.stale),
        }


def score(prompts: list[Prompt], texts: list[str]) -> list[float]:
    """Rewards of the answers to the prompts, again and again."""
    known = {**conciseness.TRAIN, **conciseness.HELD_OUT}
    rows = len(texts) // len(prompts)
    return conciseness.reward(prompts * rows, texts, [known[str(prompt)] for prompt in prompts] * rows)


def against_vllm(
    rig: Rig, work: Work, repeats: int, synchronize: Callable[[], None], say
) -> tuple[Timings, Phases]:
    """Seconds of low rank in vLLM, and of vLLM's own generation of the same rows."""
    generation = Generation(rig, work, synchronize)
    phases = generation.phases
    return in_turns(generation.cases(), repeats, synchronize, say, phases.take), phases


def compare(
    rig: Rig, work: Work, repeats: int, synchronize: Callable[[], None], say
) -> tuple[Timings, Phases]:
    """The same, and of the other ways: low rank by hf, members one by one in vLLM, and the paper's.

    Ways that evaluate members one by one are timed per member.
    """
    generation = Generation(rig, work, synchronize)
    engine = generation.engine
    blocks = LowRank(rig.replica.model, rig.weights, rank=1)
    hf = rig.engine(work.tokens, work.members * work.prompts)
    hf.on_rows = blocks.rows
    few = generation.members[:SAMPLE]
    tensors = [parameter.data for parameter in rig.original.parameters()]
    small = [1e-9] * len(few)

    def lowrank_by_hf():
        blocks.set(generation.members, SIGMA)
        answers = hf.generate_block(generation.prompts, work.members)
        score(generation.prompts, [text for one in answers for text in one.texts])
        rig.update(generation.seeds, rank=1)
        blocks.clear()

    def full():
        for member in few:
            rig.full.set([member], SIGMA)
            engine.generate(generation.prompts)

    def papers():
        for member in few:
            paper.add_noise(tensors, member.index, SIGMA)
            paper.generate(rig.original, generation.ids, work.tokens)
            paper.add_noise(tensors, member.index, -SIGMA)

    cases = generation.cases() | {
        "hf: low rank": Case(lowrank_by_hf, before=rig.stale),
        "full: a member": Case(full, len(few), before=rig.plain),
        "full: update": Case(lambda: rig.update(generation.seeds, rank=0)),
        "paper: a member": Case(papers, len(few)),
        "paper: update, a member": Case(
            lambda: paper.update(tensors, [member.index for member in few], small), len(few)
        ),
    }
    return in_turns(cases, repeats, synchronize, say, generation.phases.take), generation.phases


def encode(rig: Rig, work: Work) -> list[list[int]]:
    """Tokens of the work's prompts."""
    text = rig.engine(1, 1).text
    return [text.encode(prompt) for prompt in prompts_of(work.prompts)]
