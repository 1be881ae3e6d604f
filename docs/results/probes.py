"""Collects what probes recommended, for docs/probe.md, into probes.csv beside it.

    python docs/results/probes.py number-1.json worked-42.json ...

The files are those of `mpies.probe --json`; rows of files that are not given stay. A row has what was probed,
the step that was chosen and what it gained, with its standard error.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from evaluations import kept, write

COLLECTED = Path(__file__).parent / "probes.csv"
ABOUT = ("digest", "dtype", "seed", "pairs", "prompts", "answers", "population", "generations")


def main(*files: str) -> None:
    made = [of_probe(Path(file)) for file in files]
    rows = kept(COLLECTED, "probe", {row["probe"] for row in made}) + made
    write(COLLECTED, list(rows[0]), sorted(rows, key=lambda row: row["probe"]))


def of_probe(file: Path) -> dict:
    found = json.loads(file.read_text())
    chosen = found["recommended"]
    rung = next(one for one in found["ladder"] if one["sigma"] == chosen["sigma"])
    step = next(one for one in rung["steps"] if one["length"] == chosen["length"])
    return {
        "probe": file.stem,
        **{key: found[key] for key in ABOUT},
        "others": 0 if found["ground_is_of_members_prompts"] else len(found["ground"]["rewards"]),
        "sigma": chosen["sigma"],
        "alpha": chosen["alpha"],
        "length": step["length"],
        "step_alpha": f"{step['alpha']:.4g}",
        "reward": f"{found['ground']['reward']:.4g}",
        "gain": f"{step['gain']['mean']:.4g}",
        "error": f"{step['gain']['error']:.2g}",
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
