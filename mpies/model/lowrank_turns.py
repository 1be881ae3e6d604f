"""Any module with a block of members: one member after another, each on its own rows.

What a module is called with is cut into each member's rows, its caches too; the parameters that no rule
knows are lent as the member's own, base plus noise, for the time of its turn; what it returns is put
together again. Modules inside it compute by their own rules meanwhile, with a block that is one member. So
it takes a module's own memory, once for a turn, and the time of smaller batches; it assumes nothing but
that rows are independent, which the test at every start sees (engines/selftest.py).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import Cache

from mpies.model.lowrank_block import Block
from mpies.model.lowrank_place import Wrapped


@dataclass
class Turns:
    """A module's forward, member by member. A `Rule`."""

    place: Wrapped
    lends: list[Wrapped] = field(default_factory=list)
    """Modules, of this one or itself, whose parameters are lent as a member's own."""
    shared: set[str] = field(default_factory=set)
    """Arguments that were seen not to have rows: never cut, even where their size is that of the rows."""

    def __call__(self, block: Block, place: Wrapped, *given: Any, **named: Any) -> Any:
        if block.alone:
            with self._lent(block, int(block.rows.array[0])):
                return place.plain(*given, **named)
        cut = Cut(self, block, _first_tensor(given, named))
        made = []
        for rows, member, one in block.rows.runs:
            with block.lone(one), self._lent(block, member):
                mine = cut.part(given, rows, ""), cut.part(named, rows, "")
                made.append(place.plain(*mine[0], **mine[1]))
        return cut.whole(made)

    @contextmanager
    def _lent(self, block: Block, member: int) -> Iterator[None]:
        with ExitStack() as stack:
            for place in self.lends:
                stack.enter_context(place.lent(**own_parameters(block, place, member)))
            yield


def own_parameters(block: Block, place: Wrapped, member: int) -> dict[str, torch.Tensor]:
    """A member's own parameters of a module, in the live dtype, by their names in the module."""
    own = {}
    for key, name in place.names.items():
        base = place.parameter(key)
        if name in block.matrices:
            own[key] = block.matrices[name].added_to(base, member)
        else:
            own[key] = block.vectors[name][member].view(base.shape)
    return own


def _first_tensor(given: tuple[Any, ...], named: Mapping[str, Any]) -> torch.Tensor | None:
    return next((x for x in (*given, *named.values()) if isinstance(x, torch.Tensor)), None)


class Cut:
    """One call's arguments, cut by rows, and its results, put together."""

    def __init__(self, turns: Turns, block: Block, first: torch.Tensor | None):
        self.turns, self.rows = turns, len(block.rows)
        self.runs = [rows for rows, *_ in block.rows.runs]
        # Tokens of all rows together are rows one after another.
        self.sizes = {self.rows, self.rows * block.tokens}
        if first is not None and first.dim() and first.shape[0] % (self.rows * block.tokens) == 0:
            self.sizes.add(first.shape[0])
        self.caches: dict[int, tuple[Cache, list[Cache]]] = {}

    def part(self, value: Any, rows: slice, key: str) -> Any:
        """What of an argument is for those rows. `key`: which argument it is, or which part of one."""
        if isinstance(value, torch.Tensor):
            return self._part_of_tensor(value, rows, key)
        if isinstance(value, Cache):
            parts = self.caches.setdefault(id(value), (value, []))[1]
            parts.append(CacheOfRows.of(value, rows, self.rows))
            return parts[-1]
        if isinstance(value, Mapping):
            return type(value)((k, self.part(v, rows, f"{key}.{k}")) for k, v in value.items())  # type: ignore[call-arg]
        if type(value) in (tuple, list):
            return type(value)(self.part(v, rows, f"{key}.{i}") for i, v in enumerate(value))
        return value

    def _part_of_tensor(self, value: torch.Tensor, rows: slice, key: str) -> torch.Tensor:
        if value.dim() < 2 or value.shape[0] == 1 or key in self.turns.shared:
            return value
        if value.shape[0] not in self.sizes:
            self.turns.shared.add(key)
            return value
        each = value.shape[0] // self.rows
        return value[rows.start * each : rows.stop * each]

    def whole(self, made: list[Any]) -> Any:
        """What all members' turns have returned, together; caches hold what they have written."""
        for cache, parts in self.caches.values():
            CacheOfRows.join(cache, parts)
        return made[0] if len(made) == 1 and not self.caches else self._joined(made)

    def _joined(self, made: list[Any]) -> Any:
        first = made[0]
        if isinstance(first, torch.Tensor):
            counts = [rows.stop - rows.start for rows in self.runs]
            each = {len(x) / count if x.dim() > 1 else 0.5 for x, count in zip(made, counts, strict=True)}
            if len(each) > 1 or each.pop() % 1:
                self.turns.place.refuse("what the {} at {} returns")
            return torch.cat(made)
        if isinstance(first, Cache):
            return next((cache for cache, parts in self.caches.values() if parts[0] is first), first)
        if isinstance(first, Mapping):
            whole = copy.copy(first)
            for key in first:
                whole[key] = self._joined([one[key] for one in made])  # type: ignore[index]
            return whole
        if type(first) in (tuple, list):
            return type(first)(self._joined(list(parts)) for parts in zip(*made, strict=True))
        return first


class CacheOfRows(list[Any]):
    """The layers of a cache, as some of its rows have them: cut when they are asked for.

    What is written into a layer's tensors in place is written into the cache's own; where a layer gets
    others, as those that grow do, `join` puts all rows' together.
    """

    def __init__(self, layers: list[Any], rows: slice, count: int):
        super().__init__(layers)
        self.rows, self.of_all = rows, count
        self.cut: dict[int, Any] = {}

    @staticmethod
    def of(cache: Cache, rows: slice, count: int) -> Cache:
        part = copy.copy(cache)
        part.layers = CacheOfRows(cache.layers, rows, count)
        return part

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, int):
            return [self[i] for i in range(*index.indices(len(self)))]
        index %= len(self)
        if index not in self.cut:
            layer = copy.copy(super().__getitem__(index))
            for name, value in vars(layer).items():
                vars(layer)[name] = self._part(value)
            self.cut[index] = layer
        return self.cut[index]

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def _part(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            has_rows = value.dim() > 1 and value.shape[0] == self.of_all
            return value[self.rows] if has_rows else value.clone()
        if type(value) is dict:
            return {key: self._part(one) for key, one in value.items()}
        return value

    @staticmethod
    def join(cache: Cache, parts: list[Cache]) -> None:
        """The cache's layers hold what those of its parts, one after another, have become."""
        cut: list[Any] = [part.layers for part in parts]
        for index in {index for layers in cut for index in layers.cut}:
            layers = [each[index] for each in cut]
            layer = cache.layers[index]
            join = getattr(layer, "join", None)
            if join is not None:
                join(layers)
                continue
            for name in vars(layers[0]):
                vars(layer)[name] = _grown(vars(layer).get(name), [vars(one)[name] for one in layers])


def _grown(before: Any, parts: list[Any]) -> Any:
    """A layer's attribute after all parts' turns; `before`: what it was in the whole layer."""
    first = parts[0]
    if isinstance(first, torch.Tensor) and first.dim() > 1:
        in_place = isinstance(before, torch.Tensor) and before.shape[1:] == first.shape[1:] and before.numel()
        if in_place and before.data_ptr() == first.data_ptr():
            return before
        return torch.cat(parts)
    if type(first) is dict:
        old = before if type(before) is dict else {}
        return {key: _grown(old.get(key), [part[key] for part in parts]) for key in first}
    return first
