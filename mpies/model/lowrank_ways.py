"""The way in which each module of a model computes with a block of members, and simpler ones if it is wrong.

A module starts with the table's rule for its class, or with a guess (lowrank_kinds.py). Where that turns
out not to be right, it is computed member by member (lowrank_turns.py), then the module that it is in,
and so on up to the whole model. Modules of one kind, as those of all layers, change their ways together.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import nn

from mpies.errors import InputError
from mpies.model.beside import beside_decoder
from mpies.model.lowrank_block import Block
from mpies.model.lowrank_kinds import GUESSES, READ_BY_OTHERS, InPlaceOf, rules_for
from mpies.model.lowrank_own import UnknownUse
from mpies.model.lowrank_place import Rule, Unfit, Wrapped
from mpies.model.lowrank_turns import Turns


@dataclass
class Way:
    """How one module computes."""

    place: Wrapped
    rules: list[Rule]
    """The first is what is done now; none: the module's own forward. The rest is tried next."""

    @property
    def rule(self) -> Rule | None:
        return self.rules[0] if self.rules else None

    @property
    def is_guess(self) -> bool:
        """Is it none of the table's rules?"""
        return isinstance(self.rule, InPlaceOf | Turns) or len(self.rules) > 1

    @property
    def kind(self) -> tuple[str, type]:
        """Modules of different layers are of one kind if their names are equal but for numbers."""
        return re.sub(r"\d+", "#", self.place.path), type(self.place.module)

    def lends(self) -> list[Wrapped]:
        """Modules whose parameters have to be lent if this one is computed member by member."""
        if isinstance(self.rule, InPlaceOf | Turns):
            return self.rule.lends
        return [self.place] if self.rule else []


class Ways:
    """Of all modules with parameters, and of those that are computed member by member.

    The forward of each is replaced; without a block, it calls the one that was there. On CPUs,
    `linear_cpu.install` replaces forwards, too, before or after: it leaves alone what is replaced.
    """

    def __init__(self, model: nn.Module, block: Block, tuned: Container[str] | None = None):
        self.model = model
        self.block = block
        self.ways: dict[str, Way] = {}
        self.trying = False
        named = {id(parameter): name for name, parameter in model.named_parameters()}
        self.names = {key: name for key, name in named.items() if tuned is None or name in tuned}
        self.beside = tuple(f"{path}." for path in beside_decoder(model))
        self._at("", top=True)
        for path, module in model.named_modules():
            own = [parameter for parameter in module._parameters.values() if parameter is not None]
            known = [parameter for parameter in own if id(parameter) in self.names]
            if known and len(known) < len(own):
                raise InputError(
                    f"es.leave_out: leaves out a part of {path}'s parameters, and low rank needs all of a"
                    " module's; name the whole module, or use es.perturbation=full"
                )
            if known:
                way = self._at(path)
                way.rules = rules_for(way.place)
        for path in [path for path, way in self.ways.items() if type(way.place.module) in READ_BY_OTHERS]:
            self._leave_to_reader(path)

    @contextmanager
    def tried(self) -> Iterator[None]:
        """For the time being, what goes wrong in a module's own way is `Unfit`, whatever it is."""
        self.trying = True
        try:
            yield
        finally:
            self.trying = False

    def give_way(self, unfit: Unfit) -> bool:
        """After a module could not be computed as it was: simpler from now on. False: nothing is.

        One that was called with something else than rows keeps its rule, within a module that is computed
        member by member.
        """
        way = self.ways[unfit.place.path]
        if unfit.in_turn or way.is_guess:
            return self._each_of_kind(way, self._simplify)
        return self._each_of_kind(way, lambda one: self._raise(one, []))

    def give_way_of(self, names: list[str]) -> bool:
        """The same after parameters, by name, turned out not to be computed with as they should be."""
        chosen = set(names)
        found = [way for way in self.ways.values() if chosen & self._computed(way)]
        return all([self._each_of_kind(way, self._simplify) for way in found]) and bool(found)

    def give_way_where(self, is_right: Callable[[], bool]) -> bool:
        """The same after something went wrong that is not about parameters: for a kind that makes it right.

        Guesses first. For all of these, if it takes more than one kind. False: there are none.
        """
        found = {way.kind: way for way in self.ways.values() if way.rules}
        before = {path: way.rules for path, way in self.ways.items()}
        for way in sorted(found.values(), key=lambda way: not way.is_guess):
            if self._each_of_kind(way, self._simplify) and is_right():
                return True
            for path, one in self.ways.items():
                one.rules = before.get(path, [])
        guesses = [way for way in found.values() if way.is_guess]
        return any([self._each_of_kind(way, self._simplify) for way in guesses])

    def in_turns(self) -> list[str]:
        """Classes of the modules that are computed member by member, in the model's order."""
        found = (type(way.place.module).__name__ for way in self.ways.values() if isinstance(way.rule, Turns))
        return list(dict.fromkeys(found))

    def _computed(self, way: Way) -> set[str]:
        """The parameters, by name, that a way computes with."""
        return {name for place in way.lends() for name in place.names.values()}

    def _each_of_kind(self, way: Way, change: Callable[[Way], bool]) -> bool:
        """Change all ways of one kind; those that this changes meanwhile are left."""
        kind, rules = way.kind, [type(rule) for rule in way.rules]
        alike = [one for one in self.ways.values() if one.kind == kind]
        return all([change(one) for one in alike if [type(rule) for rule in one.rules] == rules])

    def _simplify(self, way: Way) -> bool:
        if len(way.rules) > 1:
            way.rules = way.rules[1:]
            return True
        if not isinstance(way.rule, Turns):
            way.rules = [Turns(way.place, way.lends())]
            return True
        return self._raise(way, way.lends())

    def _raise(self, way: Way, lends: list[Wrapped]) -> bool:
        """The module that this one is in is computed member by member, with these others' parameters lent."""
        path = self._outer(way.place.path)
        if path is None:
            return False
        outer = self._at(path)
        if not lends and isinstance(outer.rule, Turns):  # its forward is not what calls this one
            return self._raise(outer, outer.lends())
        lent = list({place.path: place for place in (*outer.lends(), *lends)}.values())
        tried = isinstance(outer.rule, Turns) or not lends
        read = [] if tried or not InPlaceOf.can_lend(lent) else [InPlaceOf(lent)]
        outer.rules = [*read, Turns(outer.place, lent)]
        if lends:
            way.rules = []
        return True

    def _outer(self, path: str) -> str | None:
        """The innermost module around one that has a forward."""
        while path:
            path = path.rpartition(".")[0]
            if type(self.model.get_submodule(path)).forward is not nn.Module.forward:
                return path
        return None

    def _leave_to_reader(self, path: str) -> None:
        way, outer = self.ways[path], self._at(self._outer(path) or "")
        lends = [*(outer.place for _ in outer.rules[:1]), way.place]
        if isinstance(outer.rule, InPlaceOf):
            lends = [*outer.rule.lends, way.place]
        way.rules, outer.rules = [], [InPlaceOf(lends)]

    def _at(self, path: str, top: bool = False) -> Way:
        """The way of the module there, whose forward is replaced if it was not."""
        if path not in self.ways:
            module = self.model.get_submodule(path)
            own = {key: self.names[id(p)] for key, p in module._parameters.items() if id(p) in self.names}
            way = self.ways[path] = Way(Wrapped(path, module, own, module.forward), [])
            vars(module)["forward"] = self._forward(way, top)
        return self.ways[path]

    def _forward(self, way: Way, top: bool) -> Callable[..., Any]:
        """A module's forward: its own without a block, else that of its way."""
        place, block = way.place, self.block
        beside = f"{place.path}.".startswith(self.beside) if self.beside else False

        @wraps(place.plain)  # others look at its signature
        def forward(*given: Any, **named: Any) -> Any:
            if not block.members:
                return place.plain(*given, **named)
            if top:
                block.tokens = _tokens(*given, **named)
            rule = way.rule
            if rule is None:
                return place.plain(*given, **named)
            tokens = block.tokens
            if beside:  # a row has patches of images there, not tokens
                block.tokens = 1
            try:
                return rule(block, place, *given, **named)
            except Unfit as unfit:
                unfit.in_turn |= block.alone
                raise
            except UnknownUse as error:
                raise Unfit.of(place, f"the use of {error} in the {{}} at {{}}", block.alone) from error
            except GUESSES as error:
                if not self.trying or isinstance(error, torch.OutOfMemoryError):
                    raise
                raise Unfit.of(place, "all that the {} at {} does", block.alone) from error
            finally:
                block.tokens = tokens

        return forward


def _tokens(input_ids: torch.Tensor | None = None, *_: Any, **named: Any) -> int:
    """Of each row, in a call of the whole model."""
    return (named["inputs_embeds"] if input_ids is None else input_ids).shape[1]


def count_in_turn(model: nn.Module, tuned: Container[str]) -> int:
    """The most numbers of a module's own parameters that may have to be made of one member; see Turns.

    Those of modules that are in no table: of others, single small ones may be read past their forward.
    `tuned`: names of parameters.
    """
    places = (Wrapped(path, module, {}, module.forward) for path, module in _with_tuned(model, tuned))
    guessed = (place.module for place in places if _is_guessed(place))
    return max((sum(p.numel() for p in module.parameters(recurse=False)) for module in guessed), default=0)


def _with_tuned(model: nn.Module, tuned: Container[str]) -> Iterator[tuple[str, nn.Module]]:
    """The modules, by path, of whose own parameters any is tuned."""
    for path, module in model.named_modules():
        if any(f"{path}.{name}".lstrip(".") in tuned for name in module._parameters):
            yield path, module


def _is_guessed(place: Wrapped) -> bool:
    has_own = any(parameter is not None for parameter in place.module._parameters.values())
    return has_own and isinstance(rules_for(place)[-1], InPlaceOf | Turns)
