"""All ranks' copies of the model stay equal, and one that does not is noticed and named."""

from __future__ import annotations

import subprocess
import sys

import h5py
import pytest
import torch

from mpies import config, replica, train
from mpies.errors import DivergedError, RefusedError
from mpies.es.directions import directions
from mpies.es.population import Population
from mpies.ranks import collectives

pytestmark = pytest.mark.mpi

PROMPTS = ["2 + 2 =", "Say something short.", "?"]


def settings_for(folder, *overrides: str) -> list[str]:
    return [
        f"model.path={folder}",
        "model.device=cpu",
        "task.name=conciseness",
        "model.dtype=float32",
        "es.population=5",
        "es.antithetic=false",
        # Large steps, so that the random model's rewards differ between members.
        "es.sigma=0.3",
        "es.alpha=0.3",
        "engine.max_new_tokens=16",
        *overrides,
    ]


def build(world, folder, *overrides: str) -> replica.Replica:
    return replica.build(world, config.load(settings_for(folder, *overrides)))


def flip_a_bit(weights) -> None:
    """What a memory error does: the lowest bit of one element of the base."""
    name = list(weights.base)[-1]
    weights.base[name].view(torch.int32).view(-1)[-1] ^= 1


@pytest.mark.parametrize(
    "kind, tied, dtype",
    [("llama", True, "bfloat16"), ("qwen2", False, "float16"), ("llama", False, "float32")],
)
def test_replicas_stay_equal_although_each_rank_perturbs_its_own(world, shared_model, kind, tied, dtype):
    mine = build(world, shared_model(kind=kind, tied=tied), f"model.dtype={dtype}")
    population = Population(size=5, seed=7)
    seen = [mine.weights.digest()]
    for generation in range(3):
        for block in population.plan(generation, world.size).blocks[world.rank]:
            for member in block:
                mine.weights.perturb(member.seed, 0.05)
                mine.engine.generate(PROMPTS)
        members = population.members(generation)
        factors = [0.01 * (index - 2) for index in range(5)]
        mine.weights.update(*directions([m.seed for m in members], [m.sign for m in members], factors))
        seen.append(mine.weights.digest())
    everyone = collectives.allgather_objects(world, seen)
    assert everyone == [seen] * world.size
    assert len(set(seen)) == 4, "every generation changes the weights"


def test_perturbing_and_evaluating_50_members_leaves_the_base_as_it_was(world, shared_model):
    mine = build(world, shared_model(), "model.dtype=bfloat16")
    before = {name: base.clone() for name, base in mine.weights.base.items()}
    for seed in range(50):
        mine.weights.perturb(1000 * world.rank + seed, 0.1)
        mine.engine.generate(PROMPTS[:1])
    for name, base in mine.weights.base.items():
        assert torch.equal(base.view(torch.int32), before[name].view(torch.int32)), name
    assert len(set(collectives.allgather_objects(world, mine.weights.digest()))) == 1


@pytest.mark.parametrize("which", ["first", "last"])
def test_a_flipped_bit_stops_the_job(world, shared_model, mpi_tmp_path, monkeypatch, which):
    if world.size == 1:
        pytest.skip("one replica has nothing to be compared with")
    culprit = 0 if which == "first" else world.size - 1
    update, updates = replica.Weights.update, []

    def faulty_update(weights, seeds, factors, *pull):
        update(weights, seeds, factors, *pull)
        updates.append(len(seeds))
        if world.rank == culprit and len(updates) == 3:
            flip_a_bit(weights)

    monkeypatch.setattr(replica.Weights, "update", faulty_update)
    with pytest.raises(DivergedError) as diverged:
        train.main(world, settings_for(shared_model(), "es.generations=5", f"run.directory={mpi_tmp_path}"))
    assert len(updates) == 3
    # Of two, nobody can know which one is right: rank 0 is believed.
    named = culprit if world.size > 2 else 1
    assert [r for r in range(world.size) if f"rank {r} on" in str(diverged.value)] == [named]
    assert "generation 3:" in str(diverged.value)
    # Read by another process, because the writer in this one has not closed the file.
    program = "import h5py, sys; print(h5py.File(sys.argv[1], locking=False).attrs['generations_committed'])"
    command = [sys.executable, "-c", program, str(mpi_tmp_path / "run.h5")]
    if world.rank == 0:
        assert subprocess.run(command, capture_output=True, text=True).stdout == "2\n"


def test_a_whole_job_in_one_world(world, shared_model, mpi_tmp_path):
    """train.main twice: two runs with the same settings are the same run."""
    digests = []
    for name in ("once", "again"):
        arguments = settings_for(shared_model(), "es.generations=3", f"run.directory={mpi_tmp_path / name}")
        assert train.main(world, arguments) == 0
        with h5py.File(mpi_tmp_path / name / "run.h5", "r", locking=False) as file:
            digests.append(file["generation/digest"][:].tolist())
    assert digests[0] == digests[1]
    assert len(set(digests[0])) == 3
    collectives.barrier(world)


def test_ranks_that_load_different_weights_are_refused(world, tiny_model):
    folder = tiny_model(seed=1 if world.rank == world.size - 1 else 0)
    if world.size == 1:
        build(world, folder)
        return
    with pytest.raises(RefusedError, match=r"model\.path.*differ between ranks") as refused:
        build(world, folder)
    assert f"rank {world.size - 1} on" in str(refused.value)


def test_a_model_that_one_rank_cannot_load_is_refused_by_all(world, tiny_model, tmp_path):
    last = world.size - 1
    folder = tiny_model() if world.rank != last else tmp_path / "nothing"
    with pytest.raises(RefusedError, match=r"model\.path.*nothing.*no such folder") as refused:
        build(world, folder)
    assert str(refused.value).startswith(f"rank {last} on") == (world.size > 1)
