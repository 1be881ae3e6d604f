"""What was said in an episode: for people to read, and as JSON."""

from __future__ import annotations

import json

from mpies.tasks.episodes import Episode


def readable(episode: Episode) -> str:
    """All that was said after the prompt, who says it in brackets, and how the episode ended."""
    said = episode.completion
    lines = [said] if isinstance(said, str) else [f"[{m['role']}] {m['content']}" for m in said]
    return "\n".join([*lines, f"[{ending(episode)}]"])


def ending(episode: Episode) -> str:
    """'done after 3 turns', 'failed after 1 turn: step raised ...'."""
    count = len(episode.turns)
    why = f": {episode.error}" if episode.error else ""
    return f"{episode.ended} after {count} turn{'s' * (count != 1)}{why}"


def written(episode: Episode) -> str:
    """The conversation as JSON: a list of messages, or a text; and how it ended."""
    return json.dumps({"conversation": episode.conversation, "ended": ending(episode)})
