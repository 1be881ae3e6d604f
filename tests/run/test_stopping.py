"""Stopping early: signals and time limits end a job in order, resumable, with exit code 75."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

import launching
import pytest

from jobs import ENDLESS, Job, arguments, assert_same_run, committed, train
from mpies import config
from mpies.errors import InputError
from mpies.run.stopping import Stop, announce
from mpies.runfile import open_for_reading
from mpies.signals import REPEATABLE, SIGNALS
from mpies.time_limit import seconds_of

STOPPED = 75
ENOUGH = 12  # generations of the run that all others are compared with
SIGNAL = pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)

pytestmark = pytest.mark.timed

# How much time there is


@pytest.mark.parametrize(
    "limit, seconds",
    [
        ("none", None),
        ("0", 0),
        ("90", 90 * 60),
        ("0:20", 20),
        ("90:30", 90 * 60 + 30),
        ("2:00:00", 2 * 3600),
        ("02:03:04", 2 * 3600 + 3 * 60 + 4),
        ("1-0", 86400),
        ("1-2", 26 * 3600),
        ("1-02:03", 26 * 3600 + 3 * 60),
        ("1-02:03:04", 26 * 3600 + 3 * 60 + 4),
        ("14-00:00:00", 14 * 86400),
    ],
)
def test_limits_are_read_as_slurm_reads_them(limit, seconds):
    assert seconds_of(limit) == seconds


@pytest.mark.parametrize(
    "limit", ["", "soon", "1:2:3:4", "-5", "1.5", "1-", "-1:00", "1-2-3", "90 minutes", "1:", ":30"]
)
def test_other_limits_are_refused(limit):
    with pytest.raises(
        InputError, match=r"^run\.time_limit: given .*allowed is auto, none, minutes"
    ) as refused:
        seconds_of(limit)
    assert repr(limit) in str(refused.value)


@pytest.mark.parametrize(
    "text, value", [("0:20", "0:20"), ("1-02:03:04", "1-02:03:04"), ("90", "90"), ("none", "none")]
)
def test_a_limit_on_the_command_line_is_not_taken_for_another_number(text, value):
    """YAML's older rules read 1:30 as ninety."""
    settings = config.load([f"run.time_limit={text}"])
    assert settings.run.time_limit == value


def test_a_limit_that_is_none_is_refused_with_the_other_settings():
    with pytest.raises(InputError) as refused:
        config.load(["run.time_limit=1.5", "es.sigma=0"])
    lines = str(refused.value).splitlines()
    assert len(lines) == 2
    assert any(line.startswith("run.time_limit: given '1.5'") for line in lines)


@pytest.fixture
def slurm(monkeypatch, tmp_path):
    """slurm(script): as inside a job, whose `squeue` is that shell script."""
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)

    def answers(script: str) -> None:
        squeue = tmp_path / "squeue"
        squeue.write_text(f"#!/bin/sh\n{script}\n")
        squeue.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    return answers


def test_auto_outside_slurm_is_no_limit(monkeypatch, slurm):
    slurm("echo 10:00")
    monkeypatch.delenv("SLURM_JOB_ID")
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 1000))
    assert seconds_of("auto") is None


def test_auto_is_the_end_of_the_slurm_job(monkeypatch, slurm):
    slurm("echo 10:00")  # the environment is believed first, which costs the controller nothing
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 1000))
    assert 995 < seconds_of("auto") <= 1000


@pytest.mark.parametrize(
    "script, seconds",
    [
        ("echo 1-02:03:04", 26 * 3600 + 3 * 60 + 4),
        ("echo 2:03:04", 2 * 3600 + 3 * 60 + 4),
        ("echo '     59:30'", 59 * 60 + 30),
        ("echo 0:00", 0),
        ("echo UNLIMITED", None),
        ("echo NOT_SET", None),
        ("echo INVALID", None),
        ("true", None),
        ("echo slurm_load_jobs error: Unable to contact slurm controller >&2; exit 1", None),
        ("kill -9 $$", None),
    ],
)
def test_auto_asks_squeue_where_the_environment_does_not_say(slurm, script, seconds):
    slurm(script)
    assert seconds_of("auto") == seconds


def test_auto_asks_for_this_job_and_the_time_that_is_left(slurm, tmp_path):
    slurm(f'echo "$@" > {tmp_path}/asked; echo 10:00')
    assert seconds_of("auto") == 600
    asked = (tmp_path / "asked").read_text().split()
    assert asked[asked.index("--job") + 1] == "4711"
    assert asked[asked.index("--format") + 1] == "%L"


def test_auto_without_squeue_is_no_limit(monkeypatch, slurm, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert seconds_of("auto") is None


# What still fits


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def raised():
    """raised(number): this process gets that signal. Its handlers are put back afterwards."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield lambda number: os.kill(os.getpid(), number)
    for number, handler in before.items():
        signal.signal(number, handler)


def test_without_limit_and_signal_everything_fits(clock):
    stop = Stop(None, grace=30, clock=clock)
    clock.now += 1e9
    assert stop.fits(1e9)
    assert not stop.requested and stop.reason == ""


def test_nothing_fits_that_would_end_after_the_limit(clock):
    stop = Stop(100, grace=30, clock=clock)
    for passed in range(0, 120, 5):
        clock.now = Clock.now + passed
        for work in range(0, 120, 5):
            if stop.fits(work):
                assert passed + work < 100


def test_what_fits_easily_is_done(clock):
    stop = Stop(100, grace=30, clock=clock)
    assert stop.fits(60)
    clock.now += 50
    assert stop.fits(25)
    assert stop.reason == ""
    assert not stop.fits(60)
    assert stop.reason == "the time limit"
    assert not stop.requested, "the others find out in their own time"


@SIGNAL
def test_a_signal_asks_for_a_stop_within_the_grace(clock, raised, number):
    stop = Stop(None, grace=30, clock=clock)
    stop.listen()
    clock.now += 1000
    assert not stop.requested
    raised(number)
    assert stop.requested
    assert stop.reason == f"signal {number.name}"
    assert stop.fits(15) and not stop.fits(30)
    clock.now += 29
    assert not stop.fits(0.01)
    assert stop.reason == f"signal {number.name}"


def test_ctrl_c_is_heard(clock, raised, capfd):
    """Once, and by whom it is said to."""
    Stop(None, grace=30, clock=clock, tells=True).listen()
    raised(signal.SIGINT)
    assert capfd.readouterr().err.strip().startswith("mpies: stops after this generation; Ctrl-C once more")
    raised(signal.SIGINT)  # an echo
    Stop(None, grace=30, clock=clock).listen()
    raised(signal.SIGINT)
    Stop(None, grace=30, clock=clock, tells=True).listen()
    raised(signal.SIGUSR1)
    assert capfd.readouterr().err == ""


@SIGNAL
def test_after_a_signal_a_known_limit_counts_and_not_the_grace(clock, raised, number):
    stop = Stop(1000, grace=30, clock=clock)
    stop.listen()
    raised(number)
    # But not after SIGTERM, since batch systems kill soon after it.
    assert stop.fits(500) == (number != signal.SIGTERM)
    assert stop.fits(15)
    clock.now += 900
    assert not stop.fits(90)


SIGNALLED_TWICE = """
import os, time
from mpies.run.stopping import Stop
stop = Stop(None, 30)
stop.listen()
os.kill(os.getpid(), 10)
print(stop.reason, flush=True)
time.sleep(0.3)  # sooner, it would be taken for an echo of the first
os.kill(os.getpid(), {number})
print("still here")
"""
# The C library sleeps for a second (the exit code) when Python is gone, as MPI's end may.
SIGNALLED_AT_THE_END = """
import ctypes, subprocess, sys
from mpies.run.stopping import Stop
Stop(None, 30).listen()
libc = ctypes.CDLL(None)
libc.on_exit(ctypes.cast(libc.sleep, ctypes.c_void_p), None)
quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
subprocess.Popen(["sh", "-c", "while kill -{number} $PPID; do sleep 0.1; done"], **quiet)
sys.exit(1)
"""


def test_the_job_script_is_told_that_signals_are_heard(monkeypatch, tmp_path):
    for name in ("listening", "no/such/folder"):
        monkeypatch.setenv("MPIES_LISTENING", str(tmp_path / name))
        announce()
    monkeypatch.delenv("MPIES_LISTENING")
    announce()
    assert [path.name for path in tmp_path.iterdir()] == ["listening"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_second_signal_ends_at_once(number):
    """Also if the first one was another."""
    ended = launching.python("-c", SIGNALLED_TWICE.format(number=int(number)))
    assert (ended.returncode, ended.stdout, ended.stderr) == (-number, "signal SIGUSR1\n", "")


@pytest.mark.parametrize("number", REPEATABLE, ids=lambda number: number.name)
def test_what_batch_scripts_send_may_come_again(number):
    again = launching.python("-c", SIGNALLED_TWICE.format(number=int(number)))
    assert (again.returncode, again.stdout, again.stderr) == (0, "signal SIGUSR1\nstill here\n", "")
    at_the_end = launching.python("-c", SIGNALLED_AT_THE_END.format(number=int(number)))
    assert at_the_end.returncode == 1


def test_a_signal_that_is_delivered_twice_is_one(clock, raised):
    """By the terminal and by the launcher, for example."""
    stop = Stop(None, grace=30, clock=clock)
    stop.listen()
    raised(signal.SIGINT)
    raised(signal.SIGINT)
    assert stop.requested


# Jobs

# A member of this takes a quarter of a second, a generation a minute.
LONG = {"engine__max_new_tokens": 160, "es__population": 500}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tiny_model) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    train(2, *arguments(tiny_model(), folder, ENOUGH))
    return folder


def send(job: Job, number: signal.Signals, to: str) -> None:
    if to == "the launcher":
        job.process.send_signal(number)
        return
    for rank, process in enumerate(job.ranks()):
        if to in ("all ranks", f"rank {rank}"):
            process.send_signal(number)


def stopping_line(job: Job) -> tuple[str, int]:
    """Why the job says that it stopped, and after which generation."""
    (line,) = [line for line in job.lines if line.startswith("stopped by ")]
    assert line.endswith("; the same command goes on from there")
    why, done = re.match(r"stopped by (.*) after generation (\d+) of ", line).groups()
    return why, int(done)


# MPICH's mpirun passes on SIGUSR1, SIGTERM and SIGINT; a SIGUSR2 ends it. Open MPI's passes on SIGUSR1
# and SIGUSR2; after the other two it kills the ranks. So SIGUSR1 is the one to use, and srun and kill
# can send any to the ranks themselves.
@pytest.mark.launch
@pytest.mark.parametrize(
    "number, to, why",
    [
        (signal.SIGUSR1, "the launcher", "signal SIGUSR1"),
        pytest.param(signal.SIGUSR2, "rank 1", "signal SIGUSR2 (rank 1 on ", marks=pytest.mark.long),
        (signal.SIGTERM, "all ranks", "signal SIGTERM"),
        (signal.SIGINT, "the launcher", "signal SIGINT"),
    ],
    ids=["SIGUSR1-launcher", "SIGUSR2-rank", "SIGTERM-ranks", "SIGINT-launcher"],
)
def test_a_signal_stops_the_job_resumably(tmp_path, tiny_model, uninterrupted, number, to, why):
    if (number, to) == (signal.SIGINT, "the launcher") and launching.is_open_mpi():
        pytest.skip("Open MPI kills the ranks after this one")
    with Job(2, *arguments(tiny_model(), tmp_path, ENDLESS)) as job:
        job.wait_for("generation 2/")
        send(job, number, to)
        assert job.end(30) == STOPPED, job.output
        said, done = stopping_line(job)
        assert why in said and done == committed(tmp_path)
        assert "Traceback" not in job.output and "TERMINATION" not in job.output
    assert 2 <= committed(tmp_path) < ENOUGH
    assert_same_run(tmp_path, uninterrupted, committed(tmp_path))
    if number == signal.SIGUSR1:  # one resumption shows it for all
        train(1, *arguments(tiny_model(), tmp_path, ENOUGH))
        assert_same_run(tmp_path, uninterrupted, ENOUGH)


def in_the_first_generation(job: Job, folder: Path) -> None:
    """Wait until the job has made its first evaluation."""
    job.wait_for("run file")
    deadline = time.monotonic() + 60
    while True:
        assert time.monotonic() < deadline and job.process.poll() is None, job.output
        if (folder / "run.h5").exists():
            with open_for_reading(folder / "run.h5") as file:
                if len(file["evaluation/generation"]) == 2:
                    return
        time.sleep(0.05)


@pytest.mark.launch
def test_a_generation_too_long_for_the_grace_is_left_in_its_middle(tmp_path, tiny_model):
    with Job(2, *arguments(tiny_model(), tmp_path, ENDLESS, **LONG, run__grace=10)) as job:
        in_the_first_generation(job, tmp_path)
        time.sleep(0.5)
        assert job.process.poll() is None
        start = time.monotonic()
        send(job, signal.SIGUSR1, "the launcher")
        assert job.end(30) == STOPPED, job.output
        assert time.monotonic() - start < 10
        why, done = stopping_line(job)
        assert "signal SIGUSR1" in why and done == 0
    assert committed(tmp_path) == 0


@pytest.mark.launch
def test_a_second_signal_ends_the_job_at_once(tmp_path, tiny_model):
    with Job(2, *arguments(tiny_model(), tmp_path, ENDLESS, **LONG, run__grace=1000)) as job:
        in_the_first_generation(job, tmp_path)
        send(job, signal.SIGUSR1, "the launcher")
        time.sleep(1.5)
        assert job.process.poll() is None, "there was time for the generation"
        start = time.monotonic()
        send(job, signal.SIGTERM, "all ranks")
        assert job.end(30) not in (0, 2, STOPPED)
        assert time.monotonic() - start < 5
        assert "stopped by" not in job.output
    assert committed(tmp_path) == 0


@pytest.mark.launch
def test_a_generation_too_long_for_the_limit_is_left_in_its_middle(tmp_path, tiny_model):
    with Job(2, *arguments(tiny_model(), tmp_path, ENDLESS, **LONG, run__time_limit="0:20")) as job:
        job.wait_for("loading")
        start = time.monotonic()
        assert job.end(60) == STOPPED, job.output
        assert time.monotonic() - start < 20
        why, done = stopping_line(job)
        assert "the time limit" in why and done == 0
    assert committed(tmp_path) == 0


@pytest.mark.launch
def test_a_generation_that_would_not_fit_the_limit_is_not_begun(tmp_path, tiny_model):
    settings = arguments(tiny_model(), tmp_path, ENDLESS, es__population=30, run__time_limit="0:20")
    with Job(2, *settings) as job:
        job.wait_for("loading")
        start = time.monotonic()
        assert job.end(60) == STOPPED, job.output
        passed = time.monotonic() - start
    why, done = stopping_line(job)
    assert "the time limit" in why
    assert committed(tmp_path) == done > 0
    assert sum(line.startswith("generation ") for line in job.lines) == done
    # Used, but not overrun: a generation takes about a second.
    assert 5 < passed < 20  # of which the start takes some


# A reward that takes its time for every answer to a held-out prompt.
SLOW = """
import os, time

def slow(prompts, completions, held_out, **columns):
    time.sleep(float(os.environ["SECONDS_AN_ANSWER"]) * sum(held_out))
    return [-float(len(completion)) for completion in completions]
"""


@pytest.mark.long
@pytest.mark.launch
def test_an_evaluation_that_does_not_fit_the_time_limit_is_left_to_the_next_start(
    tmp_path, tiny_model, monkeypatch
):
    """200 answers of half a second in batches of two; the job has 40 s for everything."""
    (tmp_path / "slow.py").write_text(SLOW)
    for name, many in (("train", 2), ("held", 200)):
        rows = [json.dumps({"prompt": f"{i}?", "held_out": name == "held"}) for i in range(many)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    data = {
        f"task__{split}_data": tmp_path / f"{name}.jsonl"
        for split, name in (("train", "train"), ("eval", "held"))
    }
    words = arguments(
        tiny_model(),
        tmp_path / "run",
        0,
        task__reward=f"{tmp_path}/slow.py:slow",
        engine__batch_size=2,
        **data,
    )
    monkeypatch.setenv("SECONDS_AN_ANSWER", "0.5")
    start = time.monotonic()
    with Job(1, *words, "run.time_limit=0:40") as job:
        assert job.end(90) == STOPPED, job.output
        assert "the time limit" in job.output
    assert time.monotonic() - start < 60
    assert "held_out" not in splits_evaluated(tmp_path / "run")
    monkeypatch.setenv("SECONDS_AN_ANSWER", "0")
    train(1, *words)
    assert "held_out" in splits_evaluated(tmp_path / "run")


def splits_evaluated(folder: Path) -> list[str]:
    with open_for_reading(folder / "run.h5") as file:
        return file["evaluation/split"].asstr()[:].tolist()
