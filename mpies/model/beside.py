"""What a model has beside its text decoder: towers that read images, and what leads from them to it."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel


def beside_decoder(model: nn.Module) -> list[str]:
    """Paths of the outermost modules that are neither in the decoder nor around it, nor its embeddings.

    None of a model that is a decoder. Modules without parameters are left out.
    """
    if not isinstance(model, PreTrainedModel):
        return []
    decoder = model.get_decoder()
    if decoder is None or decoder is model or decoder is model.base_model:
        return []
    try:
        own = {id(decoder), id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    except (NotImplementedError, AttributeError):  # not all models have them where transformers looks
        return []
    return sorted(_beside(model, "", own))


def _beside(module: nn.Module, path: str, own: set[int]) -> Iterator[str]:
    for name, child in module.named_children():
        place = f"{path}.{name}" if path else name
        if id(child) in own or not any(True for _ in child.parameters()):
            continue
        if any(id(inner) in own for inner in child.modules()):
            yield from _beside(child, place, own)
        else:
            yield place
