"""Runs whose tasks are environments: in step, the same on any ranks and interrupted, and told of."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import games
import h5py
import numpy as np
import pytest
import small
import threads

from jobs import Job, arguments, assert_same_run, committed, train
from mpies.errors import InputError
from mpies.measure.evaluation import FIRST_HELD_OUT, Sampling, evaluate_rows, first_of
from mpies.measure.kl import estimate_kl
from mpies.replica import Replica
from mpies.tasks.base import TrainerState
from mpies.tasks.environments.seeds import seeds

pytestmark = pytest.mark.lengthy

FILE = str(Path(games.__file__))
OWN = {"task__name": "custom", "task__reward": {}, "task__train_data": "", "task__eval_data": ""}
MADE_UP = {"task__train_size": 3, "task__eval_size": 2}


def environment(name: str, **others) -> dict:
    return OWN | {"task__environment": f"{FILE}:{name}"} | others


class Counted:
    """An engine that notes the prompts of each call."""

    def __init__(self, engine):
        self.engine, self.calls = engine, []

    def __getattr__(self, name):
        return getattr(self.engine, name)

    def generate_each(self, prompts, members, turns=None):
        self.calls.append(Counter(members))
        return self.engine.generate_each(prompts, members, turns)


@pytest.fixture
def build(runs):
    """build(environment's name, setting=value, ...) -> a replica."""

    def make(name: str, **changes) -> Replica:
        return runs.build(**environment(name, **changes))

    return make


def members_of(replica: Replica, count: int) -> None:
    from mpies.es.population import Member

    replica.perturbation.set([Member(i, 10 + i, 1) for i in range(count)], 0.3)


LOWRANK = {"es__perturbation": "lowrank", "es__block": 2, "engine__batch_size": 64}


def test_episodes_without_room_for_a_first_answer_are_refused(build):
    said = (
        r"^task\.environment: an episode's prompt 1 has 28 tokens and its answer up to 4,"
        r" but an episode has room for 31 \(task\.episode_tokens\)"
    )
    with pytest.raises(InputError, match=said):
        build("Echo", **MADE_UP, task__episode_tokens=31)
    made = build("Echo", **MADE_UP, task__episode_tokens=32)
    (played,) = made.task.play(made.engine, made.task.starts(0))
    assert {(one.ended, len(one.turns)) for one in played.episodes} == {("tokens", 1)}
    assert made.facts.turns == "keys and values are kept from one to the next"


STRICT = (
    "{% for m in messages %}{% if m.role != ['user', 'assistant'][loop.index0 % 2] %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "<bos>{{ m.role }}: {{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant: {% endif %}"
)


def test_a_conversation_that_the_template_refuses_costs_its_episode_and_no_more(build):
    """As Gemma's refuses two answers in a row."""
    made = build("Silent", **MADE_UP)
    made.tokenizer.chat_template = STRICT
    starts = made.task.starts(0)
    starts[1].row["turns"] = 1
    (played,) = made.task.play(made.engine, starts)
    ended = [(one.ended, len(one.turns)) for one in played.episodes]
    assert ended == [("failed", 2), ("done", 1), ("failed", 2)]
    assert "roles must alternate" in played.episodes[0].error
    rewards = played.scores.rewards.tolist()
    assert rewards[0] == rewards[2] == 0.0


def test_members_play_in_step_and_the_same_as_alone(build):
    """A call a turn, of all that are left; what it comes to is what a plain loop comes to."""
    made = build("Echo", **MADE_UP, **LOWRANK)
    members_of(made, 2)
    engine, starts = Counted(made.engine), made.task.starts(3)
    starts[1].row["turns"] = 1
    both = made.task.play(engine, starts, 2)
    assert engine.calls == [{0: 3, 1: 3}, {0: 2, 1: 2}, {0: 2, 1: 2}]
    for member, played in enumerate(both):
        for start, episode, reward in zip(starts, played.episodes, played.scores.rewards, strict=True):
            game, conversation, total = games.Echo(), [], 0.0
            games.seen.clear()
            games.random.seed(start.seed)
            said = game.reset(**start.row)
            done = False
            while not done:
                conversation.append({"role": "user", "content": said})
                answer = made.engine.generate_each([conversation], [member]).texts[0]
                conversation = [*conversation, {"role": "assistant", "content": answer}]
                said, won, done = game.step(answer)
                total += won
            assert [*conversation, {"role": "user", "content": said}] == episode.conversation
            assert reward == pytest.approx(total) and episode.ended == "done"
    texts = [[turn.text for one in played.episodes for turn in one.turns] for played in both]
    assert texts[0] != texts[1]


def test_an_environment_of_one_turn_costs_no_more_calls_or_tokens_than_a_task_without(runs, build):
    plain = runs.build()
    rows = plain.task.train
    path = runs._rows[0]
    single = build("Single", task__train_data=path)
    calls = []
    for made in (plain, single):
        engine = Counted(made.engine)
        (played,) = made.task.play(engine, made.task.starts(0), 1)
        given = [made.engine.text.encode(turn.prompt) for one in played.episodes for turn in one.turns]
        calls.append((engine.calls, given, [one.ids for one in played.episodes]))
    assert calls[0] == calls[1] and len(calls[0][1]) == len(rows)


@pytest.mark.parametrize(
    "limit, turns, ended",
    [({"task__max_turns": 2}, 2, "turns"), ({"task__episode_tokens": 60}, 1, "tokens"), ({}, 6, "done")],
)
def test_an_episode_over_a_limit_ends_with_what_it_has(build, limit, turns, ended):
    made = build("Echo", **(MADE_UP | limit))
    starts = made.task.starts(0)
    for start in starts:
        start.row["turns"] = 6
    (played,) = made.task.play(made.engine, starts)
    assert [(len(one.turns), one.ended) for one in played.episodes] == [(turns, ended)] * 3
    assert played.scores.rewards.tolist() == [one.reward for one in played.episodes]
    assert all(one.reward > 0 for one in played.episodes)
    metrics = {name: values.tolist() for name, values in played.scores.metrics.items()}
    assert metrics["cut"] == [float(ended != "done")] * 3 and metrics["turns"] == [turns] * 3
    assert metrics["left"] == [6 - turns] * 3 and metrics["failed"] == [0] * 3


def test_one_that_fails_gets_the_failure_reward_whatever_it_had(build, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"what": what}) for what in ("nothing", "raise", "exit")))
    made = build("Wicked", task__train_data=rows, task__failure_reward=-2.5)
    (played,) = made.task.play(made.engine, made.task.starts(0))
    assert played.scores.rewards.tolist() == [1.0, -2.5, -2.5]
    assert played.scores.metrics["failed"].tolist() == [0, 1, 1]


def test_conversations_without_a_chat_template_are_one_text(build):
    made = build("Echo", **MADE_UP, task__chat_template="false")
    (played,) = made.task.play(made.engine, made.task.starts(0))
    for one in played.episodes:
        assert isinstance(one.prompt, str) and one.turns[0].prompt == one.prompt
        assert one.conversation.startswith(one.prompt + one.turns[0].text)
        for turn, following in pairwise(one.turns):
            assert following.prompt.startswith(turn.prompt + turn.text)


def test_reward_functions_add_to_what_environments_give(build):
    made = build("Echo", **(MADE_UP | {"task__reward": "{games:more: 2}"}))
    (played,) = made.task.play(made.engine, made.task.starts(0), state=TrainerState(1, 2))
    given = games.given
    assert given["prompts"] == [one.prompt for one in played.episodes]
    assert given["completions"] == [one.conversation[1:] for one in played.episodes]
    own = [one.reward for one in played.episodes]
    assert played.scores.rewards.tolist() == [own[0] + 2, own[1], own[2] + 2]


def test_evaluations_are_the_same_on_any_ranks_and_at_any_generation(alone, build):
    made = build("Echo", **MADE_UP)
    task, rows = made.task, made.task.held_out
    for sampling in (None, Sampling.of("held_out", 2, 5)):
        found = [
            evaluate_rows(
                alone, made.engine, task, rows, 1, TrainerState(g, 9), sampling, first=first_of("held_out")
            )
            for g in (0, 4)
        ]
        found += threads.run(
            3,
            lambda comm, sampling=sampling: evaluate_rows(
                comm, made.engine, task, rows, 1, None, sampling, first=FIRST_HELD_OUT
            ),
        )
        first = found[0]
        assert all(one.completions == first.completions for one in found)
        assert all(one.rewards.tolist() == first.rewards.tolist() for one in found)
        assert first.metrics["turns"].tolist() == [3] * len(first.completions)
        told = [json.loads(answer["messages"]) for answer in first.answers(2)]
        assert [one["ended"] for one in told] == ["done after 3 turns"] * len(told)
        assert all(len(one["conversation"]) == 7 for one in told)
    (start, _) = task.evaluated_starts(rows, [FIRST_HELD_OUT, FIRST_HELD_OUT + 1])
    assert start.seed == seeds(42, [FIRST_HELD_OUT], None)[0]
    # Each turn of a sampled episode is drawn anew.
    assert len({text.split("\n")[2] for text in first.completions}) > 1


def test_kl_is_over_the_tokens_of_all_turns(alone, runs):
    made = runs.build(**environment("Echo", **MADE_UP), run__kl_samples=2)
    made.weights.update(np.array([7], np.uint64), np.array([0.15], np.float32))
    made.perturbation.clear()
    sampling = Sampling.of("held_out", 2, 5)
    found = estimate_kl(alone, made, made.initial, made.task.held_out, 3, sampling)
    assert found.mean > 0.01
    assert found == estimate_kl(alone, made, made.initial, made.task.held_out, 3, sampling)


def test_a_run_tells_what_its_episodes_came_to_and_goes_on(runs, capsys):
    changes = environment("Echo", **MADE_UP, run__evaluate_every=2)
    assert runs.train(2, **changes) == 0
    assert runs.train(4, **changes) == 0  # its digests are replayed and compared
    whole = small.Runs(runs.comm, runs.model, runs.folder.parent)
    whole.folder = runs.folder.parent / "whole"
    with whole:
        assert whole.train(4, **changes) == 0
    assert_same_run(runs.folder, whole.folder, 4)
    with h5py.File(runs.folder / "run.h5") as file:
        assert (file["member/turns"][:4] == 9).all() and not file["member/failed"][:4].any()
        assert len(set(file["member/replies"][:4].ravel().tolist())) == 16
        names = {name.decode() for name in file["metric/name"][:]}
        assert {"turns", "cut", "failed", "left"} <= names
        assert file["sample/prompt"].asstr()[0].startswith("Say ")
        told = json.loads(file["sample/messages"].asstr()[0])
        assert [message["role"] for message in told["conversation"]] == ["user", "assistant"] * 3 + ["user"]
        rewards = json.loads(file["start/rewards"].asstr()[0])
    assert list(rewards) == [f"{FILE}:Echo"]


def test_a_failure_in_a_run_is_said_once_and_counted(runs, capsys):
    rows = runs.folder.parent / "wicked.jsonl"
    rows.write_text("\n".join(json.dumps({"what": what}) for what in ("nothing", "raise")))
    assert runs.train(2, **environment("Wicked", task__train_data=rows)) == 0
    said = capsys.readouterr().out
    assert said.count("an episode's environment failed (step raised ValueError: no such (") == 1
    with h5py.File(runs.folder / "run.h5") as file:
        assert (file["member/failed"][:2] == 1).all()


PERTURBATIONS = pytest.mark.parametrize("lowrank", [False, True], ids=["full", "lowrank"])


def rewards_of(folder: Path) -> list:
    with h5py.File(folder / "run.h5") as file:
        assert (file["member/turns"][:2] == 9).all()
        return file["member/reward"][:2].tolist()


@PERTURBATIONS
def test_what_is_kept_in_batches_of_any_size_makes_no_difference(runs, build, lowrank):
    changes = environment("Echo", **MADE_UP, **(LOWRANK if lowrank else {}))
    assert build("Echo", **MADE_UP).engine.keeps
    assert not build("Echo", **MADE_UP, task__max_turns=1).engine.keeps
    found = []
    for size in (64, 3):
        runs.folder = runs.folder.parent / f"size-{size}"
        assert runs.train(2, **(changes | {"engine__batch_size": size})) == 0
        found.append(rewards_of(runs.folder))
    assert found[0] == found[1] and len(set(found[0][0])) > 1


@pytest.mark.long
@pytest.mark.launch
@pytest.mark.timeout(900)
@PERTURBATIONS
def test_rewards_are_the_same_on_two_ranks_with_other_batches(tiny_model, tmp_path, lowrank):
    changes = {"task__environment": f"{FILE}:Echo", "task__name": "custom", **MADE_UP}
    changes |= {"engine__max_new_tokens": 4, "es__population": 4, "run__evaluate_every": 0}
    changes |= LOWRANK if lowrank else {}
    for ranks, size in ((1, 64), (2, 3)):
        own = changes | {"engine__batch_size": size}
        train(ranks, *arguments(tiny_model(), tmp_path / str(ranks), 2, **own))
    assert rewards_of(tmp_path / "1") == rewards_of(tmp_path / "2")


@pytest.mark.launch
@pytest.mark.timeout(900)
def test_any_ranks_kills_and_resumes_give_the_same_run(tiny_model, tmp_path):
    def given(folder: str, generations: int) -> list[str]:
        changes = {"task__environment": f"{FILE}:Echo", "task__name": "custom", **MADE_UP}
        changes |= {"engine__max_new_tokens": 4, "run__evaluate_every": 3, "run__keep_samples": 2}
        return arguments(tiny_model(), tmp_path / folder, generations, **changes)

    train(1, *given("one", 5))
    train(4, *given("four", 5))
    with Job(2, *given("killed", 10**6)) as job:
        job.wait_for("generation 3", 300)
        job.kill()
    assert 2 <= committed(tmp_path / "killed") < 100
    train(3, *given("killed", max(5, committed(tmp_path / "killed"))))
    for folder in ("four", "killed"):
        assert_same_run(tmp_path / "one", tmp_path / folder, 5 if folder == "four" else 2)
