"""Ranks of one mind: what one refuses all refuse, and what differs is named, with the ranks."""

from __future__ import annotations

import pytest
import threads

from mpies import config
from mpies.errors import InputError, MissingRankError, RefusedError
from mpies.ranks import agreement, collectives
from mpies.ranks.agreement import Brought

HOSTS = ("alpha", "alpha", "beta", "gamma")


def refusals(ranks: int, function) -> str:
    """What all ranks say alike when they refuse."""
    errors = threads.run(ranks, function, hosts=HOSTS)
    assert all(type(error) is RefusedError for error in errors), errors
    (text,) = {str(error) for error in errors}
    return text


def test_every_rank_gets_its_own_result_and_what_all_have_told(alone):
    def bring(comm, factor):
        return Brought(factor * comm.rank, {"seed": 42}, told=f"from {comm.rank}")

    found = threads.run(3, lambda comm: agreement.agree(comm, "settings", bring, comm, 10))
    assert found == [(10 * rank, ["from 0", "from 1", "from 2"]) for rank in range(3)]
    assert agreement.agree(alone, "settings", bring, alone, 10) == (0, ["from 0"])


def test_a_refusal_of_one_rank_is_every_ranks_and_names_it(alone):
    def load(comm):
        if comm.rank == 2:
            raise InputError("model.path: not here")
        return Brought("loaded")

    said = refusals(4, lambda comm: agreement.agree(comm, "weights", load, comm))
    assert said == "rank 2 on beta: model.path: not here"


def test_of_several_refusals_the_first_ranks_is_told():
    def load(comm):
        if comm.rank:
            raise InputError(f"cannot read /scratch/{comm.rank}")

    said = refusals(3, lambda comm: agreement.together(comm, load, comm))
    assert said == "rank 1 on alpha: cannot read /scratch/1"


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_refusal_that_all_share_names_no_rank(ranks):
    def load():
        raise InputError("es.sigma: must be positive")

    assert refusals(ranks, lambda comm: agreement.together(comm, load)) == "es.sigma: must be positive"


def test_other_errors_are_not_caught(alone):
    """They end the rank that they occur on, and with it the job."""
    with pytest.raises(ZeroDivisionError):
        agreement.together(alone, lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        agreement.on_root(alone, lambda: 1 / 0)


def test_a_refusal_comes_before_a_difference():
    """A rank that could not tell its facts differs in all of them."""

    def load(comm):
        if comm.rank == 1:
            raise InputError("no such folder")
        return Brought(None, {"digest": 7})

    said = refusals(2, lambda comm: agreement.agree(comm, "weights", load, comm))
    assert said == "rank 1 on alpha: no such folder"


@pytest.mark.parametrize(
    "values, says",
    [
        ((1, 1, 2, 1), "is 1 on rank 0 on alpha and 2 on rank 2 on beta"),
        ((1, 2, 2, 2), "is 1 on rank 0 on alpha and 2 on rank 1 on alpha, rank 2 on beta, rank 3 on gamma"),
        (("a", "a", "b", "c"), "is 'a' on rank 0 on alpha and 'b' on rank 2 on beta, rank 3 on gamma"),
        ((None, None, 0, None), "is None on rank 0 on alpha and 0 on rank 2 on beta"),
    ],
)
def test_a_difference_is_told_with_values_and_ranks(values, says):
    def compare(comm):
        facts = {"es.seed": 42, "es.sigma": values[comm.rank], "z": comm.rank}
        agreement.require_equal(comm, facts, "settings")

    assert refusals(4, compare) == f"settings differ between ranks: es.sigma {says}"


def test_a_fact_that_only_some_ranks_have_is_a_difference():
    def compare(comm):
        facts = {"reward": "abc"} if comm.rank == 1 else {}
        agreement.require_equal(comm, facts, "software")

    said = refusals(2, compare)
    assert (
        said
        == "software differ between ranks: reward is None on rank 0 on alpha and 'abc' on rank 1 on alpha"
    )


def test_equal_facts_pass(alone):
    facts = {"es.seed": 42, "model.path": "x"}
    agreement.require_equal(alone, facts, "settings")
    assert threads.run(3, lambda comm: agreement.require_equal(comm, facts, "settings")) == [None] * 3


def test_a_call_has_its_own_timeout():
    def load(comm):
        return agreement.together(comm, lambda: None, timeout=0.2) if comm.rank == 0 else None

    error, _ = threads.run(2, load, timeout=1000, hosts=HOSTS)
    assert isinstance(error, MissingRankError) and "0.2 s for rank 1 on alpha" in str(error)


def test_the_root_alone_acts(alone):
    called = []

    def create(comm, name):
        called.append(comm.rank)
        return {"created": name}

    found = threads.run(3, lambda comm: agreement.on_root(comm, create, comm, "run.h5"))
    assert found == [{"created": "run.h5"}] * 3 and called == [0]
    assert agreement.on_root(alone, lambda a, b: a + b, 1, 2) == 3


def test_what_the_root_refuses_all_refuse():
    def create():
        raise InputError("run.directory: exists already")

    assert refusals(3, lambda comm: agreement.on_root(comm, create)) == "run.directory: exists already"


def test_settings_make_the_ranks_as_patient_as_they_say(alone, tmp_path):
    given = [f"run.directory={tmp_path}", "run.collective_timeout=77"]
    fresh = alone.Dup()
    assert agreement.agree_on_settings(fresh, config.load, given) == config.load(given)
    assert collectives.patience(fresh).timeout == 77
    fresh.Free()

    def load(comm):
        return agreement.agree_on_settings(comm, config.load, [*given, f"es.seed={min(comm.rank, 1)}"])

    assert refusals(3, load) == (
        "settings differ between ranks: es.seed is 0 on rank 0 on alpha"
        " and 1 on rank 1 on alpha, rank 2 on beta"
    )


@pytest.mark.parametrize(
    "digests, differing",
    [
        ([7], []),
        ([7, 7, 8], [2]),
        ([8, 7, 7], [0]),
        ([7, 8, 9, 7], [1, 2]),
        ([7, 8], [1]),
        ([7, 8, 9], [1, 2]),
    ],
)
def test_diverged_are_those_outside_the_majority(digests, differing):
    assert agreement.find_diverged(digests) == differing
