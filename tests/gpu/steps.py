"""What a part of the test on a GPU is made of: steps, each in processes of its own, within the time there is.

A step that breaks (a wrong result, an illegal address, a hang) says so in the report, and the next one begins
with a GPU that nobody uses.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from math import inf
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired
from typing import Any

HERE = Path(__file__).resolve().parent
HELPERS = HERE.parent / "helpers"
sys.path.insert(0, str(HELPERS))

import launching
import shapes

END = 5.0  # seconds of a part that are kept for its report
HANGS = 3.0  # times what a step takes, about: then it hangs


class LeftOutError(Exception):
    """A step that cannot be done here, and why."""


class WaitsError(LeftOutError):
    """It can be done here, by another call: there is no time."""


class WrongError(Exception):
    """What a step found that should not be."""


@dataclass
class Figure:
    name: str
    value: float | str
    unit: str = ""
    verdict: str = ""
    """wrong, or anything else."""


@dataclass
class Outcome:
    """What became of a step."""

    part: str
    step: str
    what: str
    state: str = "left out"
    """right, wrong, or left out."""
    why: str = ""
    waits: bool = False
    """Is it left out for want of time only?"""
    seconds: float = 0.0
    commands: list[str] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)


@dataclass
class Bench:
    """Where steps are done: their files, their models, and how much time is left."""

    folder: Path
    deadline: float
    pretended: bool = False
    """On a GPU that is pretended: models are tiny, kernels are emulated."""
    gpus: int = 1
    commands: list[str] = field(default_factory=list)
    """Of the step that is being done."""
    hangs: float = inf
    """When that step hangs, on the clock of `deadline`."""

    @property
    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    def model(self, name: str) -> Path:
        """The folder of a model of that shape with random weights; made where it is not there."""
        return shapes.make(self.folder / "models", "tiny" if self.pretended else name)

    def fresh(self, name: str) -> Path:
        """A folder that does not exist."""
        path = self.folder / "work" / name
        shutil.rmtree(path, ignore_errors=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def run(self, *arguments: object, ranks: int = 0, cpu: bool = False) -> CompletedProcess[str]:
        """python ARGUMENTS on the GPU, under mpirun on so many ranks, or (0) without.

        Raises WrongError unless it ends well, in time. `cpu`: as on a machine without a GPU.
        """
        given = [str(argument) for argument in arguments]
        pretending = [str(HELPERS / "pretending.py")] if self.pretended and not cpu else []
        command = [*pretending, *given]
        self.commands.append(" ".join(([f"mpirun -n {ranks}"] if ranks else []) + ["python", *given]))
        start = launching.mpirun if ranks else launching.python
        before = (ranks,) if ranks else ()
        paths = [str(launching.REPOSITORY), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
        env = {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
        env |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"} if cpu else {}
        try:
            until = min(self.deadline - END, self.hangs)
            done = start(*before, *command, env=env, timeout=max(1.0, until - time.monotonic()))
        except TimeoutExpired as error:
            raise WrongError(f"not done after {error.timeout:.0f} s: {self.commands[-1]}") from None
        if done.returncode:
            raise WrongError(f"exit code {done.returncode}: {tail(done.stderr) or tail(done.stdout)}")
        return done

    def probe(self, name: str, *arguments: object, ranks: int = 0) -> list[Figure]:
        """What one of the programs of `probes/` finds. Raises WrongError as `run`."""
        file = self.fresh(f"{name}.json")
        self.run("-m", f"probes.{name}", "--json", file, *arguments, ranks=ranks)
        return [Figure(**figure) for figure in json.loads(file.read_text())]


Call = Callable[[Bench], Iterable[Figure]]


@dataclass(frozen=True)
class Step:
    name: str
    what: str
    call: Call
    """Does it and yields figures. Raises WrongError and LeftOutError."""
    seconds: float
    """That it takes, about, on an H100: it is not begun if there are fewer."""
    pretended: str = ""
    """Why it is left out on a pretended GPU; '': it is done there, too."""


def do(step: Step, part: str, bench: Bench) -> Outcome:
    made = Outcome(part, step.name, step.what)
    bench.commands = made.commands
    begin = time.monotonic()
    bench.hangs = inf if bench.pretended else begin + HANGS * step.seconds
    try:
        if bench.pretended and step.pretended:
            raise LeftOutError(step.pretended)
        if not bench.pretended and bench.left < step.seconds:
            raise WaitsError(f"{max(0.0, bench.left):.0f} s are left, and it takes {step.seconds:.0f}")
        for figure in step.call(bench):
            made.figures.append(figure)
        missed = [figure.name for figure in made.figures if figure.verdict == "wrong"]
        made.state, made.why = ("wrong" if missed else "right"), ", ".join(missed)
    except LeftOutError as error:
        made.why, made.waits = str(error), isinstance(error, WaitsError)
    except WrongError as error:
        made.state, made.why = "wrong", str(error)
    except Exception as error:  # of this test itself: the others are done all the same
        made.state, made.why = "wrong", f"{type(error).__name__}: {error}"
    made.seconds = round(time.monotonic() - begin, 1)
    return made


def calls(steps: Iterable[Step], seconds: float) -> int:
    """How many calls of so many seconds these steps take, in their order."""
    number, left = 0, 0.0
    for step in steps:
        if step.seconds > left:
            number, left = number + 1, seconds
        left -= step.seconds
    return number


def tail(text: str, lines: int = 12) -> str:
    return "\n".join(text.strip().splitlines()[-lines:])


def as_plain(outcome: Outcome) -> dict[str, Any]:
    return asdict(outcome)
