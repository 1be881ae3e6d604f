"""The output layer gets its rows without gaps, on every device and with every perturbation.

A prefill asks for the logits of its last tokens alone, which lie apart in memory: hidden states
(rows, 1, width), with all other tokens between them. Of such a tensor, torch's linear layer makes a batch of
products, with a copy of the weight for each row; and a vocabulary's weight is the largest there is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def close_gaps(model: nn.Module) -> None:
    """From now on, whatever the model's output layer is called with is contiguous.

    A model whose output layer is not where transformers looks stays as it is.
    """
    try:
        layer = model.get_output_embeddings()  # type: ignore[operator]
    except (NotImplementedError, AttributeError):
        return
    if isinstance(layer, nn.Module):
        layer.register_forward_pre_hook(_without_gaps)


def _without_gaps(_layer: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(one.contiguous() if isinstance(one, torch.Tensor) else one for one in given)
