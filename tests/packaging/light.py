"""What commands do where mpies stands alone, without extras: a program, for an environment of that kind.

Prints what is not so, and ends with 1 if anything is.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

RUN = str(Path(__file__).resolve().parents[1] / "data" / "schema-1.h5")
# The command's words, the exit code, what its one line on stderr ends with.
CASES = [
    (["analyze", "summary", RUN], 0, ""),
    (["analyze", "compare", RUN], 0, ""),
    (["analyze", "samples", RUN], 0, ""),
    (["analyze", "plot", RUN, "--output", "x.png"], 2, "pip install 'mpies[analyze]'"),
    (["analyze", "report", RUN, "--output", "x.html"], 2, "pip install 'mpies[analyze]'"),
    (["replay", RUN, "--verify"], 2, "pip install 'mpies[replay]'"),
    *(([name], 2, "pip install 'mpies[train]'") for name in ("train", "check", "probe", "bench", "evaluate")),
    *(
        ([name, "--help"], 0, "")
        for name in ("train", "check", "probe", "bench", "evaluate", "replay", "analyze")
    ),
]


def fault(words: list[str], status: int, end: str, python: list[str]) -> str:
    """What is wrong with how a command ends; empty if nothing is. `python`: how one is started."""
    ended = subprocess.run([*python, *words], capture_output=True, text=True)
    lines = ended.stderr.splitlines()
    good = ended.returncode == status and len(lines) == bool(end) and ended.stderr.rstrip().endswith(end)
    return "" if good else f"{' '.join(words)}: ended with {ended.returncode}, not {status}: {ended.stderr}"


if __name__ == "__main__":
    faults = [
        fault([f"mpies.{name}", *rest], status, end, [sys.executable, "-m"])
        for (name, *rest), status, end in CASES
    ]
    print("\n".join(filter(None, faults)) or f"{len(CASES)} commands work or say which extra to install")
    sys.exit(any(faults))
