"""OpenAI's chat completions: what a client asks, read and checked; what it is answered.

https://platform.openai.com/docs/api-reference/chat, without streaming. Answers are greedy: what steers
sampling, such as a temperature, is read over. What would need another kind of answer is refused.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from mpies.engines.calls import DEPTH, is_shallow
from mpies.tasks.environments.limits import CHARACTERS

MODEL = "mpies"  # the only one that there is, under any name
ROLES = {role: role for role in ("system", "user", "assistant", "tool")} | {"developer": "system"}
MOST_STOPS = 4

# What asks for an answer of another kind, and the values of it that do not.
ELSEWHERE: dict[str, tuple[Any, ...]] = {
    "stream": (False,),
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tool_choice": ("auto", "none"),
    "functions": ([],),
    "function_call": ("auto", "none"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "parallel_tool_calls": (True,),
    "frequency_penalty": (0,),  # both change greedy answers, too
    "presence_penalty": (0,),
}

Json = dict[str, Any]


class NotServedError(Exception):
    """A request is refused; the text says why."""


@dataclass(frozen=True)
class Question:
    """What is asked: chat messages and tools as chat templates take them."""

    messages: list[Json]
    tools: list[Json]
    most: int | None
    """Tokens of the answer, at most, if the request says so."""
    stops: list[str]
    """Texts that end the answer, without them."""
    model: str


def read(body: bytes) -> Question:
    """A request's body. Raises NotServedError."""
    given = _parsed(body)
    if not isinstance(given, dict):
        raise NotServedError("the body has to be an object")
    for name, allowed in ELSEWHERE.items():
        if given.get(name) is not None and given[name] not in allowed:
            raise NotServedError(f"`{name}` is not served here but as {list(allowed) or 'null'}")
    tools = [_tool(one) for one in _list_in(given, "tools")] if given.get("tool_choice") != "none" else []
    stops = _stops(given.get("stop"))
    if stops and tools:
        raise NotServedError("`stop` together with `tools` is not served here")
    messages = _messages(_list_in(given, "messages"))
    if messages[-1]["role"] == "assistant":
        raise NotServedError("the last of `messages` is the assistant's: to go on with it is not served here")
    return Question(messages, tools, _most(given), stops, _text(given.get("model") or MODEL, "`model`"))


def answered(question: Question, message: Json, number: int, why: str, tokens: list[int]) -> Json:
    """The answer to a client. `message`: the model's, with `tool_calls` as chat templates take them;
    `number`: in the episode, from 1; `why` it ended; `tokens`: of the prompt, and generated ones."""
    calls = [
        {
            "id": f"call_{number}_{i}",
            "type": "function",
            "function": {
                "name": call["function"]["name"],
                "arguments": json.dumps(call["function"]["arguments"]),
            },
        }
        for i, call in enumerate(message.get("tool_calls", []))
    ]
    told = {"role": "assistant", "content": message["content"]} | ({"tool_calls": calls} if calls else {})
    return {
        "id": f"chatcmpl-{number}",
        "object": "chat.completion",
        "created": 0,  # no answer depends on the time
        "model": question.model,
        "choices": [{"index": 0, "message": told, "logprobs": None, "finish_reason": why}],
        "usage": {
            "prompt_tokens": tokens[0],
            "completion_tokens": tokens[1],
            "total_tokens": sum(tokens),
        },
    }


def _parsed(body: bytes) -> Any:
    """Its JSON, of text that a tokenizer can read, no deeper than a program can go."""
    try:
        made = json.loads(body, parse_constant=_refuse_constant)
        if not is_shallow(made):
            raise NotServedError(f"the body is nested more than {DEPTH} times")
        return json.loads(json.dumps(made, ensure_ascii=False).encode(errors="replace"))
    except (ValueError, RecursionError) as error:
        raise NotServedError(f"the body is no JSON ({str(error)[:100]})") from None


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _list_in(given: Json, name: str) -> list[Any]:
    found = given.get(name) or []
    if not isinstance(found, list):
        raise NotServedError(f"`{name}` has to be a list")
    return found


def _messages(given: list[Any]) -> list[Json]:
    if not given:
        raise NotServedError("`messages` is missing or empty")
    names: dict[str, str] = {}  # of the functions that were called, by their calls' ids
    return [_message(one, names) for one in given]


def _message(given: Any, names: dict[str, str]) -> Json:
    if not isinstance(given, dict) or not isinstance(role := given.get("role"), str) or role not in ROLES:
        raise NotServedError(f"a message needs a `role`, one of {', '.join(ROLES)}")
    calls = _list_in(given, "tool_calls")
    if role != "assistant" and calls:
        raise NotServedError("`tool_calls` are the assistant's")
    content = given.get("content")
    made: Json = {"role": ROLES[role], "content": _content("" if content is None and calls else content)}
    if calls:
        made["tool_calls"] = [_call(call, names) for call in calls]
    if role == "tool":
        made["name"] = names.get(str(given.get("tool_call_id")), "unknown")
    return made


def _content(given: Any) -> str:
    parts = given if isinstance(given, list) else [{"type": "text", "text": given}]
    if not all(isinstance(part, dict) and part.get("type") == "text" for part in parts):
        raise NotServedError("a message's `content` has to be text, or a list of parts that are text")
    return _text("".join(_text(part.get("text"), "a message's `content`") for part in parts), "a message")


def _call(given: Any, names: dict[str, str]) -> Json:
    function = given.get("function") if isinstance(given, dict) else None
    if not isinstance(function, dict):
        raise NotServedError("each of `tool_calls` needs a `function`")
    name = _text(function.get("name"), "a call's `name`")
    try:
        arguments = json.loads(_text(function.get("arguments"), "a call's `arguments`"))
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict) or not is_shallow(arguments):
        raise NotServedError("a call's `arguments` have to be an object, as JSON in a text")
    names[str(given.get("id"))] = name
    return {
        "type": "function",
        "function": {"name": name, "arguments": _parsed(json.dumps(arguments).encode())},
    }


def _tool(given: Any) -> Json:
    function = given.get("function") if isinstance(given, dict) else None
    if not isinstance(function, dict) or given.get("type") != "function":
        raise NotServedError("each of `tools` has to be a `function`")
    name = _text(function.get("name"), "a tool's `name`")
    described = _text(function.get("description") or "", "a tool's `description`")
    parameters = function.get("parameters") or {"type": "object", "properties": {}}
    if not isinstance(parameters, dict):
        raise NotServedError("a tool's `parameters` have to be a JSON schema")
    return {
        "type": "function",
        "function": {"name": name, "description": described, "parameters": parameters},
    }


def _most(given: Json) -> int | None:
    found = given.get("max_completion_tokens", given.get("max_tokens"))
    if found is not None and (type(found) is not int or found < 1):
        raise NotServedError("`max_tokens` has to be a whole number of 1 or more")
    return found


def _stops(given: Any) -> list[str]:
    stops = given if isinstance(given, list) else [] if given is None else [given]
    if len(stops) > MOST_STOPS or not all(isinstance(one, str) and one for one in stops):
        raise NotServedError(f"`stop` has to be a text, or a list of up to {MOST_STOPS}")
    return stops


def _text(found: Any, what: str) -> str:
    if not isinstance(found, str):
        raise NotServedError(f"{what} has to be text")
    if len(found) > CHARACTERS:
        raise NotServedError(f"{what} has {len(found):,} characters; allowed are {CHARACTERS:,}")
    return found
