"""examples/environments/: played to the end, by who can; what models may write is answered, too."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import random
import re
import runpy
import sys
from pathlib import Path

import h5py
import launching
import pytest
import tiny

from jobs import arguments, train
from mpies import config

FOLDER = launching.REPOSITORY / "examples" / "environments"
NONSENSE = ("", "no", "1" * 10_000, "99 99 99", "\x00", "55")


@pytest.fixture(autouse=True)
def found(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    yield
    for name in ("number", "sudoku", "calculator", "agent"):
        sys.modules.pop(name, None)


def test_a_number_is_found_by_halving():
    game = importlib.import_module("number").FindTheNumber()
    for seed in range(20):
        random.seed(seed)
        game.reset()
        for text in NONSENSE:
            _, reward, done = game.step(text)
            assert (reward, done) == (0.0, False)
        low, high, total, done = 1, 32, 0.0, False
        while not done:
            guess = (low + high) // 2
            said, reward, done = game.step(f"I say {guess}.")
            total += reward
            assert done or 0 < total < 0.5 + 1e-9
            low, high = (guess + 1, high) if "higher" in said else (low, guess - 1)
        assert total == pytest.approx(1) and game.metrics()["accuracy"] == 1
        assert game.metrics()["guesses"] <= len(NONSENSE) + 6
    with pytest.raises(ValueError, match="highest is 1: there is nothing to find"):
        game.reset(highest=1)


def test_a_sudoku_is_solved_cell_by_cell():
    sudoku = importlib.import_module("sudoku")
    for seed in range(20):
        random.seed(seed)
        game = sudoku.Sudoku()
        game.reset(empty=seed % 16 + 1)
        assert sudoku.solvable(game.cells)
        for text in NONSENSE:
            _, reward, done = game.step(text)
            assert (reward, done) == (0.0, False)
        total, done, wrong = 0.0, False, game.wrong
        while not done:
            place = game.cells.index(0)
            for digit in range(1, 5):
                _, reward, done = game.step(f"{place // 4 + 1} {place % 4 + 1} {digit}")
                total += reward
                if game.cells[place]:
                    break
        assert total == pytest.approx(1) and game.metrics()["accuracy"] == 1 and game.wrong >= wrong
    assert game.reset(board="1234341221430000").count("0 0 0 0") == 1
    longer = sudoku.LongSudoku()
    longer.reset()
    assert longer.cells.count(0) == 6


def test_a_calculator_computes_and_answers_are_right_or_not():
    calculator = importlib.import_module("calculator")
    assert [calculator.calculator(e) for e in ("(3 + 5) * 2", "1/3 - -1", "2")] == ["16", "4/3", "2"]
    for text in ("", "9**9", "__import__('os')", "1" * 101, "(" * 99, "a", "1.5", "True", "3 +"):
        with pytest.raises(ValueError):
            calculator.calculator(text)
    for answer, right in (
        ("So <answer>(1 + 2) * 3</answer>", 1.0),
        ("<answer>3 * (2 + 1)</answer>.", 1.0),
        ("<answer>9</answer>", 0.0),
        ("<answer>1 + 2 + 3</answer>", 0.0),
        ("<answer>1 / (2 - 2) + 3</answer>", 0.0),
        ("(1 + 2) * 3", 0.0),
        ("<answer>" * 1000, 0.0),
    ):
        said = [[{"role": "assistant", "content": answer}]]
        logged = {}
        assert calculator.right([[]], said, [9], [[1, 2, 3]], log_extra=logged.__setitem__) == [right]
        assert logged == {"accuracy": [right]}
        assert calculator.right([[]], said, [9], [[1, 2, 3]]) == [right]
    called = [{"role": "tool", "name": "calculator", "content": value} for value in ("8", "9")]
    assert calculator.reached([[]] * 3, [called, called[:1], []], [9, 9, 9]) == [1, 0, 0]


@pytest.mark.parametrize("tries, reward", [(1, 1.0), (2, 2 / 3), (3, 1 / 3), (4, 0)])
def test_an_agent_asks_until_the_answer_is_right(monkeypatch, tries, reward):
    agent = importlib.import_module("agent")
    row = json.loads((FOLDER / "problems.jsonl").read_text().splitlines()[0])
    wrong = ["no", "<answer>1 / 0</answer>", "<answer>21 + 1 + 4</answer>"]
    answers = [*wrong[: tries - 1], "<answer>4 * 21 - 1</answer>"]
    heard = []

    def ask(base_url, api_key, messages):
        heard.append(messages[-1]["content"])
        return answers[len(heard) - 1]

    monkeypatch.setattr(agent, "ask", ask)
    found = agent.run(row, "", "")
    assert (found["reward"], found["accuracy"]) == (pytest.approx(reward), float(reward > 0))
    assert "calculator" not in heard[0] and len(heard) == min(tries, 3)
    told = ["There is no <answer>", "That is no expression", "That is 26, or"]
    assert all(text.startswith(start) for text, start in zip(heard[1:], told))


def test_the_problems_are_those_that_the_program_writes():
    written = io.StringIO()
    with contextlib.redirect_stdout(written):
        runpy.run_path(str(FOLDER / "problems.py"), run_name="__main__")
    assert written.getvalue() == (FOLDER / "problems.jsonl").read_text()
    assert all(
        {"prompt", "target", "nums"} == set(json.loads(line)) for line in written.getvalue().splitlines()
    )


@pytest.mark.parametrize(
    "name", ["number", "sudoku", "calculator", "agent", "number-tiny", "sudoku-tiny", "calculator-tiny"]
)
def test_the_settings_can_be(name, monkeypatch):
    monkeypatch.chdir(launching.REPOSITORY)
    settings = config.load([str(FOLDER / f"{name}.yaml")])
    assert settings.task.in_environments and config.remark(settings) == []


CALLS = [
    f'<tool_call>\n{{"name": "calculator", "arguments": {{"expression": "1 + {n}"}}}}\n</tool_call>'
    for n in range(64)
]


@pytest.mark.long
@pytest.mark.launch
@pytest.mark.timeout(900)
def test_a_tool_and_its_reward_function_are_the_same_file_for_trl(tmp_path):
    """By a model that calls at random: TRL's own trainer, and ours."""
    utils = pytest.importorskip("trl.chat_template_utils")
    text = tiny.byte_tokenizer((Path(utils.__file__).parent / "chat_templates" / "qwen3.jinja").read_text())
    text.add_tokens(CALLS)
    model = tiny.save_model(tmp_path / "model", "qwen2", positions=8192, text=text)
    given = {"model_name_or_path": model, "output_dir": tmp_path / "trl", "use_cpu": "true", "bf16": "false"}
    given |= {"max_steps": 1, "logging_steps": 1, "num_generations": 4, "per_device_train_batch_size": 4}
    given |= {"max_completion_length": 256, "max_tool_calling_iterations": 1, "report_to": "none"}
    said = launching.output_of(
        sys.executable,
        FOLDER / "trl_grpo.py",
        *(str(part) for name, value in given.items() for part in (f"--{name}", value)),
        cwd=tmp_path,
        HF_HOME=str(tmp_path / "cache"),
    )
    (calls,) = re.findall(r"tools/call_frequency\W+([0-9.]+)", said)
    assert float(calls) > 1 and "rewards/right/mean" in said
    files = {
        "task__tools": FOLDER / "calculator.py:calculator",
        "task__reward": FOLDER / "calculator.py:right",
    }
    files["task__train_data"] = FOLDER / "problems.jsonl"
    sizes = {"task__train_size": 4, "task__eval_size": 2, "task__max_turns": 2, "engine__max_new_tokens": 12}
    train(1, *arguments(model, tmp_path / "ours", 1, run__evaluate_every=0, **(files | sizes)))
    with h5py.File(tmp_path / "ours" / "run.h5") as file:
        assert (file["member/calls"][0] > 4).all() and not file["member/failed"][0].any()
