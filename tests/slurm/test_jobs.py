"""The job scripts on a real Slurm: run, be signalled, requeue, go on, fail; nothing is left behind."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import h5py
import launching
import psutil
import pytest
from launching import is_open_mpi

from jobs import ENDLESS, arguments, assert_same_run, committed

SRUN = "srun --mpi=pmi2"
ACROSS = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1")  # one rank on each node
HERE = ("--ntasks-per-node=2", "--cpus-per-task=1")

needs_pmi2 = pytest.mark.skipif(
    is_open_mpi(), reason="this Slurm has PMI-2 only, which Open MPI does not speak"
)


def rank_processes(word: str) -> list[psutil.Process]:
    """Python processes that have the word as an argument, ranks in their order."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            line, environment = process.cmdline(), process.environ()
            rank = environment.get("PMI_RANK", environment.get("OMPI_COMM_WORLD_RANK"))
            if word in line and "python" in line[0] and rank is not None:
                found.append((int(rank), process))
    return [process for _, process in sorted(found, key=lambda pair: pair[0])]


def starts(folder: Path) -> int:
    """How often a job began to write the run file."""
    with h5py.File(folder / "run.h5", "r", locking=False) as file:
        return len(file["start/generation"])


def noted(folder: Path) -> dict[str, float]:
    """Split -> reward of the last evaluation in the run file."""
    with h5py.File(folder / "run.h5", "r") as file:
        table = file["evaluation"]
        return dict(zip(table["split"].asstr()[:], table["reward_mean"][:].tolist(), strict=True))


def evaluated(file: Path) -> dict[str, float]:
    """The same of mpies.evaluate's figures."""
    splits = json.loads(file.read_text())["splits"]
    return {name: split["figures"]["reward"]["mean"] for name, split in splits.items()}


# A reward as slow, or as unreliable, as a judge elsewhere may be.
REWARD = """
import ctypes, os, time
from mpi4py import MPI

calls = []

def judge(prompts, completions, **columns):
    calls.append(1)
    time.sleep(float(os.environ.get("JUDGE_SECONDS", 0)))
    if MPI.COMM_WORLD.rank == 1 and len(calls) == int(os.environ.get("JUDGE_FAILS", 0)):
        raise ConnectionError("the judge does not answer")
    if len(calls) == int(os.environ.get("JUDGE_LEAVES", 0)):
        ctypes.CDLL(None)._exit(0)
    return [-float(sum(map(ord, c)) % 100) for c in completions]
"""


def judged(site) -> list[str]:
    """Settings of a task with that reward."""
    (site.folder / "rewards.py").write_text(REWARD)
    (site.folder / "prompts.jsonl").write_text('{"prompt": "3 + 5 ="}\n{"prompt": "Can penguins fly?"}\n')
    return ["task.name=custom", "task.train_data=prompts.jsonl", "task.reward=rewards.py:judge"]


def test_the_same_run_by_mpirun_and_by_srun_on_two_nodes(site, tiny_model):
    one, two = site.folder / "one", site.folder / "two"
    job = site.submit("quickstart.sbatch", *arguments(tiny_model(), one, 4))
    assert job.end() == [("COMPLETED", "0:0")], job.output
    assert re.search(r"== \S+ job \d+ quickstart, restart 0 of 20\n== 2 ranks on n1 by mpirun\n", job.output)
    assert re.search(r"== Python 3\.\d+.*, mpi4py \S+, torch \S+, transformers \S+; .*MPI", job.output)
    assert (one / "model" / "model.safetensors").exists()
    launcher = "mpirun" if is_open_mpi() else SRUN
    job = site.submit("train.sbatch", *arguments(tiny_model(), two, 4), options=ACROSS, LAUNCHER=launcher)
    assert job.end() == [("COMPLETED", "0:0")], job.output
    assert f"2 ranks on n[1-2] by {launcher}" in job.output
    assert_same_run(one, two, 4)
    job = site.submit("evaluate.sbatch", two, "--json", "figures.json", options=ACROSS)
    assert job.end() == [("COMPLETED", "0:0")], job.output
    assert noted(two) == evaluated(site.folder / "figures.json")


@pytest.mark.timeout(600)
def test_a_run_longer_than_its_wall_time_ends_as_if_it_had_none(site, tiny_model):
    """A minute's job is signalled, ends with 75, is requeued, goes on, and ends with 0."""
    generations, parts, whole = 60, site.folder / "parts", site.folder / "whole"
    # Two members a rank and generation, so it takes more than the minute, however fast the machine is.
    es = {"es__population": 4, "es__perturbation": "full"}
    words = [*arguments(tiny_model(), parts, generations, **es), *judged(site), "run.time_limit=none"]
    # Half a minute before its end or more: Slurm looks at its jobs' time twice a minute.
    wall = ("--time=1", "--signal=B:USR1@5")
    job = site.submit("quickstart.sbatch", *words, options=wall, JUDGE_SECONDS="0.5")
    assert job.end(400) == [("COMPLETED", "0:0")], job.output
    hops = job.restarts
    assert hops >= 1
    assert len(re.findall(r"exit code 75\n== requeued\n", job.output)) == hops
    assert job.output.count("\nstopped by signal SIGUSR1 after") == hops
    assert job.output.count("resuming after generation") == hops
    assert starts(parts) == hops + 1
    job = site.submit("quickstart.sbatch", *words, f"run.directory={whole}")
    assert job.end() == [("COMPLETED", "0:0")], job.output
    assert starts(whole) == 1
    assert_same_run(parts, whole, generations)


@pytest.mark.parametrize("launcher", ["mpirun", pytest.param(SRUN, marks=needs_pmi2)])
def test_a_signal_is_heard_at_any_time_and_a_job_requeued_as_often_as_allowed(site, tiny_model, launcher):
    folder = site.folder / "run"
    words = arguments(tiny_model(), folder, ENDLESS)
    job = site.submit("quickstart.sbatch", *words, MAX_RESTARTS="1", LAUNCHER=launcher)
    job.wait_for("restart 0 of 1")  # no rank is there yet
    # What --signal=B:USR1@... does when the time comes.
    site.cluster.command("scancel", "--batch", "--signal=USR1", job.number)
    # Sooner than the script sends it unasked: it was told that the ranks listen.
    job.wait_for("\n== requeued", timeout=60)
    assert "exit code 75" in job.output and "\ngeneration 2/" not in job.output
    job.wait_for("\ngeneration 2/")
    site.cluster.command("scancel", "--batch", "--signal=USR1", job.number)
    assert job.end() == [("FAILED", "75:0")], job.output
    assert job.restarts == 1
    assert "not requeued: 1 restarts are the limit" in job.output
    assert job.output.count("stopped by signal SIGUSR1") == 2
    assert launching.all_gone(f"run.directory={folder}", within=10)


def test_a_sweep_gives_a_run_for_every_line(site, tiny_model):
    seeds = (7, 8, 9)
    (site.folder / "seeds.txt").write_text("".join(f"es.seed={seed} run.keep_samples=0\n" for seed in seeds))
    config = [word for word in arguments(tiny_model(), Path(), 3) if not word.startswith("run.directory")]
    options = ("--array=1-3", "--ntasks-per-node=1", "--cpus-per-task=1")
    job = site.submit("sweep.sbatch", "seeds.txt", *config, options=options)
    assert job.end() == [("COMPLETED", "0:0")] * 3, job.output
    rewards = set()
    for line, seed in enumerate(seeds, 1):
        with h5py.File(site.folder / "runs" / "seeds" / str(line) / "run.h5", "r") as file:
            assert f"seed: {seed}\n" in file["config/000"].asstr()[()]
            assert file.attrs["generations_committed"] == 3
            rewards.add(tuple(file["member/reward"][:].ravel()))
    assert len(rewards) == 3
    assert len(list(site.folder.glob(f"slurm-sweep-{job.number}_?.out"))) == 3
    runs = sorted((site.folder / "runs" / "seeds").iterdir())
    compared = launching.python("-m", "mpies.analyze", "compare", *runs)
    assert compared.returncode == 0, compared.stderr


def test_a_sweep_without_a_line_for_a_task_fails_with_one_line(site):
    (site.folder / "seeds.txt").write_text("es.seed=7\n")
    job = site.submit("sweep.sbatch", "seeds.txt", options=("--array=2", *HERE))
    assert job.end() == [("FAILED", "2:0")]
    assert launching.problems(job.output) == [
        "seeds.txt has no settings in line 2; submit it with --array=1-N for N lines"
    ]


@pytest.mark.parametrize("launcher", ["mpirun", pytest.param(SRUN, marks=needs_pmi2)])
def test_a_killed_rank_ends_the_job(site, tiny_model, launcher):
    """As the kernel does when a node's memory is full."""
    folder = site.folder / "run"
    words = arguments(tiny_model(), folder, ENDLESS)
    job = site.submit("quickstart.sbatch", *words, options=ACROSS, LAUNCHER=launcher)
    job.wait_for("\ngeneration 2/")
    ranks = rank_processes(f"run.directory={folder}")
    assert len(ranks) == 2
    ranks[1].send_signal(signal.SIGKILL)
    ((state, code),) = job.end(90)
    assert state == "FAILED" and code not in ("0:0", "2:0", "75:0"), job.output
    assert job.restarts == 0
    assert launching.all_gone(f"run.directory={folder}", within=10)
    assert committed(folder) >= 2


@needs_pmi2
def test_a_job_that_was_killed_can_be_requeued_under_srun(site, tiny_model):
    """MPICH names its shared memory after the step; what the kill leaves is not taken for the new one."""
    folder = site.folder / "run"
    job = site.submit("quickstart.sbatch", *arguments(tiny_model(), folder, ENDLESS), LAUNCHER=SRUN)
    job.wait_for("\ngeneration 2/")
    for rank in rank_processes(f"run.directory={folder}"):
        rank.send_signal(signal.SIGKILL)
    assert job.end()[0][0] == "FAILED", job.output
    site.cluster.command("scontrol", "requeue", job.number)
    job.wait_for("resuming after generation")


def test_a_node_that_goes_down_costs_a_restart_and_scancel_ends_it_for_good(site, tiny_model):
    folder = site.folder / "run"
    words = arguments(tiny_model(), folder, ENDLESS)
    job = site.submit("train.sbatch", *words, options=ACROSS)
    job.wait_for("\ngeneration 2/")
    site.cluster.command("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
    deadline = time.monotonic() + 60
    while not job.restarts:
        assert time.monotonic() < deadline, job.facts()
        time.sleep(0.3)
    # Unless it came back by itself, its daemon being alive.
    with contextlib.suppress(subprocess.SubprocessError):
        site.cluster.command("scontrol", "update", "NodeName=n2", "State=RESUME")
    job.wait_for("resuming after generation")
    job.wait_for("\ngeneration ", job.output.count("\ngeneration ") + 2)
    assert starts(folder) == 2
    site.cluster.command("scancel", job.number)
    ((state, _),) = job.end(60)
    assert state == "CANCELLED"
    assert launching.all_gone(f"run.directory={folder}", within=10)
    time.sleep(3)
    assert (job.restarts, job.facts()[0]["JobState"]) == (1, "CANCELLED"), "it must not come back"


@pytest.mark.parametrize("launcher", ["mpirun", pytest.param(SRUN, marks=needs_pmi2)])
def test_a_failing_reward_function_ends_the_job_with_its_traceback(site, tiny_model, launcher):
    folder = site.folder / "run"
    words = [*arguments(tiny_model(), folder, ENDLESS), *judged(site)]
    job = site.submit("quickstart.sbatch", *words, LAUNCHER=launcher, JUDGE_FAILS="9")
    ((state, code),) = job.end()
    assert state == "FAILED" and code not in ("0:0", "2:0", "75:0"), job.output
    assert job.restarts == 0
    assert job.output.count("\nConnectionError: the judge does not answer") == 1
    assert "rank 1 of 2" in job.output
    assert launching.all_gone(f"run.directory={folder}", within=10)


@contextlib.contextmanager
def listening():
    """A port, and the connections that were made to it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        callers = []

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    callers.append(connection)
                    connection.close()

        threading.Thread(target=accept, daemon=True).start()
        yield server.getsockname()[1], callers
        server.shutdown(socket.SHUT_RDWR)


def test_bad_input_fails_at_once_and_is_not_requeued(site, tiny_model):
    words = arguments(tiny_model(), site.folder / "run", 4)
    with listening() as (port, callers):
        address = f"http://127.0.0.1:{port}"
        away = {"HF_ENDPOINT": address, "HTTP_PROXY": address, "HTTPS_PROXY": address}
        jobs = {
            "es.sigma: given -1": site.submit("quickstart.sbatch", *words, "es.sigma=-1"),
            "model.path: cannot load org/none: there is no such folder, and it is not in the local Hugging": (
                site.submit("quickstart.sbatch", *words, "model.path=org/none", **away)
            ),
            "SLURM_STEP_NUM_TASKS=2, but this rank is alone": site.submit(
                "quickstart.sbatch", *words, LAUNCHER="srun --mpi=none"
            ),
        }
        for problem, job in jobs.items():
            assert job.end() == [("FAILED", "2:0")], job.output
            assert job.restarts == 0
            said = launching.problems(job.output)
            assert said and all(line.startswith(problem) for line in said), said
            assert "Traceback" not in job.output
            assert len(said) == 1 or "none" in problem or "alone" in problem
        assert callers == [], "no job may reach for a hub"
    assert not (site.folder / "run").exists()


def test_time_limit_auto_is_the_end_of_the_job(site):
    (site.folder / "jobs" / "left.sbatch").write_text(
        "#!/bin/bash\n#SBATCH --output=slurm-left-%j.out\nsource jobs/env.sh\n"
        "python -c \"from mpies.time_limit import seconds_of; print('left', seconds_of('auto'))\"\n"
    )
    limited = site.submit("left.sbatch", options=("--time=4",))
    assert limited.end() == [("COMPLETED", "0:0")], limited.output
    left = float(re.search(r"left (\S+)", limited.output)[1])
    assert 4 * 60 - 30 < left <= 4 * 60


HELP = """#!/bin/bash
#SBATCH --output=slurm-help-%j.out
source jobs/env.sh
$1 python -m mpies.train --help
"""


@pytest.mark.parametrize("launcher", ["mpirun", pytest.param(SRUN, marks=needs_pmi2)])
def test_help_is_printed_once(site, launcher):
    (site.folder / "jobs" / "help.sbatch").write_text(HELP.replace("$1", launcher))
    job = site.submit("help.sbatch", options=ACROSS)
    assert job.end() == [("COMPLETED", "0:0")], job.output
    assert job.output.count("run.time_limit:") == 1


@pytest.mark.timeout(400)
def test_check_tells_before_the_job_does(site, tiny_model):
    words = arguments(tiny_model(), site.folder / "run", 1000)
    good = site.submit("check.sbatch", *words, "run.time_limit=1:00:00", options=ACROSS)
    bad = site.submit("check.sbatch", *words, "run.time_limit=0:05", options=ACROSS)
    assert good.end() == [("COMPLETED", "0:0")], good.output
    assert "\nverdict: this job would run" in good.output
    assert bad.end() == [("FAILED", "2:0")], bad.output
    assert "\nverdict: this job would fail" in bad.output
    (problem,) = launching.problems(bad.output)
    assert problem.startswith("run.time_limit: not one generation")
    assert not (site.folder / "run").exists() and not list(site.folder.glob(".mpies*"))


def test_a_rank_that_native_code_ends_is_no_success(site, tiny_model):
    """A launcher calls it one: an exit code of 0 is compared with what the run came to."""
    folder = site.folder / "run"
    words = [*arguments(tiny_model(), folder, ENDLESS), *judged(site)]
    job = site.submit("quickstart.sbatch", *words, options=("--ntasks=1",), JUDGE_LEAVES="9")
    assert job.end() == [("FAILED", "1:0")], job.output
    assert "== exit code 0, but the run is not complete: a rank left without a word\n" in job.output
    assert job.restarts == 0
