"""The attack: kill a run again and again, resume it, and compare it with a run that was left alone.

    make torture KILLS=300

A tiny model is trained under mpirun. At random moments the whole job, or a single rank, gets SIGKILL;
then the same command goes on, on a random number of ranks. All the while, a reader opens the run file
again and again. At the end, the digest and every dataset except times and places must equal those of
an uninterrupted run. The last line gives the figures; exit code 0 only if everything held.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import h5py
import numpy as np
import psutil
import tiny

from jobs import VARYING

SETTINGS = """
model: {path: MODEL, dtype: float32}
es: {population: 5, generations: 1000000, sigma: 0.05, alpha: 0.02, antithetic: false}
engine: {max_new_tokens: 4}
run: {evaluate_every: 7, checkpoint_every: 20, progress: lines}
"""


class Reader(threading.Thread):
    """Opens the run file as any user would, as often as it can, and reads all of it."""

    def __init__(self, path: Path):
        super().__init__(daemon=True)
        self.path, self.reads, self.failures = path, 0, []
        self.committed = 0
        self.ending = threading.Event()

    def run(self):
        while not self.ending.wait(0.02):
            if self.path.exists():
                try:
                    self._read()
                    self.reads += 1
                except Exception as error:
                    self.failures.append(f"{type(error).__name__}: {error}")

    def _read(self):
        with h5py.File(self.path, "r", locking=False) as file:
            committed = int(file.attrs["generations_committed"])
            assert committed >= self.committed, f"went back from {self.committed} to {committed}"
            self.committed = committed
            for table in ("generation", "member"):
                for name, dataset in file[table].items():
                    rows = dataset[:committed]
                    assert len(rows) == committed, f"{table}/{name} has {len(rows)} of {committed} rows"
            digests = file["generation/digest"][:committed]
            assert (digests != 0).all(), "a committed generation without digest"


def launch(ranks: int, *arguments: str) -> subprocess.Popen:
    mpirun = Path(sys.executable).parent / "mpirun"
    command = [str(mpirun) if mpirun.exists() else "mpirun", "-n", str(ranks)]
    command += [sys.executable, "-u", "-m", "mpies.train", *arguments]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )


def ranks_of(job: subprocess.Popen) -> list[psutil.Process]:
    try:
        family = psutil.Process(job.pid).children(recursive=True)
        return [p for p in family if "mpies.train" in p.cmdline()]
    except psutil.NoSuchProcess:
        return []


def kill_whole(job: subprocess.Popen) -> None:
    family = [psutil.Process(job.pid), *psutil.Process(job.pid).children(recursive=True)]
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    job.wait()


def kill_one(job: subprocess.Popen) -> float:
    """SIGKILL one rank; returns the seconds until the whole job is gone."""
    victims = ranks_of(job)
    start = time.monotonic()
    random.choice(victims).send_signal(signal.SIGKILL)
    job.wait(timeout=60)
    assert job.returncode != 0, "the job ended well although a rank was killed"
    psutil.wait_procs(victims, timeout=60)
    return time.monotonic() - start


def attack(arguments: list[str]) -> tuple[str, float]:
    """One start and one kill. Returns where the kill came and how long the others lived on."""
    job = launch(random.choice([1, 2, 2, 3]), *arguments)
    output = []
    if random.random() < 0.1:
        where = "start-up"
        time.sleep(random.uniform(0.5, 4.0))
    else:
        where = "generations"
        for line in job.stdout:
            output.append(line)
            if line.startswith("generation "):
                break
        else:
            raise AssertionError("the job ended by itself:\n" + "".join(output[-30:]))
        time.sleep(random.uniform(0.0, 0.6))
    drain = threading.Thread(target=job.stdout.read, daemon=True)
    drain.start()
    lived = 0.0
    if random.random() < 0.3 and len(ranks_of(job)) > 1:
        lived = kill_one(job)
    else:
        kill_whole(job)
    drain.join(10)
    return where, lived


def finish(arguments: list[str], generations: int) -> None:
    """Run to the end."""
    job = launch(2, *arguments, f"es.generations={generations}")
    output, _ = job.communicate(timeout=3600)
    assert job.returncode == 0, output


def differences(attacked: Path, alone: Path) -> list[str]:
    """The datasets and values in which two run files differ, those that may vary left out."""
    found = []
    with h5py.File(attacked, "r") as a, h5py.File(alone, "r") as b:
        for table in ("generation", "member", "evaluation", "metric", "sample"):
            for name in a[table]:
                if name.startswith(VARYING):
                    continue
                left, right = a[table][name][:], b[table][name][:]
                equal_nan = left.dtype.kind == "f"
                if not np.array_equal(left, right, equal_nan=equal_nan):
                    found.append(f"{table}/{name}")
        if a.attrs["generations_committed"] != b.attrs["generations_committed"]:
            found.append("generations_committed")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=None)
    options = parser.parse_args()
    random.seed(options.seed)
    with tempfile.TemporaryDirectory() as name:
        return torture(Path(name), options.kills)


def torture(folder: Path, kills: int) -> int:
    model = tiny.save_model(folder / "model")
    settings = folder / "settings.yaml"
    settings.write_text(SETTINGS.replace("MODEL", str(model)))
    attacked, alone = folder / "attacked", folder / "alone"
    arguments = [str(settings), f"run.directory={attacked}"]
    reader = Reader(attacked / "run.h5")
    reader.start()
    places = {"start-up": 0, "generations": 0}
    longest = 0.0
    for kill in range(kills):
        where, lived = attack(arguments)
        places[where] += 1
        longest = max(longest, lived)
        print(f"kill {kill + 1}/{kills} in {where}: {reader.committed} generations", flush=True)
    generations = reader.committed + 5
    finish(arguments, generations)
    reader.ending.set()
    reader.join()
    finish([str(settings), f"run.directory={alone}"], generations)
    differing = differences(attacked / "run.h5", alone / "run.h5")
    for problem in [*differing, *sorted(set(reader.failures))]:
        print(f"PROBLEM: {problem}")
    print(
        f"{kills} kills ({places['start-up']} in start-up), {generations} generations:"
        f" {len(differing)} datasets differ from an uninterrupted run's,"
        f" {len(reader.failures)} of {reader.reads + len(reader.failures)} readers failed,"
        f" after a rank's death the job lived {longest:.1f} s at most"
    )
    return 1 if differing or reader.failures else 0


if __name__ == "__main__":
    sys.exit(main())
