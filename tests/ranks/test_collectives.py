"""What ranks exchange and how they wait: on one rank, and on ranks that are threads."""

from __future__ import annotations

import time

import numpy as np
import pytest
import threads

from mpies.errors import MissingRankError
from mpies.ranks import collectives

PAIR = np.dtype([("seed", "<u8"), ("reward", "<f8")])
HOSTS = ("alpha", "alpha", "beta")


def rows_of(rank: int, count: int) -> np.ndarray:
    """Rows that no other rank has."""
    return np.array([(2**63 + 100 * rank + i, -(rank + i / 7)) for i in range(count)], dtype=PAIR)


@pytest.mark.parametrize("word", [0, 1, True, False, 5, 2**63])
def test_a_rank_alone_hears_its_own_word(alone, word):
    assert collectives.barrier(alone, word=word) == word


@pytest.mark.parametrize("words", [(0, 0, 0), (0, 0, 7), (3, 0, 1), (0, 127, 126), (2, 2, 2)])
def test_every_rank_hears_the_largest_word(words):
    heard = threads.run(3, lambda comm: collectives.barrier(comm, words[comm.rank]))
    assert heard == [max(words)] * 3


def test_nobody_leaves_a_barrier_before_the_last_has_come():
    left = []

    def meet(comm):
        if comm.rank == 2:
            time.sleep(0.3)
            left.append("the last is here")
        collectives.barrier(comm)
        left.append(comm.rank)

    threads.run(3, meet)
    assert left[0] == "the last is here" and sorted(left[1:]) == [0, 1, 2]


@pytest.fixture
def hurried(monkeypatch):
    """Ranks that wait have this long to answer to the roll, and for rank 0 to report."""
    monkeypatch.setattr(collectives, "MISSING", 0.5)
    monkeypatch.setattr(collectives, "REPORTING", 0.5)


def test_rank_0_names_all_that_are_missing_with_their_hosts(hurried):
    def meet(comm):
        return collectives.barrier(comm) if comm.rank == 0 else None

    error, _, _ = threads.run(3, meet, timeout=0.2, hosts=HOSTS)
    assert isinstance(error, MissingRankError)
    assert str(error) == (
        "gave up after waiting 0.2 s for rank 1 on alpha, rank 2 on beta; if nothing is wrong with"
        " them, set a larger run.collective_timeout"
    )


def test_a_rank_that_came_is_not_named_and_a_barriers_own_patience_counts(hurried):
    def meet(comm):
        if comm.rank < 2:
            collectives.barrier(comm, timeout=0.2)

    first, second, _ = threads.run(3, meet, timeout=1000, hosts=HOSTS)
    assert "waiting 0.2 s for rank 2 on beta;" in str(first)
    # Rank 0 has time to say it first.
    assert isinstance(second, MissingRankError) and "rank 0 on alpha has not arrived" in str(second)


def test_without_a_timeout_ranks_wait_for_ever(alone):
    fresh = alone.Dup()
    assert collectives.patience(fresh).timeout == float("inf")
    collectives.set_timeout(fresh, 7)
    assert collectives.patience(fresh) == collectives.Patience(7, (collectives.host(),))
    fresh.Free()


def test_an_exchange_that_does_not_end_is_followed_by_a_roll_call(hurried):
    """Ranks 1 and 2 do not come to the exchange, but rank 1 answers."""

    def exchange(comm):
        if comm.rank == 0:
            collectives.allgather_rows(comm, np.zeros(1), [1] * 3)
        elif comm.rank == 1:
            time.sleep(0.3)  # it answers when it has come to something
            collectives.barrier(comm)

    first, _, _ = threads.run(3, exchange, timeout=0.5, hosts=HOSTS)
    assert isinstance(first, MissingRankError) and "for rank 2 on beta;" in str(first)


@pytest.mark.lengthy
def test_a_rank_that_comes_late_to_an_exchange_is_told_of():
    def exchange(comm):
        if comm.rank:
            time.sleep(1.5)
        collectives.allgather_rows(comm, np.zeros(1), [1] * 2)
        collectives.barrier(comm)

    late, _ = threads.run(2, exchange, timeout=1)
    assert isinstance(late, MissingRankError)
    assert "came to an exchange more than 1 s after others" in str(late)


def test_ranks_are_named_up_to_eight(alone):
    named = threads.run(1, lambda comm: collectives.named(comm, [1, 2]), hosts=HOSTS)
    assert named == ["rank 1 on alpha, rank 2 on beta"]
    (eight, ten) = (collectives.named(alone.Dup(), list(range(n))) for n in (8, 10))
    assert eight == ", ".join(f"rank {rank}" for rank in range(8))
    assert ten == eight + " and 2 more"


@pytest.mark.parametrize("counts", [(2, 1, 3), (0, 0, 4), (3, 0, 0), (0, 0, 0)])
def test_rows_come_in_rank_order(counts):
    expected = np.concatenate([rows_of(rank, n) for rank, n in enumerate(counts)])

    def exchange(comm):
        mine = rows_of(comm.rank, counts[comm.rank])
        everyone = collectives.allgather_rows(comm, mine, list(counts))
        return everyone, collectives.gather_rows(comm, mine, list(counts))

    for rank, (everyone, on_root) in enumerate(threads.run(3, exchange)):
        assert everyone.dtype == PAIR and everyone.tolist() == expected.tolist()
        assert on_root is None if rank else on_root.tolist() == expected.tolist()


def test_objects_of_any_size_come_in_rank_order(alone):
    def thing(rank):
        return {"rank": rank, "text": "é" * 10**rank}

    assert collectives.allgather_objects(alone, thing(3)) == [thing(3)]
    found = threads.run(3, lambda comm: collectives.allgather_objects(comm, thing(comm.rank)))
    assert found == [[thing(0), thing(1), thing(2)]] * 3


def test_waiting_sleeps_and_ends_in_time(alone):
    start, spent = time.monotonic(), time.process_time()
    never = alone.Irecv(np.zeros(1), 0, 99)
    assert not collectives.wait(never, timeout=0.3)
    assert 0.3 <= time.monotonic() - start < 1
    assert time.process_time() - spent < 0.1
    never.Cancel()
    never.Free()
    assert collectives.wait(timeout=0)
