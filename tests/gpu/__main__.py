"""The test on a GPU, for the day there is one: python tests/gpu [PART or PART.STEP ...]

Needs no network. Writes report.md and report.json into --output after every step; a further run adds to them.
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
from steps import Bench


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
    for part, those in PARTS.items():
        for step in those:
            if part in given.what or f"{part}.{step.name}" in given.what:
                print(f"{part}.{step.name}: {step.what} ...", flush=True)
                outcomes.append(steps.do(step, part, bench))
                print(f"  {outcomes[-1].state} in {outcomes[-1].seconds} s. {outcomes[-1].why}", flush=True)
                report.write(folder, known, outcomes)
    print(f"{folder / 'report.md'}")
    return int(any(outcome.state == "wrong" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
