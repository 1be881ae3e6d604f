"""mpirun -n N python -m mpies.probe: its table, picture and JSON, on any number of ranks; what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import launching
import numpy as np
import pytest

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


@pytest.fixture
def probed(tiny_model, tmp_path, monkeypatch, alone, capsys):
    """probed(*arguments, **settings): what the command shows and writes, on one rank, in this process."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, **changes: object) -> tuple[str, dict]:
        given = [*settings(tiny_model(), **changes), *SMALL, *arguments, "--json", "probe.json"]
        assert main(alone, given) == 0
        return capsys.readouterr().out, json.loads((tmp_path / "probe.json").read_text())

    return run


def test_what_it_shows_and_writes(probed, tmp_path):
    pytest.importorskip("matplotlib")
    out, found = probed("--output", "probe.svg")
    assert [rung["sigma"] for rung in found["ladder"]] == [0.1, 0.4]
    assert np.shape(found["ladder"][0]["rewards"]) == (6, 5) and len(found["base"]["rewards"]) == 5
    assert found["answers"] == 5 + 2 * 6 * 5 and f"It cost {found['answers']} answers" in out
    for rung in found["ladder"]:
        mean = np.mean(rung["rewards"])
        assert rung["reward"] == pytest.approx(mean)
        assert rung["reward_lost"]["mean"] == pytest.approx(found["base"]["reward"] - mean)
        pairs = np.array(rung["rewards"])
        assert rung["disagreement"]["mean"] == pytest.approx((pairs[::2] != pairs[1::2]).mean())
    assert found["prompts_per_generation"] == 100, "of the run, which has all of them"
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
def test_ranks_find_the_same(probed, tiny_model, tmp_path):
    _, alone = probed()
    given = [*settings(tiny_model()), *SMALL, "--json", "two.json"]
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
