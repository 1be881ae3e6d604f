"""examples/environments/: tiny starts are trained on what players did, in just the words that mpies uses."""

from __future__ import annotations

import importlib
import json
import sys
from random import Random

import h5py
import launching
import pytest

from mpies import config, train
from mpies.engines.tools import Tools
from mpies.tasks import making
from mpies.tasks.episodes import Episode, Start, Turn

FOLDER = launching.REPOSITORY / "examples" / "environments"
GAMES = "number", "sudoku", "calculator"


@pytest.fixture(autouse=True)
def found(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.chdir(launching.REPOSITORY)
    yield
    for name in ("start", "players", "problems", *GAMES):
        sys.modules.pop(name, None)


def replayed(task, row: dict, seed: int, answers: list[str], text=None) -> Episode:
    """The episode in which a model gives these answers."""
    episode = Episode(Start(row, seed))
    with task.environments.open([episode], text) as stage:
        replies = stage.begin()
        for answer in [*answers, None]:
            episode.take(replies[0])
            if answer is not None:
                episode.turns.append(turn := Turn(episode.conversation, answer, []))
                replies = stage.step({0: turn})
        stage.finish()
    return episode


@pytest.mark.parametrize("game, name, row", [("number", "find", {}), ("sudoku", "fill", {"empty": 6})])
def test_players_of_text_games_are_told_what_a_model_is_told(game, name, row):
    players = importlib.import_module("players")
    task = making.make(config.load([str(FOLDER / f"{game}-tiny.yaml")]).task)
    made = {"number": players.FindTheNumber, "sudoku": players.Sudoku}[game]
    won = 0
    for number in range(12):
        turns = list(players.played(made(), getattr(players, name), 9, Random(number), **row))
        played = replayed(task, row, Random(number).getrandbits(32), [answer for _, answer in turns])
        assert [said for said, _ in turns] == [turn.prompt for turn in played.turns]
        won += played.metrics["accuracy"]
        assert 0 <= played.reward <= 1.000001
    assert 0 < won < 12  # neither good nor hopeless


def test_a_player_with_a_calculator_is_told_what_a_model_is_told(tmp_path):
    start, players = importlib.import_module("start"), importlib.import_module("players")
    data = tmp_path / "problems.jsonl"
    data.write_text("".join(json.dumps(players.small_problem(Random(n))) + "\n" for n in range(2)))
    given = [str(FOLDER / "calculator-tiny.yaml"), f"task.train_data={data}", "task.train_size=2"]
    task = making.make(config.load([*given, "task.eval_size=0", "task.prompts_per_generation=2"]).task)
    text = start.trained("calculator", 1)
    encoder = type("Encoder", (), {"tools": Tools(text)})
    calls = answers = 0
    for number in range(12):
        draw = Random(number)
        problem = players.small_problem(draw)
        turns = [start.written(text, *turn) for turn in players.compute(problem, draw)]
        played = replayed(task, problem, 0, [answer for _, answer in turns], encoder)
        assert [said for said, _ in turns] == [encoder.tools.written(turn.prompt) for turn in played.turns]
        assert played.ended == "done" and not any(reply.bad_calls for reply in played.replies)
        calls += len(turns) - 1
        answers += played.text.startswith("<answer>")
    assert calls and answers == 12


@pytest.mark.parametrize("game", GAMES)
def test_what_is_learned_from_has_the_tokens_that_a_model_reads(game):
    start = importlib.import_module("start")
    text = start.trained(game, 1)
    source = start.episodes(game, 2, text)
    for _ in range(5):
        turns = next(source)
        tokens, next_ones = start.encoded(text, turns)
        assert tokens == text("".join(turns[-1]), add_special_tokens=False).input_ids
        learned = text.decode([token for token in next_ones if token >= 0])
        assert learned == "".join(answer + start.END for _, answer in turns)
        places = [i for i, token in enumerate(next_ones) if token not in (-100, text.eos_token_id)]
        assert all(tokens[i + 1] == next_ones[i] for i in places)


@pytest.mark.parametrize("game", GAMES)
def test_a_start_is_a_model_that_plays(game, alone, tmp_path, monkeypatch):
    start, players = importlib.import_module("start"), importlib.import_module("players")
    folder, data = tmp_path / "start", tmp_path / "problems.jsonl"
    monkeypatch.setattr(sys, "argv", ["start.py", game, str(folder), "--steps", "2"])
    start.main()
    given = [str(FOLDER / f"{game}-tiny.yaml"), f"model.path={folder}", f"run.directory={tmp_path / 'run'}"]
    given += ["es.population=4", "es.generations=1", "task.train_size=4", "task.eval_size=2"]
    given += ["task.prompts_per_generation=2", "task.max_turns=2", "run.progress=lines"]
    if game == "calculator":
        data.write_text("".join(json.dumps(players.small_problem(Random(n))) + "\n" for n in range(6)))
        given.append(f"task.train_data={data}")
    assert train.main(alone, given) == 0
    with h5py.File(tmp_path / "run" / "run.h5") as file:
        assert (file["member/turns"][0] >= 2).all() and not file["member/failed"][0].any()
