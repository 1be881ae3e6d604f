"""Tools in conversations: how a model is told of them, how its calls are read, how their results come back.

Conversations keep TRL's and transformers' form: an assistant's message may have `tool_calls`, and a message
of role `tool` has a result. What a model's chat template or tokenizer does not know is written as text:

    <tool_call>{"name": "...", "arguments": {...}}</tool_call>
    <tool_response>...</tool_response>, as the user's message

A template that asks for calls in a format of its own is left to tell of tools only if what it writes of a
call is read back as that call; else a model would call, and nobody would hear it.
"""

from __future__ import annotations

import json
import re
from datetime import datetime
from functools import lru_cache
from typing import Any

from mpies.engines.calls import (
    FORMATS,
    OPEN,
    PLAIN,
    THINKS,
    THOUGHT,
    Format,
    ToolCall,
    UnreadableCallError,
    checked_call,
    refuse_many,
)
from mpies.errors import InputError

Message = dict[str, Any]
Tokenizer = Any
"""Of transformers, which this module does without: run files are read where it is not."""

EXPLAINED = (
    "You can call tools. To call one, write\n"
    '<tool_call>{"name": "NAME", "arguments": {"ARGUMENT": VALUE}}</tool_call>\n'
    "and you are given what it returns. The tools, as JSON:\n"
)
PLAIN_PARTS = OPEN, '"name"', '"arguments"'  # of what a template says that asks for this format


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


class Tools:
    """What a tokenizer and its chat template know of tools, found out by trying."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.format: Format | None = PLAIN
        """In which calls are read; None: by the tokenizer's own response parsing."""
        self.shows = self.tells_calls = self.tells_several = False
        """Does the template write tools, a call in a message, more than one?"""
        if _writes(tokenizer, [ASKED], [TRIED], MARK):
            self._find_format()
        self._told_after_text = self._writes_results({"role": "assistant", "content": "b"}, 2)
        many = 2 if self.tells_several else 1
        self._told_after_calls = self.tells_calls and self._writes_results(_calling(many), many)

    def written(self, chat: Chat) -> str:
        """A conversation as the chat template writes it, with what it does not know as text."""
        messages = self._told(chat)
        if self.shows or not chat.tools:
            return _rendered(self.tokenizer, messages, chat.tools or None)
        schemas = "\n".join(json.dumps(tool.get("function", tool)) for tool in chat.tools)
        return _rendered(self.tokenizer, _explained(messages, EXPLAINED + schemas), None)

    def read(self, ids: list[int], text: str, prompt: Chat) -> tuple[Message, list[str]]:
        """An answer as a message, with the calls in it, and what of it could not be read as a call.

        `text`: the answer without special tokens; `prompt`: what it answers.
        """
        try:
            message = self._read(self.format, ids, text, prompt)
        except UnreadableCallError as error:
            return {"role": "assistant", "content": text}, [str(error)]
        if not self._tells(message.get("tool_calls", [])):
            message["content"] = text
        return message, []

    def _read(self, format: Format | None, ids: list[int], text: str, prompt: Chat) -> Message:
        """Raises UnreadableCallError."""
        if format is None:
            return self._parsed(ids, self.written(prompt), prompt.tools)
        if text.lstrip().startswith(THINKS) and THOUGHT not in text:  # cut off before it has said anything
            return {"role": "assistant", "content": text}
        calls, before = format.read(text, prompt.tools)
        return {"role": "assistant", "content": before} | ({"tool_calls": calls} if calls else {})

    def _parsed(self, ids: list[int], prefix: str, tools: list[dict[str, Any]]) -> Message:
        """By transformers' response parsing. Raises UnreadableCallError."""
        given = self.tokenizer.decode(ids)
        try:
            found = self.tokenizer.parse_response(given, prefix=prefix, tools=[*tools])
            calls = [checked_call(call.get("function", call)) for call in found.get("tool_calls") or []]
        except UnreadableCallError:
            raise
        except Exception as error:  # of the template's own parsers, which find all that can be wrong
            raise UnreadableCallError(f"the answer cannot be read: {str(error)[:200]}") from None
        refuse_many(len(calls))
        stop = self.tokenizer.eos_token or ""
        content = str(found.get("content") or "").removesuffix(stop)
        kept = {k: v for k, v in found.items() if k not in ("role", "content", "tool_calls")}
        return {"role": "assistant", "content": content, **kept} | ({"tool_calls": calls} if calls else {})

    def _find_format(self) -> None:
        """That in which the template writes calls, if it is known."""
        has_own = getattr(self.tokenizer, "response_template", None) is not None
        for format in (*([None] if has_own else []), *FORMATS):
            if self._reads_back(format, 1):
                self.format, self.shows, self.tells_calls = format, True, True
                self.tells_several = self._reads_back(format, 2)
                return
        # Some ask for the plain format, but write no calls: these stay the model's own text.
        if not _writes(self.tokenizer, [ASKED, _calling(1)], None, MARK):
            self.shows = all(part in _rendered(self.tokenizer, [ASKED], [TRIED]) for part in PLAIN_PARTS)

    def _reads_back(self, format: Format | None, calls: int) -> bool:
        """Are a message's calls found in what the template writes of it?"""
        called = _calling(calls)
        try:
            asked = [_rendered(self.tokenizer, [ASKED], [TRIED], begun) for begun in (True, False)]
            whole = _rendered(self.tokenizer, [ASKED, called], [TRIED], False)
            prefix = next(one for one in asked if whole.startswith(one))
            ids = self.tokenizer(whole[len(prefix) :], add_special_tokens=False)["input_ids"]
            if format is None:
                found = self._parsed(ids, prefix, [TRIED]).get("tool_calls")
            else:
                text = self.tokenizer.decode(ids, skip_special_tokens=True)
                found, _ = format.read(text, [TRIED])
        except Exception:  # the template is a program of the model's makers, which may refuse anything
            return False
        return found == called["tool_calls"]

    def _writes_results(self, answer: Message, many: int) -> bool:
        """Does the template write so many, after this answer?"""
        tools = [TRIED] if self.shows else None
        return _writes(self.tokenizer, [ASKED, answer, *RESULTS[:many]], tools, *RESULT_MARKS[:many])

    def _tells(self, calls: list[ToolCall]) -> bool:
        """Can the template write them in a message?"""
        return not calls or (self.tells_several if len(calls) > 1 else self.tells_calls)

    def _told(self, chat: Chat) -> list[Message]:
        """The messages, each of a kind that the template knows. Results that become the user's are one with
        what else the user says there: many templates want roles to alternate."""
        told: list[Message] = []
        writes, was_result = self._told_after_text, False
        for message in chat:
            is_result = message["role"] == "tool" and not writes
            made = _as_users(message) if is_result else self._with_calls_told(message)
            if made["role"] == "assistant":
                writes = self._told_after_calls if made.get("tool_calls") else self._told_after_text
            if (is_result or was_result) and told and told[-1]["role"] == made["role"]:
                told[-1] = {**told[-1], "content": f"{told[-1]['content']}\n{made['content']}"}
            else:
                told.append(made)
            was_result = is_result
        return told

    def _with_calls_told(self, message: Message) -> Message:
        """A message, with its calls as text where the template cannot write them: as the model wrote them,
        where its own text has them."""
        calls = message.get("tool_calls") or []
        if self._tells(calls):
            return message
        format, content = self.format or PLAIN, message["content"]
        if not _has_calls(format, content):
            content = "\n".join(filter(None, [content, *map(format.write, calls)]))
        return {"role": message["role"], "content": content}


def _has_calls(format: Format, content: str) -> bool:
    try:
        return bool(format.read(content)[0])
    except UnreadableCallError:
        return False


def _as_users(result: Message) -> Message:
    return {"role": "user", "content": f"<tool_response>\n{result['content']}\n</tool_response>"}


def _explained(messages: list[Message], explanation: str) -> list[Message]:
    """With the explanation before the first message that the user or the system gives."""
    if not messages:
        return messages
    first = messages[0]
    return [{**first, "content": f"{explanation}\n\n{first['content']}"}, *messages[1:]]


def _rendered(tokenizer: Tokenizer, messages: list[Message], tools: Any, begun: bool = True) -> str:
    """`begun`: with what the model's answer goes on from."""
    template = of_one_day(tokenizer.get_chat_template(None, tools))
    options = {"tools": tools, "add_generation_prompt": begun, "tokenize": False}
    return str(tokenizer.apply_chat_template(messages, chat_template=template, **options))


@lru_cache
def of_one_day(template: str) -> str:
    """The template, with one day in place of the one on which it is used.

    Raises InputError if it asks for the time in another way than those of Llama 3 and gpt-oss do.
    """
    made = TODAY.sub(lambda found: repr(DAY.strftime(found[2])), template)
    if re.search(r"strftime_now(?!\s+is\b)", made):
        raise InputError(
            "task.chat_template: the model's template writes the time of day, so that prompts would be others"
            " each time; use task.chat_template=false, or another template"
        )
    return made


# Some templates write the day: prompts, and so rewards, would be others tomorrow, or in another time zone.
# This is the one that Llama 3's templates name where they are not told.
DAY = datetime(2024, 7, 26)
TODAY = re.compile(r"""\bstrftime_now\(\s*(['"])(.*?)\1\s*\)""")
MARK = "zyxwvut"
RESULT_MARKS = "xwvutsr", "vutsrqp"
ASKED = {"role": "user", "content": "a"}
RESULTS = [{"role": "tool", "name": MARK, "content": mark} for mark in RESULT_MARKS]
TRIED = {
    "type": "function",
    "function": {
        "name": MARK,
        "description": "A tool.",
        "parameters": {
            "type": "object",
            "properties": {
                "a": {"type": "integer", "description": "A number."},
                "b": {"type": "string", "description": "A text."},
            },
        },
    },
}


def _calling(calls: int) -> Message:
    """A message that calls so many times, with a text that may be taken for a number."""
    made = [{"name": MARK, "arguments": {"a": number, "b": "2"}} for number in range(calls)]
    called = [{"type": "function", "function": one} for one in made]
    return {"role": "assistant", "content": "", "tool_calls": called}


def _writes(tokenizer: Tokenizer, messages: list[Message], tools: Any, *marks: str) -> bool:
    """Are the marks in what the template makes of it?"""
    try:
        written = _rendered(tokenizer, messages, tools)
    except Exception:  # it is a program of the model's makers, which may refuse anything
        return False
    return all(mark in written for mark in marks)
