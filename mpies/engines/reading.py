"""Rows of tokens as a model reads them, from left to right: its cache, and where each row begins.

Prompts without images are read together, left padded. Those with images are read one after another, each for
all members of a block at once: no two prompts' pixels meet, whatever form a model wants them in. Then
their caches become one, in which they are left padded as well. So do the caches of conversations that go on,
of which only what is new is read, and of others beside them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from mpies.engines.cache import ARGUMENTS, RoomyLayer, cache_argument, cache_for, has_keys
from mpies.engines.turns import Part, Past, resume
from mpies.engines.vision import Inputs, for_rows, of_same_prompt
from mpies.errors import InputError

OnRows = Callable[[torch.Tensor], None]


class Reading:
    """Prompts that are read, and what follows them: up to `room` tokens more.

    `inputs`: what the model is given of each prompt's images; none for text. `on_rows` is called before the
    prompts that a forward pass is made of change, with their numbers, int64 (rows,). `pasts`: what each
    prompt goes on from, if anything of it was kept; only of text, and in a cache that `keeps_all`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Sequence[list[int]],
        room: int,
        inputs: Sequence[Inputs] = (),
        on_rows: OnRows = lambda rows: None,
        pasts: Sequence[Past | None] = (),
    ):
        self.model, self.prompts, self.room, self.on_rows = model, prompts, room, on_rows
        self.inputs = inputs if any(inputs) else ()
        self.pasts = pasts if any(pasts) else [None] * len(prompts)
        self.knows = inspect.signature(model.forward).parameters
        self.argument = cache_argument(model) or ARGUMENTS[0]
        self.ids, self.starts = left_padded(prompts, model.device)
        self.width = self.ids.shape[1]
        self.padded = any(len(prompt) < self.width for prompt in prompts)
        self.positions = torch.arange(self.width + room, device=model.device)
        # Positions of a row's next tokens, less their number: images may have fewer positions than tokens.
        self.shifts = torch.zeros_like(self.starts)
        self.rows = torch.arange(len(prompts), device=model.device)
        self.cache = cache_for(model, self.width + room)
        self.has_keys = has_keys(self.argument, self.cache)
        self.seen = 0

    def begin(self) -> torch.Tensor:
        """Read the prompts. Logits of their last tokens: (rows, 1 or more, vocabulary)."""
        if self.inputs:
            return self._read_apart()
        going_on = [past for past in self.pasts if past]
        if going_on and len(going_on) < len(self.pasts):
            return self._read_in_two()
        self.on_rows(self.rows)
        if not going_on:
            return self.go_on(self.ids)
        starts = self.starts.tolist()
        # All rows read as many tokens as the one with most that is new: some, a few that were kept.
        self.seen = min(start + past.tokens for start, past in zip(starts, going_on, strict=True))
        tokens = [max(0, self.seen - start) for start in starts]
        resume(self.cache.layers, going_on, tokens, self.seen)  # type: ignore[arg-type]  # all keep all
        return self.go_on(self.ids[:, self.seen :])

    def go_on(self, ids: torch.Tensor, keep: int = 1) -> torch.Tensor:
        """Read `ids` (rows, tokens). Logits of the last `keep` tokens: (rows, `keep` or more, vocabulary)."""
        self.seen += ids.shape[1]
        seen = self.positions[: self.seen]
        # Models of states alone want no mask once they are past the padding.
        masked = self.padded and (self.has_keys or self.seen == ids.shape[1])
        mask = (seen >= self.starts[:, None]).long() if masked else None
        places = (seen[-ids.shape[1] :] - self.starts[:, None]).clamp(min=0)
        if self.inputs:
            places = places + self.shifts[:, None]
        optional = {"position_ids": places, "logits_to_keep": keep}
        given = {name: value for name, value in optional.items() if name in self.knows}
        given[self.argument] = self.cache
        return self.model(ids, attention_mask=mask, use_cache=True, **given).logits

    def leave(self, staying: torch.Tensor) -> None:
        """From now on, there are only these of the rows; int64 (rows,)."""
        self.rows, self.starts, self.shifts = (x[staying] for x in (self.rows, self.starts, self.shifts))
        self.cache.reorder_cache(staying)  # type: ignore[arg-type]  # its numbers are int64
        self.on_rows(self.rows)

    def part(self, which: torch.Tensor) -> Part:
        """What the cache has of these of the rows; int64 (some,)."""
        return Part.of(self.cache.layers, self.rows.tolist(), self.starts.tolist(), which.tolist())  # type: ignore[arg-type]

    def _renumbered(self, rows: torch.Tensor) -> OnRows:
        """`on_rows` for a reading of these rows alone."""
        return lambda some: self.on_rows(rows[some])

    def _read_in_two(self) -> torch.Tensor:
        """Those that go on by themselves, and the others: these have far more to be read."""
        groups = [[row for row, past in enumerate(self.pasts) if bool(past) is old] for old in (False, True)]
        caches, logits = [], []
        for group in groups:
            rows = torch.tensor(group, device=self.model.device)
            own = Reading(
                self.model,
                [self.prompts[row] for row in group],
                0,
                on_rows=self._renumbered(rows),
                pasts=[self.pasts[row] for row in group],
            )
            logits.append(own.begin()[:, -1:])
            caches.append(own.cache)
        return self._together(groups, caches, logits)

    def _read_apart(self) -> torch.Tensor:
        groups = of_same_prompt(self.prompts, self.inputs)
        caches, logits = [], []
        for group in groups:
            rows, tokens = torch.tensor(group, device=self.model.device), len(self.prompts[group[0]])
            self.on_rows(rows)
            caches.append(cache_for(self.model, tokens))
            ids = self.ids[rows, self.width - tokens :]
            given: dict[str, Any] = for_rows(self.inputs[group[0]], len(group), tokens, self.model)
            given[self.argument] = caches[-1]
            if "logits_to_keep" in self.knows:
                given["logits_to_keep"] = 1
            found = self.model(ids, use_cache=True, **given).logits[:, -1:]
            logits.append(found)
            self.shifts[rows] = take_shifts(self.model, rows)
        return self._together(groups, caches, logits)

    def _together(
        self, groups: list[list[int]], caches: list[DynamicCache], logits: list[torch.Tensor]
    ) -> torch.Tensor:
        """The groups' rows, which were read apart, are one batch from now on. Logits of all of them."""
        order = torch.tensor([row for group in groups for row in group], device=self.model.device)
        join(self.cache, caches, order, self.width)
        self.seen = self.width
        self.on_rows(self.rows)
        return torch.cat(logits)[order.argsort()]


def left_padded(prompts: Sequence[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (rows, width), and where each row starts (rows,); int64.

    Left padded, so that all rows' next tokens are in one column; what is padded with is to be masked.
    """
    width = max(map(len, prompts))
    if not all(prompts):
        raise InputError("a prompt has no tokens, so that there is nothing to go on from")
    starts = torch.tensor([width - len(prompt) for prompt in prompts], device=device)
    return torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=device), starts


def take_shifts(model: PreTrainedModel, rows: torch.Tensor) -> torch.Tensor:
    """What a model with positions in three dimensions keeps of the rows it has read: int64 (rows,).

    It keeps it no longer: the next batch has other rows.
    """
    for module in model.modules():
        found = getattr(module, "rope_deltas", None)
        if isinstance(found, torch.Tensor):
            module.rope_deltas = None  # type: ignore[assignment]
            return found.view(-1).to(rows)
    return torch.zeros_like(rows)


def join(whole: DynamicCache, parts: list[DynamicCache], order: torch.Tensor, width: int) -> None:
    """`whole` <- what the parts have read, up to column `width`; `order`: their rows, one after another."""
    for number, layer in enumerate(whole.layers):
        layers = [part.layers[number] for part in parts]
        if isinstance(layer, RoomyLayer):
            layer.take(layers, order, width)
            for part in parts:  # all of it twice would be too much
                part.layers[number] = RoomyLayer(0, False)
            continue
        back = order.argsort()
        for name in vars(layers[0]):
            vars(layer)[name] = _joined([vars(one)[name] for one in layers], back)


def _joined(values: list[Any], back: torch.Tensor) -> Any:
    first = values[0]
    if isinstance(first, torch.Tensor) and first.dim() > 1:
        return torch.cat(values)[back]
    if type(first) is dict:
        return {key: _joined([value[key] for value in values], back) for key in first}
    return first
