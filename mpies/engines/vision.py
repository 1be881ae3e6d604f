"""Prompts with images as a model reads them: tokens, some of which stand for an image, and pixels."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from mpies.engines.image import Image
from mpies.errors import InputError, reason

# What a model is given of a prompt beside its tokens, by the names of its forward's arguments: pixels, of all
# images one after another or in one row, and what says of each token whether it stands for an image.
Inputs = dict[str, torch.Tensor]

OF_TOKENS = "token_type_ids"  # what such arguments' names end with
KEPT = 2**30  # bytes of pixels that are kept from one generation to the next


class Vision:
    """Makes tokens and pixels of text with images, by transformers' processor of the model."""

    def __init__(self, model: PreTrainedModel, processor: Any):
        self.processor = processor
        self.knows = set(inspect.signature(model.forward).parameters)
        self.name = type(model).__name__
        self._kept: OrderedDict[str, Inputs] = OrderedDict()

    def read(self, text: str, images: list[Image]) -> tuple[list[int], Inputs]:
        """Of a prompt that the chat template has written. Raises InputError, which names an image or why."""
        pictures = [image.open() for image in images]
        try:
            # The template writes the special tokens itself.
            found = self.processor(
                text=[text], images=[pictures], return_tensors="pt", add_special_tokens=False, padding=False
            )
        except Exception as error:
            raise InputError(
                f"the model's processor cannot read it with {len(images)} images, the first {images[0].name}"
                f" ({type(error).__name__}: {reason(error)})"
            ) from None
        ids = found.pop("input_ids")[0].tolist()
        found.pop("attention_mask", None)
        if unknown := sorted(set(found) - self.knows):
            raise InputError(
                f"the model's processor makes {unknown[0]} of images, which {self.name} does not take"
            )
        return ids, {name: torch.as_tensor(value) for name, value in found.items()}

    def inputs(self, key: str, text: str, images: list[Image]) -> Inputs:
        """The same without the tokens, from memory if they were made lately; `key` is the prompt's own."""
        if key not in self._kept:
            self.keep(key, self.read(text, images)[1])
        self._kept.move_to_end(key)
        return self._kept[key]

    def keep(self, key: str, inputs: Inputs) -> None:
        self._kept[key] = inputs
        while len(self._kept) > 1 and sum(map(_bytes, self._kept.values())) > KEPT:
            self._kept.popitem(last=False)


def for_rows(inputs: Inputs, rows: int, tokens: int, model: PreTrainedModel) -> Inputs:
    """What is given with `rows` times one prompt, of `tokens` tokens with what follows it."""
    return {
        name: value.repeat(rows, *[1] * (value.dim() - 1))
        for name, value in ((name, _fitted(name, value, tokens, model)) for name, value in inputs.items())
    }


def _fitted(name: str, value: torch.Tensor, tokens: int, model: PreTrainedModel) -> torch.Tensor:
    value = value.to(model.device, model.dtype if value.is_floating_point() else None)
    if name.endswith(OF_TOKENS):
        return torch.nn.functional.pad(value, (0, tokens - value.shape[1]))
    return value


def of_same_prompt(prompts: Sequence[list[int]], inputs: Sequence[Inputs]) -> list[list[int]]:
    """Numbers of the rows that have the same tokens and images: those of a block's members."""
    found: dict[tuple[Any, ...], list[int]] = {}
    for row, (prompt, own) in enumerate(zip(prompts, inputs, strict=True)):
        found.setdefault((id(own), *prompt), []).append(row)
    return list(found.values())


def _bytes(inputs: Inputs) -> int:
    return sum(value.nbytes for value in inputs.values())
