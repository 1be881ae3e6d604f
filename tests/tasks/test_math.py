"""Mathematics: final answers in GSM8K's and MATH's formats, and answers that would stop the checker."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time

import launching
import psutil
import pytest

from mpies import config
from mpies.errors import InputError
from mpies.tasks import making
from mpies.tasks.math import PLAIN, SAMPLE, reward
from mpies.tasks.math_worker import final_answer, is_answer, right

pytest.importorskip("math_verify")


def scores(completions: list[str], gold: str) -> list[float | None]:
    return reward([""] * len(completions), completions, answer=[gold] * len(completions))


def workers() -> list[psutil.Process]:
    """This process's checkers."""
    children = psutil.Process().children()
    return [child for child in children if any("math_worker" in word for word in child.cmdline())]


@pytest.mark.parametrize(
    "gold, right, wrong",
    [
        (
            "36",
            ["\\boxed{36}", "#### 36", "It is $36$.", "36", "#### 36.00", "#### 36 euros"],
            ["\\boxed{63}"],
        ),
        ("1,080", ["#### 1080", "\\boxed{1,080}", "\\boxed{1080}"], ["#### 1", "#### 80"]),
        ("19.80", ["#### 19.8", "\\boxed{\\frac{99}{5}}"], ["#### 19.9"]),
        (
            "\\frac{1}{2}",
            ["\\boxed{\\frac{1}{2}}", "\\boxed{0.5}", "$\\frac{2}{4}$"],
            ["\\boxed{\\frac{1}{3}}"],
        ),
        ("6\\sqrt{2}", ["\\boxed{6\\sqrt{2}}", "\\boxed{\\sqrt{72}}"], ["\\boxed{6}"]),
        ("x^2 - 3x - 10", ["\\boxed{(x+2)(x-5)}"], ["\\boxed{x^2 - 3x}"]),
        ("(2, 3)", ["\\boxed{(2,3)}"], ["\\boxed{(3,2)}", "\\boxed{2}"]),
        ("5", ["not \\boxed{4} but \\boxed{5}"], ["", " ", "no idea", "\\boxed{}", "####", "\\boxed{5"]),
    ],
)
def test_answers(gold, right, wrong):
    assert scores(right, gold) == [1] * len(right)
    assert scores(wrong, gold) == [0] * len(wrong)


GROUPED = ("1,080", "1{,}080", "1\\,080", "1\\!080", "1,\\!080", "1\\;080", "1\\ 080", "1~080", "1 080")


@pytest.mark.parametrize("notation", [*GROUPED, "1\\, 080", "1\\thinspace 080", "1\u202f080", "1\u2009080"])
def test_thousands_are_grouped_in_many_ways(notation):
    """`1\\,080` was read as 1 + 80."""
    written = [f"\\boxed{{{notation}}}", f"#### {notation}", f"So the answer is {notation}."]
    assert scores(written, "1080") == [1] * len(written)
    assert scores(written, "81") == scores(written, "80") == [0] * len(written)
    assert scores(["\\boxed{1080}", "1080", "\\boxed{81}", "80"], notation) == [1, 1, 0, 0]


@pytest.mark.parametrize(
    "answer, gold",
    [
        ("2\\,x", "2x"),
        ("(1,\\,200)", "(1, 200)"),
        ("\\{1,\\,200\\}", "\\{1, 200\\}"),
        ("12\\,345\\,678", "12345678"),
        ("-1\\,234.5", "-1234.5"),
        ("3.141\\,592\\,65", "3.14159265"),
        ("0.000\\,1", "0.0001"),
        ("3\\,100/300", "\\frac{103}{300}"),  # as math-verify reads `3 100/300`
        ("\\frac{1\\,000}{3}", "\\frac{1000}{3}"),
    ],
)
def test_numbers_in_groups_and_other_blanks(answer, gold):
    assert scores([f"\\boxed{{{answer}}}"], gold) == scores([f"\\boxed{{{gold}}}"], answer) == [1]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("so 3 * 4 = 12\n#### 12", "12"),
        ("#### 1 #### 2 ", "2"),
        ("so $\\boxed{\\frac{1}{2}}$.", "\\frac{1}{2}"),
        ("\\boxed{1} or \\boxed{{2}}", "{2}"),
        ("\\boxed{1", None),
        ("twelve", None),
    ],
)
def test_final_answer(text, expected):
    assert final_answer(text) == expected


# Data


def test_the_sample_is_right_by_its_own_solutions():
    task = making.make(config.TaskSettings(name="math"))
    assert (len(task.train), len(task.held_out)) == (20, 8)
    rows = task.train + task.held_out
    assert len({row["prompt"] for row in rows}) == len(rows)
    assert all("\\boxed{}" in row["prompt"] for row in rows)
    worked = [json.loads(line) for line in SAMPLE.read_text().splitlines()]
    solutions = [row.get("answer", row.get("solution")) for row in worked]
    made = task.judge(rows, solutions)
    assert made.rewards.tolist() == [1] * len(rows) == made.metrics["accuracy"].tolist()
    assert 0 < made.metrics["boxed"].mean() < 1
    # The neighbour's solution is wrong.
    assert task.score(rows, solutions[1:] + solutions[:1]).sum() <= 1


ROWS = {
    "GSM8K": ({"question": "3 * 4?", "answer": "3 * 4 = 12\n#### 12"}, "12"),
    "MATH": ({"problem": "3 * 4?", "solution": "It is $\\boxed{12}$.", "level": "Level 3"}, "12"),
    "MATH-500": ({"problem": "3 * 4?", "solution": "\\boxed{12}", "answer": "12"}, "12"),
    "own": ({"prompt": "3 * 4?", "answer": 12}, "12"),
    "alternatives": ({"problem": "3 * 4?", "answer": ["12", "#### 12.0", 12]}, ["12", "12.0", "12"]),
    "chat": ({"prompt": [{"role": "user", "content": "3 * 4?"}], "answer": "\\frac{1}{2}"}, "\\frac{1}{2}"),
}


@pytest.mark.parametrize("kind", ROWS)
def test_rows(tmp_path, kind):
    given, gold = ROWS[kind]
    (tmp_path / "data.jsonl").write_text(json.dumps(given))
    (row,) = making.make(config.TaskSettings(name="math", train_data=str(tmp_path / "data.jsonl"))).train
    assert row["answer"] == gold
    if kind in ("own", "chat"):
        assert row["prompt"] == given["prompt"]
    else:
        assert row["prompt"].startswith("3 * 4?") and "\\boxed{}" in row["prompt"]


@pytest.mark.parametrize(
    "row, words",
    [
        ({"question": "3 * 4?"}, "no final answer; needed is a column `answer`"),
        ({"problem": "3 * 4?", "solution": "twelve"}, "no final answer"),
        ({"problem": "3 * 4?", "solution": "\\boxed{}"}, "no final answer"),
        ({"answer": "12"}, "no column 'prompt', only answer"),
        (
            {"question": "?", "answer": "#### }{"},
            "answer: '}{' cannot be compared, not even with itself; write it as LaTeX",
        ),
        ({"question": "?", "answer": ["12", "}{"]}, "answer: '}{' cannot be compared"),
        ({"question": "?", "answer": []}, "answer: given [], needed is at least one of the right answers"),
        ({"question": "?", "answer": ["12", " "]}, "answer: given ['12', ' '], of which one is empty"),
        ({"question": "?", "answer": ["12", None]}, "answer: given None, needed is text or a number"),
        ({"question": "?", "answer": [["12"]]}, "answer: given ['12'], needed is text or a number"),
        (
            {"question": "?", "answer": {"value": 12}},
            "answer: given {'value': 12}, needed is text or a number",
        ),
        ({"problem": "?", "solution": ["\\boxed{12}"]}, "no final answer"),
    ],
)
def test_rows_that_are_wrong(tmp_path, row, words):
    lines = [json.dumps(ROWS["GSM8K"][0]), "", json.dumps(row)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    with pytest.raises(InputError) as error:
        making.make(config.TaskSettings(name="math", train_data=str(tmp_path / "data.jsonl")))
    (line,) = str(error.value).splitlines()
    assert "data.jsonl: line 3: " in line and words in line


def test_any_of_several_golds_is_right(tmp_path):
    """A list became its own text in Python, which no answer equals."""
    row = {"problem": "Solve x^2 = 4 for one x.", "answer": ["2", "$-2$"]}
    (tmp_path / "data.jsonl").write_text(json.dumps(row))
    task = making.make(config.TaskSettings(name="math", train_data=str(tmp_path / "data.jsonl")))
    for text, expected in {"\\boxed{2}": 1, "\\boxed{-2}": 1, "\\boxed{3}": 0, "\\boxed{2, -2}": 0}.items():
        assert task.score(task.train, [text]).tolist() == [expected], text


def test_golds_are_looked_at_by_several_checkers_and_the_first_bad_row_is_named(tmp_path):
    golds = [f"{i}\\pi" for i in range(450)]
    rows = [{"problem": "?", "answer": [gold, "7"]} for gold in golds]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = config.TaskSettings(name="math", train_data=str(tmp_path / "data.jsonl"))
    before = workers()
    assert [row["answer"] for row in making.make(settings).train] == [[gold, "7"] for gold in golds]
    assert set(before) <= set(workers()) and len(workers()) == 1
    for bad in (300, 302):
        rows[bad]["answer"][1] = "}{"
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(InputError, match=r"data.jsonl: line 301: answer: '}{' cannot be compared"):
        making.make(settings)


def test_golds_that_are_not_looked_at_can_be_compared():
    golds = ["0", "-3", "007", "3.50", "-0.5", "9" * 15, "\\frac{1}{2}", "-\\frac{12}{7}", "\\frac{1}{0}"]
    assert all(PLAIN.fullmatch(gold) and is_answer(gold) for gold in golds)
    assert not any(PLAIN.fullmatch(gold) for gold in ["", "-", "9" * 16, "1\n", "１", "1.", "1,000"])


@pytest.mark.parametrize(
    "gold", ["204", "\\frac{1}{2}", "(2, 3)", "\\{1,2\\}", "x^2", "\\text{Evelyn}", "1,080"]
)
@pytest.mark.parametrize(
    "end", [".", ",", ";", ":", " .", ". ", "\\,", "\\ ", "~", "\\\\", ".\\,", "\\;.", "\\quad", "\n.\n"]
)
def test_what_ends_a_sentence_is_no_part_of_the_answer(gold, end):
    assert right(gold, f"so \\boxed{{{gold}{end}}}")
    assert right(gold + end, f"so \\boxed{{{gold}}}")


@pytest.mark.parametrize(
    "text, gold, expected",
    [
        ("$204.$", "204", True),
        ("\\text{Evelyn.}", "\\text{Evelyn}", True),
        ("\\$204.", "204", True),
        ("204\\%.", "204", True),
        ("2, 4.", "2, 4", True),
        ("\\left\\{1, 2\\right\\}.", "\\{1, 2\\}", True),
        # These say something.
        ("204!", "204", False),
        ("0.333...", "0.333", False),
        ("1, 2, ..", "1, 2", False),
        ("204.5", "204", False),
        ("2.04.", "204", False),
        ("20,4", "204", False),
    ],
)
def test_what_else_ends_an_answer(text, gold, expected):
    assert right(gold, f"\\boxed{{{text}}}") is expected


def test_without_math_verify_a_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(InputError, match=r"math needs math-verify: pip install 'mpies\[math\]'"):
        making.make(config.TaskSettings(name="math"))


# Hostile answers


def test_an_answer_without_end_is_wrong_soon_in_any_thread():
    """math-verify's own time limits refuse to work outside of the main thread."""
    made = []
    thread = threading.Thread(target=lambda: made.append(scores(["\\boxed{7^{7^{11}}}"], "3")))
    start = time.monotonic()
    thread.start()
    thread.join(60)
    assert made == [[0]]
    assert time.monotonic() - start < 60
    assert scores(["\\boxed{3}"], "3") == [1]


@pytest.mark.parametrize(
    "nest", ["(", "{", "\\frac{", "\\sqrt{", "-", "[", "\\boxed{", "$", "\\left(", "9", "####"]
)
def test_deep_and_long_answers_are_wrong(nest):
    assert scores([nest * 2000, f"\\boxed{{{nest * 500}"], "3") == [0, 0]


@pytest.mark.parametrize(
    "text", ["\0", "\ud800", "\u202e\\boxed{4}", "\\boxed{__import__('os')}", "💥" * 1000]
)
def test_odd_characters_are_wrong(text):
    assert scores([text], "3") == [0]


UNINTERRUPTED = """
import signal
from mpies.tasks import math_worker
signal.signal(signal.SIGPROF, math_worker._time_is_up)
math_worker.SECONDS = math_worker.KILL_AFTER = 1
math_worker._in_time(lambda: sum(range(10**12)))  # one step of the interpreter
"""


def test_the_kernel_ends_what_no_signal_interrupts():
    ended = subprocess.run([sys.executable, "-c", UNINTERRUPTED], env=launching.environment(), timeout=200)
    assert ended.returncode == -signal.SIGXCPU


def test_the_answer_that_used_up_the_time_is_wrong_and_no_other(monkeypatch):
    assert scores(["\\boxed{3}"], "3") == [1]
    (worker,) = workers()
    worker.send_signal(signal.SIGXCPU)  # as the kernel does
    worker.wait(10)
    assert scores(["\\boxed{5}", "\\boxed{6}"], "6") == [0, 1]


def test_a_worker_that_was_killed_by_others_is_replaced():
    assert scores(["\\boxed{3}"], "3") == [1]
    (worker,) = workers()
    worker.kill()
    worker.wait(10)
    assert scores(["\\boxed{41}", "\\boxed{42}"], "42") == [0, 1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_signals_are_for_the_rank(number):
    """A batch system sends them to every process of the job, and the generation is to be finished."""
    assert scores([f"\\boxed{{{number}}}"], f"{int(number)}") == [1]
    (worker,) = workers()
    worker.send_signal(number)
    time.sleep(0.2)
    assert scores([f"\\boxed{{{number + 1000}}}"], f"{number + 1000}") == [1]
    assert workers() == [worker]


def test_no_worker_outlives_its_rank():
    program = (
        "import os, psutil; from mpies.tasks.math import reward; reward([''], ['1'], ['1']);"
        " print(psutil.Process().children()[0].pid, flush=True); os._exit(1)"
    )
    ended = launching.python("-c", program)
    pid = int(ended.stdout)
    deadline = time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.long
@pytest.mark.launch
def test_training_on_two_ranks(tmp_path, tiny_model):
    settings = [
        f"model.path={tiny_model()}",
        "model.dtype=float32",
        "model.device=cpu",
        "task.name=math",
        "task.train_size=4",
        "task.eval_size=2",
        "es.population=4",
        "es.generations=2",
        "engine.max_new_tokens=8",
        f"run.directory={tmp_path / 'run'}",
    ]
    ended = launching.mpirun(2, "-m", "mpies.train", *settings)
    assert ended.returncode == 0, ended.stderr
    assert "math: 4 training, 2 held-out prompts" in ended.stdout
    assert "right answers: 0 %" in ended.stdout
