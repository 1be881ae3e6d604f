"""A user's folder on the cluster, and the jobs that are submitted from it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import launching
from cluster import Cluster

ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}
PATIENCE = 150  # seconds for anything that a job does


@dataclass
class Site:
    """A user's folder on the cluster, with a copy of jobs/; jobs are submitted from there."""

    cluster: Cluster
    folder: Path

    def submit(self, script: str, *arguments: object, options: tuple[str, ...] = (), **environment) -> Job:
        """sbatch OPTIONS jobs/SCRIPT ARGUMENTS. Without a `LAUNCHER`, mpirun starts the ranks."""
        words = ["sbatch", "--parsable", f"--chdir={self.folder}", *options, f"jobs/{script}"]
        words += [str(argument) for argument in arguments]
        variables = {key: value for key, value in launching.environment().items() if key == "PYTHONPATH"}
        variables |= {key: value for key, value in os.environ.items() if key.startswith("OMPI_")}
        variables |= {"VENV": sys.prefix, **environment}
        done = subprocess.run(
            words,
            env=self.cluster.environment | variables,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return Job(self, done.stdout.strip())


@dataclass
class Job:
    """A submitted job; `number` is what Slurm calls it."""

    site: Site
    number: str

    @property
    def output(self) -> str:
        """What it printed so far, over all its starts; of an array, all tasks' output."""
        files = sorted(self.site.folder.glob(f"slurm-*-{self.number}*.out"))
        return "\n".join(file.read_text(errors="replace") for file in files)

    def facts(self) -> list[dict[str, str]]:
        """Slurm's facts: of the job, or of each task of an array."""
        lines = self.site.cluster.command("scontrol", "--oneliner", "show", "job", self.number)
        return [dict(re.findall(r"(\w+)=(\S*)", line)) for line in lines.splitlines() if line.strip()]

    @property
    def restarts(self) -> int:
        return int(self.facts()[0]["Restarts"])

    def wait_for(self, text: str, count: int = 1, timeout: float = PATIENCE) -> None:
        """Until it has printed the text so often."""
        deadline = time.monotonic() + timeout
        while self.output.count(text) < count:
            assert time.monotonic() < deadline, f"no {text!r} in {timeout} s:\n{self.output}\n{self.facts()}"
            states = {facts["JobState"] for facts in self.facts()}
            assert not states <= ENDED or self.output.count(text) >= count, self.output
            time.sleep(0.2)

    def end(self, timeout: float = PATIENCE) -> list[tuple[str, str]]:
        """Wait for its end: (state, exit code) of the job, or of each task, as Slurm writes them."""
        deadline = time.monotonic() + timeout
        while True:
            facts = self.facts()
            if {f["JobState"] for f in facts} <= ENDED:
                return [(f["JobState"], f["ExitCode"]) for f in facts]
            assert time.monotonic() < deadline, f"not ended in {timeout} s:\n{self.output}\n{facts}"
            time.sleep(0.3)
