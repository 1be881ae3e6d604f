"""From what a block took to a generation, the run, and the jobs that it needs, by hand."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch

from mpies import config
from mpies.check.forecast import (
    Forecast,
    describe_generation,
    describe_memory,
    describe_run,
    forecast,
    jobs_needed,
)
from mpies.check.rehearsal import Trial
from mpies.tasks.base import Task

COST = Trial(block=10.0, tokens=7, seed=0.5, pull=3.0, digest=1.0, memory=100)


def settings_of(*given: str) -> config.Settings:
    whole = ["run.directory=x", "es.perturbation=full", "es.antithetic=false", "run.time_limit=1:00:00"]
    return config.load([*whole, *given])


@pytest.mark.parametrize(
    "given, ranks, blocks, update",
    [
        (["es.population=6"], 1, (6,), 6 * 0.5 + 3),
        (["es.population=6"], 4, (2, 2, 1, 1), 6 * 0.5 + 3),
        (["es.population=2"], 3, (1, 1, 0), 2 * 0.5 + 3),
        # A pair shares its noise.
        (["es.population=6", "es.antithetic=true"], 2, (3, 3), 3 * 0.5 + 3),
        (["es.population=7", "es.perturbation=lowrank", "es.block=3"], 2, (2, 1), 7 * 0.5 + 3),
    ],
)
def test_a_generation_is_the_busiest_ranks_blocks_an_update_and_a_digest(given, ranks, blocks, update):
    task = Task("test", [{"prompt": "a"}] * 2, [{"prompt": "b"}] * 40, lambda *_, **__: [])
    settings = settings_of(*given, "engine.batch_size=16", "run.evaluate_every=4")
    found = forecast(settings, COST, task, ranks, start=20.0)
    assert (found.start, found.generation) == (20.0, max(blocks) * 10.0 + update + 1.0)
    assert (found.update, found.blocks, found.every) == (update, blocks, 4)
    # Four batches, of 2 training and 16, 16 and 8 held-out answers; the longest, as many as a rank has.
    answer = 10.0 / (2 * min(settings.es.block_size, settings.es.population))
    assert found.evaluation == pytest.approx(-(-4 // ranks) * 16 * answer)
    assert found.paced == pytest.approx(found.generation + found.evaluation / 4)


def said_of(blocks: tuple[int, ...]):
    (finding,) = describe_generation(Forecast(0.0, 40.0, 4.0, blocks))
    return finding


def test_a_generation_in_words():
    finding = said_of((3, 3))
    assert (finding.what, finding.mark, finding.note) == ("generation", "ok", "")
    assert finding.value == "40 s: 3 such block(s) on the busiest rank, update 10.0 %"


@pytest.mark.parametrize(
    "blocks, note",
    [
        ((5,), ""),
        ((10, 9), ""),  # 95 % busy
        (
            (2, 1, 1, 1),
            "5 blocks on 4 ranks: they are idle 38 % of the time; 1, 5 rank(s) would share them evenly",
        ),
        (
            (2, 2, 1, 1),
            "6 blocks on 4 ranks: they are idle 25 % of the time; 1, 2, 3, 6 rank(s) would share them evenly",
        ),
        (
            (1, 1, 0),
            "2 blocks on 3 ranks: they are idle 33 % of the time; 1, 2 rank(s) would share them evenly",
        ),
    ],
)
def test_ranks_that_would_be_idle_are_noted_with_numbers_that_fit(blocks, note):
    finding = said_of(blocks)
    assert finding.note == note and finding.mark == ("note" if note else "ok")


@dataclass
class Held:
    """As much of a replica as memory is told of: 400 bytes of weights, and an engine's own cache."""

    held: int

    @property
    def engine(self):
        return self

    @property
    def weights(self):
        return SimpleNamespace(base={"a": torch.zeros(30), "b": torch.zeros(15)}, device=torch.device("cpu"))

    @property
    def model(self):
        """Some of it is not tuned, and has no base."""
        return SimpleNamespace(parameters=lambda: torch.zeros(11, 10, dtype=torch.bfloat16))


def test_memory_is_weights_and_the_engines_cache_and_the_peak():
    (finding,) = describe_memory(COST, Held(500), there=1200)
    assert finding.value == "600 B beyond the weights at the peak, 1 kB in all, 1.2 kB there"
    assert (finding.what, finding.mark) == ("cache", "ok")
    (full,) = describe_memory(COST, Held(500), there=1100)
    assert full.mark == "note" and "smaller engine.batch_size" in full.note
    assert describe_memory(replace(COST, memory=None), Held(500), 1200) == []


EXPECTED = Forecast(start=10.0, generation=5.0, update=1.0, blocks=(1,))


def described(limit: float | None, done: int, *given: str):
    (finding,) = describe_run(settings_of("es.generations=8", *given), EXPECTED, limit, done)
    assert finding.what == "time"
    return finding


def test_a_run_without_a_limit():
    assert described(None, 2).value == "6 generation(s) to go: 40 s; an evaluation takes 0 s; no time limit"


def test_a_run_in_a_job_whose_time_is_not_the_training_jobs():
    said = described(1000, 2, "run.time_limit=auto").value
    assert said.startswith("6 generation(s) to go: 40 s; ") and "with run.time_limit=HH:MM:SS" in said


@pytest.mark.parametrize(
    "limit, says", [(1000, "1 job(s) of 16.7 min"), (57, "1 job(s) of 57 s"), (40, "2 job(s) of 40 s")]
)
def test_a_run_that_comes_to_its_end(limit, says):
    finding = described(limit, 0)
    assert finding.mark == "ok" and finding.value.endswith(f"; {says}")


def test_a_run_of_which_no_generation_fits():
    finding = described(20, 0)
    assert finding.mark == "FAIL"
    assert finding.problem.startswith(
        "run.time_limit: not one generation of 5 s, 10 s after the start, fits into 20 s: "
    )


def test_a_run_whose_jobs_replay_until_nothing_fits():
    finding = described(26.5, 0)
    assert finding.problem.startswith(
        "run.time_limit: jobs of 26 s get no further than generation 6 of 8, since"
    )
    assert "run.checkpoint_every" in finding.problem
    assert described(26.5, 0, "run.checkpoint_every=2").mark == "ok"


def test_a_job_has_to_leave_in_time():
    """Start, replay, generations, of which the last is counted 1.2 times, and five seconds."""
    for fit in range(1, 5):
        least = 10 + 3 * 1 + 5 + (fit + 0.2) * 5
        assert jobs_needed(EXPECTED, least + 0.01, 3, 3 + fit, 0) == (1, 3 + fit)
        assert jobs_needed(EXPECTED, least - 0.01, 3, 3 + fit, 0) != (1, 3 + fit)


def test_a_checkpoint_spares_what_came_before_it():
    """After 7 generations with one every 3, one generation is replayed."""
    least = 10 + 1 + 5 + 1.2 * 5
    assert jobs_needed(EXPECTED, least + 0.01, 7, 8, 3) == (1, 8)
    assert jobs_needed(EXPECTED, least + 0.01, 7, 8, 0) == (0, 7)
