"""The bench's generations, on a tiny model: the work is the one that is named, in every way."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mpies.bench import generation, one_turn
from mpies.bench.__main__ import parse
from mpies.bench.generation import Rig, Work, prompts_of, seeds_of, settings_of, task_of
from mpies.engines.hf import HfEngine
from mpies.es.population import Population
from mpies.tasks import conciseness
from mpies.tasks.base import Task

WORK = Work(members=6, prompts=2, tokens=3)


@pytest.fixture(scope="module")
def given(tiny_model):
    return parse(["--model", str(tiny_model()), "--device", "cpu", "--threads", "1"])


@pytest.fixture(scope="module")
def rig(alone, given):
    return Rig(alone, given, "float32", WORK)


def test_settings_are_those_of_the_work(given):
    settings = settings_of(
        given, "bfloat16", WORK, {"es.rank": 3, "es.block": 5, "es.perturbation": "lowrank"}
    )
    assert (settings.model.path, settings.model.dtype) == (given.model, "bfloat16")
    assert (settings.engine.max_new_tokens, settings.engine.batch_size) == (3, 2)
    assert (settings.es.rank, settings.es.block_size, settings.run.threads) == (3, 5, 1)
    assert not settings.task.chat_template


def test_a_block_is_as_large_as_the_work(given):
    """Not as large as a run's population is by default."""
    lowrank = {"es.perturbation": "lowrank", "es.block": 129}
    assert settings_of(given, "bfloat16", Work(129, 4, 64), lowrank).es.block_size == 129


@pytest.mark.parametrize("count", [1, 8, 25])
def test_prompts_go_round(count):
    known = [*conciseness.TRAIN, *conciseness.HELD_OUT]
    prompts = prompts_of(count)
    assert prompts == [known[i % len(known)] for i in range(count)]
    assert [row["prompt"] for row in task_of(Work(1, count, 1)).train] == prompts


def test_seeds_of_members():
    members = Population(4, seed=1).members(0)
    seeds = seeds_of(members)
    assert seeds.dtype == np.uint64 and seeds.tolist() == [member.seed for member in members]


def test_work_in_words():
    assert str(WORK) == "6 members x 2 prompts x 3 tokens"


def test_every_answer_has_its_full_length(rig):
    """An end of sequence would spare work that another way does."""
    rig.plain()
    found = rig.engine(6, 2).generate_block(prompts_of(2), 1)
    stop = rig.replica.tokenizer.eos_token_id
    assert [answer.tokens for answer in found] == [[6, 6]]
    rig.lowrank.set(Population(40, seed=1).members(0), 0.5)
    many = rig.engine(6, 80).generate_block(prompts_of(2), 40)
    assert {n for answer in many for n in answer.tokens} == {6}
    assert any(stop in ids for answer in many for ids in answer.ids), "of which some have one"
    rig.plain()


def test_plain_is_the_base_also_after_an_update(rig):
    rig.full.set(Population(1, seed=1).members(0), 0.5)
    rig.update(np.array([5, 6], np.uint64), rank=1)
    rig.plain()
    live, base = rig.weights.live, rig.weights.base
    assert all(torch.equal(live[name], base[name]) for name in base)


@pytest.mark.parametrize("rank", [0, 1])
def test_an_update_is_a_real_one_but_too_small_to_matter(rig, rank):
    before = {name: base.clone() for name, base in rig.weights.base.items()}
    digest = rig.weights.digest()
    rig.update(np.arange(1, 7, dtype=np.uint64), rank)
    assert rig.weights.rank == rank
    assert rig.weights.digest() != digest
    assert all(torch.allclose(base, before[name], atol=1e-7) for name, base in rig.weights.base.items())


def test_the_papers_model_is_another_copy(rig):
    theirs = {p.data_ptr() for p in rig.original.parameters()}
    assert not theirs & {
        tensor.data_ptr() for tensor in [*rig.weights.live.values(), *rig.weights.base.values()]
    }
    assert {p.dtype for p in rig.original.parameters()} == {torch.float32}


def test_all_ways_are_timed_alike(rig):
    said = []
    timings, phases = generation.compare(rig, WORK, 2, lambda: None, said.append)
    ways = [
        "plain",
        "low rank",
        "low rank: a direction's update",
        "full: a member",
        "full: update",
        "paper: a member",
        "paper: update, a member",
    ]
    assert list(timings.seconds) == ways
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in timings.seconds.values())
    assert len(said) == 3 * len(ways)
    # The phases are those of the low-rank generations, the one that does not count included.
    parts = [phases.seconds[phase] for phase in ("perturb", "generate", "update")]
    assert min(parts) > 0 and sum(parts) == sum(phases.seconds.values())
    assert sum(parts) > 0.5 * sum(timings.seconds["low rank"])


def test_the_paper_restores_its_weights_but_for_rounding(rig):
    before = [p.detach().clone() for p in rig.original.parameters()]
    generation.compare(rig, Work(2, 1, 1), 1, lambda: None, lambda text: None)
    for parameter, value in zip(rig.original.parameters(), before, strict=True):
        assert torch.allclose(parameter, value, atol=1e-5)


def test_parts_of_a_full_generation(rig):
    timings = generation.share(rig, WORK, 1, lambda: None, lambda text: None)
    assert list(timings.seconds) == ["perturb", "generate", "update"]
    assert all(timings[part] > 0 for part in timings.seconds)
    assert rig.weights.rank == 0


def test_an_environment_of_one_turn_is_played_as_the_task_is(rig, monkeypatch):
    """In each way and round, one call of the engine for all members, whose episodes come to their ends; but
    for the turns alone, which have none."""
    answered, played = [], []
    answer, play = HfEngine.generate_each, Task.play
    monkeypatch.setattr(
        HfEngine,
        "generate_each",
        lambda self, prompts, *more: (answered.append(prompts), answer(self, prompts, *more))[1],
    )
    monkeypatch.setattr(Task, "play", lambda *given: (played.append(play(*given)), played[-1])[1])
    monkeypatch.setattr(one_turn, "ALONE", 1)
    timings = one_turn.measure(rig, WORK, 1, lambda: None, lambda text: None)
    assert list(timings.seconds) == ["task", "one turn", "one turn of more", "turns alone"]
    assert all(timings[way] > 0 for way in timings.seconds)
    assert answered == [prompts_of(2) * 6] * 6
    ended = [{one.ended for member in found for one in member.episodes} for found in played]
    assert ended == [{"done"}] * 8
    rewards = [[member.scores.rewards.tolist() for member in found] for found in played]
    assert rewards[:3] == rewards[4:7] == [rewards[0]] * 3
    assert rewards[3] == rewards[7] == [[float(len(prompt)) for prompt in prompts_of(2)]] * 6


def test_scaling_on_one_rank(rig, alone, monkeypatch):
    """Both ways evaluate all members, each once."""
    evaluated, really = [], rig.lowrank.set
    monkeypatch.setattr(
        rig.lowrank, "set", lambda ms, sigma: (evaluated.append([m.index for m in ms]), really(ms, sigma))
    )
    timings = generation.scaling(rig, alone, WORK, 1, lambda: None, lambda text: None)
    assert list(timings.seconds) == ["1 rank", "all ranks"]
    assert evaluated == [[0, 1, 2, 3, 4, 5]] * 4
