"""Tools in conversations: how a model is told of them, how its calls are read, how their results come back.

Conversations keep TRL's and transformers' form: an assistant's message may have `tool_calls`, and a message
of role `tool` has a result. What a model's chat template or tokenizer does not know is written as text:

    <tool_call>{"name": "...", "arguments": {...}}</tool_call>
    <tool_response>...</tool_response>, as the user's message
"""

from __future__ import annotations

import json
from typing import Any

Message = dict[str, Any]
Tokenizer = Any
"""Of transformers, which this module does without: run files are read where it is not."""

OPEN, CLOSE = "<tool_call>", "</tool_call>"
MOST_CALLS = 16  # of a turn
DEPTH = 64  # of a call's arguments: who copies and writes them goes as deep; a parser may do a thousand
EXPLAINED = (
    "You can call tools. To call one, write\n"
    '<tool_call>{"name": "NAME", "arguments": {"ARGUMENT": VALUE}}</tool_call>\n'
    "and you are given what it returns. The tools, as JSON:\n"
)


class Chat(list):
    """Chat messages, with the JSON schemas of the tools that the model can call."""

    def __init__(self, messages: list[Message], tools: list[dict[str, Any]]):
        super().__init__(messages)
        self.tools = tools

    def __repr__(self) -> str:
        return f"Chat({super().__repr__()}, {self.tools!r})"

    def with_messages(self, *messages: Message) -> Chat:
        """The conversation, gone on."""
        return Chat([*self, *messages], self.tools)


class UnreadableCallError(Exception):
    """What a model wrote is no call of a tool."""


class Tools:
    """What a tokenizer and its chat template know of tools, found out by trying."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.reads = getattr(tokenizer, "response_template", None) is not None
        self.shows, self.tells_calls, self.tells_results = _tried(tokenizer)

    def written(self, chat: Chat) -> str:
        """A conversation as the chat template writes it, with what it does not know as text."""
        messages = [self._as_text(message) for message in chat]
        if self.shows or not chat.tools:
            return _rendered(self.tokenizer, messages, chat.tools or None)
        schemas = "\n".join(json.dumps(tool.get("function", tool)) for tool in chat.tools)
        return _rendered(self.tokenizer, _explained(messages, EXPLAINED + schemas), None)

    def read(self, ids: list[int], text: str, prompt: Any) -> tuple[Message, list[str]]:
        """An answer as a message, with the calls in it, and what of it could not be read as a call.

        `text`: the answer without special tokens; `prompt`: what it answers.
        """
        message: Message = {"role": "assistant", "content": text}
        try:
            if self.reads and isinstance(prompt, Chat):
                return self._parsed(ids, text, prompt), []
            calls = calls_in(text)
        except UnreadableCallError as error:
            return message, [str(error)]
        if calls:
            message["tool_calls"] = calls
            if self.tells_calls:
                message["content"] = text[: text.index(OPEN)].strip()
        return message, []

    def _parsed(self, ids: list[int], text: str, prompt: Chat) -> Message:
        """By transformers' response parsing. Raises UnreadableCallError."""
        given = self.tokenizer.decode(ids)
        try:
            found = self.tokenizer.parse_response(given, prefix=self.written(prompt), tools=[*prompt.tools])
            calls = [checked_call(call.get("function", call)) for call in found.get("tool_calls") or []]
        except UnreadableCallError:
            raise
        except Exception as error:  # of the template's own parsers, which find all that can be wrong
            raise UnreadableCallError(f"the answer cannot be read: {str(error)[:200]}") from None
        if len(calls) > MOST_CALLS:
            raise UnreadableCallError(f"{len(calls)} calls in one answer; allowed are {MOST_CALLS}")
        stop = self.tokenizer.eos_token or ""
        content = str(found.get("content") or "").removesuffix(stop)
        kept = {k: v for k, v in found.items() if k not in ("role", "content", "tool_calls")}
        return {"role": "assistant", "content": content, **kept} | ({"tool_calls": calls} if calls else {})

    def _as_text(self, message: Message) -> Message:
        """A message of a kind that the template knows."""
        if message["role"] == "tool" and not self.tells_results:
            content = f"<tool_response>\n{message['content']}\n</tool_response>"
            return {"role": "user", "content": content}
        if message.get("tool_calls") and not self.tells_calls:
            return _with_calls_as_text(message)
        return message


def calls_in(text: str) -> list[dict[str, Any]]:
    """The calls that an answer makes in the plain format. Raises UnreadableCallError."""
    calls = []
    _, *pieces = text.split(OPEN)
    if len(pieces) > MOST_CALLS:
        raise UnreadableCallError(f"{len(pieces)} calls in one answer; allowed are {MOST_CALLS}")
    for piece in pieces:
        body, closed, _ = piece.partition(CLOSE)
        if not closed:
            raise UnreadableCallError(f"{OPEN} without {CLOSE}")
        try:
            call = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise UnreadableCallError(f"a call is no JSON ({str(error)[:100]})") from None
        calls.append(checked_call(call))
    return calls


def checked_call(call: Any) -> dict[str, Any]:
    """A call in transformers' form. Raises UnreadableCallError."""
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise UnreadableCallError('a call needs a "name"')
    arguments = call.get("arguments", {})
    if not isinstance(arguments, dict) or not all(isinstance(name, str) for name in arguments):
        raise UnreadableCallError('the "arguments" of a call have to be an object')
    if not is_shallow(arguments):
        raise UnreadableCallError(f'the "arguments" of a call are nested more than {DEPTH} times')
    try:  # JSON can name half of a character, which no tokenizer takes back
        json.dumps([call["name"], arguments], ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise UnreadableCallError(f"a call is no text ({error.reason})") from None
    return {"type": "function", "function": {"name": call["name"], "arguments": arguments}}


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


def _with_calls_as_text(message: Message) -> Message:
    """As the model wrote it, where its own text has the calls; else, with them in the plain format."""
    content = message["content"]
    if OPEN not in content:
        calls = (json.dumps(call["function"]) for call in message["tool_calls"])
        content = "\n".join(filter(None, [content, *(f"{OPEN}{call}{CLOSE}" for call in calls)]))
    return {"role": message["role"], "content": content}


def _explained(messages: list[Message], explanation: str) -> list[Message]:
    """With the explanation before the first message that the user or the system gives."""
    if not messages:
        return messages
    first = messages[0]
    return [{**first, "content": f"{explanation}\n\n{first['content']}"}, *messages[1:]]


def _rendered(tokenizer: Tokenizer, messages: list[Message], tools: Any) -> str:
    made = tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, tokenize=False)
    return str(made)


MARK = "zyxwvut"
TRIED = {
    "type": "function",
    "function": {
        "name": MARK,
        "description": "A tool.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer", "description": "A number."}},
        },
    },
}


def _tried(tokenizer: Tokenizer) -> tuple[bool, bool, bool]:
    """Does the template write tools, calls, results?"""
    asked = {"role": "user", "content": "a"}
    shows = _writes(tokenizer, [asked], [TRIED])
    tells_calls = shows and _writes(tokenizer, [asked, _calling(MARK)], None)
    before = _calling("a") if tells_calls else {"role": "assistant", "content": "b"}
    result = {"role": "tool", "name": "a", "content": MARK}
    return shows, tells_calls, _writes(tokenizer, [asked, before, result], None)


def _calling(name: str) -> Message:
    call = {"type": "function", "function": {"name": name, "arguments": {"a": 1}}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def _writes(tokenizer: Tokenizer, messages: list[Message], tools: Any) -> bool:
    """Is the mark in what the template makes of it?"""
    try:
        return MARK in _rendered(tokenizer, messages, tools)
    except Exception:  # it is a program of the model's makers, which may refuse anything
        return False
