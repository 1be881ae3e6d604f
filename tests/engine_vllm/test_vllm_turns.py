"""Conversations in vLLM: what was read in a turn is not read again in the next, and never in another's."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import games
import one_vllm
import pytest
import torch

from mpies import config, replica
from mpies.engines.base import Conversations, Draws
from mpies.engines.sampler import answer_numbers
from mpies.errors import InputError
from mpies.es.population import Population
from mpies.replica import Replica
from mpies.tasks import making

BLOCK = 128  # tokens, of vLLM's cache on CPUs
OPENINGS = ["Add these: " + "1, 2, 3, " * 15, "Say it.", "A word about colours. " * 6]
SIGMA = 0.05


def build(world, folder, *overrides: str) -> Replica:
    torch.set_num_threads(1)
    given = [f"model.path={folder}", "model.device=cpu", "model.dtype=float32", "run.directory=none"]
    given += ["task.name=custom", f"task.environment={Path(games.__file__)}:Echo", "task.train_size=2"]
    given += ["task.eval_size=1", "task.chat_template=false", "task.episode_tokens=480", "engine.name=vllm"]
    settings = config.load([*given, "engine.max_new_tokens=8", "engine.batch_size=4", *overrides])
    return one_vllm.alone(lambda: replica.build(world, settings, making.make(settings.task)))


@pytest.fixture(scope="module", params=["full", "lowrank"])
def perturbation(request) -> str:
    return request.param


@pytest.fixture
def made(perturbation, world, tiny_model):
    noise = {"full": ["es.perturbation=full"], "lowrank": ["es.perturbation=lowrank", "es.block=2"]}
    model = tiny_model(kind="llama", tied=True, hidden=128)
    made = one_vllm.shared(("turns", perturbation), lambda: build(world, model, *noise[perturbation]))
    assert made.engine.keeps
    return made


@dataclass
class Talk:
    """Turns of all conversations of members; how many tokens of each turn's prompts vLLM had read before."""

    made: Replica
    keeps: bool = True
    members: int = 1
    draws: Draws | None = None
    answers: list[list[list[int]]] = field(default_factory=list)
    cached: list[list[int]] = field(default_factory=list)

    def go(self, turns: int = 3) -> Talk:
        engine, texts = self.made.engine, OPENINGS * self.members
        kept = engine.keep() if self.keeps else None
        generate, outputs = engine.llm.generate, []

        def watched(*arguments: Any, **named: Any) -> Any:
            outputs.append(generate(*arguments, **named))
            return outputs[-1]

        engine.llm.generate = watched
        try:
            for _ in range(turns):
                live = [*range(len(texts))]
                which = Conversations(kept, live) if kept else None
                said = (
                    engine.sample(texts, self.draws, which)
                    if self.draws
                    else engine.generate_each(texts, [i // len(OPENINGS) for i in live], which)
                )
                self.answers.append(said.ids)
                texts = [f"{t}{a} And then, tell me?" for t, a in zip(texts, said.texts, strict=True)]
        finally:
            del engine.llm.generate
        self.cached = [[output.num_cached_tokens for output in turn] for turn in outputs]
        return self


def test_a_turn_goes_on_from_the_one_before(made):
    members = 2 if made.engine.in_blocks else 1
    seen = []
    for seed in (0, 1):
        made.perturbation.set(Population(members, seed=seed + 1).members(0), SIGMA)
        going_on, anew = (Talk(made, keeps, members).go() for keeps in (True, False))
        assert going_on.answers == anew.answers
        assert anew.cached == [[0] * len(row) for row in anew.cached]
        first, *later = going_on.cached
        assert not any(first)
        long = [i for i in range(len(OPENINGS) * members) if len(OPENINGS[i % len(OPENINGS)]) > BLOCK]
        assert long and all(turn[i] >= BLOCK for turn in later for i in long)
        seen.append(going_on.answers)
    made.perturbation.clear()
    assert seen[0] != seen[1]


def test_sampled_turns(made):
    draws = Draws(5, 1.0, answer_numbers(range(len(OPENINGS)), 1))
    going_on, anew = (Talk(made, keeps, draws=draws).go() for keeps in (True, False))
    assert going_on.answers == anew.answers and any(any(turn) for turn in going_on.cached)


def test_what_was_read_is_refused_if_vllm_finds_it_for_another(made, monkeypatch):
    """As a vLLM would that no longer looked at salts."""
    engine, generate = made.engine, made.engine.llm.generate
    monkeypatch.setattr(
        engine.llm,
        "generate",
        lambda given, *a, **n: generate([one | {"cache_salt": "one"} for one in given], *a, **n),
    )
    engine.generate(OPENINGS)
    with pytest.raises(InputError, match="another's prompt"):
        engine.generate(OPENINGS)


def test_a_conversation_that_fills_no_block_costs_nothing(world, tiny_model):
    model, short = tiny_model(kind="llama", tied=True, hidden=128), "task.episode_tokens=100"
    made = build(world, model, short, "es.perturbation=full")
    assert made.engine.cached and not made.engine.keeps and made.engine.keep() is None
