"""The Hugging Face engine: greedy decoding with transformers, in batches, left padded."""

from __future__ import annotations

import contextlib

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from mpies.engines.base import Completions, Prompt
from mpies.errors import InputError


class HfEngine:
    """Decodes with `model` as it is at the time of the call.

    The model's own generation settings are used for its end-of-sequence tokens only: sampling and
    penalties that a model folder suggests would make fitness differences depend on more than the weights.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_new_tokens: int,
        batch_size: int,
        chat_template: bool,
    ):
        if chat_template and not tokenizer.chat_template:
            raise InputError("task.chat_template: this model has none; use task.chat_template=false")
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.chat_template = chat_template
        self.stops = _stop_tokens(model, tokenizer)
        pad = tokenizer.pad_token_id
        self.settings = GenerationConfig(
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=sorted(self.stops) or None,
            pad_token_id=pad if pad is not None else 0,
        )
        self._encoded: dict[str, list[int]] = {}

    def generate(self, prompts: list[Prompt]) -> Completions:
        return self.generate_block(prompts, 1)[0]

    def generate_block(self, prompts: list[Prompt], members: int) -> list[Completions]:
        answers: list[Completions] = [Completions([], []) for _ in range(members)]
        # Rows belong to the members in turn, equally many each, as a block's perturbation expects.
        share = max(1, self.batch_size // members)
        for i in range(0, len(prompts), share):
            rows = [self._encode(p) for p in prompts[i : i + share]]
            for j, tokens in enumerate(self._batch(rows * members)):
                mine = answers[j // len(rows)]
                mine.texts.append(self.tokenizer.decode(tokens, skip_special_tokens=True))
                mine.tokens.append(len(tokens))
                mine.ids.append(tokens)
        return answers

    @torch.inference_mode()
    def _batch(self, prompts: list[list[int]]) -> list[list[int]]:
        """The new tokens of each row, up to and including its end of sequence."""
        width = max(len(ids) for ids in prompts)
        pad = self.settings.pad_token_id
        device = self.model.device
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        with _own_settings_hidden(self.model):
            output = self.model.generate(ids, attention_mask=mask, generation_config=self.settings)
        return [self._until_stop(row) for row in output[:, width:].tolist()]

    def _until_stop(self, row: list[int]) -> list[int]:
        end = next((i + 1 for i, token in enumerate(row) if token in self.stops), len(row))
        return row[:end]

    def _encode(self, prompt: Prompt) -> list[int]:
        key = repr(prompt)
        if key not in self._encoded:
            self._encoded[key] = self._tokenize(prompt)
        return self._encoded[key]

    def _tokenize(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str) and not self.chat_template:
            return self.tokenizer(prompt)["input_ids"]
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        # The template writes the special tokens itself.
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


@contextlib.contextmanager
def _own_settings_hidden(model: PreTrainedModel):
    """transformers fills gaps in the settings it is given from the model's own; exports keep those."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    stops = {tokenizer.eos_token_id}
    for config in (model.generation_config, model.config):
        token = getattr(config, "eos_token_id", None)
        stops.update(token if isinstance(token, list) else [token])
    return stops - {None}
