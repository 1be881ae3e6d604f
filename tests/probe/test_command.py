"""mpirun -n N python -m mpies.probe: its table, picture and JSON, on any number of ranks; what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import launching
import numpy as np
import pytest

from mpies import train
from mpies.errors import InputError, RefusedError
from mpies.probe.command import main, parse

SMALL = ("--pairs", "3", "--prompts", "5", "--sigmas", "0.4,0.1")


def settings(model: Path, **changes: object) -> list[str]:
    values = {
        "model.path": model,
        "model.dtype": "float32",
        "model.device": "cpu",
        "task.name": "questions",
        "es.population": 8,
        "es.generations": 4,
        "es.perturbation": "lowrank",
        "es.block": 4,
        "engine.max_new_tokens": 12,
    }
    return [f"{key}={value}" for key, value in {**values, **changes}.items()]


REWARD = """
def score(prompts, completions, **columns):
    return [-(sum(i * ord(c) for i, c in enumerate(text, 1)) % 101) / 7 for text in completions]
"""


@pytest.fixture
def scored(tmp_path):
    """scored(prompts): settings for so many prompts; rewards differ between almost any two answers."""

    def write(prompts: int) -> dict[str, object]:
        (tmp_path / "score.py").write_text(REWARD)
        rows = [json.dumps({"prompt": f"{i} + {i} ="}) for i in range(prompts)]
        (tmp_path / "rows.jsonl").write_text("\n".join(rows))
        (tmp_path / "held_out.jsonl").write_text(rows[0])
        data = {"task.train_data": "rows.jsonl", "task.eval_data": "held_out.jsonl"}
        return {"task.name": "custom", "task.reward": "score.py:score", **data}

    return write


@pytest.fixture
def probed(tiny_model, tmp_path, monkeypatch, alone, capsys):
    """probed(*arguments, **settings): what the command shows and writes, on one rank, in this process."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, **changes: object) -> tuple[str, dict]:
        given = [*settings(tiny_model(), **changes), *SMALL, *arguments, "--json", "probe.json"]
        assert main(alone, given) == 0
        return capsys.readouterr().out, json.loads((tmp_path / "probe.json").read_text())

    return run


def test_what_it_shows_and_writes(probed, scored, tmp_path):
    pytest.importorskip("matplotlib")
    out, found = probed("--output", "probe.svg", **scored(20))
    assert [rung["sigma"] for rung in found["ladder"]] == [0.1, 0.4]
    assert np.shape(found["ladder"][0]["rewards"]) == (6, 5) and len(found["base"]["rewards"]) == 5
    steps = [step for rung in found["ladder"] for step in rung["steps"]]
    assert len(steps) == 10 and len(found["ground"]["rewards"]) == 15
    first, more = ([s for s in steps if len(s["rewards"]) == prompts] for prompts in (5, 15))
    assert len(first) == len(more) == 5, "the better half is tried on more prompts"
    assert "tried on 5 other prompts, and the 5 best on 15, where" in out
    early = {step["alpha"]: np.subtract(step["rewards"], found["ground"]["rewards"][:5]) for step in first}
    late = [np.subtract(step["rewards"], found["ground"]["rewards"])[:5].mean() for step in more]
    assert max(gains.mean() for gains in early.values()) <= min(late)
    assert found["answers"] == 5 + 2 * 6 * 5 + 5 * 5 + 5 * 15 + 15
    assert f"It cost {found['answers']} answers" in out
    for rung in found["ladder"]:
        mean = np.mean(rung["rewards"])
        assert rung["reward"] == pytest.approx(mean)
        assert rung["reward_lost"]["mean"] == pytest.approx(found["base"]["reward"] - mean)
        pairs = np.array(rung["rewards"])
        assert rung["disagreement"]["mean"] == pytest.approx((pairs[::2] != pairs[1::2]).mean())
    assert found["prompts_per_generation"] == 20, "of the run, which has all of them"
    chosen = found["recommended"]
    assert f"recommended: es.sigma={chosen['sigma']:g} es.alpha={chosen['alpha']:g}: " in out
    assert (tmp_path / "probe.svg").read_text().startswith("<?xml")


def test_noise_is_the_same_at_every_sigma_and_0_is_the_model_itself(probed):
    """At a sigma that moves no weight, all answers are the unperturbed model's."""
    _, found = probed("--sigmas", "1e-30")
    (rung,) = found["ladder"]
    assert rung["rewards"] == [found["base"]["rewards"]] * 6
    assert (rung["identical_pairs"], rung["disagreement"]["mean"], rung["reward_lost"]["mean"]) == (1, 0, 0)
    assert found["recommended"]["by_answers"] and rung["signal_to_noise"]["mean"] is None


@pytest.mark.parametrize(
    "changes",
    [
        {"es.fitness": "centered_rank"},
        {"es.perturbation": "full", "es.block": 1},
        {"model.dtype": "bfloat16", "model.master": "live"},
    ],
)
def test_a_step_is_a_generation_of_training(changes, probed, scored, tiny_model, tmp_path, alone):
    """The same members' update, to the last bit: what it gains is what the trained model gains."""
    own = {**scored(2), **changes}
    out, found = probed("--sigmas", "0.1", **own)
    assert found["ground_is_of_members_prompts"] and "tried on the same 2 prompts" in out
    assert "tried on the members' own prompts," in found["recommended"]["reason"]
    assert found["ground"]["rewards"] == found["base"]["rewards"], "nothing has moved there"
    (rung,) = found["ladder"]
    for step in (rung["steps"][0], rung["steps"][-1]):
        run = {"es.sigma": 0.1, "es.alpha": step["alpha"], "es.population": 6, "es.generations": 1}
        run |= {"es.antithetic": True, "run.directory": f"run-{step['length']:g}"}
        assert train.main(alone, settings(tiny_model(), **own, **run)) == 0
        with h5py.File(tmp_path / f"{run['run.directory']}/run.h5") as file:
            rows = file["prompt"]
            last = (rows["generation"][:] == 1) & (rows["split"].asstr()[:] == "train")
            assert rows["reward"][last].tolist() == step["rewards"] != found["ground"]["rewards"]


def test_both_tables_mark_what_is_recommended(probed, scored):
    out, found = probed(**scored(20))
    chosen = found["recommended"]
    sigma = f"{chosen['sigma']:g}"
    (step,) = (line for line in out.splitlines() if "->" in line)
    (members,) = (line for line in out.splitlines() if line.rstrip().endswith("<-"))
    assert step.split()[0] == members.split()[0] == sigma and chosen["length"] in (0.25, 0.5, 1, 2, 4)


def test_steps_know_of_right_answers(probed):
    """Of a task that measures them."""
    _, found = probed("--sigmas", "0.03", **{"task.name": "conciseness"})
    (rung,) = found["ladder"]
    known = {step["accuracy"] for step in rung["steps"]}
    assert known and known <= {0.0, 0.5, 1.0}


def test_a_prompt_that_cannot_be_scored_takes_no_step_away(probed, scored, tmp_path):
    """Training leaves out whom it cannot score; here that may be every member."""
    own = scored(20)
    first_unscored = REWARD.replace("return [", "made = [") + "    return [None, *made[1:]]\n"
    (tmp_path / "score.py").write_text(first_unscored)
    _, found = probed("--sigmas", "0.1", **own)
    (rung,) = found["ladder"]
    assert found["base"]["rewards"][0] is None and {rewards[0] for rewards in rung["rewards"]} == {None}
    assert all(step["gain"]["mean"] for step in rung["steps"]), "something moves"


def test_a_ladder_around_the_settings_sigma(probed):
    _, found = probed("--sigmas", "", **{"es.sigma": 0.2})
    assert [rung["sigma"] for rung in found["ladder"]] == [0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6]


def test_all_rewards_are_zero(probed, tmp_path):
    (tmp_path / "nothing.py").write_text("def zero(prompts, **columns):\n    return [0.0] * len(prompts)\n")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "3 + 5 ="}\n{"prompt": "Can penguins fly?"}\n')
    own = {"task.name": "custom", "task.reward": "nothing.py:zero", "task.train_data": "rows.jsonl"}
    out, found = probed("--sigmas", "0.1,1e-30", **own)
    assert found["recommended"]["by_answers"] and found["recommended"]["sigma"] == 0.1
    assert len(found["base"]["rewards"]) == 2, "there are no more prompts"
    assert "no two rewards of a pair differ" in out


@pytest.mark.launch
@pytest.mark.timeout(600)
def test_ranks_find_the_same(probed, scored, tiny_model, tmp_path):
    own = scored(20)
    _, alone = probed(**own)
    given = [*settings(tiny_model(), **own), *SMALL, "--json", "two.json"]
    ended = launching.mpirun(2, "-m", "mpies.probe", *given, cwd=tmp_path, timeout=300)
    assert (ended.returncode, ended.stderr) == (0, ""), ended.stderr
    assert json.loads((tmp_path / "two.json").read_text()) == alone


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--pairs", "1"], "--pairs: given 1, allowed is 2 to"),
        (["--pairs", "many"], "--pairs"),
        (["--prompts", "1"], "--prompts: given 1, allowed is 2 or more"),
        (["--sigmas", "0.1,0"], "--sigmas: given 0.1,0, allowed are up to 64 numbers above 0"),
        (["--sigmas", "nan"], "--sigmas: given nan"),
        (["--sigmas", "a,b"], "--sigmas: given a,b"),
        (
            ["--output", "probe.txt"],
            "--output: given probe.txt, allowed is a name that ends in .png, .svg, .pdf",
        ),
        (["--nothing"], "--nothing: there is no such option; --help shows what there is"),
    ],
)
def test_a_command_line_that_cannot_be(arguments, told):
    with pytest.raises(InputError) as caught:
        parse(arguments)
    assert told in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["es.sigma=0"], "es.sigma: given 0"),
        (["--json", "nowhere/probe.json"], "--json: cannot write nowhere/probe.json"),
        (["es.sigmas=1"], "es.sigmas"),
    ],
)
def test_bad_input_is_refused_before_the_model_is_loaded(
    arguments, told, tiny_model, alone, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((InputError, RefusedError)) as caught:
        main(alone, [*settings(tiny_model()), *arguments])
    assert told in str(caught.value) and "\n" not in str(caught.value)
