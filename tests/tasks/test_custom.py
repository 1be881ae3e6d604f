"""The user's own rewards: TRL's calling convention, both ways, and one clear line for what is wrong."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path

import h5py
import launching
import pytest
import tiny

from jobs import ENDLESS, Job, arguments, assert_same_run, committed, refused, train
from mpies import config
from mpies.errors import InputError
from mpies.tasks import base, making, rewards
from mpies.tasks.base import TrainerState

EXAMPLES = launching.REPOSITORY / "examples"
EXAMPLE = {f"{EXAMPLES / 'rewards.py'}:right": 1.0, f"{EXAMPLES / 'rewards.py'}:brief": 0.2}
ROWS = [{"prompt": "a", "n": 1}, {"prompt": "b", "n": 2}]
CHAT = [{"prompt": [{"role": "user", "content": "a"}], "n": 1}]


@pytest.fixture
def make(tmp_path):
    """make(code of the reward file, name=weight, ...) -> the task."""

    def build(code: str, rows=ROWS, **weights: float):
        (tmp_path / "rewards.py").write_text(code)
        (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
        reward = {f"{tmp_path / 'rewards.py'}:{name}": w for name, w in (weights or {"reward": 1}).items()}
        return making.make(config.TaskSettings(reward=reward, train_data=str(tmp_path / "train.jsonl")))

    yield build
    # Another test's file may have the same name.
    for name in [name for name in sys.modules if name.startswith("mpies_reward_")]:
        del sys.modules[name]


# The convention

SPY = """
seen = []

def reward(prompts, completions, **columns):
    seen.append({"prompts": prompts, "completions": completions, **columns})
    return [0.0] * len(prompts)
"""


def seen_by(task) -> dict:
    """What the spy was called with last."""
    (function,) = task.reward.functions.values()
    return function.__globals__["seen"][-1]


def test_what_a_function_gets(make):
    task = make(SPY)
    task.score(task.train, ["x", "y"], [[5], [6, 7]], TrainerState(3, 10))
    seen = seen_by(task)
    assert seen["prompts"] == ["a", "b"] and seen["completions"] == ["x", "y"] and seen["n"] == [1, 2]
    assert seen["completion_ids"] == [[5], [6, 7]]
    assert (seen["trainer_state"].global_step, seen["trainer_state"].max_steps) == (3, 10)


def test_what_a_function_gets_for_chat_messages(make):
    task = make(SPY, CHAT)
    task.score(task.train, ["x"])
    assert seen_by(task)["prompts"] == [CHAT[0]["prompt"]]
    assert seen_by(task)["completions"] == [[{"role": "assistant", "content": "x"}]]


@pytest.fixture(scope="module")
def grpo(tmp_path_factory):
    """grpo(reward functions, rows) -> its log: a step of TRL's GRPOTrainer on a tiny model."""
    pytest.importorskip("trl")
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    folder = tmp_path_factory.mktemp("trl")
    model = tiny.save_model(folder / "model")

    def step(functions, rows, **settings):
        settings |= {"max_steps": 1, "num_generations": 2, "per_device_train_batch_size": 2}
        settings |= {"use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no"}
        options = GRPOConfig(str(folder / "out"), max_completion_length=8, logging_steps=1, **settings)
        trainer = GRPOTrainer(str(model), functions, options, Dataset.from_list(rows))
        trainer.train()
        return trainer.state.log_history[0]

    return step


@pytest.mark.parametrize("rows", [ROWS, CHAT])
def test_trl_calls_functions_in_the_same_way(make, grpo, rows):
    """The same names, and values of the same types, deep down."""
    task = make(SPY, rows)
    (function,) = task.reward.functions.values()
    grpo(function, rows)
    theirs = seen_by(task)
    task.score(task.train[:1] * 2, ["x", "y"], [[5], [6, 7]])
    ours = seen_by(task)
    assert set(ours) == set(theirs)

    def shape(value):
        if isinstance(value, list):
            return [shape(value[0])]
        return {k: shape(v) for k, v in value.items()} if isinstance(value, dict) else type(value)

    for name in set(ours) - {"trainer_state", "log_extra", "log_metric"}:
        assert shape(ours[name]) == shape(theirs[name]), name
    for name in ("log_extra", "log_metric"):
        assert callable(ours[name]) and callable(theirs[name])
    for name in ("global_step", "max_steps"):
        assert type(getattr(ours["trainer_state"], name)) is type(getattr(theirs["trainer_state"], name))


def example() -> base.Task:
    return making.make(config.TaskSettings(reward=EXAMPLE, train_data=str(EXAMPLES / "train.jsonl")))


def test_the_example():
    task = example()
    made = task.judge(task.train[:4], ["Yes.", "No, it is longer.", "no", ""])
    assert made.metrics["accuracy"].tolist() == [1, 1, 0, 0] == made.metrics["right"].tolist()
    assert made.metrics["brief"].tolist() == pytest.approx([0, -math.sqrt(3), 0, 0])
    assert made.rewards.tolist() == pytest.approx([1, 1 - 0.2 * math.sqrt(3), 0, 0])


def test_the_example_runs_in_trl_unchanged(grpo):
    functions = list(example().reward.functions.values())
    rows = [json.loads(line) for line in (EXAMPLES / "train.jsonl").read_text().splitlines()]
    log = grpo(functions, rows, reward_weights=[1.0, 0.2])
    assert log["reward"] == pytest.approx(log["rewards/right/mean"] + 0.2 * log["rewards/brief/mean"])


def test_functions_may_be_async_as_in_trl(make):
    task = make(
        "async def reward(completions, **columns):\n    return [float(len(c)) for c in completions]\n"
    )
    assert task.score(task.train, ["", "abc"]).tolist() == [0, 3]


def test_files_beside_the_reward_file_can_be_imported(make, tmp_path):
    (tmp_path / "helper_of_rewards.py").write_text("def length(text):\n    return float(len(text))\n")
    body = "def reward(completions, **_):\n    return list(map(helper_of_rewards.length, completions))\n"
    task = make(f"import helper_of_rewards\n\n{body}")
    assert task.score(task.train, ["", "abc"]).tolist() == [0, 3]


def test_modules_by_name():
    task = making.make(
        config.TaskSettings(name="conciseness", reward={"mpies.tasks.conciseness:reward": 2.0}),
    )
    assert task.score(task.train, ["88", "No"]).tolist() == [-2, 0]


# Several

SEVERAL = """
def a(completions, **columns):
    return [1.0, None]

def b(completions, **columns):
    return [10.0, float("nan")]

def c(completions, **columns):
    return [None, 100.0]

def none(completions, **columns):
    return [None, None]
"""


@pytest.mark.parametrize(
    "weights, expected",
    [
        ({"a": 1, "b": 1}, [11, None]),
        ({"a": 1, "b": 0.5}, [6, None]),
        ({"a": -2, "c": 0.25}, [-2, 25]),
        ({"a": 1, "b": 1, "c": 1}, [11, 100]),
        ({"a": 1, "none": 1}, [1, None]),
        ({"none": 1}, [None, None]),
    ],
)
def test_several_rewards_are_a_weighted_sum(make, weights, expected):
    task = make(SEVERAL, **weights)
    made = task.score(task.train, ["x", "y"])
    assert [None if math.isnan(r) else r for r in made] == expected


def test_rewards_of_one_name_are_told_apart_by_their_files(tmp_path):
    names = []
    for name, made in (("a", 1.0), ("b", 2.0)):
        (tmp_path / f"{name}.py").write_text(
            f"def score(completions, **columns):\n    return [{made}] * len(completions)\n"
        )
        names.append(f"{tmp_path}/{name}.py:score")
    logged = {}
    made = rewards.load(dict.fromkeys(names, 1.0))(
        prompts=["p"], completions=["c"], log_extra=logged.__setitem__
    )
    assert made == [3.0] and {name: list(values) for name, values in logged.items()} == {
        "a.py:score": [1.0],
        "b.py:score": [2.0],
    }
    assert rewards.parts_of(dict.fromkeys(names, 1.0)) == set(logged)


def test_several_rewards_are_figures_of_evaluations(make):
    task = make(SEVERAL, a=1, c=1)
    metrics = task.judge(task.train, ["x", "y"]).metrics
    assert {name: values.tolist()[0 if name == "a" else 1] for name, values in metrics.items()} == {
        "a": 1,
        "c": 100,
    }


def test_logged_numbers_are_figures_of_evaluations(make):
    code = (
        "def reward(completions, log_extra, log_metric, **columns):\n"
        "    log_extra('accuracy', [1, 0])\n    log_extra('text', ['a', 'b'])\n    log_extra('odd', [1])\n"
        "    log_metric('mean', 2)\n    return [0, 0]"
    )
    task = make(code)
    made = {name: values.tolist() for name, values in task.judge(task.train, ["x", "y"]).metrics.items()}
    assert made == {"accuracy": [1, 0], "mean": [2, 2]}


def test_an_own_reward_for_a_task_keeps_its_metrics(tmp_path):
    (tmp_path / "r.py").write_text(
        "def reward(completions, **columns):\n    return [5.0] * len(completions)\n"
    )
    task = making.make(config.TaskSettings(name="conciseness", reward={f"{tmp_path / 'r.py'}:reward": 1.0}))
    made = task.judge(task.train, ["8", "Yes"])
    assert made.rewards.tolist() == [5, 5] and made.metrics["accuracy"].tolist() == [1, 0]


# What is wrong


@pytest.mark.parametrize(
    "given, words",
    [
        ("'none.py:reward'", "task.reward: there is no file none.py"),
        ("'no_such_module:reward'", "task.reward: no_such_module: no module named 'no_such_module'"),
        ("'rewards.py'", "task.reward: given 'rewards.py', allowed is FILE.py:FUNCTION"),
        ("':reward'", "task.reward: given ':reward'"),
        ("5", "task.reward: given 5"),
        ("[5]", "task.reward: given [5]"),
        ("{a.py:f: one}", "task.reward: given {'a.py:f': 'one'}"),
        ("{a.py:f: true}", "task.reward: given {'a.py:f': True}"),
    ],
)
def test_task_reward(given, words):
    with pytest.raises(InputError) as error:
        settings = config.load([f"task.reward={given}", "task.train_data=train.jsonl"])
        making.make(settings.task)
    (line,) = str(error.value).splitlines()
    assert words in line


@pytest.mark.parametrize(
    "given, expected",
    [
        ("a.py:f", {"a.py:f": 1}),
        ("[a.py:f, b.py:g]", {"a.py:f": 1, "b.py:g": 1}),
        ("{a.py:f: 2, a.py:g: -0.5}", {"a.py:f": 2, "a.py:g": -0.5}),
    ],
)
def test_forms_of_task_reward(given, expected):
    settings = config.load([f"task.reward={given}", "task.train_data=train.jsonl"])
    assert settings.task.reward == expected and settings.task.name == "custom"
    assert config.from_yaml(settings.to_yaml()) == settings


@pytest.mark.parametrize("key", ["reward", "train_data"])
def test_what_a_task_of_ones_own_needs(key):
    given = {"reward": "task.reward=a.py:f", "train_data": "task.train_data=train.jsonl"}
    del given[key]
    with pytest.raises(InputError, match=f"^task.{key}: missing; task.name=custom needs it$"):
        config.load(["task.name=custom", *given.values()])


@pytest.mark.parametrize(
    "code, words",
    [
        ("def rewards(**columns): ...", "has no function 'reward'; did you mean"),
        ("reward = 5", "has no function 'reward'"),
        ("def reward(prompts, completions): ...", "its signature has to end with **columns"),
        ("def reward(:", "cannot be imported: SyntaxError: "),
        ("x = 1\ny = z", "cannot be imported: NameError: name 'z' is not defined"),
        ("import no_such_module", "no module named 'no_such_module'"),
        ("import sys\nsys.exit(0)", "cannot be imported: SystemExit: 0 ("),
        ("import sys\nsys.exit()", "cannot be imported: SystemExit: SystemExit ("),
        ("class Own(BaseException): ...\nraise Own('x\\ny')", "cannot be imported: Own: x ("),
        ("from builtins import dict as reward", "reward tells no signature"),
        ("reward = 'a'.join", "does not take every column"),
        ("x = '\0'", "source code string cannot contain null bytes"),
        ("def __getattr__(name):\n    raise OSError('no')", "cannot be imported: OSError: no"),
    ],
)
def test_reward_files(make, code, words):
    with pytest.raises(InputError) as error:
        make(code)
    (line,) = str(error.value).splitlines()
    assert line.startswith("task.reward: ") and "rewards.py" in line and words in line


def test_the_line_of_an_error_in_a_reward_file_is_named(make, tmp_path):
    with pytest.raises(InputError, match=rf"\({tmp_path / 'rewards.py'} line 2\)$"):
        make("x = 1\ny = z")


# Whole runs, on several ranks


@pytest.fixture
def job(tmp_path, tiny_model):
    """job(code, ...) -> a training command's settings with this reward and the example's data."""

    def build(code: str, generations: int = 3, **changes) -> list[str]:
        (tmp_path / "rewards.py").write_text(code)
        shutil.copy(EXAMPLES / "train.jsonl", tmp_path / "train.jsonl")
        changes = {
            "task__reward": f"{tmp_path / 'rewards.py'}:reward",
            "task__train_data": tmp_path / "train.jsonl",
            "task__train_size": 5,
            "task__eval_size": 3,
            "run__directory": tmp_path / "run",
        } | changes
        return arguments(tiny_model(), changes.pop("run__directory"), generations, **changes)

    return build


LENGTH = (
    "def reward(completions, **columns):\n    return [-float(len(c[0]['content'])) for c in completions]\n"
)


@pytest.mark.long
@pytest.mark.launch
def test_a_run_with_own_data_does_not_depend_on_the_ranks(job, tmp_path):
    other = (
        "def sum_of(completions, **columns):\n    return [sum(map(ord, str(c))) % 97 for c in completions]\n"
    )
    code = LENGTH + other
    functions = {f"{tmp_path / 'rewards.py'}:{name}": 1 for name in ("reward", "sum_of")}
    chosen = {"task__prompts_per_generation": 2, "task__reward": json.dumps(functions)}
    for ranks in (1, 3):
        train(ranks, *job(code, **chosen, run__directory=tmp_path / str(ranks)))
    assert_same_run(tmp_path / "1", tmp_path / "3", 3)
    with h5py.File(tmp_path / "1" / "run.h5") as file:
        assert file["evaluation/split"].asstr()[:].tolist() == ["train", "held_out"] * 2
        assert set(file["metric/name"].asstr()[:]) == {"reward", "sum_of"}
        assert len(file.attrs["data_digest"]) == 64


@pytest.mark.launch
def test_a_run_goes_on_with_moved_data_and_no_other(job, tmp_path):
    settings = job(LENGTH)
    train(2, *settings)
    (tmp_path / "train.jsonl").rename(tmp_path / "moved.jsonl")
    longer = [s for s in settings if not s.startswith(("task.train_data", "es.generations"))]
    longer.append("es.generations=4")
    train(1, *longer, f"task.train_data={tmp_path / 'moved.jsonl'}")
    assert committed(tmp_path / "run") == 4
    text = (tmp_path / "moved.jsonl").read_text()
    (tmp_path / "moved.jsonl").write_text(text.replace("colder", "warmer"))
    (line,) = refused(*longer, f"task.train_data={tmp_path / 'moved.jsonl'}")
    assert line.startswith("task.train_data: ") and "digest" in line


@pytest.mark.launch
def test_bad_data_are_refused_once_before_the_model_is_loaded(job, tmp_path):
    (tmp_path / "no-model").mkdir()  # a missing folder would be told first
    settings = job(LENGTH, model__path=tmp_path / "no-model")
    (tmp_path / "train.jsonl").write_text('{"prompt": "a"}\n{"question": "b"}\n')
    ended = launching.mpirun(2, "-m", "mpies.train", *settings)
    assert ended.returncode == 2
    (line,) = launching.problems(ended.stderr)
    assert f"{tmp_path / 'train.jsonl'}: line 2: no column 'prompt'" in line
    assert not (tmp_path / "run").exists()


UNEQUAL = """
import os, sys
from mpies.ranks import launch
from mpies import train
from mpi4py import MPI

os.chdir(f"rank-{MPI.COMM_WORLD.rank}")
launch.run(train.main, sys.argv[1:])
"""


@pytest.mark.launch
@pytest.mark.parametrize("differs", [pytest.param("train.jsonl", marks=pytest.mark.long), "rewards.py"])
def test_files_that_differ_between_nodes_are_refused(job, tmp_path, differs):
    settings = job(LENGTH, task__reward="rewards.py:reward", task__train_data="train.jsonl")
    (tmp_path / "program.py").write_text(UNEQUAL)
    for rank in (0, 1):
        (tmp_path / f"rank-{rank}").mkdir()
        for name in ("train.jsonl", "rewards.py"):
            text = (tmp_path / name).read_text()
            changed = text.replace("colder", "warmer").replace("float", "-float")
            (tmp_path / f"rank-{rank}" / name).write_text(changed if rank and name == differs else text)
    ended = launching.mpirun(2, "program.py", *settings, cwd=tmp_path)
    assert ended.returncode == 2
    (line,) = launching.problems(ended.stderr)
    assert "differ between ranks" in line and ("train_data" if "train" in differs else "rewards.py") in line


@pytest.mark.launch
def test_chat_messages_need_a_chat_template(job, tmp_path, tiny_model):
    model = Path(shutil.copytree(tiny_model(), tmp_path / "model"))
    (model / "chat_template.jinja").unlink()
    settings = job(LENGTH, model__path=model, task__chat_template="false")
    (line,) = refused(*settings)
    assert line.startswith("task.train_data: ") and "no chat template" in line


# Trouble on some ranks, in the second generation.
LATER = """
import re, time
from mpi4py import MPI

def reward(completions, trainer_state, **columns):
    if trainer_state.global_step == 1 and MPI.COMM_WORLD.rank in {ranks}:
        {trouble}
    return [-float(len(c[0]["content"])) for c in completions]
"""
TROUBLE_LINE = 7


@pytest.mark.launch
@pytest.mark.parametrize(
    "returned, why",
    [
        ("None", "None (NoneType)"),
        pytest.param("[0.0] * 6", "6 rewards", marks=pytest.mark.long),
        pytest.param("{1.0: 2}", "{1.0: 2} (dict)", marks=pytest.mark.long),
    ],
)
def test_a_reward_that_returns_no_list_of_rewards_on_one_rank_ends_all(job, returned, why):
    with Job(2, *job(LATER.format(ranks=[1], trouble=f"return {returned}"), ENDLESS)) as running:
        assert running.end(60) == 2
    (line,) = launching.problems(running.output)
    assert line.startswith("rank 1: task.reward: ") and f"rewards.py:reward returned {why}; needed is" in line
    assert "Traceback" not in running.output


@pytest.mark.launch
@pytest.mark.parametrize("program", ["train", pytest.param("check", marks=pytest.mark.long)])
def test_a_reward_file_that_never_ends_to_be_imported_is_given_up(job, tmp_path, program):
    settings = job("x = 1\nwhile x:\n    x += 1\n" + LENGTH, run__collective_timeout=3)
    ended = launching.python("-m", f"mpies.{program}", *settings)
    assert ended.returncode == 2, ended
    (line,) = launching.problems(ended.stderr)
    assert line.startswith(
        "task.reward: the import of its functions has not returned after 3 s; it is in <module> (rewards.py"
    )
    assert line.endswith("If it only needs longer, set a larger run.collective_timeout")
    assert "Traceback" not in ended.stderr and not list(tmp_path.glob("run/*"))


@pytest.mark.long
@pytest.mark.launch
def test_a_reward_that_changes_the_folder_does_not_end_the_run(job, tmp_path):
    """Where the paths of the settings, the reward's own among them, are relative."""
    code = f"import os\n{LENGTH}    ".replace("    return", "    os.chdir('/')\n    return")
    changes = {"task__reward": "rewards.py:reward", "task__train_data": "train.jsonl"}
    changes |= {"run__directory": "run", "run__checkpoint_every": 1, "run__measure_drift": True}
    settings = job(code, **changes, es__anchor_decay=0.01)
    for generations in (2, 3):
        given = [*settings, f"es.generations={generations}"]
        ended = launching.python("-m", "mpies.train", *given, cwd=tmp_path)
        assert ended.returncode == 0, ended.stderr
        assert committed(tmp_path / "run") == generations


@pytest.mark.launch
def test_a_reward_that_sleeps_for_ever_is_given_up(job):
    code = LATER.format(ranks=[1], trouble="time.sleep(10**6)")
    with Job(2, *job(code, ENDLESS, run__collective_timeout=8)) as running:
        assert running.end(60) not in (0, 2, 75)
    assert any("rank 1" in line for line in launching.problems(running.output)), running.output


@pytest.mark.long
@pytest.mark.launch
def test_a_reward_that_sleeps_for_ever_is_given_up_where_no_rank_waits(job):
    code = LATER.format(ranks=[0], trouble="time.sleep(10**6)")
    with Job(1, *job(code, ENDLESS, run__collective_timeout=3)) as running:
        assert running.end(60) not in (0, 2, 75)
    (line,) = launching.problems(running.output)
    assert f"has not returned after 3 s; it is in reward (rewards.py line {TROUBLE_LINE})." in line
    assert "Traceback" not in running.output


@pytest.mark.long
@pytest.mark.launch
def test_a_reward_that_lets_no_other_thread_run_is_given_up_too(job):
    code = LATER.format(ranks=[0], trouble="re.match('(a+)+$', 50 * 'a' + 'b')")
    with Job(1, *job(code, ENDLESS, run__collective_timeout=1)) as running:
        assert running.end(60) not in (0, 2, 75)
    assert f'rewards.py", line {TROUBLE_LINE} in reward' in running.output
