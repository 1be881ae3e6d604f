"""The KL divergence on one rank, against log-probabilities of models that transformers loads."""

from __future__ import annotations

import math

import numpy as np
import pytest
import threads
import torch
from transformers import AutoModelForCausalLM

from mpies.measure.evaluation import Sampling
from mpies.measure.kl import divergence, estimate_kl, k3
from mpies.measure.statistics import Figure
from mpies.replica import Replica
from mpies.tasks.episodes import Start

ROWS = [{"prompt": text} for text in ("3 + 5 =", "Say it.", "Name a color:")]


@torch.inference_mode()
def log_probabilities(model, prompt: list[int], answer: list[int], temperature: float) -> np.ndarray:
    logits = model(torch.tensor([prompt + answer])).logits[0].double() / temperature
    chosen = torch.log_softmax(logits, -1)[len(prompt) - 1 : -1]
    return chosen[torch.arange(len(answer)), torch.tensor(answer)].numpy()


def by_hand(made: Replica, folder, sampling: Sampling) -> float:
    """Sum over sampled tokens of r - 1 - log r, by the number of tokens."""
    initial = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tuned = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for name, parameter in tuned.named_parameters():
        parameter.data.copy_(made.weights.base[name])
    prompts = [row["prompt"] for row in ROWS for _ in range(sampling.samples)]
    answers = made.engine.sample(prompts, sampling.draws(len(ROWS))).ids
    total, tokens = 0.0, 0
    for prompt, answer in zip(prompts, answers, strict=True):
        encoded = made.engine.text.encode(prompt)
        log_r = np.subtract(
            *(log_probabilities(m, encoded, answer, sampling.temperature) for m in (initial, tuned))
        )
        total += float((np.exp(log_r) - 1 - log_r).sum())
        tokens += len(answer)
    return total / tokens


@pytest.mark.parametrize("sampling", [Sampling(4, 1.0, seed=3), Sampling(2, 0.5, seed=4, first=9)])
def test_divergence_is_the_mean_over_sampled_tokens(alone, moved, tiny_model, sampling):
    made, initial = moved()
    expected = by_hand(made, tiny_model(), sampling)
    assert expected > 0.01
    for batch in (1, 5, 100):
        found = estimate_kl(alone, made, initial, ROWS, batch, sampling)
        assert found.mean == pytest.approx(expected, rel=1e-4)
        assert found.error > 0


def test_neither_base_nor_live_weights_are_others_afterwards(alone, moved):
    made, initial = moved()
    digest = made.weights.digest()
    live = {name: value.clone() for name, value in made.weights.live.items()}
    estimate_kl(alone, made, initial, ROWS, 4, Sampling(2))
    assert made.weights.digest() == digest
    assert all(torch.equal(made.weights.live[name], value) for name, value in live.items())


def test_without_a_move_there_is_no_divergence(alone, moved):
    made, initial = moved(shift=0)
    assert estimate_kl(alone, made, initial, ROWS, 4, Sampling(3)) == Figure(0.0, 0.0)


def test_answers_that_are_there_are_used(alone, moved):
    """Those to this rank's batches, in order."""
    made, initial = moved()
    sampling = Sampling(2, 1.0, seed=8)
    prompts = [row["prompt"] for row in ROWS for _ in range(2)]
    draws = sampling.draws(len(ROWS))
    parts = [slice(0, 4), slice(4, 6)]
    answers = [
        made.task.play(made.engine, [Start({"prompt": p}) for p in prompts[part]], draws=draws.part(part))[0]
        for part in parts
    ]
    answers = [played.episodes for played in answers]
    found = divergence(alone, made, initial, ROWS, 4, sampling, answers)
    assert found == estimate_kl(alone, made, initial, ROWS, 4, sampling)
    with pytest.raises(ValueError):
        divergence(alone, made, initial, ROWS, 4, sampling, answers[:1])


def test_every_rank_has_all_ranks_tokens_in_the_figure(alone, moved):
    """Each rank with a replica of its own; the third of three gets no batch."""
    replicas = [moved() for _ in range(3)]
    sampling = Sampling(2, 1.0, seed=8)
    expected = estimate_kl(alone, *replicas[0], ROWS, 4, sampling)
    found = threads.run(3, lambda comm: estimate_kl(comm, *replicas[comm.rank], ROWS, 4, sampling))
    assert found == [expected] * 3


def test_k3_is_never_negative_and_0_for_equals():
    log_ratios = np.array([-30, -1, -1e-9, 0, 1e-9, 1, 20.0])
    values = k3(log_ratios - 2, np.full(7, -2.0))
    assert (values >= 0).all() and values[3] == 0
    assert values[1] == pytest.approx(math.exp(-1) - 1 + 1)
    assert values[5] == pytest.approx(math.e - 2)
