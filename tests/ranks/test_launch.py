"""Starting and ending on one rank; what ends several is in test_failures.py."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import launching
import pytest

from mpies.errors import DivergedError, RefusedError
from mpies.ranks import collectives, launch

FAILING = """
import sys
from mpies.errors import InputError, StorageError
from mpies.ranks import launch

def main(comm, arguments):
    {trouble}

launch.run(main, [])
"""


@pytest.fixture
def environment(monkeypatch):
    """As without a launcher; `conduct` leaves nothing behind."""
    for variable in launch.LAUNCHER_SIZES + launch.LAUNCHER_RANKS:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    return monkeypatch


def status_of(main) -> int:
    return launch.conduct(main, ["a=1"])


@pytest.mark.parametrize(
    "variables, first",
    [
        ({}, True),
        ({"PMI_RANK": "0"}, True),
        ({"PMI_RANK": "3"}, False),
        ({"OMPI_COMM_WORLD_RANK": "1"}, False),
        ({"PALS_RANKID": "2"}, False),
        ({"SLURM_PROCID": "1"}, False),
        # Under mpirun in a Slurm job, Slurm's number is the node's.
        ({"OMPI_COMM_WORLD_RANK": "0", "SLURM_PROCID": "1"}, True),
        ({"PMI_RANK": "1", "SLURM_PROCID": "0"}, False),
    ],
)
def test_the_first_rank_is_known_from_the_launcher(environment, variables, first):
    for name, value in variables.items():
        environment.setenv(name, value)
    assert launch.is_first() == first


@pytest.mark.parametrize("status", [0, 75])
def test_main_gets_a_communicator_and_its_status_is_the_programs(environment, status):
    seen = []

    def main(comm, arguments):
        seen.append((comm.size, arguments, collectives.patience(comm).timeout))
        return status

    assert status_of(main) == status
    assert seen == [(1, ["a=1"], launch.START_TIMEOUT)]


@pytest.mark.parametrize(
    "error, status",
    [(RefusedError("es.sigma: no\nes.alpha: no"), 2), (DivergedError("es.sigma: no\nes.alpha: no"), 1)],
)
def test_an_error_that_all_ranks_know_of_is_told_in_its_lines(environment, capfd, error, status):
    def main(comm, arguments):
        raise error

    assert status_of(main) == status
    assert capfd.readouterr().err == "mpies: es.sigma: no\nmpies: es.alpha: no\n"


@pytest.mark.parametrize("variable", launch.LAUNCHER_SIZES)
def test_a_rank_alone_under_a_launcher_of_several_is_refused(environment, capfd, variable):
    environment.setenv(variable, "4")
    assert status_of(lambda comm, arguments: 0) == 2
    assert capfd.readouterr().err.startswith(f"mpies: {variable}=4, but this rank is alone: ")
    for size in ("1", ""):
        environment.setenv(variable, size)
        assert status_of(lambda comm, arguments: 0) == 0


def test_without_an_mpi_library_one_line_says_what_to_do(environment, capfd):
    import mpi4py.MPI

    environment.delattr(mpi4py, "MPI")
    environment.setitem(sys.modules, "mpi4py.MPI", None)
    assert status_of(lambda comm, arguments: 0) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("mpies: no MPI library (") and "pip install mpich" in line


def failed(folder: Path, trouble: str):
    script = folder / "failing.py"
    script.write_text(FAILING.format(trouble=trouble))
    return launching.python(script, cwd=folder, timeout=60)


@pytest.mark.parametrize(
    "trouble, status, line",
    [
        ("raise InputError('model.path: gone')", 2, "mpies: model.path: gone"),
        ("raise StorageError('run.h5: the disk is full')", 1, "mpies: run.h5: the disk is full"),
    ],
)
def test_an_error_that_one_rank_knows_of_is_one_line(tmp_path, trouble, status, line):
    ended = failed(tmp_path, trouble)
    assert ended.returncode == status
    assert ended.stderr.splitlines()[0] == line and "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    "trouble, status, last",
    [("1 / 0", 1, "ZeroDivisionError: division by zero"), ("sys.exit(256 + 3)", 3, "SystemExit: 259")],
)
def test_anything_else_is_a_failure_with_its_traceback(tmp_path, trouble, status, last):
    ended = failed(tmp_path, trouble)
    assert ended.returncode == status
    lines = ended.stderr.splitlines()
    assert lines[0] == f"mpies: rank 0 of 1 on {collectives.host()} failed and ends the job:"
    assert last in lines and f'  File "{tmp_path}/failing.py", line 7, in main' in lines
