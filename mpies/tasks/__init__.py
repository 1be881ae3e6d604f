"""Tasks: prompts and rewards."""

from __future__ import annotations

from mpies.tasks.base import Task


def make(name: str) -> Task:
    """The task of that name (`task.name`)."""
    from mpies.tasks import conciseness

    return {"conciseness": conciseness.task}[name]()
