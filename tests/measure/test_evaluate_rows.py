"""Answers to rows with their rewards, against direct calls of the engine and the task."""

from __future__ import annotations

import math

import numpy as np
import pytest
import small
import threads

from mpies.engines.sampler import answer_numbers
from mpies.measure.evaluation import Evaluation, Sampling, evaluate_rows, parts, rejoin, share
from mpies.tasks.base import Task, TrainerState

ROWS = [{"prompt": f"{i} + {i} =", "n": i} for i in range(7)]
STATE = TrainerState(3, 9)
states: list[TrainerState] = []


def judge(prompts, completions, n, trainer_state, log_extra, **_):
    """Not every answer can be scored; not every batch has the metric `even`."""
    states.append(trainer_state)
    log_extra("n", n)
    if all(i % 2 == 0 for i in n):
        log_extra("even", [1] * len(n))
    return [None if i == 5 else small.score(c) + i for c, i in zip(completions, n, strict=True)]


TASK = Task("test", ROWS, [], judge, lambda rows, texts: {"accuracy": [r["n"] > 2 for r in rows]})


@pytest.fixture(scope="module")
def engine(moved):
    return moved()[0].engine


def rewards_of(texts: list[str], rows=ROWS) -> list[float | None]:
    return [None if r["n"] == 5 else small.score(t) + r["n"] for t, r in zip(texts, rows, strict=True)]


def known(values: np.ndarray) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values]


def same(a: Evaluation, b: Evaluation) -> bool:
    tables = [(a.rewards, b.rewards), (a.tokens, b.tokens)]
    tables += [(a.metrics[name], b.metrics[name]) for name in a.metrics]
    return (
        a.completions == b.completions
        and list(a.metrics) == list(b.metrics)
        and all(np.array_equal(x, y, equal_nan=True) for x, y in tables)
    )


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_greedy_answers_with_rewards_and_metrics(alone, engine, batch):
    states.clear()
    found = evaluate_rows(alone, engine, TASK, ROWS, batch, STATE)
    texts, tokens = [], []
    for row in ROWS:
        answer = engine.generate([row["prompt"]])
        texts += answer.texts
        tokens += answer.tokens
    assert found.completions == texts and found.tokens.tolist() == tokens
    assert found.tokens.dtype == np.int64 and found.rewards.dtype == np.float64
    assert known(found.rewards) == rewards_of(texts)
    assert found.reward_mean == pytest.approx(np.nanmean(found.rewards))
    assert found.metrics["n"].tolist() == list(range(7))
    assert found.metrics["accuracy"].tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert set(states) == {STATE} and len(states) == -(-7 // batch)
    assert found.samples == 1 and found.rows is ROWS
    assert [one.text for part in found.mine for one in part] == texts


def test_a_metric_that_a_batch_lacks_is_unknown_there(alone, engine):
    found = evaluate_rows(alone, engine, TASK, ROWS, 1)
    assert known(found.metrics["even"]) == [1, None, 1, None, 1, None, 1]
    assert "even" not in evaluate_rows(alone, engine, TASK, ROWS, 4).metrics


def test_sampled_answers_are_a_prompts_one_after_another(alone, engine):
    sampling = Sampling(3, 0.7, seed=5, first=40)
    found = evaluate_rows(alone, engine, TASK, ROWS, 4, STATE, sampling)
    assert found.samples == 3 and len(found.completions) == 21
    asked = [row for row in ROWS for _ in range(3)]
    draws = sampling.draws(len(ROWS))
    assert (draws.seed, draws.temperature) == (5, 0.7)
    assert draws.numbers.tolist() == answer_numbers(np.arange(40, 47), 3).tolist()
    expected = engine.sample([row["prompt"] for row in asked], draws)
    assert found.completions == expected.texts
    assert known(found.rewards) == rewards_of(expected.texts, asked)
    assert found.by_prompt(found.tokens).tolist() == np.reshape(expected.tokens, (7, 3)).tolist()
    assert len(set(found.completions)) > 10


def test_no_rows_are_no_answers(alone, engine):
    found = evaluate_rows(alone, engine, TASK, [], 4)
    assert (found.completions, found.rewards.tolist(), found.tokens.tolist()) == ([], [], [])
    assert math.isnan(found.reward_mean)


@pytest.mark.parametrize("sampling", [None, Sampling(2, 1.0, seed=5)])
def test_any_number_of_ranks_finds_the_same(alone, engine, sampling):
    """Up to one more than there are batches."""
    expected = evaluate_rows(alone, engine, TASK, ROWS[:5], 3, STATE, sampling)
    for ranks in (2, 3, 5):
        found = threads.run(
            ranks, lambda comm: evaluate_rows(comm, engine, TASK, ROWS[:5], 3, STATE, sampling)
        )
        assert all(same(one, expected) for one in found)
        mine = [[a.text for part in one.mine for a in part] for one in found]
        assert sorted(text for texts in mine for text in texts) == sorted(expected.completions)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("rows, batch", [(0, 2), (1, 2), (7, 2), (7, 1), (7, 7), (6, 2), (7, 100)])
def test_shares_are_rejoined_in_order(ranks, rows, batch):
    whole = [rows for rows, _ in parts(ROWS[:rows], batch, None)]
    assert [row for part in whole for row in part] == ROWS[:rows]
    assert all(len(part) == batch for part in whole[:-1])
    shares = threads.run(ranks, lambda comm: [r for r, _ in share(comm, ROWS[:rows], batch, None)])
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert rejoin(shares) == whole


def test_parts_of_samples_have_their_random_numbers():
    sampling = Sampling(3, 1.0, seed=5)
    cut = parts(ROWS[:3], 2, sampling)
    assert [[row["n"] for row in rows] for rows, _ in cut] == [[0, 0], [0, 1], [1, 1], [2, 2], [2]]
    numbers = np.concatenate([draws.numbers for _, draws in cut])
    assert numbers.tolist() == sampling.draws(3).numbers.tolist()
    assert [draws for _, draws in parts(ROWS[:3], 2, None)] == [None, None]


# Rows of the run file


def evaluation(**changes) -> Evaluation:
    given = {
        "rows": [{"prompt": "a"}, {"prompt": [{"role": "user", "content": "b"}]}],
        "samples": 2,
        "completions": ["a0", "a1", "b0", "b1"],
        "rewards": np.array([1.0, np.nan, 2.0, 4.0]),
        "tokens": np.array([1, 2, 3, 5]),
        "metrics": {"accuracy": np.array([0, 1, 1, np.nan]), "x": np.full(4, np.nan)},
    }
    return Evaluation(**given | changes)


def test_rows_of_the_run_file():
    row, samples, metrics = evaluation().table_rows(
        6, "train", 1, 0.25, {"all": 5.0, "layer 0": 3.0, "other": 4.0}
    )
    assert row == {
        "generation": 6,
        "split": "train",
        "reward_mean": pytest.approx(7 / 3),
        "accuracy": pytest.approx(2 / 3),
        "kl": 0.25,
        "tokens": 11,
        "drift_l2": 5.0,
        "answer_tokens": 2.75,
    }
    where = {"generation": 6, "split": "train"}
    first = {**where, "prompt": "a", "completion": "a0", "sample": 0, "tokens": 1, "reward": 1.0}
    first |= {"messages": ""}
    assert samples[0] == first and len(samples) == 2
    assert samples[1]["completion"] == "a1" and math.isnan(samples[1]["reward"])
    means = {metric["name"]: metric["mean"] for metric in metrics}
    assert math.isnan(means.pop("x")) and means == {"drift_l2 layer 0": 3.0, "drift_l2 other": 4.0}
    assert all(metric.items() >= where.items() for metric in metrics)


def test_what_was_not_measured_is_unknown():
    row, samples, metrics = evaluation(metrics={}).table_rows(0, "held_out", 0)
    assert all(math.isnan(row[name]) for name in ("accuracy", "kl", "drift_l2"))
    assert samples == [] and metrics == []


@pytest.mark.parametrize("keep, answers", [(0, 0), (1, 2), (2, 4), (9, 4)])
def test_answers_to_the_first_prompts_are_kept(keep, answers):
    kept = evaluation().answers(keep)
    assert [answer["completion"] for answer in kept] == ["a0", "a1", "b0", "b1"][:answers]
    assert [(answer["prompt"], answer["sample"]) for answer in kept] == [
        ("a", 0),
        ("a", 1),
        ("b", 0),
        ("b", 1),
    ][:answers]
    assert [answer["tokens"] for answer in kept] == [1, 2, 3, 5][:answers]
