"""Calls that may never return: they do not disturb when they do, and end the process when they do not."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import launching
import pytest

from mpies.ranks import watchdog

WHAT = "the reward function of task custom"

# The user's file. Line numbers are part of what is said.
JUDGE = """
import re, time
def reward(seconds):
    return ask(seconds) + 1
def ask(seconds):
    time.sleep(seconds)
    return 41
def search():
    return re.match("(a+)+$", 60 * "a" + "b")
"""
PROGRAM = """
import sys, time
import judge
from mpies.ranks import collectives, launch, watchdog

def main(comm, arguments):
    collectives.set_timeout(comm, 0.5)
    call = watchdog.watched(comm, judge.{function}, "{what}")
    {body}
    return 0

launch.run(main, [])
"""


def ended(folder: Path, function: str, *body: str):
    """How a process with these lines ends; `call` is the function, watched, with half a second to return."""
    (folder / "judge.py").write_text(JUDGE)
    script = folder / "program.py"
    script.write_text(PROGRAM.format(function=function, what=WHAT, body="\n    ".join(body)))
    return launching.python(script, cwd=folder, timeout=60)


def test_a_call_that_returns_is_as_if_it_were_not_watched(alone):
    def function(*arguments, **named):
        return arguments, named

    call = watchdog.watched(alone, function, WHAT)
    before = threading.active_count()
    assert call(1, [2], name="x") == ((1, [2]), {"name": "x"})
    with pytest.raises(ZeroDivisionError):
        watchdog.watched(alone, lambda: 1 / 0, WHAT)()
    assert threading.active_count() <= before + 2  # timers that were cancelled are about to end


def test_a_call_that_has_returned_or_raised_ends_nothing_later(tmp_path):
    """Neither by its line nor by Python's fault handler."""
    after = ["time.sleep(1)", "print('still here')"]
    raising = ["try:", "    call('no number')", "except TypeError:", "    pass"]
    done = ended(tmp_path, "reward", "watchdog.GRACE = 0.1", "print(call(0))", *raising, *after)
    assert (done.returncode, done.stdout, done.stderr) == (0, "42\nstill here\n", "")


def test_a_call_that_hangs_ends_the_job_with_a_line_that_says_where_it_is(tmp_path):
    done = ended(tmp_path, "reward", "call(100)")
    assert done.returncode not in (0, 2, 75)
    assert launching.problems(done.stderr) == [
        f"{WHAT} has not returned after 0.5 s; it is in reward (judge.py line 4) > ask (judge.py line 6). If"
        " it only needs longer, set a larger run.collective_timeout"
    ]
    assert "Traceback" not in done.stderr


def test_native_code_that_holds_the_lock_ends_with_pythons_own_traceback(tmp_path):
    done = ended(tmp_path, "search", "watchdog.GRACE = 0.2", "call()")
    assert done.returncode not in (0, 2, 75)
    assert "Timeout (0:00:00.7" in done.stderr
    assert f'File "{tmp_path / "judge.py"}", line 9 in search' in done.stderr


HANGS = "def f(reached, lock):\n    reached()\n    lock.acquire()"


def place_in(alone, function: Callable) -> str:
    """Where the watchdog says that a call of it is, when it hangs in `lock.acquire()`."""
    reached, lock = threading.Event(), threading.Lock()
    lock.acquire()
    call = watchdog.watched(alone, function, WHAT)
    thread = threading.Thread(target=call, args=(reached.set, lock))
    thread.start()
    assert reached.wait(30)
    time.sleep(0.05)
    try:
        return watchdog.place(thread.ident)
    finally:
        lock.release()
        thread.join()


def defined(path: Path, code: str, **names: Callable) -> Callable:
    """The function `f` of code that is said to be in that file."""
    exec(compile(code, str(path), "exec"), names)
    return names["f"]


def test_code_of_the_program_is_left_out_where_users_code_is_called(alone, tmp_path):
    """A reward function is called through the program's own, and may call some of it."""
    own = watchdog.PACKAGE / "tasks" / "made_up.py"
    deep = defined(own, HANGS)
    theirs = defined(tmp_path / "rewards.py", "def f(*given):\n\n    deep(*given)", deep=deep)
    ours = defined(own, "def f(*given):\n    theirs(*given)", theirs=theirs)
    assert place_in(alone, ours) == "f (rewards.py line 3)"


def test_where_there_is_only_code_of_the_program_it_is_named(alone):
    function = defined(watchdog.PACKAGE / "tasks" / "made_up.py", HANGS)
    assert place_in(alone, function) == "f (made_up.py line 3)"
