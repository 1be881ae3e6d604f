"""Which values a setting can have, in words."""

from __future__ import annotations

import types
from typing import Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
BOUNDS = {Ge: ("ge", "from"), Gt: ("gt", "above"), Le: ("le", "up to"), Lt: ("lt", "below")}


def allowed(field: FieldInfo) -> str:
    """The values of a setting: 'full | lowrank', 'a whole number from 1'."""
    kind = field.annotation
    words = _kind(kind)
    for bound in field.metadata:
        for sort, (attribute, word) in BOUNDS.items():
            if isinstance(bound, sort):
                words += f" {word} {_number(getattr(bound, attribute))}"
    return words


def _kind(kind: Any) -> str:
    origin = get_origin(kind)
    if origin is Literal:
        return " | ".join(str(value) for value in get_args(kind))
    if origin in (Union, types.UnionType):
        return " or ".join(_kind(part) for part in get_args(kind))
    if origin is list:
        return f"a list of {_kind(get_args(kind)[0])}"
    if origin is dict:
        kinds = {float: "names, or a mapping of names to numbers", str: "a mapping of names to texts"}
        return kinds[get_args(kind)[1]]
    return KINDS.get(kind, "text")


def _number(bound: Any) -> str:
    return "2^64" if bound == 2**64 else str(bound)
