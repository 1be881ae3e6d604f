"""A model's tensors by the names, and in the pieces, that its checkpoints have: what vLLM's loaders are for.

transformers names some modules otherwise than checkpoints do (a Mixtral's `mlp` is `block_sparse_moe` there),
and stacks experts that lie one by one in a file. It knows the way back, for saving.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from mpies.model.weights import Tensors

# Up to a layer's number: what a checkpoint has fused, or in pieces, is of one layer.
LAYER = re.compile(r"^.*?\.\d+(?=\.)")


def as_stored(
    model: PreTrainedModel, tensors: Iterable[tuple[str, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The same as a checkpoint of the model has them. A layer's names follow each other."""
    layer: Tensors = {}
    path = ""
    for name, tensor in tensors:
        found = LAYER.match(name)
        if (now := found[0] if found else name) != path:
            yield from revert_weight_conversion(model, layer).items()
            layer, path = {}, now
        layer[name] = tensor
    yield from revert_weight_conversion(model, layer).items()
