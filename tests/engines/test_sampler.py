"""Sampled answers: the right frequencies, and a pure function of (seed, prompt, sample, place)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from mpies.engines.base import Draws
from mpies.engines.hf import HfEngine
from mpies.engines.sampler import Sampler, answer_numbers, uniform
from mpies.engines.text import Text
from mpies.model import loading

PROMPTS = ["Solve: 3 + 5 =", "a", "Name one primary color:", "2, 4, 6, 8, ?", "zz"]


@pytest.fixture
def engine(tiny_model):
    def make(new=12, batch_size=32, **options) -> HfEngine:
        torch.set_num_threads(1)
        model, tokenizer = loading.load(str(tiny_model(**options)), allow_download=False)
        return HfEngine(model, Text(model, tokenizer, False), max_new_tokens=new, batch_size=batch_size)

    return make


def draws(prompts=(0, 1, 2, 3, 4), samples=1, seed=5, temperature=1.0) -> Draws:
    return Draws(seed, temperature, answer_numbers(list(prompts), samples))


@torch.inference_mode()
def sampled_loop(engine: HfEngine, prompt: str, number: int, seed: int, temperature: float) -> list[int]:
    """Sampling as it is defined: one prompt, no padding, no cache, the cumulative sum inverted in NumPy."""
    ids = engine.text.encode(prompt)
    start = len(ids)
    for place in range(engine.max_new_tokens):
        logits = engine.model(torch.tensor([ids]), use_cache=False).logits[0, -1].double().numpy()
        chances = np.exp((logits - logits.max()) / temperature)
        (u,) = uniform(seed, np.array([number], dtype=np.uint64), place)
        ids = [*ids, int(np.searchsorted(np.cumsum(chances / chances.sum()), u, side="right"))]
        if ids[-1] in engine.text.stops:
            break
    return ids[start:]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("early", [False, True])
def test_answers_are_those_of_a_plain_loop(engine, temperature, early):
    """Also where rows end early and leave the batch, so that others take their place in it."""
    made = engine()
    made.text.stops |= set(range(60, 75)) if early else set()
    numbers = answer_numbers(range(len(PROMPTS)), 1)
    expected = [sampled_loop(made, p, int(n), 5, temperature) for p, n in zip(PROMPTS, numbers)]
    assert len({tuple(tokens) for tokens in expected}) == len(PROMPTS)
    assert (len({len(tokens) for tokens in expected}) > 2) or not early
    answers = made.sample(PROMPTS, draws(temperature=temperature))
    assert answers.ids == expected
    assert answers.tokens == [len(tokens) for tokens in expected]
    assert answers.texts == [made.text.tokenizer.decode(t, skip_special_tokens=True) for t in expected]


@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_first_tokens_have_softmax_frequencies(engine, temperature):
    """Chi-square over 20,000 answers of one token, those that are expected less than 5 times together."""
    made, total = engine(new=1, batch_size=1000), 20_000
    answers = made.sample(["a"] * total, draws([7], total, seed=1, temperature=temperature))
    counted = np.bincount([ids[0] for ids in answers.ids], minlength=made.model.config.vocab_size)
    with torch.inference_mode():
        logits = made.model(torch.tensor([made.text.encode("a")])).logits[0, -1].double()
    expected = torch.softmax(logits / temperature, 0).numpy() * total
    often = expected > max(5, expected.min())
    assert often.sum() > 20
    seen = np.append(counted[often], counted[~often].sum())
    wanted = np.append(expected[often], expected[~often].sum())
    assert stats.chisquare(seen, wanted).pvalue > 1e-3


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_answers_do_not_depend_on_their_company(engine, batch_size):
    alone = engine(batch_size=batch_size)
    twice = [prompt for prompt in PROMPTS for _ in range(2)]
    both = engine().sample(twice, draws(samples=2)).ids
    assert alone.sample(twice, draws(samples=2)).ids == both
    assert alone.sample(twice[::-1], draws(samples=2).part(slice(None, None, -1))).ids == both[::-1]
    assert alone.sample(PROMPTS, draws(samples=1)).ids == both[::2]


def test_samples_and_seeds_differ(engine):
    made = engine()
    answers = made.sample(["a"] * 20, draws([0], 20)).ids
    assert len({tuple(a) for a in answers}) > 15
    assert made.sample(["a"] * 20, draws([0], 20, seed=6)).ids != answers
    assert made.sample(["a"] * 20, draws([1], 20)).ids != answers


def test_a_cold_temperature_is_greedy(engine):
    made = engine()
    assert made.sample(PROMPTS, draws(temperature=1e-4)).ids == made.generate(PROMPTS).ids


def test_uniform_numbers():
    """Of neighbouring answers and places: uniform, and not correlated."""
    numbers = answer_numbers(np.arange(100), 10)
    u = np.stack([uniform(3, numbers, place) for place in range(50)])
    assert 0 <= u.min() < u.max() < 1
    assert stats.kstest(u.ravel(), "uniform").pvalue > 1e-3
    for a, b in ((u[1:], u[:-1]), (u[:, 1:], u[:, :-1]), (u[:, 10:], u[:, :-10])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 4 / np.sqrt(a.size)


def test_impossible_tokens_are_never_chosen():
    """Not even by the smallest and the largest number that there are."""
    logits = torch.full((1000, 7), -torch.inf)
    logits[:, [2, 4]] = 0.0
    sampler = Sampler(Draws(0, 1.0, np.arange(1000, dtype=np.uint64)))
    assert set(sampler(logits, torch.arange(1000), 0).tolist()) == {2, 4}
    extremes = pytest.MonkeyPatch()
    for u, token in ((0.0, 2), (1 - 2.0**-52, 4)):
        with extremes.context() as patch:
            patch.setattr("mpies.engines.sampler.uniform", lambda *_, u=u: np.full(1000, u))
            assert set(sampler(logits, torch.arange(1000), 0).tolist()) == {token}


# How likely answers are


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("piece", [1, 3, 1000])
def test_log_probabilities_are_those_of_whole_forward_passes(engine, monkeypatch, temperature, piece):
    """Padded on both sides, in pieces, against one answer at a time without cache."""
    made = engine()
    answers = [*made.sample(PROMPTS, draws()).ids[:-1], []]
    rows = len(PROMPTS) * made.model.config.vocab_size
    monkeypatch.setattr("mpies.engines.likelihood.LOGITS", piece * rows)
    found = made.log_probabilities(PROMPTS, answers, temperature)
    for prompt, answer, values in zip(PROMPTS, answers, found, strict=True):
        ids = [*made.text.encode(prompt), *answer]
        with torch.inference_mode():
            logits = made.model(torch.tensor([ids]), use_cache=False).logits[0].double()
        chances = torch.log_softmax(logits / temperature, -1)
        expected = [float(chances[i - 1, ids[i]]) for i in range(len(ids) - len(answer), len(ids))]
        np.testing.assert_allclose(values, expected, atol=1e-4)
