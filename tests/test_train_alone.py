"""The generation loop on one rank, in this process: by the definition, stopped, gone on with."""

from __future__ import annotations

import math
import os
import signal
from functools import partial

import h5py
import numpy as np
import pytest
import small
import torch
from mpi4py import MPI
from transformers import AutoModelForCausalLM, AutoTokenizer

from jobs import assert_same_model, assert_same_run, committed
from mpies import train
from mpies.errors import RefusedError
from mpies.es.directions import directions
from mpies.noise import definition
from mpies.noise.definition import STREAM_SEEDS, philox
from mpies.run.stopping import Stop
from mpies.train import RESUMABLE

PROMPTS = [row["prompt"] for row in small.TRAIN]


@pytest.fixture
def runs(alone, tiny_model, tmp_path):
    with small.Runs(alone, tiny_model(), tmp_path) as runs:
        yield runs


def datasets(runs: small.Runs, *names: str) -> list[np.ndarray]:
    with h5py.File(runs.folder / "run.h5", "r", locking=False) as file:
        return [file[name][:] for name in names]


# By the definition


class Model:
    """The initial model, loaded by transformers alone, with weights that are set from NumPy arrays."""

    def __init__(self, folder):
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.parameters = dict(self.model.named_parameters())
        self.initial = {name: p.detach().numpy().copy() for name, p in self.parameters.items()}
        self.ids = {name: definition.parameter_id(name) for name in self.initial}

    @torch.inference_mode()
    def reward(self, weights: dict[str, np.ndarray]) -> float:
        """The mean score of this model's greedy answers to the training prompts."""
        for name, value in weights.items():
            self.parameters[name].copy_(torch.from_numpy(value))
        return math.fsum(small.score(self.answer(prompt)) for prompt in PROMPTS) / len(PROMPTS)

    def answer(self, prompt: str) -> str:
        chat = [{"role": "user", "content": prompt}]
        ids = self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
        ids = ids["input_ids"]
        output = self.model.generate(ids, max_new_tokens=4, do_sample=False)
        return self.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)

    def noise(self, name: str, seed: int, rank: int) -> np.ndarray:
        """Of a parameter, in its shape: full for rank 0 and for vectors."""
        base = self.initial[name]
        if rank and base.ndim == 2:
            a, b = definition.factors(seed, self.ids[name], base.shape, rank)
            return a.T @ b / np.float32(math.sqrt(rank))
        return definition.normal(seed, self.ids[name], 0, base.size).reshape(base.shape)

    def updated(self, name: str, base: np.ndarray, seeds, factors, rank: int) -> np.ndarray:
        if rank and base.ndim == 2:
            return definition.lowrank_updated(base, seeds, factors, self.ids[name], rank)
        return definition.updated(base.reshape(-1), seeds, factors, self.ids[name]).reshape(base.shape)

    def digest(self, weights: dict[str, np.ndarray]) -> int:
        return sum(definition.digest(w.reshape(-1), self.ids[n]) for n, w in weights.items()) % 2**64


def linear(first: float, share: float, generations: int) -> list[float]:
    """From `first` to that share of it, on a line."""
    steps = range(generations)
    return [first * (1 + (share - 1) * g / max(1, generations - 1)) for g in steps]


@pytest.mark.parametrize(
    "changes",
    [
        {"es__antithetic": True, "es__anchor_decay": 0.25},
        {"es__population": 5, "es__perturbation": "lowrank", "es__rank": 2, "es__block": 2},
    ],
    ids=["full", "lowrank"],
)
def test_generations_are_what_the_definition_says(runs, tiny_model, changes):
    """Seeds, signs, rewards, coefficients, digests, from nothing but the settings and the initial model."""
    generations, es_seed = 2, 11
    schedules = {f"es__{name}_schedule": "linear" for name in ("sigma", "alpha")}
    assert runs.train(generations, es__seed=es_seed, es__sigma_end=0.5, **schedules, **changes) == 0
    names = ("seed", "sign", "reward", "coefficient", "tokens")
    seeds, signs, rewards, coefficients, tokens = datasets(runs, *(f"member/{name}" for name in names))
    digests, sigmas, alphas = datasets(runs, *(f"generation/{n}" for n in ("digest", "sigma", "alpha")))
    np.testing.assert_allclose(sigmas, linear(0.3, 0.5, generations), rtol=1e-11)
    np.testing.assert_allclose(alphas, linear(0.3, 0.1, generations), rtol=1e-11)

    model, rank = Model(tiny_model()), changes.get("es__rank", 0)
    base, decay = dict(model.initial), np.float32(changes.get("es__anchor_decay", 0))
    pairs = 2 if changes.get("es__antithetic") else 1
    population = seeds.shape[1]
    for g in range(generations):
        words = philox(es_seed, np.arange(population) // pairs, g, STREAM_SEEDS).astype(np.uint64)
        assert seeds[g].tolist() == (words[0] | words[1] << np.uint64(32)).tolist()
        assert signs[g].tolist() == [(-1) ** i if pairs == 2 else 1 for i in range(population)]
        for i in range(population):
            scale = np.float32(sigmas[g] * signs[g, i])
            live = {n: w + scale * model.noise(n, int(seeds[g, i]), rank) for n, w in base.items()}
            assert rewards[g, i] == model.reward(live), f"member {i} of generation {g}"
        z = (rewards[g] - rewards[g].mean()) / rewards[g].std()
        np.testing.assert_allclose(coefficients[g], alphas[g] / population * z, rtol=1e-6)
        moves = directions(seeds[g], signs[g], coefficients[g])
        assert len(moves[0]) == population // pairs
        base = {n: model.updated(n, w, *moves, rank) for n, w in base.items()}
        if decay:
            base = {n: w + decay * (model.initial[n] - w) for n, w in base.items()}
        assert model.digest(base) == int(digests[g])
    assert np.ptp(rewards, axis=1).min() > 0 and (tokens > 0).all()
    tuned = AutoModelForCausalLM.from_pretrained(runs.folder / "model", dtype="auto")
    assert all(np.array_equal(p.detach().numpy(), base[name]) for name, p in tuned.named_parameters())


# What a reward function sees


def test_reward_functions_see_how_many_updates_were_made(runs):
    """Members of generation g: g. Evaluations as well: the first 0, the last es.generations."""
    assert runs.train(2, run__evaluate_every=1) == 0
    seen = [(call["trainer_state"].global_step, call["prompts"]) for call in small.calls]
    held_out = [row["prompt"] for row in small.HELD_OUT]
    expected = []
    for step in range(3):
        expected += [(step, PROMPTS), (step, held_out)] + [(step, PROMPTS)] * (4 if step < 2 else 0)
    assert seen == expected
    assert {call["trainer_state"].max_steps for call in small.calls} == {2}


def test_a_run_that_goes_on_counts_on(runs):
    assert runs.train(1) == 0
    assert runs.train(1) == 0
    assert small.calls == [], "it is finished"
    assert runs.train(2) == 0
    steps = [call["trainer_state"].global_step for call in small.calls]
    assert steps == [1] * 4 + [2] * 2
    assert {call["trainer_state"].max_steps for call in small.calls} == {2}


def test_members_get_the_columns_and_tokens_of_their_answers(runs):
    runs.train(1)
    for call in small.calls[2:6]:
        assert call["tags"] == [row["tags"] for row in small.TRAIN]
        assert [len(ids) for ids in call["completion_ids"]] == [4, 4] or "" in call["completions"]
    (tokens,) = datasets(runs, "member/tokens")
    assert tokens[0].tolist() == [sum(map(len, call["completion_ids"])) for call in small.calls[2:6]]


def test_all_members_of_a_generation_answer_the_prompts_of_its_turn(runs):
    assert runs.train(2, task__prompts_per_generation=1) == 0
    members = [call["prompts"] for call in small.calls if call["prompts"][0] in PROMPTS][1:-1]
    turns = [members[4 * g : 4 * g + 4] for g in range(2)]
    assert all(turn == turn[:1] * 4 for turn in turns)
    assert {*turns[0][0], *turns[1][0]} == set(PROMPTS), "two prompts: two generations are an epoch"


# Stopping and going on


@pytest.fixture(scope="module")
def uninterrupted(alone, tiny_model, tmp_path_factory):
    """The folder of a run of three generations that was left alone. Kernels are compiled by now."""
    with small.Runs(alone, tiny_model(), tmp_path_factory.mktemp("uninterrupted")) as runs:
        assert runs.train(3, run__evaluate_every=1) == 0
    return runs.folder


def stopping_line(text: str) -> str:
    (line,) = [line for line in text.splitlines() if line.startswith("stopped by ")]
    return line


# Calls of the reward function: 2 for the first evaluation, 4 for a generation, 2 for each evaluation.
@pytest.mark.parametrize(
    "call, done",
    [(1, 0), (7, 1)],
    ids=["first evaluation", "later evaluation"],
)
def test_a_signal_stops_after_the_generation_resumably(uninterrupted, runs, capsys, call, done):
    small.events[call] = lambda: os.kill(os.getpid(), signal.SIGUSR1)
    assert runs.train(3, run__evaluate_every=1) == RESUMABLE == 75
    assert committed(runs.folder) == done
    assert stopping_line(capsys.readouterr().out) == (
        f"stopped by signal SIGUSR1 after generation {done} of 3; the same command goes on from there"
    )
    assert not (runs.folder / "model").exists()
    small.events.clear()
    assert runs.train(3, run__evaluate_every=1) == 0
    assert_same_run(runs.folder, uninterrupted, 3)
    assert_same_model(runs.folder, uninterrupted)


def test_after_a_signal_there_is_no_evaluation_but_at_the_end(runs):
    small.events[3] = lambda: os.kill(os.getpid(), signal.SIGUSR1)
    assert runs.train(3, run__evaluate_every=1) == 75
    assert len(small.calls) == 2 + 4
    assert committed(runs.folder) == 1
    small.events.clear()
    small.events[5] = lambda: os.kill(os.getpid(), signal.SIGUSR1)  # the last generation's last member
    assert runs.train(2, run__evaluate_every=1) == 0
    assert len(small.calls) == 2 + 4 + 2
    assert (runs.folder / "model").exists()


@pytest.fixture
def clock(monkeypatch):
    """Ten seconds pass with every call of the reward function, and none in between."""
    monkeypatch.setattr("mpies.run.job.Stop", partial(Stop, clock=lambda: 10.0 * len(small.calls)))
    return monkeypatch


@pytest.mark.parametrize("seconds, members", [(19, 0), (39, 2)])
def test_a_rank_without_time_leaves_members_out_and_the_generation_is_not_made(
    uninterrupted, runs, capsys, clock, seconds, members
):
    """Five seconds are needed to leave. The first evaluation takes twenty."""
    assert runs.train(3, run__evaluate_every=1, run__time_limit=f"0:{seconds}") == 75
    assert len(small.calls) == 2 + members
    assert committed(runs.folder) == 0
    assert "stopped by the time limit after generation 0 of 3;" in capsys.readouterr().out
    if members == 2:  # one resumption shows it for all
        clock.undo()
        assert runs.train(3, run__evaluate_every=1) == 0
        assert_same_run(runs.folder, uninterrupted, 3)


@pytest.mark.parametrize("population, evaluated", [(7, 7), (8, 0)])
def test_a_block_is_begun_if_there_is_time_for_all_that_are_left(runs, population, evaluated):
    """Seven blocks of 10 seconds, times 1.2, and 5 seconds to leave are 89 of the 100; eight are too many."""
    job = runs.begin(1, es__population=population)
    job.stop = Stop(100, 30, clock=lambda: 0.0)
    job.block_seconds.append(10.0)
    done, complete = train.evaluate_members(job, 0, 0.3)
    assert len(done) == evaluated == len(small.calls)
    assert complete == (evaluated == population)


def test_members_of_a_block_share_its_seconds(runs):
    job = runs.begin(1, es__population=5, es__perturbation="lowrank", es__block=2)
    done, _ = train.evaluate_members(job, 0, 0.3)
    assert [one.member.index for one in done] == [0, 1, 2, 3, 4]
    shares = [seconds / size for seconds, size in zip(job.block_seconds, (2, 2, 1), strict=True)]
    assert [one.seconds for one in done] == [shares[0]] * 2 + [shares[1]] * 2 + [shares[2]]


def test_out_of_time_the_weights_are_those_of_the_last_generation(uninterrupted, runs, clock):
    job = runs.begin(3, run__time_limit="1:24")  # 2 + 4 calls, and 2 of the second generation
    with job.screen.progress(0, 3):
        assert train.evolve(job) == (1, False)
    assert len(small.calls) == 8
    assert job.log.committed == 1
    with h5py.File(runs.folder / "run.h5", "r", locking=False) as file:
        assert job.replica.weights.digest() == int(file["generation/digest"][0])
        assert file["member/seed"][1:].max() == 0, "nothing of the second generation"


def test_a_generation_that_would_not_fit_is_not_begun(uninterrupted, runs, clock):
    """After 2 calls and 4, 60 of 64 seconds are spent: less than the five that leaving takes are left."""
    assert runs.train(3, run__time_limit="1:04") == 75
    assert len(small.calls) == 6 and committed(runs.folder) == 1


def test_a_generation_without_any_score_is_refused_and_nothing_is_committed(runs, monkeypatch):
    monkeypatch.setattr(small, "score", lambda text: None)
    with pytest.raises(RefusedError, match="could not be scored"):
        runs.train(2)
    assert committed(runs.folder) == 0


# What is exchanged


class Counted(MPI.Intracomm):
    """A communicator that notes which collectives are called."""

    def __init__(self, comm):
        self.called: list[str] = []

    def __getattribute__(self, name: str):
        if name.startswith("I") and name[1:] in ("allreduce", "allgatherv", "bcast", "reduce", "gatherv"):
            self.called.append(name)
        return super().__getattribute__(name)


def test_a_start_and_a_generation_take_a_few_collectives(runs):
    """Each of them is a tree of ranks: what rank 0 says, what all agree on, what all know of all."""
    runs.comm = Counted(runs.comm)
    job = runs.begin(2)
    # Run file and time limit, all listen; what is cheap to know, places; weights, the file's evaluations.
    agreed = ["Iallreduce", *["Iallgatherv"] * 2, "Iallreduce"]
    assert runs.comm.called == ["Ibcast", "Iallreduce", *agreed, "Ibcast"]
    runs.comm.called.clear()
    with job.assignment, job.screen.progress(0, 2):
        train.make_generation(job, 0)
    assert sorted(runs.comm.called) == sorted(
        ["Iallreduce", "Iallgatherv", "Iallreduce", "Igatherv", "Igatherv"]
    )


# Weights that nothing can be computed with


def test_an_update_that_cannot_be_computed_with_is_not_committed(runs):
    with pytest.raises(RefusedError) as refused:
        runs.train(3, es__alpha=1e30, model__dtype="float16")
    said = str(refused.value)
    assert said.startswith("es.alpha: after generation 1's update with 1e+30, model.embed_tokens.weight has ")
    assert "float16 ends at" in said and "smaller es.alpha" in said and len(said.splitlines()) == 1
    assert committed(runs.folder) == 0 and not (runs.folder / "model").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_model_that_is_not_finite_is_refused_with_the_tensors_name(runs, tmp_path, value):
    name = "model.layers.0.mlp.up_proj.weight"
    model = AutoModelForCausalLM.from_pretrained(runs.model)
    model.get_parameter(name).data[3, 1] = value
    model.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(runs.model).save_pretrained(tmp_path / "broken")
    with pytest.raises(RefusedError) as refused:
        runs.train(3, model__path=tmp_path / "broken")
    assert str(refused.value) == f"model.path: {tmp_path / 'broken'}: {name} has values that are not finite"
    assert not runs.folder.exists()
