"""Calls of tools, as models write them in their answers: four formats, read and checked.

    <tool_call>{"name": NAME, "arguments": {...}}</tool_call>: Qwen 2.5 and 3, Hermes; the plain one
    {"name": NAME, "parameters": {...}}: Llama 3.1 and 3.2
    <tool_call><function=NAME><parameter=KEY>VALUE</parameter></function></tool_call>: Qwen 3.5, Nemotron 3
    <tool_call>NAME<arg_key>KEY</arg_key><arg_value>VALUE</arg_value></tool_call>: GLM 4

What a model writes is hostile: each reader goes through the text once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

ToolCall = dict[str, Any]
Schema = dict[str, Any]

OPEN, CLOSE = "<tool_call>", "</tool_call>"
MOST_CALLS = 16  # of a turn
DEPTH = 64  # of a call's arguments: who copies and writes them goes as deep; a parser may do a thousand
THINKS = "<think>"
THOUGHT = "</think>"  # what is before it is no answer, but may well speak of calls


class UnreadableCallError(Exception):
    """What a model wrote is no call of a tool."""


@dataclass(frozen=True)
class Format:
    """How calls are written. `find`: where each begins in a text, and what it is, unchecked."""

    find: Callable[[str, int, Sequence[Schema]], Iterator[tuple[int, Any]]]
    write: Callable[[ToolCall], str]

    def read(self, text: str, tools: Sequence[Schema] = ()) -> tuple[list[ToolCall], str]:
        """The calls of an answer, in transformers' form, and what is said before them.

        `tools`: whose schemas say of what type arguments are that have no marks of their own. Raises
        UnreadableCallError.
        """
        begin, calls = len(text), []
        for place, found in self.find(text, text.find(THOUGHT) + 1, tools):
            begin = min(begin, place)
            calls += [checked_call(one) for one in (found if isinstance(found, list) else [found])]
            refuse_many(len(calls))
        return calls, text[:begin].strip() if calls else text


def checked_call(call: Any) -> ToolCall:
    """A call in transformers' form. Raises UnreadableCallError."""
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise UnreadableCallError('a call needs a "name"')
    arguments = call.get("arguments", {})
    if not isinstance(arguments, dict) or not all(isinstance(name, str) for name in arguments):
        raise UnreadableCallError('the "arguments" of a call have to be an object')
    if not is_shallow(arguments):
        raise UnreadableCallError(f'the "arguments" of a call are nested more than {DEPTH} times')
    try:  # JSON can name half of a character, which no tokenizer takes back
        json.dumps([call["name"], arguments], ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError as error:
        raise UnreadableCallError(f"a call is no text ({error.reason})") from None
    except ValueError:
        raise UnreadableCallError("a call has a number that is not finite, which is no JSON") from None
    return {"type": "function", "function": {"name": call["name"], "arguments": arguments}}


def refuse_many(calls: int) -> None:
    """Raises UnreadableCallError."""
    if calls > MOST_CALLS:
        raise UnreadableCallError(f"{calls} calls in one answer; allowed are {MOST_CALLS}")


def is_shallow(value: Any) -> bool:
    """Are a JSON value's lists and objects in one another no more than DEPTH times?"""
    level, depth = [value], 0
    while level:
        inner = [list(one.values()) if isinstance(one, dict) else one for one in level]
        level = [each for one in inner if isinstance(one, list) for each in one]
        depth += 1
        if depth > DEPTH:
            return False
    return True


def _find_tagged(text: str, start: int, tools: Sequence[Schema]) -> Iterator[tuple[int, Any]]:
    """JSON between tags; also a list of calls, which SmolLM2 was trained to write."""
    refuse_many(text.count(OPEN, start))
    while (place := text.find(OPEN, start)) >= 0:
        end = text.find(CLOSE, place)
        if end < 0:
            raise UnreadableCallError(f"{OPEN} without {CLOSE}")
        try:
            yield place, json.loads(text[place + len(OPEN) : end])
        except (ValueError, RecursionError) as error:
            raise UnreadableCallError(f"a call is no JSON ({str(error)[:100]})") from None
        start = end


BARE = re.compile(r'\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:')


def _find_bare(text: str, start: int, tools: Sequence[Schema]) -> Iterator[tuple[int, Any]]:
    """Objects of JSON with a name and arguments, wherever they are."""
    decoder = json.JSONDecoder()
    while match := BARE.search(text, start):
        try:
            found, start = decoder.raw_decode(text, match.start())
        except (ValueError, RecursionError) as error:
            raise UnreadableCallError(f"a call is no JSON ({str(error)[:100]})") from None
        arguments = found.get("parameters", found.get("arguments"))
        if arguments is not None:  # else, it is something else that has a name
            yield match.start(), {"name": found["name"], "arguments": arguments}


@dataclass(frozen=True)
class Marks:
    """Of a format whose arguments are texts between marks. `begins` has the name, `argument` the key."""

    hint: re.Pattern[str]
    """What no answer has but for a call."""
    begins: re.Pattern[str]
    argument: re.Pattern[str]
    argument_ends: str
    ends: re.Pattern[str]

    def find(self, text: str, start: int, tools: Sequence[Schema]) -> Iterator[tuple[int, Any]]:
        while hint := self.hint.search(text, start):
            begun = self.begins.match(text, hint.start())
            if not begun:
                raise UnreadableCallError(f"a call has no name after {hint[0]}")
            kinds, arguments, start = _kinds(begun[1], tools), {}, begun.end()
            while argument := self.argument.match(text, start):
                end = text.find(self.argument_ends, argument.end())
                if end < 0:
                    raise UnreadableCallError(f"an argument without {self.argument_ends}")
                raw = text[argument.end() : end].removesuffix("\n")
                arguments[argument[1]] = _typed(raw, kinds.get(argument[1]))
                start = end + len(self.argument_ends)
            ended = self.ends.match(text, start)
            if not ended:
                raise UnreadableCallError(f"a call of {begun[1][:100]} that is not ended after its arguments")
            yield hint.start(), {"name": begun[1], "arguments": arguments}
            start = ended.end()


def _kinds(name: str, tools: Sequence[Schema]) -> dict[str, Any]:
    """The schemas of a tool's arguments, by their names."""
    functions = [tool.get("function", tool) for tool in tools]
    found = [one.get("parameters") for one in functions if isinstance(one, dict) and one.get("name") == name]
    properties = found[0].get("properties") if found and isinstance(found[0], dict) else None
    return properties if isinstance(properties, dict) else {}


CONSTANTS = {"True": True, "False": False, "None": None}


def _typed(raw: str, schema: Any) -> Any:
    """A text as the value that its schema asks for; as it is, where that is a text or is not known."""
    types = _types(schema)
    if not types or ("string" in types and not ("null" in types and raw in ("null", "None"))):
        return raw
    if raw.strip() in CONSTANTS:
        return CONSTANTS[raw.strip()]
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return raw


def _types(schema: Any) -> set[str]:
    """Those that JSON schema names, one of which it has to be; none: it does not say."""
    if not isinstance(schema, dict):
        return set()
    named = schema.get("type")
    found = {one for one in (named if isinstance(named, list) else [named]) if isinstance(one, str)}
    for several in ("anyOf", "oneOf"):
        choices = schema.get(several)
        for one in choices if isinstance(choices, list) else []:
            found |= _types(one)
    return found | ({"null"} if schema.get("nullable") else set())


def _write_tagged(call: ToolCall) -> str:
    return f"{OPEN}{json.dumps(call['function'])}{CLOSE}"


def _write_bare(call: ToolCall) -> str:
    return json.dumps({"name": call["function"]["name"], "parameters": call["function"]["arguments"]})


QWEN = Marks(
    re.compile(r"<tool_call>|<function="),
    re.compile(r"(?:<tool_call>\s*)?<function=([^>\n]{1,200})>"),
    re.compile(r"\s*<parameter=([^>\n]{1,200})>\n?"),
    "</parameter>",
    re.compile(r"\s*</function>(?:\s*</tool_call>)?"),
)
GLM = Marks(
    re.compile(OPEN),
    re.compile(r"<tool_call>\s*([^\s<{]{1,200})"),
    re.compile(r"\s*<arg_key>([^<]{1,200})</arg_key>\s*<arg_value>"),
    "</arg_value>",
    re.compile(r"\s*</tool_call>"),
)
PLAIN = Format(_find_tagged, _write_tagged)
FORMATS = (
    PLAIN,
    Format(_find_bare, _write_bare),
    Format(QWEN.find, _write_tagged),
    Format(GLM.find, _write_tagged),
)
"""The order is that in which they are tried: what is JSON between tags is bare JSON, too."""
