"""Runs with tools and with an agent: the same on any ranks, also if a rank is killed in the middle of an
episode; and nothing of its episodes is left then."""

from __future__ import annotations

import json
import time
from pathlib import Path

import agents
import games
import h5py
import psutil
import pytest

from jobs import Job, arguments, assert_same_run, committed, train
from mpies.tasks.environments.seeds import seeds

pytestmark = [pytest.mark.launch, pytest.mark.timeout(900)]

GENERATIONS, KILLED = 4, 2
SEED = 42
LEFT_BEHIND = 3  # processes that an episode has started when it waits
LOWRANK = {"es__perturbation": "lowrank", "es__population": 8, "es__block": 2}
AGENT = {"task__agent": f"{agents.__file__}:waiting"}
KINDS = {
    "tools": {"task__environment_factory": f"{games.__file__}:Sum"},
    "agent": AGENT | LOWRANK,
    "agent-full": AGENT,
}


@pytest.mark.parametrize(
    "kind", ["agent", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("tools", "agent-full"))]
)
def test_any_ranks_and_a_rank_killed_in_an_episode_give_the_same_run(tiny_model, tmp_path, kind):
    """Begun by two ranks, one of which is killed, and gone on with by four: as by one."""
    model = tiny_model(words=games.SUMS, positions=2048)
    wait, rows = tmp_path / "wait", tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"wait": str(wait), "turns": turns}) for turns in (2, 1)))

    def given(folder: str) -> list[str]:
        changes = {"task__name": "custom", "task__train_data": rows, "task__max_turns": 4, "es__seed": SEED}
        changes |= {"engine__max_new_tokens": 4, "run__evaluate_every": 0, "run__collective_timeout": 600}
        return arguments(model, tmp_path / folder, GENERATIONS, **(changes | KINDS[kind]))

    train(1, *given("one"))
    wait.write_text(str(seeds(SEED, [0], KILLED)[0]))
    with Job(2, *given("killed")) as job:
        rank, family = waiting_rank(job, tmp_path)
        rank.kill()
        assert job.end(60) != 0
    assert psutil.wait_procs(family, 30)[1] == []
    assert committed(tmp_path / "killed") == KILLED
    wait.unlink()
    train(4, *given("killed"))
    assert_same_run(tmp_path / "one", tmp_path / "killed", GENERATIONS)
    assert_played(tmp_path / "killed", called=kind == "tools")


def waiting_rank(job: Job, folder: Path) -> tuple[psutil.Process, list[psutil.Process]]:
    """A rank of which an episode waits, and all processes below the job then."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        family = psutil.Process(job.process.pid).children(recursive=True)
        waiting = [one for one in family if (folder / f"waits-{one.pid}").exists()]
        if waiting and len(waiting[0].children(recursive=True)) >= LEFT_BEHIND:
            (rank,) = set(waiting[0].parents()) & set(job.ranks())
            return rank, family
        assert job.process.poll() is None, job.output
        time.sleep(0.05)
    pytest.fail(f"no episode waits:\n{job.output}")


def assert_played(folder: Path, called: bool) -> None:
    """What the comparison of two runs would not notice: episodes in which nothing happens."""
    with h5py.File(folder / "run.h5") as file:
        assert not file["member/failed"][:].any()
        assert (file["member/turns"][:].mean(1) > 2).all()
        assert (file["member/calls"][:].mean(1) > 2).all() == called
        assert not called or not file["member/bad_calls"][:].all()
