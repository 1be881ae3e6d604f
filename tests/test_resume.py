"""A run that was interrupted goes on as if nothing had happened, or is refused with the reason."""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from pathlib import Path

import h5py
import launching
import psutil
import pytest

from mpies import config

pytestmark = pytest.mark.launch

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
FEW, MANY = 8, 10
ENDLESS = 10**6

# Times and places. All else is the same, interrupted or not, on any number of ranks.
VARYING = ("seconds", "rank", "imbalance", "bytes_communicated")


def arguments(model: Path, directory: Path, generations: int, **changes: object) -> list[str]:
    """A training command's settings; changes as section__key=value."""
    values = {
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
        assert job.end(90) == 0, job.output
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
        for table in ("generation", "member", "evaluation", "metric", "sample"):
            rows = slice(generations)
            if table in ("evaluation", "sample", "metric"):
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


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tiny_model) -> Path:
    """A run of MANY generations that was left alone, on 2 ranks."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    train(2, *arguments(tiny_model(), folder, MANY))
    return folder


@pytest.fixture(scope="module")
def killed(tmp_path_factory, tiny_model) -> tuple[Path, int]:
    """A run of FEW generations, killed on 2 ranks, ended on 3; and how many there were in between."""
    folder = tmp_path_factory.mktemp("killed")
    settings = arguments(tiny_model(), folder, FEW, run__checkpoint_every=2)
    with Job(2, *settings) as job:
        job.wait_for("generation 3/")
        job.kill()
    before = committed(folder)
    assert 3 <= before < FEW, "the kill came too late"
    output = train(3, *settings)
    assert f"resuming after generation {before}, replayed from checkpoint 2" in output
    return folder, before


@pytest.fixture
def run(killed, tmp_path) -> Path:
    """A copy of that run, to go on with."""
    return Path(shutil.copytree(killed[0], tmp_path / "run"))


# Going on


def test_a_killed_run_goes_on_as_if_nothing_had_happened(killed, uninterrupted):
    folder, _ = killed
    assert committed(folder) == FEW
    assert_same_run(folder, uninterrupted, FEW)


def test_every_start_is_noted(killed):
    folder, before = killed
    with h5py.File(folder / "run.h5", "r") as file:
        start = {name: column[:].tolist() for name, column in file["start"].items()}
        texts = [file["config"][name].asstr()[()] for name in sorted(file["config"])]
    assert start["generation"] == [0, before]
    assert start["world_size"] == [2, 3]
    assert start["reason"] == [b"new", b"resumed"]
    assert [len(hosts.split(b",")) for hosts in start["hosts"]] == [2, 3]
    assert [config.from_yaml(text).es.generations for text in texts] == [FEW, FEW]


def test_more_generations_make_the_longer_run(run, tiny_model, uninterrupted):
    output = train(1, *arguments(tiny_model(), run, MANY))
    assert f"generation {MANY}/{MANY}" in output
    assert f"generation {FEW}/" not in output
    assert_same_run(run, uninterrupted, MANY)
    assert_same_model(run, uninterrupted)


def test_a_finished_run_ends_well_again_also_with_a_moved_model(run, killed, tiny_model, tmp_path):
    moved = shutil.copytree(tiny_model(), tmp_path / "moved")
    output = train(1, *arguments(moved, run, FEW))
    assert not any(line.startswith("generation ") for line in output.splitlines())
    assert_same_run(run, killed[0], FEW)
    assert_same_model(run, killed[0])


def test_an_evaluation_that_a_kill_prevented_is_made_up_for_and_no_other(run, tiny_model, uninterrupted):
    """Killed after the last commit, with the training prompts evaluated but not the held-out ones."""
    with h5py.File(run / "run.h5", "r+") as file:
        for table in ("evaluation", "metric", "sample"):
            columns = file[table]
            kept = (columns["generation"][:] < FEW) | (columns["split"].asstr()[:] == "train")
            assert not kept.all()
            for column in columns.values():
                rows = column[:][kept]
                column.resize(len(rows), axis=0)
                column[:] = rows
    train(1, *arguments(tiny_model(), run, FEW))
    assert_same_run(run, uninterrupted, FEW)


def test_rows_that_were_not_committed_do_not_count(run, tiny_model, uninterrupted):
    """Killed in the middle of writing generation 7. Also, the latest checkpoint is damaged."""
    with h5py.File(run / "run.h5", "r+") as file:
        file.attrs.modify("generations_committed", 6)
        for table in ("generation", "member"):
            for column in file[table].values():
                column[6:] = 77
        for table in ("evaluation", "metric", "sample"):
            kept = int((file[table]["generation"][:] <= 6).sum())
            for column in file[table].values():
                column.resize(kept, axis=0)
    (run / "checkpoint-000006.safetensors").write_bytes(b"damaged")
    output = train(2, *arguments(tiny_model(), run, FEW))
    assert output.count("checkpoint-000006.safetensors: ") == 1
    assert "resuming after generation 6, replayed from the initial model" in output
    assert_same_run(run, uninterrupted, FEW)


# Refused, with the file as it was


def test_other_settings_are_refused_with_what_may_change(run, tiny_model):
    before = (run / "run.h5").read_bytes()
    settings = arguments(tiny_model(), run, MANY, es__sigma=0.2, engine__max_new_tokens=8)
    with Job(2, *settings) as job:
        assert job.end() == 2
    problems = launching.problems(job.output)
    assert len(problems) == 3, job.output
    assert problems[0] == "es.sigma: the run was begun with 0.3, not 0.2"
    assert problems[1] == "engine.max_new_tokens: the run was begun with 16, not 8"
    for key in config.CHANGEABLE:
        assert key in problems[2]
    assert "run.directory" in problems[2] and "Traceback" not in job.output
    assert (run / "run.h5").read_bytes() == before


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"run__resume": "never"}, ["run.directory", "exists already", "run.resume"]),
        ({"es__generations": FEW - 1}, ["es.generations", f"given {FEW - 1}", f"holds {FEW}"]),
    ],
    ids=["never", "fewer generations"],
)
def test_what_is_there_can_stand_in_the_way(run, tiny_model, changes, words):
    before = (run / "run.h5").read_bytes()
    (line,) = refused(*arguments(tiny_model(), run, FEW, **changes))
    for word in words:
        assert word in line
    assert (run / "run.h5").read_bytes() == before


def test_what_must_be_there_is_missing(tiny_model, tmp_path):
    (line,) = refused(*arguments(tiny_model(), tmp_path / "nothing", FEW, run__resume="must"))
    assert "run.resume: must" in line and str(tmp_path / "nothing") in line
    assert not (tmp_path / "nothing").exists()


def test_another_model_is_refused(run, tiny_model):
    before = (run / "run.h5").read_bytes()
    other = tiny_model(seed=1)
    (line,) = refused(*arguments(other, run, MANY))
    with h5py.File(run / "run.h5", "r") as file:
        right = int(file.attrs["model_digest"])
    assert line.startswith("model.path: ") and str(other) in line and f"{right:016x}" in line
    assert (run / "run.h5").read_bytes() == before


def test_rows_that_were_changed_are_refused(run, tiny_model):
    with h5py.File(run / "run.h5", "r+") as file:
        file["member/reward"][1, 1] = 0.25
    before = (run / "run.h5").read_bytes()
    for checkpoint in run.glob("checkpoint-*"):
        checkpoint.unlink()
    (line,) = refused(*arguments(tiny_model(), run, MANY))
    assert "digest" in line and "--verify" in line
    assert (run / "run.h5").read_bytes() == before


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda data: data[:-500], ["its end is missing", "mpies.replay"]),
        (lambda data: b"not HDF5 at all\n", ["not a readable HDF5 file"]),
        (lambda data: data[:100] + bytes(2000) + data[2100:], []),
    ],
    ids=["truncated", "text", "zeroed"],
)
def test_a_damaged_file_is_refused_and_left_alone(run, tiny_model, damage, words):
    damaged = damage((run / "run.h5").read_bytes())
    (run / "run.h5").write_bytes(damaged)
    (line,) = refused(*arguments(tiny_model(), run, MANY))
    assert str(run / "run.h5") in line
    for word in words:
        assert word in line
    assert (run / "run.h5").read_bytes() == damaged
    assert not list(run.glob("*.partial"))


# Two jobs, one directory


def test_a_directory_in_use_is_refused_and_its_job_not_disturbed(tiny_model, tmp_path, uninterrupted):
    settings = arguments(tiny_model(), tmp_path, ENDLESS)
    with Job(1, *settings) as first:
        first.wait_for("generation 2/")
        (line,) = refused(*settings)
        assert "in use by another job" in line and str(tmp_path) in line
        seen = len(first.lines)
        first.wait_for(f"generation {committed(tmp_path) + 2}/")
        assert len(first.lines) > seen
    assert_same_run(tmp_path, uninterrupted, FEW)


def test_of_two_jobs_that_start_at_once_one_gets_the_directory(tiny_model, tmp_path, uninterrupted):
    """As when a job is submitted twice: both find an empty directory, and load the model."""
    settings = arguments(tiny_model(), tmp_path, MANY)
    with Job(1, *settings) as one, Job(1, *settings) as two:
        codes = sorted([one.end(), two.end()])
    assert codes == [0, 2], one.output + two.output
    assert_same_run(tmp_path, uninterrupted, MANY)
