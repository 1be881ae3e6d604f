"""`run.time_limit`: seconds of a job, in one of Slurm's formats, or as long as the Slurm job lasts."""

from __future__ import annotations

import os
import re
import subprocess
import time

from mpies.errors import InputError


class OutOfTimeError(Exception):
    """Some rank has no time for what is left of its work. Raised by all ranks; the job is resumable."""


TIME_LIMIT = re.compile(r"(?:(?P<days>\d{1,9})-)?(?P<parts>\d{1,9}(?::\d{1,9}){0,2})")


def seconds_of(limit: str) -> float | None:
    """Seconds of `run.time_limit`: None for 'none'; 'auto': to the end of the Slurm job, if in one.

    Otherwise one of Slurm's formats: minutes, minutes:seconds, hours:minutes:seconds, days-hours,
    days-hours:minutes, days-hours:minutes:seconds. Raises InputError for anything else.
    """
    if limit == "auto":
        return _slurm_seconds_left()
    return None if limit == "none" else _parse(limit)


def check(limit: str) -> None:
    """Raise InputError if `seconds_of` would, without asking Slurm."""
    if limit not in ("auto", "none"):
        _parse(limit)


def _parse(text: str) -> float:
    match = TIME_LIMIT.fullmatch(text)
    if not match:
        raise InputError(
            f"run.time_limit: given {text!r:.80}, allowed is auto, none, minutes, minutes:seconds,"
            " hours:minutes:seconds, days-hours, days-hours:minutes or days-hours:minutes:seconds"
        )
    parts = [int(part) for part in match["parts"].split(":")]
    if match["days"] is not None:
        hours, minutes, seconds = parts + [0] * (3 - len(parts))
        return ((int(match["days"]) * 24 + hours) * 60 + minutes) * 60.0 + seconds
    hours, minutes, seconds = {1: [0, *parts, 0], 2: [0, *parts], 3: parts}[len(parts)]
    return (hours * 60 + minutes) * 60.0 + seconds


def _slurm_seconds_left() -> float | None:
    """Seconds to the end of the Slurm job that this process runs in; None outside, or if unlimited."""
    job = os.environ.get("SLURM_JOB_ID")
    if not job:
        return None
    end = os.environ.get("SLURM_JOB_END_TIME", "")
    if end.isdigit():
        return int(end) - time.time()
    command = ["squeue", "--noheader", "--job", job, "--format", "%L"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return None
    # squeue prints days-hours:minutes:seconds, hours:minutes:seconds or minutes:seconds.
    return _parse(answer) if TIME_LIMIT.fullmatch(answer) else None
