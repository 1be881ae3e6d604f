"""How far back each layer's attention looks, in vLLM and in transformers: probes are too short to tell.

vLLM believes some settings of a config.json that transformers' class of the model does not read, and adds
one token to the windows of some models.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np
from transformers import PreTrainedModel

from mpies.engines.probing import Probe, by_one_forward
from mpies.engines.vllm import INSTEAD
from mpies.engines.vllm.reading import layers_of
from mpies.errors import InputError

if TYPE_CHECKING:
    from vllm import LLM

SLIDING = "sliding_attention"
Windows = dict[int, int | None]
"""By layers that attend, tokens that each token sees, itself among them; None: all before it."""


def refuse_other_windows(model: PreTrainedModel, llm: LLM, tokens: int) -> None:
    """Raise InputError if prompts with their answers, of up to `tokens` tokens, are looked at otherwise.

    model: transformers', with the base's weights.
    """
    found = _within(windows_in_vllm(llm), tokens)
    expected = _within(windows_in_transformers(model, list(found)), tokens)
    other = [layer for layer in found if found[layer] != expected[layer]]
    if other:
        seen = [window for layer in other for window in (found[layer], expected[layer]) if window]
        told = " and ".join(
            f"{_told(windows[other[0]])} in {name}"
            for name, windows in (("vllm", found), ("transformers", expected))
        )
        raise InputError(
            f"engine.name: vllm looks back otherwise than transformers in {len(other)} layers of this model,"
            f" {told}: prompts with their answers, of up to {tokens} tokens here, may have"
            f" {min(seen)}; {INSTEAD}"
        )


def windows_in_vllm(llm: LLM) -> Windows:
    found: Windows = {}
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    for name, layer in layers.items():
        number = re.search(r"\.(\d+)\.", name)
        if number and hasattr(layer, "sliding_window"):
            found[int(number[1])] = layer.sliding_window
    return found


def windows_in_transformers(model: PreTrainedModel, layers: list[int]) -> Windows:
    """Masks are made of the text configuration's window, if the model reads it: a smaller one shows."""
    config = model.config.get_text_config()
    each = layers_of(config)
    sizes = {layer: getattr(each[layer], "sliding_window", None) for layer in layers}
    several = len(set(sizes.values())) > 1
    if not any(sizes.values()) or not (several or _reads_window(model)):
        return dict.fromkeys(layers)
    kinds = getattr(config, "layer_types", None) or [SLIDING] * len(each)
    return {layer: size if kinds[layer] == SLIDING else None for layer, size in sizes.items()}


def _reads_window(model: PreTrainedModel) -> bool:
    config, probe = model.config.get_text_config(), Probe.of(model)
    plain, size = by_one_forward(model, probe), config.sliding_window
    config.sliding_window = 1 if size > 1 else 2
    try:
        return not np.array_equal(plain, by_one_forward(model, probe))
    finally:
        config.sliding_window = size


def _within(windows: Windows, tokens: int) -> Windows:
    """Windows in which all tokens are have no effect."""
    return {layer: size if size and size < tokens else None for layer, size in windows.items()}


def _told(window: int | None) -> str:
    return f"by {window} tokens" if window else "at all tokens"
