"""One block of members and some seeds, tried out: what is measured, and what is refused."""

from __future__ import annotations

import pytest
import small
import threads
import torch

from mpies import config
from mpies.check import rehearsal
from mpies.check.rehearsal import Trial, rehearse
from mpies.errors import MissingRankError, RefusedError


@pytest.fixture
def runs(alone, tiny_model, tmp_path):
    with small.Runs(alone, tiny_model(), tmp_path) as runs:
        yield runs


def tried(runs: small.Runs, **changes):
    settings = config.load(runs.arguments(1, **changes))
    made = runs.build(**changes)
    small.calls.clear()
    cost, findings = rehearse(runs.comm, settings, made)
    return made, cost, findings


def test_a_member_is_evaluated_as_in_a_generation(runs):
    made, cost, (finding,) = tried(runs)
    first, whole = small.calls
    prompts = [row["prompt"] for row in small.TRAIN]
    assert first["prompts"] == prompts[:1] and whole["prompts"] == prompts, "one is to compile and load"
    assert min(cost.block, cost.seed, cost.digest) > 0 and cost.pull == 0
    assert cost.memory is None or cost.memory >= 0
    assert finding.what == "evaluation" and finding.mark == "ok"
    assert "for 1 member(s) on the slowest rank" in finding.value and "tokens/s in all" in finding.value
    # The member's answers are those of weights that are perturbed.
    made.perturbation.clear()
    assert whole["completions"] != made.engine.generate(prompts).texts


def test_a_block_of_low_rank_is_evaluated_in_one_batch(runs):
    changes = {"es__perturbation": "lowrank", "es__population": 6, "es__block": 4}
    _, _, (finding,) = tried(runs, **changes)
    assert len(small.calls) == 4 + 4 and "for 4 member(s)" in finding.value
    assert len({str(call["completions"]) for call in small.calls[4:]}) > 1, "members differ"
    _, _, (finding,) = tried(runs, **{**changes, "es__block": 16})
    assert "for 6 member(s)" in finding.value, "there are no more"


def test_the_pull_of_an_anchor_is_measured(runs):
    assert tried(runs, es__anchor_decay=0.1)[1].pull > 0


def test_prompts_are_those_of_a_generation(runs):
    tried(runs, task__prompts_per_generation=1)
    assert [len(call["prompts"]) for call in small.calls] == [1, 1]


def trial(rank: int) -> Trial:
    table = [
        Trial(block=2.0, tokens=100, memory=None, seed=0.1, pull=0.01, digest=0.5),
        Trial(block=4.0, tokens=100, memory=70, seed=0.3, pull=0.0, digest=0.2),
        Trial(block=1.0, tokens=300, memory=90, seed=0.2, pull=0.02, digest=0.1),
    ]
    return table[rank]


def test_the_slowest_rank_counts_and_the_one_that_needs_most(runs, monkeypatch):
    """Speeds add up, since ranks work side by side."""
    settings, blocks = config.load(runs.arguments(1)), []

    def try_out(settings, replica, block):
        blocks.append([member.index for member in block])
        return trial(replica)

    monkeypatch.setattr(rehearsal, "_try_out", try_out)
    found = threads.run(3, lambda comm: rehearse(comm, settings, comm.rank))
    assert found == found[:1] * 3
    cost, (finding,) = found[0]
    assert cost == Trial(block=4.0, tokens=500, seed=0.3, pull=0.02, digest=0.5, memory=90)
    assert finding.value.endswith(", 375 tokens/s in all") and finding.value.startswith("4 s for 1 member(s)")
    assert sorted(blocks) == [[0], [1], [2]], "each rank evaluates another member"


@pytest.mark.parametrize(
    "error, says",
    [
        (ConnectionError("no answer\nsecond line"), "failed on rank 0 with ConnectionError: no answer"),
        (KeyError("answer"), "failed on rank 0 with KeyError: 'answer'"),
        (
            MemoryError(),
            "MemoryError: MemoryError; a smaller engine.batch_size or engine.max_new_tokens needs",
        ),
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried"), "; a smaller engine.batch_size"),
    ],
)
def test_what_fails_is_refused_with_the_reason_and_its_traceback(runs, capsys, error, says):
    def fail():
        raise error

    small.events[0] = fail
    with pytest.raises(RefusedError) as refused:
        tried(runs)
    assert str(refused.value).startswith("evaluating a member failed on rank 0 with ") and says in str(
        refused.value
    )
    assert "in fail" in capsys.readouterr().err


def test_what_ends_in_an_orderly_way_is_left_to_do_so(runs):
    def fail():
        raise MissingRankError("gave up")

    small.events[1] = fail
    with pytest.raises(MissingRankError, match=r"^gave up$"):
        tried(runs)


def test_the_weights_are_hardly_others_afterwards(runs):
    """An update that is measured has to be made."""
    before = runs.build().weights
    made, _, _ = tried(runs)
    assert made.weights.digest() != before.digest()
    assert all(torch.allclose(base, before.base[n], atol=1e-4) for n, base in made.weights.base.items())
