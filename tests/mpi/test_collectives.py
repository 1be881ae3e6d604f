"""What ranks do together. Every test runs on every rank, for any number of ranks, one included."""

from __future__ import annotations

import time

import numpy as np
import pytest

from mpies.errors import InputError, RefusedError
from mpies.ranks import agreement, collectives, devices

pytestmark = pytest.mark.mpi

PAIR = np.dtype([("seed", "<u8"), ("reward", "<f8")])


def pairs_of(rank: int, count: int) -> np.ndarray:
    """Rows that no other rank has, with bits in the upper half of the seed."""
    rows = [(2**63 + 1000 * rank + i, -(rank + i / 7)) for i in range(count)]
    return np.array(rows, dtype=PAIR)


@pytest.mark.parametrize("first", [0, 1, 3])
def test_allgather_rows_of_unequal_counts(world, first):
    counts = [(first + 2 * rank) % 5 for rank in range(world.size)]  # has zeros, and is not monotonic
    expected = np.concatenate([pairs_of(rank, n) for rank, n in enumerate(counts)])
    gathered = collectives.allgather_rows(world, pairs_of(world.rank, counts[world.rank]), counts)
    assert gathered.dtype == PAIR
    assert gathered.tolist() == expected.tolist()


def test_allgather_rows_when_one_rank_has_all_and_when_none_has_any(world):
    last = world.size - 1
    mine = pairs_of(world.rank, 3 if world.rank == last else 0)
    gathered = collectives.allgather_rows(world, mine, [0] * last + [3])
    assert gathered.tolist() == pairs_of(last, 3).tolist()
    assert collectives.allgather_rows(world, pairs_of(0, 0), [0] * world.size).tolist() == []


def test_allgather_rows_of_a_slice_with_gaps(world):
    mine = np.arange(6, dtype=np.int64)[::2] + 10 * world.rank
    gathered = collectives.allgather_rows(world, mine, [3] * world.size)
    assert gathered.tolist() == [10 * rank + i for rank in range(world.size) for i in (0, 2, 4)]


def test_gather_rows_gives_them_to_rank_0_only(world):
    counts = [(1 + 2 * rank) % 3 for rank in range(world.size)]
    gathered = collectives.gather_rows(world, pairs_of(world.rank, counts[world.rank]), counts)
    if world.rank == 0:
        expected = np.concatenate([pairs_of(rank, n) for rank, n in enumerate(counts)])
        assert gathered.tolist() == expected.tolist()
    else:
        assert gathered is None


def test_allgather_objects_of_different_sizes(world):
    # From a few bytes to 1 MB, far beyond what MPI sends without asking first.
    def thing(rank):
        return {"rank": rank, "text": "é" * 10 ** (2 * rank), "none": None}

    assert collectives.allgather_objects(world, thing(world.rank)) == [thing(r) for r in range(world.size)]


def test_together_returns_each_ranks_result(world):
    assert agreement.together(world, lambda a, b: a + b, world.rank, 1) == world.rank + 1


def test_together_refuses_everywhere_what_one_rank_refuses(world):
    last = world.size - 1

    def load():
        if world.rank == last:
            raise InputError("model.path: not here")
        return "loaded"

    with pytest.raises(RefusedError) as refused:
        agreement.together(world, load)
    # A rank is named where others could do what it could not.
    assert (
        str(refused.value)
        == ("" if last == 0 else f"{collectives.named(world, [last])}: ") + "model.path: not here"
    )


def test_together_names_no_rank_when_all_refuse_alike(world):
    def load():
        raise InputError("es.sigma: must be positive")

    with pytest.raises(RefusedError) as refused:
        agreement.together(world, load)
    assert str(refused.value) == "es.sigma: must be positive"


def test_together_names_the_first_rank_when_ranks_refuse_for_different_reasons(world):
    def load():
        raise InputError(f"cannot read /scratch/{world.rank}")

    with pytest.raises(RefusedError) as refused:
        agreement.together(world, load)
    assert (
        str(refused.value)
        == (f"{collectives.named(world, [0])}: " if world.size > 1 else "") + "cannot read /scratch/0"
    )


def test_on_root_acts_on_rank_0_and_returns_its_result_everywhere(world):
    called = []

    def create(name):
        called.append(name)
        return {"created": name, "by": world.rank}

    assert agreement.on_root(world, create, "run.h5") == {"created": "run.h5", "by": 0}
    assert called == (["run.h5"] if world.rank == 0 else [])


def test_on_root_refuses_everywhere_what_rank_0_refuses(world):
    def create():
        raise InputError("run.directory: exists already")

    with pytest.raises(RefusedError) as refused:
        agreement.on_root(world, create)
    assert str(refused.value) == "run.directory: exists already"


def test_require_equal_passes_what_is_equal(world):
    agreement.require_equal(world, {"es.seed": 42, "model.path": "x", "es.sigma": 0.1}, "settings")


def test_require_equal_names_the_key_the_values_and_the_ranks(world):
    last = world.size - 1
    facts = {"es.seed": 42, "es.sigma": 0.25 if world.rank == last else 0.125}
    if last == 0:
        agreement.require_equal(world, facts, "settings")
        return
    with pytest.raises(RefusedError) as refused:
        agreement.require_equal(world, facts, "settings")
    message = str(refused.value)
    for part in ("settings", "es.sigma", "0.125", "rank 0", "0.25", f"rank {last}"):
        assert part in message
    assert "es.seed" not in message


@pytest.mark.parametrize("collective", ["barrier", "allgather"])
def test_waiting_for_another_rank_does_not_use_a_core(world, collective):
    def meet():
        if collective == "barrier":
            collectives.barrier(world)
        else:
            collectives.allgather_rows(world, np.array([world.rank]), [1] * world.size)

    meet()  # what MPI sets up at the first meeting is not waiting
    late = world.size - 1
    wall, processor = time.monotonic(), time.process_time()
    if world.rank == late:
        time.sleep(1.5)
    meet()
    wall, processor = time.monotonic() - wall, time.process_time() - processor
    assert wall > 1.2, "nobody left before the last one came"
    assert processor < 0.3


@pytest.mark.parametrize(
    "digests, differing",
    [
        ([7], []),
        ([7, 7, 7], []),
        ([7, 7, 8], [2]),
        ([8, 7, 7], [0]),
        ([7, 8, 9, 7], [1, 2]),
        ([7, 8], [1]),  # no majority: rank 0 is believed
        ([8, 7, 7, 8], [1, 2]),
        ([7, 8, 9], [1, 2]),
        ([0, 2**64 - 1, 2**64 - 1], [0]),
    ],
)
def test_diverged_ranks_are_those_outside_the_majority(digests, differing):
    assert agreement.find_diverged(digests) == differing


def test_local_rank_counts_the_ranks_of_the_node(world):
    hosts = collectives.allgather_objects(world, collectives.host())
    mine = [rank for rank, host in enumerate(hosts) if host == collectives.host()]
    assert devices.local_rank(world) == mine.index(world.rank)


def test_device_for(world):
    import torch

    assert devices.device_for(world, "cpu") == torch.device("cpu")
    visible = torch.cuda.device_count()
    if visible:
        expected = torch.device("cuda", devices.local_rank(world) % visible)
        assert devices.device_for(world, "cuda") == expected
        assert devices.device_for(world, "auto") == expected
    else:
        assert devices.device_for(world, "auto") == torch.device("cpu")
        with pytest.raises(InputError, match=r"model\.device: cuda .* no GPU"):
            devices.device_for(world, "cuda")
