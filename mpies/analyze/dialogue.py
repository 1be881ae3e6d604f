"""An episode's conversation, as the run file keeps it, in lines for people to read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Line:
    who: str
    """assistant, user, tool; or end, which says how the episode ended."""
    text: str


def lines_of(messages: str) -> list[Line]:
    """What was said from the model's first answer on; nothing where no conversation was kept as messages."""
    try:
        told = json.loads(messages or "null")
        conversation, ended = told["conversation"], str(told["ended"])
        said = [Line(str(message["role"]), _text(message)) for message in conversation]
    except (ValueError, TypeError, KeyError, RecursionError):
        return []
    first = next((i for i, line in enumerate(said) if line.who == "assistant"), len(said))
    return [*said[first:], Line("end", ended)]


def _text(message: dict[str, Any]) -> str:
    """What a message says, and which tools it calls."""
    calls = [call.get("function", call) for call in message.get("tool_calls") or []]
    called = [f"{call.get('name')}({json.dumps(call.get('arguments'))})" for call in calls]
    return "\n".join(filter(None, [str(message.get("content") or ""), *called]))
