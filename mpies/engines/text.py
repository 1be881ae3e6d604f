"""Between text and tokens, the same in every engine: prompts as tokens, stop tokens, answers as text."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from mpies.engines import rope
from mpies.engines.base import Completions, Prompt
from mpies.engines.image import images_in
from mpies.engines.tools import Chat, Tools
from mpies.engines.vision import Inputs, Vision
from mpies.errors import InputError, reason
from mpies.text import clip

# Characters of prompts whose tokens are remembered: a task's own, but not all that episodes come to.
MOST_KEPT = 2**26


class Text:
    """A model's tokenizer, with its chat template or without.

    The model's own generation settings are used for its end-of-sequence tokens only: sampling and
    penalties that a model folder suggests would make fitness differences depend on more than the weights.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: bool,
        vision: Vision | None = None,
    ):
        if chat_template and not tokenizer.chat_template:
            raise InputError("task.chat_template: this model has none; use task.chat_template=false")
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.stops = _stop_tokens(model, tokenizer)
        self.positions = _positions(model.config)
        self.tools = Tools(tokenizer)
        self.vision = vision
        self.parts = hasattr(model.config, "vision_config")
        """Is the chat template one of those that may expect all content in parts?"""
        self._encoded: dict[str, list[int]] = {}
        self._kept = 0  # characters of the prompts in it

    def encode(self, prompt: Prompt) -> list[int]:
        """A prompt's tokens, special ones included."""
        key = repr(prompt)
        if key not in self._encoded:
            if self._kept > MOST_KEPT:
                self._encoded, self._kept = {}, 0
            self._encoded[key] = self._tokenize(prompt)
            self._kept += len(key)
        return self._encoded[key]

    def inputs(self, prompt: Prompt) -> Inputs:
        """What the model is given of a prompt beside its tokens: of its images, if it has any."""
        images = images_in(prompt)
        if not images or self.vision is None:
            return {}
        return self.vision.inputs(repr(prompt), self._written(prompt), images)

    def completions(self, answers: list[list[int]]) -> Completions:
        """Answers' tokens, as generated, with their texts."""
        texts = [str(self.tokenizer.decode(tokens, skip_special_tokens=True)) for tokens in answers]
        cut = [not tokens or tokens[-1] not in self.stops for tokens in answers]
        return Completions(texts, [len(tokens) for tokens in answers], answers, cut)

    def continue_with(self, kept: str, text: str) -> tuple[list[int], int]:
        """As the tokenizer writes both as one text; the token that holds where they meet is the latter's."""
        before, whole = (self.tokenizer(t, add_special_tokens=False).input_ids for t in (kept, kept + text))
        alike = (first for first, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b)
        return whole, next(alike, min(len(before), len(whole)))

    def _tokenize(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str) and not self.chat_template:
            return self.tokenizer(prompt)["input_ids"]
        text, images = self._written(prompt), images_in(prompt)
        if images:
            assert self.vision, "a model without is refused"
            ids, inputs = self.vision.read(text, images)
            self.vision.keep(repr(prompt), inputs)
            return ids
        # The template writes the special tokens itself.
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _written(self, prompt: Prompt) -> str:
        """The prompt as the chat template writes it. Raises InputError where it cannot."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if not self.parts:
            return self._by_template(messages, prompt)
        # Some templates of vision models expect parts, and write nothing of a text that is none.
        as_given = [] if images_in(prompt) else [messages]
        asked = [message["content"] for message in messages if message["role"] == "user"]
        texts = [text for content in asked for text in _texts(content)]
        for way in [*as_given, [{**m, "content": _in_parts(m["content"])} for m in messages]]:
            written = self._by_template(way, prompt)
            if all(text.strip() in written for text in texts):
                return written
        raise InputError(
            f"task.chat_template: the model's template leaves text out of the prompt {clip(repr(prompt))};"
            " change the prompt or the model's chat_template.jinja"
        )

    def _by_template(self, messages: list[dict[str, Any]], prompt: Prompt) -> str:
        try:
            return self.tools.written(Chat(messages, prompt.tools if isinstance(prompt, Chat) else []))
        except Exception as error:  # it is a program of the model's makers, which may refuse roles
            raise InputError(
                f"task.chat_template: this model's template cannot write the prompt {clip(repr(prompt), 80)}"
                f" ({type(error).__name__}: {reason(error)}); change the prompt or the model's"
                " chat_template.jinja, or use text and task.chat_template=false"
            ) from None


def _texts(content: str | list[dict[str, Any]]) -> list[str]:
    return [content] if isinstance(content, str) else [part["text"] for part in content if "text" in part]


def _in_parts(content: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [{"type": "image"} if "image" in part else part for part in content]


def _positions(config: PreTrainedConfig) -> int | None:
    """Tokens of a prompt with its answer that the model knows positions for; None: it does not say."""
    text = config.get_text_config()
    most = getattr(text, "max_position_embeddings", None)
    # Where embeddings are stretched, some models' configurations name the positions before that.
    stretched = [
        int(kind["factor"] * (kind.get("original_max_position_embeddings") or most))
        for kind in rope.kinds(config)
        if most and kind.get("factor")
    ]
    return max([most, *stretched]) if most else None


def _stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    stops = {tokenizer.eos_token_id}
    for config in (model.generation_config, model.config):
        token = getattr(config, "eos_token_id", None)
        stops.update(token if isinstance(token, list) else [token])
    return stops - {None}
