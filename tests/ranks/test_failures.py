"""Whatever ends one rank ends all ranks, soon and loudly. Seen from outside, under mpirun."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time

import launching
import psutil
import pytest

pytestmark = pytest.mark.launch

RANKS = 3
SECONDS = 10  # the promise: nobody outlives a failed rank by more than this

# Rank 1 gets into trouble, while the others do what a job does most of its time.
PROGRAM = """
import os, signal, sys, threading, time
from pathlib import Path

from mpies.ranks import collectives, launch
from mpies.errors import InputError

def trouble():
    {trouble}

def in_a_thread(error):
    raise error

def main(comm, arguments):
    collectives.barrier(comm)
    if comm.rank in {ranks}:
        Path(arguments[0]).write_text(repr(time.time()))
        trouble()
    {others}
    return 0

if __name__ == "__main__":
    launch.run(main, sys.argv[1:])
"""


def fail(tmp_path, trouble: str, others: str = "collectives.barrier(comm)", ranks=(1,)):
    """What a job with that trouble ends with, after checking that it ends in time and as a whole."""
    script, failed = tmp_path / "trouble.py", tmp_path / "time-of-failure"
    script.write_text(PROGRAM.format(trouble=trouble, others=others, ranks=ranks))
    ended = launching.mpirun(RANKS, script, failed, cwd=tmp_path, timeout=60)
    left = SECONDS - (time.time() - float(failed.read_text()))
    assert left > 0
    assert launching.all_gone(script, within=left)
    assert ended.returncode != 0
    return ended


def assert_one_traceback(stderr: str, last_line: str) -> None:
    """The traceback of rank 1, whole, in one piece, and no other."""
    assert stderr.count("Traceback (most recent call last)") == 1
    lines = stderr.splitlines()
    start = lines.index("Traceback (most recent call last):")
    assert "rank 1" in lines[start - 1]
    end = lines.index(last_line)
    assert end > start
    assert all(line.startswith(" ") for line in lines[start + 1 : end])
    assert any("trouble.py" in line for line in lines[start + 1 : end])


@pytest.mark.parametrize(
    "trouble, last_line",
    [
        ("raise ValueError('the reason')", "ValueError: the reason"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("sys.exit(3)", "SystemExit: 3"),
        ("sys.exit(0)", "SystemExit: 0"),
        ("sys.exit(256)", "SystemExit: 256"),  # of which the system keeps 8 bits, all of them 0
        ("sys.exit('a message')", "SystemExit: a message"),
        ("raise MemoryError", "MemoryError"),
        ("threading.Thread(target=in_a_thread, args=[ValueError('why')]).start()", "ValueError: why"),
        ("threading.Thread(target=in_a_thread, args=[SystemExit(0)]).start()", "SystemExit: 0"),
    ],
)
def test_a_failing_rank_ends_all_with_its_traceback(tmp_path, trouble, last_line):
    ended = fail(tmp_path, trouble, others="time.sleep(60) if comm.rank == 1 else collectives.barrier(comm)")
    assert_one_traceback(ended.stderr, last_line)


@pytest.mark.parametrize(
    "trouble",
    [
        "os._exit(5)",
        "os.kill(os.getpid(), signal.SIGKILL)",
        "os.kill(os.getpid(), signal.SIGSEGV)",
        "os.abort()",
    ],
)
def test_a_rank_that_dies_without_a_word_ends_all(tmp_path, trouble):
    fail(tmp_path, trouble)


@pytest.mark.parametrize(
    "others",
    [
        "time.sleep(60)",
        "while True: pass",  # computing, away from any communication
        "comm.Barrier()",  # inside MPI, without looking at anything else
    ],
)
def test_ranks_that_do_something_else_are_ended_too(tmp_path, others):
    ended = fail(tmp_path, "raise ValueError('the reason')", others)
    assert_one_traceback(ended.stderr, "ValueError: the reason")


def test_ranks_that_fail_at_once_end_with_a_traceback(tmp_path):
    ended = fail(tmp_path, "raise ValueError('the reason')", ranks=(0, 1, 2))
    assert "ValueError: the reason" in ended.stderr


def test_bad_input_that_only_one_rank_knows_of_ends_all_with_one_line(tmp_path):
    ended = fail(tmp_path, "raise InputError('model.path: gone')")
    assert ended.returncode == 2
    assert launching.problems(ended.stderr) == ["rank 1: model.path: gone"]
    assert "Traceback" not in ended.stderr


def test_no_rank_outlives_a_launcher_that_is_killed(tmp_path):
    """Ranks that wait for one another would do so for ever."""
    script, started = tmp_path / "trouble.py", tmp_path / "started"
    others = "collectives.barrier(comm) if comm.rank else time.sleep(100)"
    script.write_text(PROGRAM.format(trouble="time.sleep(100)", others=others, ranks=(1,)))
    command = launching.mpirun_command(RANKS, script, started)
    with subprocess.Popen(command, env=launching.environment(), cwd=tmp_path) as launcher:
        deadline = time.monotonic() + 60
        while not started.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        family = psutil.Process(launcher.pid).children(recursive=True)
        ranks = [process for process in family if str(script) in process.cmdline()]
        assert len(ranks) == RANKS
        for process in {launcher.pid: launcher, **{p.pid: p for p in family if p not in ranks}}.values():
            process.kill()
    try:
        assert launching.all_gone(script, within=SECONDS)
    finally:
        for process in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


@pytest.mark.parametrize("code", [0, 75])
def test_the_status_that_all_ranks_return_is_the_jobs(tmp_path, code):
    script = tmp_path / "fine.py"
    script.write_text(f"from mpies.ranks import launch\nlaunch.run(lambda comm, arguments: {code}, [])\n")
    ended = launching.mpirun(2, script, timeout=60)
    assert ended.returncode == code
    assert "mpies" not in ended.stderr


@pytest.mark.parametrize("missing", [pytest.param(0, marks=pytest.mark.long), 1])
def test_a_rank_that_hangs_is_given_up_and_named(tmp_path, missing):
    script = tmp_path / "hang.py"
    script.write_text(
        "import sys, time\n"
        "from mpi4py import MPI\n"
        "from mpies.ranks import collectives, launch\n"
        "collectives.host = lambda: ['alpha', 'beta', 'gamma'][MPI.COMM_WORLD.rank]\n"
        "def main(comm, arguments):\n"
        "    collectives.set_timeout(comm, 1)\n"
        f"    if comm.rank == {missing}:\n"
        "        time.sleep(100)\n"
        "    collectives.barrier(comm)\n"
        "    return 0\n"
        "launch.run(main, sys.argv[1:])\n"
    )
    ended = launching.mpirun(RANKS, script, timeout=60)
    assert ended.returncode not in (0, 2)
    assert launching.all_gone(script, within=SECONDS)
    said = " ".join(launching.problems(ended.stderr))
    assert f"rank {missing} on {['alpha', 'beta'][missing]}" in said
    assert "gamma" not in said and "Traceback" not in ended.stderr


@pytest.mark.parametrize("variable", ["SLURM_STEP_NUM_TASKS", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE"])
def test_singletons_under_a_launcher_of_another_mpi_are_refused(tmp_path, variable):
    """Four programs, each of which would believe to be the only rank, and write to the same files."""
    directory = tmp_path / "run"
    ended = launching.python(
        "-m", "mpies.train", f"run.directory={directory}", env={variable: "4"}, cwd=tmp_path, timeout=60
    )
    assert ended.returncode == 2
    assert len(launching.problems(ended.stderr)) == 1
    assert f"{variable}=4" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_world_of_one_is_fine_where_one_was_asked_for(tmp_path):
    script = tmp_path / "alone.py"
    script.write_text(
        "from mpies.ranks import launch\nlaunch.run(lambda comm, arguments: print(comm.size) or 0, [])\n"
    )
    ended = launching.run([sys.executable, str(script)], env={"SLURM_NTASKS": "1"}, cwd=tmp_path, timeout=60)
    assert (ended.returncode, ended.stdout) == (0, "1\n")


def test_in_an_allocation_of_several_tasks_a_launcher_may_start_one_rank(tmp_path):
    """What the allocation has is not what was started: mpirun -n 1, or python alone, mean one rank."""
    script = tmp_path / "alone.py"
    script.write_text(
        "from mpies.ranks import launch\nlaunch.run(lambda comm, arguments: print(comm.size) or 0, [])\n"
    )
    given = {"env": {"SLURM_NTASKS": "4"}, "cwd": tmp_path, "timeout": 60}
    for command in ([sys.executable, str(script)], launching.mpirun_command(1, script)):
        ended = launching.run(command, **given)
        assert (ended.returncode, ended.stdout) == (0, "1\n"), ended.stderr
    # srun that starts four which do not find one another.
    inside = {"env": {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4"}, "cwd": tmp_path, "timeout": 60}
    assert launching.run([sys.executable, str(script)], **inside).returncode == 2


def test_ctrl_c_before_signals_are_heard_is_told_in_a_line(tmp_path):
    ended = fail(tmp_path, "raise KeyboardInterrupt")
    assert ended.returncode == 130
    assert launching.problems(ended.stderr) == ["rank 1: interrupted"]


def test_os_exit_is_no_success(tmp_path):
    """MPICH's launcher would call it one."""
    ended = fail(tmp_path, "os._exit(0)")
    (line,) = launching.problems(ended.stderr)
    assert line.startswith("rank 1: ") and "os._exit(0)" in line and "trouble.py" in line


def test_processes_that_are_forked_may_leave_by_os_exit(tmp_path):
    script = tmp_path / "forks.py"
    script.write_text(
        "import os, sys\nfrom mpies.ranks import launch\n"
        "def main(comm, arguments):\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        os._exit(7)\n"
        "    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
        "    return 0\n"
        "launch.run(main, [])\n"
    )
    ended = launching.python(script, timeout=60)
    assert (ended.returncode, ended.stdout) == (0, "7\n"), ended.stderr


@pytest.mark.parametrize("ranks", [1, 2])
def test_threads_that_user_code_leaves_are_named_and_do_not_keep_the_job_alive(tmp_path, ranks):
    script = tmp_path / "threads.py"
    script.write_text(
        "import sys, threading, time\nfrom mpies.ranks import launch\n"
        "def main(comm, arguments):\n"
        "    threading.Thread(target=time.sleep, args=(1000,), name='poller').start()\n"
        "    return 0\n"
        "launch.run(main, [])\n"
    )
    start = time.time()
    ended = launching.mpirun(ranks, script, timeout=60)
    assert time.time() - start < 30
    assert ended.returncode == 0, ended.stderr
    said = launching.problems(ended.stderr)  # of the ranks that a launcher does not end with the first one
    assert 1 <= len(said) <= ranks and all("poller" in line for line in said)
    assert launching.all_gone(script, within=SECONDS)


def test_a_thread_that_ends_soon_is_waited_for(tmp_path):
    script = tmp_path / "threads.py"
    script.write_text(
        "import threading, time\nfrom mpies.ranks import launch\n"
        "def late():\n    time.sleep(1)\n    print('done', flush=True)\n"
        "def main(comm, arguments):\n    threading.Thread(target=late).start()\n    return 75\n"
        "launch.run(main, [])\n"
    )
    ended = launching.python(script, timeout=60)
    assert (ended.returncode, ended.stdout, launching.problems(ended.stderr)) == (75, "done\n", [])


def test_the_traceback_of_what_is_told_in_a_line_can_be_had(tmp_path):
    for wanted in ("", "1"):
        ended = launching.python(
            "-m", "mpies.train", "model.path=./none", env={"MPIES_TRACEBACK": wanted}, cwd=tmp_path
        )
        assert ended.returncode == 2
        assert len(launching.problems(ended.stderr)) == 1
        assert ("Traceback" in ended.stderr) == bool(wanted)
