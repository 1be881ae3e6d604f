"""Training jobs of a tiny model under mpirun: started, watched, killed, compared."""

from __future__ import annotations

import subprocess
import threading
import time
from pathlib import Path

import h5py
import launching
import psutil
import pytest

# Large steps, so that the random model's rewards differ between members in every generation, of
# which one takes a tenth of a second.
SETTINGS = {
    "model.dtype": "float32",
    "model.device": "cpu",
    "es.population": 5,
    "es.antithetic": "false",
    "es.perturbation": "full",
    "es.sigma": 0.3,
    "es.alpha": 0.3,
    "engine.max_new_tokens": 16,
    "run.evaluate_every": 4,
    "run.progress": "lines",
}
ENDLESS = 10**6

# How the names of columns begin that hold times and places. All others are the same, interrupted or not, on
# any number of ranks.
VARYING = ("seconds", "rank", "imbalance", "bytes", "checksum")


def arguments(model: Path, directory: Path, generations: int, **changes: object) -> list[str]:
    """A training command's settings; changes as section__key=value."""
    values = {
        # Of the tasks that come along, the one with the fewest prompts.
        "task.name": "custom" if "task__reward" in changes else "conciseness",
        **SETTINGS,
        "model.path": model,
        "run.directory": directory,
        "es.generations": generations,
        **{key.replace("__", "."): value for key, value in changes.items()},
    }
    return [f"{key}={value}" for key, value in values.items()]


class Job:
    """A program under mpirun, started and left running. Nothing of it outlives the `with` block."""

    def __init__(self, ranks: int, *arguments: str | Path, program=("-m", "mpies.train")):
        self.program = str(program[-1])
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            launching.mpirun_command(ranks, "-u", *program, *arguments),
            env=launching.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_) -> None:
        self.kill()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    def wait_for(self, text: str, timeout: float = 60) -> None:
        """Until a line contains the text."""
        deadline = time.monotonic() + timeout
        while not any(text in line for line in self.lines):
            assert time.monotonic() < deadline, f"no {text!r} in {timeout} s:\n{self.output}"
            assert self._reader.is_alive(), f"ended without {text!r}:\n{self.output}"
            time.sleep(0.01)

    def ranks(self) -> list[psutil.Process]:
        """The ranks' processes, in rank order."""
        below = psutil.Process(self.process.pid).children(recursive=True)
        return sorted((p for p in below if self.program in p.cmdline()), key=_rank_of)

    def end(self, timeout: float = 60) -> int:
        """Wait for the end of all its processes; mpirun's exit code."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {timeout} s:\n{self.output}")
        _, alive = psutil.wait_procs(family, 10)
        assert not alive, f"left behind: {alive}"
        self._reader.join(10)
        return code

    def kill(self) -> None:
        """SIGKILL to all of it, as at a wall time."""
        if self.process.poll() is None:
            family = psutil.Process(self.process.pid).children(recursive=True)
            launching.kill_tree(self.process.pid)
            psutil.wait_procs(family, 10)
        self.process.wait(10)
        self._reader.join(10)


def _rank_of(process: psutil.Process) -> int:
    environment = process.environ()
    variable = next(v for v in ("PMI_RANK", "OMPI_COMM_WORLD_RANK") if v in environment)
    return int(environment[variable])


def train(ranks: int, *arguments: str) -> str:
    """A job that ends well. Returns what it printed."""
    with Job(ranks, *arguments) as job:
        assert job.end(240) == 0, job.output
        return job.output


def refused(*arguments: str) -> list[str]:
    """The lines with which a job, of one rank, refuses to begin."""
    ended = launching.python("-m", "mpies.train", *arguments)
    assert ended.returncode == 2, ended
    assert "Traceback" not in ended.stderr
    lines = launching.problems(ended.stderr)
    assert len(lines) == len(ended.stderr.splitlines()), f"noise: {ended.stderr}"
    return lines


def committed(folder: Path) -> int:
    """The generations in the run file, also while a job writes it."""
    with h5py.File(folder / "run.h5", "r", locking=False) as file:
        return int(file.attrs["generations_committed"])


def content(folder: Path, generations: int) -> dict[str, list]:
    """What a run file says of the first generations, times and places left out: dataset -> rows."""
    found = {}
    with h5py.File(folder / "run.h5", "r", locking=False) as file:
        for table in ("generation", "member", "evaluation", "metric", "sample", "prompt"):
            rows = slice(generations)
            if table in ("evaluation", "sample", "metric", "prompt"):
                rows = file[table]["generation"][:] <= generations
            for name, dataset in file[table].items():
                if not name.startswith(VARYING):
                    values = dataset.asstr()[:] if h5py.check_string_dtype(dataset.dtype) else dataset[:]
                    # As text, since NaN is not equal to itself.
                    found[f"{table}/{name}"] = [repr(value) for value in values[rows].tolist()]
    return found


def assert_same_run(folder: Path, other: Path, generations: int) -> None:
    mine, theirs = content(folder, generations), content(other, generations)
    assert [name for name in theirs if mine[name] != theirs[name]] == []
    assert len(set(mine["generation/digest"])) == generations, "every generation changes the weights"


def assert_same_model(folder: Path, other: Path) -> None:
    one, two = (f / "model" / "model.safetensors" for f in (folder, other))
    assert one.read_bytes() == two.read_bytes()
