"""Starting programs under mpirun, as a user does, from tests that run without MPI."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import psutil

from mpies.ranks.launch import LAUNCHER_SIZES

REPOSITORY = Path(__file__).resolve().parents[2]
DATA = REPOSITORY / "tests" / "data"


def environment(**changes: str) -> dict[str, str]:
    """This process's environment, ready for mpirun."""
    # A test inside a Slurm job is no part of that job's world.
    env = {key: value for key, value in os.environ.items() if key not in LAUNCHER_SIZES}
    # Open MPI refuses to run as root, as in a container, and to start more ranks than cores.
    env |= {
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    }
    try:
        metadata.distribution("mpies")
    except metadata.PackageNotFoundError:
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), env.get("PYTHONPATH")]))
    return env | changes


def mpirun_command(n: int, *arguments: str | Path) -> list[str]:
    """mpirun -n N python ARGUMENTS, with the mpirun of this environment, or else of the machine."""
    beside = Path(sys.executable).with_name("mpirun")
    launcher = str(beside) if beside.exists() else shutil.which("mpirun")
    assert launcher, "there is no mpirun, neither beside python nor on PATH"
    return [launcher, "-n", str(n), sys.executable, *map(str, arguments)]


def mpirun(
    n: int,
    *arguments: str | Path,
    env: dict[str, str] | None = None,
    cwd: Path | None = None,
    timeout: float = 120,
) -> subprocess.CompletedProcess[str]:
    """Run it to its end. Whatever runs after `timeout` seconds is killed, and TimeoutExpired raised."""
    return run(mpirun_command(n, *arguments), env=env, cwd=cwd, timeout=timeout)


def load_script(name: str):
    """A script of docs/, as a module."""
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def python(*arguments: str | Path, env=None, cwd=None, timeout=120) -> subprocess.CompletedProcess[str]:
    """The same without a launcher."""
    return run([sys.executable, *map(str, arguments)], env=env, cwd=cwd, timeout=timeout)


def run(command: list[str], *, env, cwd, timeout) -> subprocess.CompletedProcess[str]:
    with subprocess.Popen(
        command,
        env=environment(**(env or {})),
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            kill_tree(process.pid)
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def output_of(*command: str | Path, cwd: Path, timeout: float = 800, **environment: str) -> str:
    """What a program prints, which has to succeed."""
    done = run(list(map(str, command)), env=environment, cwd=cwd, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def kill_tree(pid: int) -> None:
    """Kill a launcher and everything below it."""
    try:
        root = psutil.Process(pid)
        doomed = [*root.children(recursive=True), root]
    except psutil.NoSuchProcess:
        return
    for process in doomed:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def all_gone(word: str | Path, within: float) -> bool:
    """Is no process left that has `word` as an argument, in so many seconds from now?"""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        lines = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
        if not any(str(word) in line for line in lines):
            return True
        time.sleep(0.1)
    return False


def is_open_mpi() -> bool:
    command = [mpirun_command(1)[0], "--version"]
    return "Open MPI" in subprocess.run(command, capture_output=True, text=True).stdout


def problems(stderr: str) -> list[str]:
    """What the program, not the launcher, says is wrong: the lines that begin with 'mpies: '."""
    return [line.removeprefix("mpies: ") for line in stderr.splitlines() if line.startswith("mpies: ")]
