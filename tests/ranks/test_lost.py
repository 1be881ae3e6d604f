"""A rank that hangs while blocks are handed out is told of by name, and ends the job. No model is loaded."""

from __future__ import annotations

import time

import launching
import pytest

from mpies.ranks import collectives

pytestmark = [pytest.mark.launch, pytest.mark.timed]

PATIENCE = 4
# Four blocks a rank. In the second generation, a rank stops in its first block.
PROGRAM = """
import os, signal, sys, time

from mpies.es.population import Population
from mpies.phases import Phases
from mpies.ranks import collectives, launch
from mpies.run.assignment import Assignment
from mpies.run.exchange import Evaluated, compare_replicas, end_evaluation, exchange_rewards

def main(comm, arguments):
    lost = int(arguments[0])
    population, phases = Population(4 * comm.size, seed=3), Phases()
    collectives.barrier(comm)
    collectives.set_timeout(comm, {patience})
    with Assignment(comm, population, phases, True) as assignment:
        assert assignment.bytes_received, "blocks are handed out"
        for generation in range(3):
            mine = []
            for block, _ in assignment.blocks(generation):
                time.sleep(0.05)
                if generation == 1 and comm.rank == lost:
                    os.kill(os.getpid(), signal.SIGSTOP)
                mine += [Evaluated(member, member.index, 1, 0.05, None) for member in block]
            end_evaluation(comm, phases, complete=True)
            rewards = exchange_rewards(comm, phases, assignment.plan(generation), mine)
            assert rewards.tolist() == list(range(4 * comm.size))
            assert not compare_replicas(comm, phases, 7, lambda: False, generation)
            if comm.rank == 0:
                print(f"generation {{generation}}", flush=True)
    return 0

launch.run(main, sys.argv[1:])
"""


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "hand_out.py"
    path.write_text(PROGRAM.format(patience=PATIENCE))
    return path


@pytest.mark.parametrize("ranks, lost", [(3, 0), (16, 7)])
def test_a_rank_that_hangs_in_a_block_is_named(program, ranks, lost):
    start = time.monotonic()
    ended = launching.mpirun(ranks, program, str(lost), timeout=300)
    assert ended.returncode not in (0, 2, 75)
    assert time.monotonic() - start < 240
    assert ended.stdout.splitlines()[:1] == ["generation 0"]
    lines = launching.problems(ended.stderr)
    said = " ".join(line.split(": ", 1)[1] for line in lines)
    assert f"rank {lost} on {collectives.host()}" in said and f"{PATIENCE} s" in said
    assert not any(f"rank {rank} on" in said for rank in range(ranks) if rank != lost), said
    assert "Traceback" not in ended.stderr
    assert launching.all_gone(program, within=20)
