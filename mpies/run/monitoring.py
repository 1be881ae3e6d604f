"""What a site's own monitoring shows of a run: a text file for Prometheus, and the Slurm job's comment.

Rank 0 writes both after each generation, if the settings ask for it. No result depends on it: what fails
while the run goes on is said once, and the run goes on.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mpies.config import Settings
from mpies.errors import InputError
from mpies.files import written_whole
from mpies.run.time_left import Pace
from mpies.runfile import TABLES
from mpies.text import duration

# Columns of a generation's row that are no measurements.
UNMEASURED = {"digest", "checksum"}
SLURM_INTERVAL = 60.0  # seconds between changes of a job's comment, each a call of Slurm's controller
SLURM_PATIENCE = 600.0  # seconds after which a call that has not returned is given up


class Monitor:
    """Of one run, on rank 0. `say` shows a line."""

    def __init__(self, settings: Settings, say: Callable[[str], None]):
        self._file = Path(settings.run.metrics) if settings.run.metrics else None
        self._comments = Comments(say) if settings.run.slurm_comment else None
        self._run = settings.run.directory
        self._target = settings.es.generations
        self._pace = Pace()
        self._say = say

    def begin(self, done: int) -> None:
        """Before the first generation. Raises InputError if the file cannot be written."""
        try:
            self._write(done, {})
        except OSError as error:
            raise InputError(f"run.metrics: {self._file}: {error.strerror}") from None

    def generation(self, done: int, row: dict[str, Any]) -> None:
        """Generation number `done` - 1 is committed with this row."""
        self._pace.note(float(row["seconds"]))
        try:
            self._write(done, row)
        except OSError as error:
            self._say(f"warning: run.metrics: {error}; it is not written any more")
            self._file = None
        if self._comments:
            seconds = self._seconds_left(done)
            left = f", {duration(seconds)} to go" if seconds > 0 else ""  # unknown after the first one
            text = f"mpies: generation {done}/{self._target}, reward {row['reward_mean']:.4g}{left}"
            self._comments.change(text, last=done == self._target)

    def _seconds_left(self, done: int) -> float:
        """Of the missing generations; NaN while their pace is not known."""
        return self._pace.seconds_of(self._target - done)

    def _write(self, done: int, row: dict[str, Any]) -> None:
        if self._file:
            about: dict[str, float] = {"generations": done, "generations_target": self._target}
            about |= {"seconds_left": self._seconds_left(done), "written_time_seconds": time.time()}
            with written_whole(self._file) as file:
                file.write(metrics(self._run, about, row).encode())


ABOUT = {
    "generations": "generations that are in the run file",
    "generations_target": "es.generations",
    "seconds_left": "until the last generation, by the median of the latest ones; NaN: not known yet",
    "written_time_seconds": "when this was written, seconds since 1970",
}


def metrics(run: str, about: dict[str, float], row: dict[str, Any]) -> str:
    """Prometheus's text format: `about` the run, and what a generation's row measures, as in the run file."""
    described = {f"mpies_{name}": (ABOUT[name], value) for name, value in about.items()}
    for column in TABLES["generation"]:
        if column.name in row and column.name not in UNMEASURED:
            what = f"latest generation: {column.description} [{column.units}]"
            described[f"mpies_generation_{column.name}"] = what, row[column.name]
    label = run.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return "".join(
        f'# HELP {name} {what}\n# TYPE {name} gauge\n{name}{{run="{label}"}} {float(value)!r}\n'
        for name, (what, value) in described.items()
    )


class Comments:
    """The comment of the Slurm job that this is, changed by `scontrol` beside the run."""

    def __init__(self, say: Callable[[str], None]):
        self._say = say
        self._job = os.environ.get("SLURM_JOB_ID")
        self._call: subprocess.Popen[bytes] | None = None
        self._called = -SLURM_INTERVAL
        if not self._job:
            self._say("warning: run.slurm_comment: has no effect, this is no Slurm job")

    def change(self, text: str, last: bool = False) -> None:
        """Unless the latest change is less than a minute old; `last`: in any case."""
        if not self._job or not self._has_returned(last):
            return
        if time.monotonic() - self._called < SLURM_INTERVAL and not last:
            return
        self._called = time.monotonic()
        words = ["scontrol", "update", f"JobId={self._job}", f"Comment={text}"]
        try:
            self._call = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
            )
        except OSError as error:
            self._give_up(f"scontrol: {error.strerror}")

    def _has_returned(self, wait: bool) -> bool:
        """Has the latest call, well? If `wait`, after a moment."""
        call = self._call
        if call is None:
            return True
        try:
            code = call.wait(5.0 if wait else 0.0)
        except subprocess.TimeoutExpired:
            if time.monotonic() - self._called > SLURM_PATIENCE:
                call.kill()
                self._give_up("scontrol does not return")
            return False
        said = call.stderr.read().decode(errors="replace").strip() if call.stderr else ""
        self._call = None
        if code:
            self._give_up(said.splitlines()[-1] if said else f"scontrol ended with {code}")
        return code == 0

    def _give_up(self, why: str) -> None:
        self._say(f"warning: run.slurm_comment: {why}; the job's comment is not changed any more")
        self._job = None
