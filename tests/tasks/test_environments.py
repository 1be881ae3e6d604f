"""Environments in processes of their own: what goes wrong in one costs its episode, and bounded time."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from pathlib import Path

import games
import numpy as np
import psutil
import pytest

from mpies import config
from mpies.errors import HelperError, InputError
from mpies.noise.definition import philox
from mpies.signals import SIGNALS
from mpies.tasks import making
from mpies.tasks.environments import nursery as made_nursery
from mpies.tasks.environments import task as made_task
from mpies.tasks.environments.children import Call
from mpies.tasks.environments.fork_server import Batch, Beginning, packed
from mpies.tasks.environments.limits import Limits
from mpies.tasks.environments.nursery import Nursery
from mpies.tasks.environments.seeds import seeds
from mpies.tasks.environments.stage import TextStage
from mpies.tasks.episodes import Episode, EpisodeLimits, Start, Turn

pytestmark = pytest.mark.lengthy

FILE = str(Path(games.__file__))
LIMITS = Limits(1, 120.0)


def settings(name: str, **others) -> config.TaskSettings:
    return config.TaskSettings(environment=f"{FILE}:{name}", chat_template=False, **others)


@pytest.fixture
def nursery():
    made = []

    def start(name: str, limits: Limits = LIMITS) -> Nursery:
        made.append(Nursery(Beginning(limits, f"{FILE}:{name}")))
        return made[-1]

    yield start
    for one in made:
        one.close()


def begin(nursery: Nursery, rows: list[dict], number: list[int] | None = None) -> list[dict]:
    calls = [
        Call(i, "reset", {"row": row, "seed": (number or [0] * len(rows))[i]}) for i, row in enumerate(rows)
    ]
    return nursery.call(calls)


def step(nursery: Nursery, answers: dict[int, str]) -> list[dict]:
    return nursery.call([Call(i, "step", {"answer": answer}) for i, answer in answers.items()])


# What an environment does wrong -> what is said of it.
WRONG = {
    "raise": "step raised ValueError: no such (",
    "half": "step raised ValueError: no ? (",
    "blank": "step raised ValueError: ValueError (",
    "huge": "step's reward is 1e+308 (float); needed is a number of 1e+100 at most",
    "orphans": "step ended its process with exit status 3",
    "leave": "step raised SystemExit: 3 (",
    "exit": "step ended its process with exit status 3",
    "crash": "step ended its process by SIGSEGV",
    "memory": "step raised MemoryError: MemoryError (",
    "nonsense": "step returned ('what?', 1.0) (tuple); needed is (observation, reward, done)",
    "nan": "step's reward is nan (float); needed is a number",
    "long": "step's observation has 1,000,000 characters; allowed are 100,000",
    "flood": "step answered more than ",
}
RIGHT = ("nothing", "halves", "print")


def test_what_goes_wrong_in_one_environment_costs_its_own_episode(nursery, capfd):
    made = nursery("Wicked")
    family = psutil.Process(made._process.process.pid)
    kinds = [*WRONG, *RIGHT]
    assert [one["prompt"] for one in begin(made, [{"what": what} for what in kinds])] == kinds
    found = dict(zip(kinds, step(made, dict.fromkeys(range(len(kinds)), "a"))))
    for what, said in WRONG.items():
        assert found[what]["error"].startswith(said)
    assert [found[what]["reward"] for what in RIGHT] == [1.0] * 3
    assert found["halves"]["text"] == "?\0"
    died = {"exit", "crash", "flood", "orphans"}
    left = {p.pid for p in family.children()}
    assert len(left) == len(kinds) - len(died)
    assert "noise" not in "".join(capfd.readouterr())
    made.end(range(len(kinds)))
    begin(made, [{"what": "nothing"}])
    assert len(family.children(recursive=True)) == 1


def test_a_call_has_its_cpu_time_however_long_that_takes(nursery):
    made = nursery("Wicked", Limits(1, 120.0))
    begin(made, [{"what": "spin"}])
    assert step(made, {0: "a"}) == [{"error": "step took more than 1 s of CPU time"}]


def test_a_call_that_does_not_return_is_ended_with_all_that_it_has_started(nursery):
    made = nursery("Wicked", Limits(1, 2.0))
    begin(made, [{"what": "sleep"}])
    family = psutil.Process(made._process.process.pid)
    assert step(made, {0: "a"}) == [{"error": "step has not returned after 2 s"}]
    assert family.children(recursive=True) == []


def test_what_is_computed_while_the_model_answers_is_not_the_next_calls(nursery):
    made = nursery("Wicked", Limits(1, 120.0))
    begin(made, [{"what": "busy", "when": "reset"}])
    (child,) = psutil.Process(made._process.process.pid).children()
    while child.status() != psutil.STATUS_ZOMBIE and sum(child.cpu_times()[:2]) < 2.5:
        time.sleep(0.1)
    assert step(made, {0: "a"})[0]["reward"] == 1.0


def test_calls_that_are_not_taken_are_waited_for_together(nursery):
    made = nursery("Wicked", Limits(1, 4.0))
    begin(made, [{"what": "stopped", "when": "reset"}] * 4 + [{"what": "nothing"}])
    children = sorted(psutil.Process(made._process.process.pid).children(), key=lambda one: one.pid)
    for child in children[:4]:
        while child.status() != psutil.STATUS_STOPPED:
            time.sleep(0.05)
    start = time.monotonic()
    found = step(made, dict.fromkeys(range(5), "a" * 2**22))
    assert found[:4] == [{"error": "step has not returned after 4 s"}] * 4 and found[4]["reward"] == 1.0
    assert time.monotonic() - start < 12


def test_all_that_an_episode_has_started_ends_with_it(nursery):
    """Also where it does not end by itself when it is told to."""
    made = nursery("Wicked")
    forks = psutil.Process(made._process.process.pid)
    begin(made, [{"what": what, "when": "reset"} for what in ("started", "nothing", "stopped")])
    children = sorted(forks.children(), key=lambda one: one.pid)
    started = [one for one in forks.children(recursive=True) if one not in children]
    assert len(started) == 3
    while children[2].status() != psutil.STATUS_STOPPED:
        time.sleep(0.05)
    made.end([0, 1])
    assert psutil.wait_procs([*children[:2], *started], 10)[1] == []
    made.end([2])
    assert psutil.wait_procs(children[2:], 10)[1] == []
    assert begin(made, [{"what": "nothing"}])[0]["prompt"] == "nothing"


def test_the_death_of_the_process_that_forks_is_told_where_episodes_are_played(nursery):
    forks = nursery("Wicked")
    made = made_task.InProcesses("", EpisodeLimits(), 0, lambda all_, _: TextStage(forks, all_, False))
    episodes = [Episode(Start({"what": "parent"})), Episode(Start({"what": "nothing"}))]
    said = r"^task\.environment: the process of its episodes ended by SIGKILL$"
    with pytest.raises(HelperError, match=said), made.open(episodes, None) as stage:
        stage.begin()
        stage.step({0: Turn("", "a", [1]), 1: Turn("", "a", [1])})


def test_signals_end_what_an_episode_has_started(nursery):
    made = nursery("Wicked")
    begin(made, [{"what": "terminates"}])
    (child,) = psutil.Process(made._process.process.pid).children()
    for number in SIGNALS:  # which are for the rank
        child.send_signal(number)
    assert step(made, {0: "a"})[0].get("text") == "ended"


def test_memory_is_counted_from_an_episodes_begin(nursery):
    """What the process that forks has grown by is nothing that the episode took."""
    limit, size = 64 * 2**20, 20 * 2**20
    made = nursery("Wicked", Limits(10, 100.0, limit))
    rows = [{"what": "needs", "size": size, "more": str(i) * 8 * 2**20} for i in range(10)]
    begin(made, rows)
    assert [one.get("text") for one in step(made, dict.fromkeys(range(10), "a"))] == [str(size)] * 10
    begin(made, [{}] * 10 + [{"what": "needs", "size": 2 * limit}])
    assert step(made, {10: "a"})[0]["error"].startswith("step raised MemoryError")


def leftovers(seconds: str = "1000") -> list[psutil.Process]:
    return [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", seconds]]


def unruly(name: str) -> Nursery:
    return Nursery(Beginning(LIMITS, f"{Path(games.__file__).with_name('unruly.py')}:{name}"))


def test_what_a_module_does_at_its_import_harms_nothing(capfd):
    """Threads, signals, files, and what it prints; what it has started ends with its episodes."""
    made, start = unruly("Game"), time.monotonic()
    started = psutil.Process(int(begin(made, [{}] * 40)[0]["prompt"]))
    while time.monotonic() - start < 3:
        found = step(made, dict.fromkeys(range(40), "a"))
        assert [one.get("reward") for one in found] == [1.0] * 40
        made.end(range(10, 40))
        begin(made, [{}] * 40)
    assert found[0]["text"] == found[39]["text"] == '"'
    assert step(made, {0: "exit"}) == [{"error": "step ended its process with exit status 3"}]
    for child in psutil.Process(made._process.process.pid).children():
        if child != started:
            child.kill()
    assert "by SIGKILL" in step(made, {1: "a"})[0]["error"]
    start = time.monotonic()
    made.close()
    assert time.monotonic() - start < 20
    assert psutil.wait_procs([started], 10)[1] == []
    assert "noise" not in "".join(capfd.readouterr())


def test_a_refusal_waits_for_no_thread_of_the_modules(monkeypatch):
    monkeypatch.setenv("SECONDS_OF_SLEEP", "1002")
    start = time.monotonic()
    with pytest.raises(InputError, match="has no method 'reset'"):
        unruly("NoGame")
    assert time.monotonic() - start < 60
    assert leftovers("1002") == []


def test_an_import_lasts_no_longer_than_the_rank(tmp_path):
    slow, told = tmp_path / "slow.py", tmp_path / "told"
    slow.write_text(f"import os, time\nopen({str(told)!r}, 'w').write(str(os.getpid()))\ntime.sleep(1000)\n")
    code = (
        "from mpies.tasks.environments.fork_server import Beginning\n"
        "from mpies.tasks.environments.limits import Limits\n"
        "from mpies.tasks.environments.nursery import Nursery\n"
        f"Nursery(Beginning(Limits(1, 10.0), {f'{slow}:Game'!r}))"
    )
    rank = subprocess.Popen([sys.executable, "-c", code])
    while not told.exists() or not told.read_text():
        time.sleep(0.05)
    forks = psutil.Process(int(told.read_text()))
    rank.kill()
    rank.wait()
    assert psutil.wait_procs([forks], 10)[1] == []


def test_an_episode_has_the_modules_files_and_one_socket(nursery):
    made = nursery("Wicked")
    begin(made, [{"what": "files"}] * 40)
    found = step(made, dict.fromkeys(range(40), "a"))
    assert [one["text"] for one in found] == ['""" 1'] * 40


def test_an_environment_that_fails_at_reset(nursery):
    made = nursery("Wicked")
    kinds = ["raise", "exit", "nothing"]
    found = begin(made, [{"what": what, "when": "reset"} for what in kinds])
    assert [bool(one.get("error")) for one in found] == [True, True, False]
    assert found[0]["error"].startswith("reset raised ValueError: ")


def test_episodes_know_nothing_of_one_another_and_draw_from_their_seeds(nursery):
    """Also what they keep in their module, and whatever their number and company is."""
    made, other = nursery("Echo"), nursery("Echo")
    first = begin(made, [{}] * 3, [7, 8, 7])
    assert first[0] == first[2] != first[1]
    for _ in range(2):
        first = step(made, {0: "ab", 1: "ab", 2: "ab"})
        assert first[0] == first[2] and first[0]["text"].startswith(("2 ", "3 "))
    (alone,) = begin(other, [{}], [8])
    assert alone == begin(made, [{}] * 2, [8, 8])[1]
    for _ in range(2):
        (alone,) = step(other, {0: "ab"})
    assert alone == first[1]


def test_nothing_is_left_when_it_is_closed_or_killed(nursery):
    made, killed = nursery("Wicked", Limits(1, 1000.0)), nursery("Echo")
    begin(made, [{"what": "sleep"}] * 3)
    begin(killed, [{}] * 3)
    everyone = [p for n in (made, killed) for p in psutil.Process(n._process.process.pid).children()]
    made._process.tell(packed(Batch([Call(i, "step", {"answer": "a"}) for i in range(3)], [])), 10)
    time.sleep(0.5)
    made.close()
    killed._process.process.kill()
    _, alive = psutil.wait_procs(everyone, 10)
    assert not alive
    with pytest.raises(
        HelperError, match=r"^task\.environment: the process of its episodes ended by SIGKILL"
    ):
        step(killed, {0: "a"})
    deadline = time.monotonic() + 30  # tests beside this one start some, too, and end them
    while leftovers() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert leftovers() == []


@pytest.mark.parametrize("length", [1, 2**20])
def test_one_that_does_not_answer_at_all_is_ended_and_named(nursery, monkeypatch, length):
    """Also where it does not take what it is told."""
    made = nursery("Echo", Limits(1, 60.0))
    begin(made, [{}] * 2)
    # Waited for is what a round of calls and one more may take, and a start besides: here 1 s in all.
    monkeypatch.setattr(made_nursery, "STARTING", 1 - 2 * (60 + made_nursery.GRACE))
    forks = psutil.Process(made._process.process.pid)
    children = forks.children()
    forks.suspend()
    start = time.monotonic()
    said = r"^task\.environment: the process of its episodes has not answered for 1 s$"
    with pytest.raises(HelperError, match=said):
        step(made, {0: "a" * length})
    assert 1 <= time.monotonic() - start < 30
    assert not forks.is_running() and len(children) == 2
    assert psutil.wait_procs(children, 10)[1] == []


def test_seeds_are_those_of_the_definition():
    for generation, when in ((None, 0), (0, 1), (41, 42)):
        words = philox(5, np.array([3, 2**31]), when, 8)
        assert seeds(5, [3, 2**31], generation) == words[0].tolist()


CLOCK = "import time\nclass Game:\n def reset(self, **row): return str(time.time())\n def step(self): ..."


@pytest.mark.parametrize(
    "code, said",
    [
        ("class Game: pass", "has no method 'reset', which an environment needs"),
        ("class Game:\n def reset(self): ...", "has no method 'step'"),
        ("Gam = 3\nclass Games: pass", "has no class 'Game'; did you mean {file}:Games?"),
        ("import nowhere_to_be", "no module named 'nowhere_to_be'"),
        ("import sys; sys.exit(1)", "cannot be imported: SystemExit: 1 ({file} line 1)"),
        ("import os; os._exit(4)", "cannot be imported: ended with exit status 4"),
        (
            "class Game:\n def reset(self): return 'a'\n def step(self): ...",
            "row 1: reset raised TypeError: ",
        ),
        (
            CLOCK,
            "the episode of row 1 began otherwise the second time, with the same seed",
        ),
    ],
)
def test_what_is_no_environment_is_refused(tmp_path, code, said):
    file, rows = tmp_path / "game.py", tmp_path / "rows.jsonl"
    file.write_text(code)
    rows.write_text('{"n": 1}\n')
    with pytest.raises(InputError) as error:
        making.make(config.TaskSettings(environment=f"{file}:Game", train_data=str(rows)))
    assert str(error.value).startswith("task.environment: ") and "\n" not in str(error.value)
    assert said.format(file=file) in str(error.value)


def test_openings_that_differ_are_allowed_if_that_is_declared(tmp_path):
    file = tmp_path / "game.py"
    file.write_text(
        "import time\nclass Game:\n def reset(self): return str(time.time())\n def step(self): ..."
    )
    task = making.make(config.TaskSettings(environment=f"{file}:Game", train_size=1, services=True))
    assert math.isfinite(float(task.environments.openings[0][0]["content"]))


def test_where_there_is_no_file_the_number_of_episodes_has_to_be_known():
    with pytest.raises(InputError, match=r"^task\.train_data: missing; or, .* task\.train_size"):
        making.make(settings("Echo"))
    task = making.make(settings("Echo", train_size=3, eval_size=2), seed=5)
    assert (task.train, task.held_out) == ([{}] * 3, [{}] * 2)
    assert [start.seed for start in task.starts(4)] == seeds(5, [0, 1, 2], 4)
    assert len(task.environments.openings) == made_task.TRIED * 2
