"""Positions whose effect depends on the longest row of a batch.

Rotary embeddings with "dynamic" scaling have frequencies that grow with the longest row seen so far, with
"longrope" they change once the longest row is longer than what the model was trained on at first. Llama 4
scales its attention by steps of positions that count the padding, too. Up to there, rows are independent.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from mpies.errors import InputError


def kinds(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """The kinds of rotary embeddings that the model's layers have, as its configuration tells of them."""
    given = getattr(config.get_text_config(), "rope_parameters", None) or {}
    return [given] if "rope_type" in given else [kind for kind in given.values() if isinstance(kind, dict)]


def reach(config: PreTrainedConfig) -> int | None:
    """Tokens of a prompt with its answer up to which rows are independent; None: always."""
    text = config.get_text_config()
    known = []
    for kind in kinds(config):
        if "dynamic" in kind.get("rope_type", ""):
            known.append(text.max_position_embeddings)
        elif kind.get("rope_type") == "longrope":
            known.append(kind["original_max_position_embeddings"])
    if getattr(text, "attn_temperature_tuning", False):
        known.append(text.floor_scale - 1)
    return min(known, default=None)


def refuse_beyond(model: PreTrainedModel, tokens: int) -> None:
    """Raise InputError if prompts and answers of up to so many tokens go beyond the model's reach."""
    most = reach(model.config)
    if most is not None and tokens > most:
        raise InputError(
            f"engine.max_new_tokens: the longest prompt and its answer may have {tokens} tokens, but beyond"
            f" {most} what {type(model).__name__} computes for a row depends on the longest row of a batch;"
            f" use {tokens - most} less, or engine.name=vllm"
        )
