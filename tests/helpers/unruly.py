"""A module for environments that does at its import what could make trouble later."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time

signal.signal(signal.SIGPIPE, signal.SIG_DFL)
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
signal.signal(signal.SIGTERM, signal.SIG_DFL)
os.dup2(2, 1)
threading.Thread(target=time.sleep, args=[1000]).start()
started = subprocess.Popen(["sleep", os.environ.get("SECONDS_OF_SLEEP", "1001")])
later: list = []


def open_later() -> None:
    """One file after another, while episodes come and go."""
    while len(later) < 20:
        time.sleep(0.05)
        later.append(open(__file__))  # noqa: SIM115


threading.Thread(target=open_later, daemon=True).start()


class Game:
    """Does what the answer says."""

    def reset(self, **row) -> str:
        return f"{started.pid}"

    def step(self, answer: str):
        print("noise", flush=True)
        os.write(2, b"noise")
        if answer == "exit":
            os._exit(3)
        return "".join(os.pread(file.fileno(), 1, 0).decode() for file in later[-1:]), 1.0, False


class NoGame:
    """Refused, for it has no methods."""
