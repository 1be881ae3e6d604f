"""The test on a GPU, for the day there is one: python tests/gpu [PART or PART.STEP ...]

Needs no network. Writes report.md and report.json into --output after every step. What there is no time
for, the same command does when it is called again: then it ends with exit code 75 and says how many calls
remain. A step that is named is done anew.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import report
import steps
import torch
from parts import PARTS
from steps import Bench, Outcome, Step

GOES_ON = 75  # as of mpies' own commands


def parse(arguments: list[str]) -> argparse.Namespace:
    description, _, epilog = (__doc__ or "").partition("\n\n")
    made = argparse.ArgumentParser(prog="python tests/gpu", description=description, epilog=epilog)
    made.add_argument("what", nargs="*", default=list(PARTS), help=f"of {', '.join(PARTS)}; all of them")
    made.add_argument("--output", type=Path, default=Path("build/gpu-report"), help="(%(default)s)")
    made.add_argument("--seconds", type=float, default=600, help="that there are in all (%(default)s)")
    made.add_argument("--pretended", action="store_true", help="on a GPU that is pretended, to test the test")
    given = made.parse_args(arguments)
    known = {*PARTS, *(f"{part}.{step.name}" for part, those in PARTS.items() for step in those)}
    if unknown := set(given.what) - known:
        made.error(f"{', '.join(sorted(unknown))}: there is {', '.join(sorted(known))}")
    if not given.pretended and not torch.cuda.is_available():
        made.error("there is no GPU here that torch can use; --pretended tests this test")
    return given


def main(arguments: list[str]) -> int:
    given = parse(arguments)
    folder = given.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    gpus = 2 if given.pretended else torch.cuda.device_count()
    bench = Bench(folder, time.monotonic() + given.seconds, given.pretended, gpus)
    known, outcomes = report.facts(given.pretended), []
    before = report.states(folder, known)
    asked = [
        (f"{part}.{step.name}", part, step)
        for part, those in PARTS.items()
        for step in those
        if part in given.what or f"{part}.{step.name}" in given.what
    ]
    asked.sort(key=lambda named: before.get(named[0]) == "wrong")  # again, but after what was not done yet
    for name, part, step in asked:
        if before.get(name) == "right" and name not in given.what:
            print(f"{name}: right already", flush=True)
            continue
        print(f"{name}: {step.what} ...", flush=True)
        outcomes.append(steps.do(step, part, bench))
        print(f"  {outcomes[-1].state} in {outcomes[-1].seconds} s. {outcomes[-1].why}", flush=True)
        report.write(folder, known, outcomes)
    print(f"{folder / 'report.md'}")
    return ended(outcomes, [step for *_, step in asked], given.seconds)


def ended(outcomes: list[Outcome], asked: list[Step], seconds: float) -> int:
    """The exit code: 1 if a step is wrong; 75 if some wait for a further call, after a line that says so."""
    waiting = {outcome.step for outcome in outcomes if outcome.waits}
    if waiting:
        remain = steps.calls((step for step in asked if step.name in waiting), seconds)
        print(
            f"{len(waiting)} step(s) wait for time: the same command {remain} time(s) more goes on with them"
        )
    if any(outcome.state == "wrong" for outcome in outcomes):
        return 1
    return GOES_ON if waiting else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
