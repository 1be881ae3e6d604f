"""What a check found, and the table and verdict that are made of it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mpies.errors import RefusedError
from mpies.ranks.collectives import allgather_objects

if TYPE_CHECKING:
    from mpi4py.MPI import Comm


@dataclass(frozen=True)
class Finding:
    """A line of the table. `problem`: why the job would fail; `note`: what could be better; both with
    the remedy."""

    what: str
    value: str
    problem: str = ""
    note: str = ""

    @property
    def mark(self) -> str:
        return "FAIL" if self.problem else "note" if self.note else "ok"


class Findings:
    """The findings so far, the same on every rank; rank 0 prints each at once."""

    def __init__(self, comm: Comm):
        self.comm = comm
        self.findings: list[Finding] = []

    @property
    def problems(self) -> list[str]:
        return list(dict.fromkeys(finding.problem for finding in self.findings if finding.problem))

    def check(self, what: str, function: Callable[..., list[Finding]], *arguments: Any) -> None:
        """Call the function on all ranks and print what it found."""
        self.obtain(what, lambda: (None, function(*arguments)))

    def obtain(self, what: str, function: Callable[..., tuple[Any, list[Finding]]], *arguments: Any) -> Any:
        """The same for one that also has a result, which is returned; None if it refuses.

        What it refuses is a finding. Where ranks find different things, rank 0's count.
        """
        result = None
        try:
            result, findings = function(*arguments)
        except RefusedError as error:
            findings = [Finding(what, "refused", problem=str(error))]
        findings = allgather_objects(self.comm, findings)[0]
        self.findings += findings
        for finding in findings:
            self._say(f"{finding.mark:5} {finding.what:11} {finding.value}")
            if finding.note:
                self._say(f"{'':17} {finding.note}")
        return result

    def verdict(self) -> int:
        """Print it; the exit code."""
        notes = sum(bool(finding.note) for finding in self.findings)
        if not self.problems:
            self._say("verdict: this job would run" + (f"; {notes} note(s) above" if notes else ""))
            return 0
        self._say("verdict: this job would fail")
        if self.comm.rank == 0:
            for line in "\n".join(self.problems).splitlines():
                print(f"mpies: {line}", file=sys.stderr, flush=True)
        return 2

    def _say(self, text: str) -> None:
        if self.comm.rank == 0:
            print(text, flush=True)
