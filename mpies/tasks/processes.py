"""A process beside the rank which computes what the rank's own should not: bytes in, lines out."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import time
from pathlib import Path

import mpies

LEAVING = 5  # seconds for a process that ends by itself


class HelperProcess:
    """A program of the package's, `MODULE:FUNCTION`, and the two pipes to it. It ends with its input."""

    def __init__(self, program: str, **environment: str) -> None:
        package = str(Path(mpies.__file__).parents[1])
        path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
        threads = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        module, _, function = program.partition(":")
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"from {module} import {function}; {function}()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env={**os.environ, "PYTHONPATH": path, **threads, **environment},
            start_new_session=True,  # Ctrl-C is for the ranks
        )
        assert self.process.stdin and self.process.stdout  # pipes, as asked for
        self.requests, self.answers = self.process.stdin, self.process.stdout
        os.set_blocking(self.requests.fileno(), False)

    def tell(self, request: bytes, seconds: float) -> bool:
        """Send it. Has it been taken in time? That the process has ended is found when its answer is read."""
        left, deadline = memoryview(request), time.monotonic() + seconds
        with contextlib.suppress(BrokenPipeError):
            while left:
                if not select.select([], [self.requests], [], max(0.0, deadline - time.monotonic()))[1]:
                    return False
                left = left[self.requests.write(left) or 0 :]
        return True

    def line(self, seconds: float) -> bytes:
        """Its next line; empty if it ended, or took too long."""
        found, deadline = bytearray(), time.monotonic() + seconds
        while not found.endswith(b"\n"):
            left = max(0.0, deadline - time.monotonic())
            ready, _, _ = select.select([self.answers], [], [], left)
            piece = self.answers.read(2**16) if ready else b""
            if not piece:
                return b""
            found += piece
        return bytes(found)

    def let_end(self, seconds: float) -> int:
        """Give it that time to end by itself, since no more will come; its exit status."""
        self.requests.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        return self.end()

    def end(self) -> int:
        """End it, if it has not ended by itself; its exit status."""
        if self.process.poll() is None:
            if select.select([self.answers], [], [], 0)[0]:  # an end of file: it ends by itself
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(LEAVING)
            if self.process.poll() is None:
                self.process.kill()
        status = self.process.wait()
        self.requests.close()
        self.answers.close()
        return status
