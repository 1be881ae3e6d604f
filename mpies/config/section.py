"""A section of the settings, and what its settings decide."""

from __future__ import annotations

from enum import Enum
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

MOST = 10**7  # members, generations, prompts: every rank lists them, and the run file has a row for each


class Role(Enum):
    """What a setting decides. From it follows whether it may change when a run goes on, and whether runs
    that differ in it are still runs of one kind, to be compared over their seeds."""

    RESULT = "what is computed: it stays, and tells runs apart"
    DATA = "where data are: it may change, since their digests are compared; it tells runs apart"
    JOB = "where, how and how long a job computes: it may change, and does not tell runs apart"


def as_list(given: Any) -> Any:
    """A text stands for a list of it, an empty one for none."""
    return [given] if isinstance(given, str) and given else given or []


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    role: ClassVar[Role] = Role.RESULT
    """Of the settings that are not marked with one of their own."""
