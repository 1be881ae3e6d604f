"""What rank 0 shows, as text; other ranks show nothing."""

from __future__ import annotations

import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import h5py
import made_up
import pytest
import torch

import mpies
from mpies import config
from mpies.config import Settings
from mpies.phases import PHASES
from mpies.ranks.devices import Place
from mpies.replica import Facts, Setup
from mpies.run.screen import Screen
from mpies.tasks.base import Task

FACTS = Facts("some/model", "model", 134_515_008, 0xABC, "bfloat16", "as set", "float32")
TASK = Task("custom", [{"prompt": "a"}] * 7, [{"prompt": "b"}] * 3, None)
REWARDS = {"/home/me/rewards.py:right": "0123456789abcdef" * 4}
ROW = {"reward_mean": -12.3456, "reward_std": 3.219, "reward_max": -7.1234, "seconds": 4.0, "tokens": 1000}


def settings_of(*given: str) -> Settings:
    chosen = [
        "es.sigma=0.25",
        "es.alpha=0.5",
        "es.population=6",
        "es.antithetic=false",
        "es.perturbation=full",
    ]
    return config.load(["run.directory=runs/x", *chosen, *given])


@pytest.fixture
def shown(capsys):
    """shown(): what was shown since the last call."""
    return lambda: capsys.readouterr().out


def banner(*given: str, places: list[Place] | None = None) -> None:
    places = places or [Place("n1", "cpu", None, 1)]
    Screen(False, "lines").banner(settings_of(*given), FACTS, setup_of(*places), Path("runs/x/run.h5"))


def setup_of(*places: Place) -> Setup:
    return Setup(TASK, torch.device("cpu"), torch.float32, "as set", {}, REWARDS, places)


def table(text: str) -> dict[str, str]:
    """What the banner says of each thing."""
    first, *lines = text.splitlines()
    assert first == f"mpies {mpies.__version__}"
    return dict(re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in lines)


def test_the_banner_says_what_runs_where(shown):
    banner("es.seed=3", "run.threads=2")
    assert table(shown()) == {
        "model": "model, 134.5 M parameters, digest 0000000000000abc",
        "weights": "base float32, live bfloat16 (as set)",
        "task": "custom: 7 training, 3 held-out prompts",
        "reward": "/home/me/rewards.py:right (SHA-256 0123456789abcdef)",
        "population": "6 members, sigma 0.25, alpha 0.5, seed 3",
        "perturbation": "full, one member at a time",
        "ranks": "1 on n1 (cpu), 2 CPU thread(s) each",
        "run file": "runs/x/run.h5",
    }


def test_the_banner_of_pairs_and_low_rank(shown):
    banner("es.antithetic=true", "es.perturbation=lowrank", "es.rank=2", "es.block=5")
    said = table(shown())
    assert said["population"].startswith("6 members in 3 antithetic pairs, sigma ")
    assert said["perturbation"] == "low rank 2, 5 members in a batch"


@pytest.mark.parametrize(
    "places, says",
    [
        ([("n1", "cuda:0"), ("n1", "cuda:1"), ("n2", "cuda:0")], "3 on n1 (cuda:0, cuda:1), n2 (cuda:0)"),
        ([("n1", "cpu")] * 3 + [("n2", "cpu")], "4 on n1 (3 x cpu), n2 (cpu)"),
        (
            [(f"n{i}", "cpu") for i in range(6)],
            "6 on n0 (cpu), n1 (cpu), n2 (cpu), n3 (cpu) and 2 more hosts",
        ),
    ],
)
def test_hosts_are_shown_with_their_devices(shown, places, says):
    banner(places=[Place(host, device, None, 1) for host, device in places])
    assert table(shown())["ranks"].startswith(f"{says}, ")


def test_what_is_to_be_known_of_gpus_and_engine(shown):
    banner()
    assert not {"note", "engine"} & set(table(shown()))
    places = [Place("n1", f"cuda:{i}", str(i), 1, model) for i, model in enumerate(["NVIDIA H100", "H200"])]
    facts = replace(FACTS, engine="vllm, 7 of engine.batch_size=32 answers at a time: memory is short")
    Screen(False, "lines").banner(settings_of(), facts, setup_of(*places), Path("run.h5"))
    said = table(shown())
    assert said["note"].startswith("the ranks' GPUs differ (1 rank(s), the first 0: NVIDIA H100; ")
    assert said["engine"] == facts.engine


def test_text_is_no_markup(shown):
    Screen(False, "lines").say("[bold]loading[/bold] /models/[x] ...")
    assert shown() == "[bold]loading[/bold] /models/[x] ...\n"


def test_a_line_per_generation(shown):
    screen = Screen(False, "lines")
    with screen.progress(2, 32):
        screen.generation(ROW)
        screen.generation({**ROW, "reward_mean": 0.5, "seconds": 0.5})
    assert shown().splitlines() == [
        "generation 3/32  reward -12.35 +- 3.22  best -7.123  4.0 s  250 tokens/s  29 left",
        "generation 4/32  reward 0.5 +- 3.22  best -7.123  0.5 s  2000 tokens/s  28 left, 14 s",
    ]


def test_the_time_left_is_that_of_generations_after_the_first(shown):
    """The first one compiles and warms up: it once promised 46 minutes of a run of 3."""
    screen = Screen(False, "lines")
    with screen.progress(0, 12):
        for seconds in (100.0, 2.0, 2.0, 8.0):
            screen.generation({**ROW, "seconds": seconds})
    assert [line.split(" left")[1] for line in shown().splitlines()] == ["", ", 20 s", ", 18 s", ", 16 s"]


def test_a_long_path_is_whole_in_the_banner(shown):
    path = Path("/".join(["some-folder"] * 20), "run.h5")
    Screen(False, "lines").banner(settings_of(), FACTS, setup_of(Place("n1", "cpu", None, 1)), path)
    assert f"  run file      {path}\n" in shown()


def test_a_bar_instead_of_lines(shown):
    screen = Screen(False, "bar")
    with screen.progress(2, 4):
        screen.generation(ROW)
        screen.generation(ROW)
    text = shown()
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert "generation 4/4" in plain and "reward -12.35" in plain and "tokens/s" not in plain
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1


def test_a_failure_shows_the_cursor_again(shown):
    screen = Screen(False, "bar")
    with pytest.raises(KeyError), screen.progress(0, 4):
        raise KeyError
    assert shown().count("\x1b[?25h") == 1


def test_other_ranks_show_nothing(shown, finished):
    for progress in ("auto", "bar", "lines"):
        show_all(Screen(True, progress), finished)
        assert shown() == ""


def show_all(screen: Screen, path: Path) -> None:
    screen.say("hello")
    screen.banner(settings_of(), FACTS, setup_of(Place("n1", "cpu", None, 1)), path)
    with screen.progress(0, 4):
        screen.generation(ROW)
    screen.result(path)
    screen.next_steps(path, settings_of(), 2)


# The end


@pytest.fixture
def finished(tmp_path) -> Path:
    """A run file whose evaluations can be changed."""
    return made_up.write_run(tmp_path, generations=4, evaluate_every=2)


def change(path: Path, dataset: str, where, value) -> None:
    with h5py.File(path, "r+") as file:
        file[dataset][where] = value


def result(path: Path, shown) -> list[str]:
    Screen(False, "lines").result(path)
    return [line.rstrip() for line in shown().splitlines()]


def test_rewards_before_and_after_are_the_first_and_the_last_evaluations(finished, shown):
    with h5py.File(finished, "r") as file:
        rewards = dict(
            zip(["train", "held-out"], file["evaluation/reward_mean"][:].reshape(3, 2).T, strict=True)
        )
    change(finished, "evaluation/answer_tokens", slice(-2, None), [40.0, 3.25])
    lines = result(finished, shown)
    for split, tokens in (("train", "12.5, 40"), ("held-out", "12.5, 3.25")):
        before, after = rewards[split][0], rewards[split][-1]
        expected = f"mean reward, {split} prompts: {before:.4g} before, {after:.4g} after"
        assert f"{expected}; tokens an answer: {tokens}" in lines


def test_right_answers_are_told_where_all_are_known(finished, shown):
    change(finished, "evaluation/accuracy", slice(None), [0.5, 1 / 3, 0, 0, 0.25, 1])
    lines = "\n".join(result(finished, shown))
    assert "after; right answers: 50 %, 25 %; tokens" in lines
    assert "after; right answers: 33.3 %, 100 %; tokens" in lines
    change(finished, "evaluation/accuracy", 0, float("nan"))
    lines = "\n".join(result(finished, shown))
    assert "50 %" not in lines and "33.3 %" in lines


def test_answers_before_and_after(finished, shown):
    lines = [re.split(r"\s*[│┃]\s*", line)[1:-1] for line in result(finished, shown) if line[:1] in "│┃"]
    assert [line for line in lines if line] == [
        ["held-out prompt", "before", "after"],
        ["prompt 0", "answer 0.0", "answer 4.0"],
        ["prompt 1", "answer 0.1", "answer 4.1"],
        ["prompt 2", "answer 0.2", "answer 4.2"],
    ]
    change(finished, "sample/split", slice(None), "train")
    assert not any("│" in line for line in result(finished, shown))


def test_an_answer_cannot_take_over_the_terminal(finished, shown):
    change(finished, "sample/completion", 0, "\x1b[31mred[/] [bold]\r\nsecond line \x07 " + 300 * "x")
    Screen(False, "lines").result(finished)
    text = shown()
    assert "\x1b" not in text and "\x07" not in text and "\r" not in text
    assert "[31mred[/] [bold]" in text and 200 * "x" not in text.replace("\n", "")


def test_time_is_told_by_phases_the_longest_first(finished, shown):
    for i, phase in enumerate(PHASES):
        change(finished, f"generation/seconds_{phase}", slice(None), float(i))
    change(finished, "generation/seconds_log", 3, float("nan"))  # of the last one, it is known later
    (line,) = [line for line in result(finished, shown) if line.startswith("time: ")]
    total = 4 * sum(range(len(PHASES))) - PHASES.index("log")
    spent = {phase: 4 * i for i, phase in enumerate(PHASES)}
    spent["log"] -= PHASES.index("log")
    shares = sorted(spent.items(), key=lambda item: -item[1])
    assert line == "time: " + ", ".join(f"{phase} {100 * s / total:.1f} %" for phase, s in shares)


def test_time_of_committed_generations_only(finished, shown):
    with h5py.File(finished, "r+") as file:
        file.attrs.modify("generations_committed", 0)
    assert not any(line.startswith("time: ") for line in result(finished, shown))


def test_next_steps_can_be_typed(shown, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["train", "my config.yaml", "es.generations=16", "es.sigma=0.1"])
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    monkeypatch.chdir(tmp_path)
    screen = Screen(False, "lines")
    screen.next_steps(Path("out/run.h5"), settings_of("es.generations=16"), 3)
    lines = [line.split("    #")[0].strip() for line in shown().splitlines()]
    assert "tuned model: out/model (a Hugging Face folder)" in lines
    again = "-m mpies.train 'my config.yaml' es.sigma=0.1 es.generations=32"
    assert f"mpirun -n 3 bin/python {again}" in lines
    assert "bin/python -m mpies.replay out/run.h5 --generation 8 --output gen8" in lines
    assert "bin/python -m mpies.analyze summary out/run.h5" in lines

    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "mpirun").touch()
    monkeypatch.chdir(tmp_path / "bin")
    screen.next_steps(Path("out/run.h5"), settings_of("es.generations=0"), 1)
    text = shown()
    assert "  mpirun -n 1 python -m mpies.train" in text and "es.generations=10 " in text
    assert "mpies.replay" not in text, "which refuses generation 1 where none was made"
    monkeypatch.chdir(Path(__file__).parent)
    screen.next_steps(Path("out/run.h5"), settings_of("es.generations=0"), 1)
    assert f"{tmp_path}/bin/mpirun -n 1 {tmp_path}/bin/python" in shown()


def test_next_steps_with_blanks_in_their_paths(shown, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["train", "run.directory=my runs/a"])
    monkeypatch.setattr(sys, "executable", str(tmp_path / "my env" / "python"))
    monkeypatch.chdir(tmp_path)
    Screen(False, "lines").next_steps(Path("my runs/a/run.h5"), settings_of(), 1)
    commands = [line.split("    #")[0] for line in shown().splitlines() if line.startswith("  ")]
    words = [shlex.split(command) for command in commands]
    assert all("my env/python" in command for command in words)
    assert [command for command in words if "my runs/a/run.h5" in command] == words[1:3]


@pytest.mark.parametrize(
    "given, told",
    [
        ([], "# go on from here"),
        (["es.alpha_schedule=cosine"], "# go on from here, with alpha of the longer schedule"),
        (
            ["es.alpha_schedule=linear", "es.sigma_schedule=cosine"],
            "# go on from here, with sigma and alpha of the longer schedule",
        ),
    ],
)
def test_a_longer_run_has_another_schedule(shown, monkeypatch, given, told):
    Screen(False, "lines").next_steps(Path("out/run.h5"), settings_of(*given), 1)
    (line,) = [line for line in shown().splitlines() if "go on from here" in line]
    assert line.endswith(told)


@pytest.mark.parametrize("given, added", [("never", ["run.resume=auto"]), ("must", []), ("auto", [])])
def test_the_next_run_goes_on_with_this_one(shown, monkeypatch, given, added):
    monkeypatch.setattr(sys, "argv", ["train", f"run.resume={given}"])
    Screen(False, "lines").next_steps(Path("out/run.h5"), settings_of(f"run.resume={given}"), 1)
    (line,) = [line for line in shown().splitlines() if "mpies.train" in line and "-n 1" in line]
    assert line.split("    #")[0].split("mpies.train ")[1].split()[:-1] == added
