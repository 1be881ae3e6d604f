"""The self-test of every start: each of its checks has a real model with a fault that only it finds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import zoo
from torch import nn
from torch.nn import functional
from transformers import LlamaForCausalLM, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from mpies.engines import membertest
from mpies.errors import InputError
from mpies.es.population import Member
from mpies.model.lowrank_ways import Ways
from mpies.model.storage import OnDevice
from mpies.model.weights import take_over
from mpies.noise.cpu import CpuKernels

pytestmark = pytest.mark.lengthy

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
PROMPTS, ANSWERS = ["3 + 5 =", "a"], [[30, 40, 50, 60], [70, 80]]


def llama(kind: type[LlamaForCausalLM] = LlamaForCausalLM) -> LlamaForCausalLM:
    return zoo.filled(kind, zoo.configuration("llama", sliding_window=None))


def refusal(model: PreTrainedModel, lowrank: bool = False, **options: Any) -> str:
    """The line with which a start ends."""
    with pytest.raises(InputError) as refused:
        zoo.start(model, lowrank, **options)
    assert "\n" not in str(refused.value)
    return str(refused.value)


# What is sound


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, torch.float16], ids=str)
@pytest.mark.parametrize("lowrank", [False, True], ids=["full", "lowrank"])
def test_a_sound_model_is_left_as_it_was(lowrank, dtype):
    model, seen = llama(), {}

    def look():
        seen.update({name: parameter.clone() for name, parameter in model.named_parameters()})

    started = zoo.start(model, lowrank, dtype, before=look)
    other = take_over(llama(), dtype, torch.device("cpu"), CpuKernels(1), int(lowrank))
    assert started.weights.digest() == other.digest()
    for name, parameter in model.named_parameters():
        assert parameter.dtype == dtype
        assert torch.equal(parameter, seen[name])
        assert parameter.data_ptr() == started.weights.live[name].data_ptr()
    assert started.engine.keeps and not started.engine.at_once


# Reading and decoding, by a Llama with a short convolution, whose state is the last token's embedding


class Convolved(LlamaForCausalLM):
    """A Llama that adds half of the embedding before to each token's.

    This one is sound: its state, the last embedding, is a layer of the cache.
    """

    def forward(self, input_ids, attention_mask=None, past_key_values=None, logits_to_keep=0, **others):
        x = self.model.embed_tokens(input_ids)
        if attention_mask is not None:
            x = x * attention_mask[:, -x.shape[1] :, None]
        state = self.recall(past_key_values, x)
        before = torch.cat([torch.zeros_like(x[:, :1]) if state is None else state, x[:, :-1]], dim=1)
        if past_key_values is not None:
            self.keep(past_key_values, x[:, -1:])
        return super().forward(
            inputs_embeds=self.mix(x, before, attention_mask),
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            logits_to_keep=logits_to_keep,
            **others,
        )

    def mix(self, x, before, mask):
        return x + before / 2

    def keep(self, cache, last):
        if len(cache.layers) == self.config.num_hidden_layers:
            cache.layers.append(DynamicLayer())
            cache.layers[-1].lazy_initialization(last[:, None], last[:, None])
        cache.layers[-1].keys = cache.layers[-1].values = last[:, None]

    def recall(self, cache, x):
        if cache is None or len(cache.layers) == self.config.num_hidden_layers:
            return None
        return cache.layers[-1].keys[:, 0]


class Forgetful(Convolved):
    """No token knows what the forward pass before has read."""

    def recall(self, cache, x):
        return None


class Faint(Forgetful):
    """So little comes of it that 16 bits round it away."""

    def mix(self, x, before, mask):
        return x + before / 100


class Unmasked(Convolved):
    """Padding is read."""

    def forward(self, input_ids, attention_mask=None, past_key_values=None, **others):
        return super().forward(input_ids, past_key_values=past_key_values, **others)


class Mixing(Convolved):
    """The state is where the cache does not know of it, so that it stays when a row leaves."""

    def keep(self, cache, last):
        cache.last = last

    def recall(self, cache, x):
        return cache.last[: len(x)] if hasattr(cache, "last") else None


class TokenByToken(Convolved):
    """The state goes on by one token, but not by several."""

    def recall(self, cache, x):
        return super().recall(cache, x) if x.shape[1] == 1 else None


class Short(TokenByToken):
    """Neither that, nor does it know of long rows that are padded."""

    def mix(self, x, before, mask):
        return 2 * x if mask is not None and x.shape[1] > 5 else super().mix(x, before, mask)


class Overflowing(LlamaForCausalLM):
    """Logits are infinite."""

    def forward(self, input_ids, past_key_values=None, **others):
        found = super().forward(input_ids, past_key_values=past_key_values, **others)
        found.logits = found.logits / 0
        return found


@pytest.mark.parametrize(
    "kind, words",
    [
        (Forgetful, "token by token than at once"),
        (Faint, "token by token than at once"),
        (Unmasked, "beside a longer prompt than alone"),
        (Mixing, "where another answer has ended"),
        (Short, "where it reads answers than where it decodes"),
    ],
)
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_reading_that_depends_on_the_batch_or_on_pieces(kind, words, dtype):
    line = refusal(llama(kind), dtype=dtype)
    assert line.startswith(f"engine.name: hf computes {kind.__name__} otherwise {words} (log-probabilities ")
    assert "; use engine.name=vllm or another model" in line
    # What the base computes is not rounded.
    assert ("model.dtype=float32 if this is rounding" in line) == (
        dtype == BFLOAT16 and kind not in (Faint, Short)
    )


def test_a_sound_state_is_no_reason_to_refuse():
    engine = zoo.start(llama(Convolved), lowrank=False).engine
    assert not engine.at_once and not engine.keeps  # it is in a place that the cache does not know of


def test_a_state_that_goes_on_by_one_token_reads_answers_at_once():
    model = llama(TokenByToken)
    engine = zoo.start(model, lowrank=False).engine
    assert engine.at_once
    for prompt, answer, found in zip(
        PROMPTS, ANSWERS, engine.log_probabilities(PROMPTS, ANSWERS), strict=True
    ):
        ids = engine.text.encode(prompt)
        with torch.inference_mode():
            logits = model(torch.tensor([ids + answer]), use_cache=False).logits[0, len(ids) - 1 : -1]
        expected = torch.log_softmax(logits, dim=-1)[range(len(answer)), answer]
        np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)


def test_log_probabilities_that_are_not_finite():
    line = refusal(llama(Overflowing))
    assert line.startswith(
        "engine.name: hf cannot compute Overflowing in float32 (ArithmeticError: the log-prob"
    )


# Members of a block


class ScaledLinear(nn.Linear):
    def forward(self, x):
        return super().forward(2 * x)


class AddsOne(nn.LayerNorm):
    """Computes with weight + 1, by torch's function, which takes no vector a row."""

    def forward(self, x):
        return functional.layer_norm(x, self.normalized_shape, self.weight + 1, self.bias, self.eps)


class Scale(nn.Module):
    """Multiplies with a vector plus 1, element by element: nothing is wrong with it."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), 0.3))

    def forward(self, x):
        return x * (1 + self.weight)


class FirstNumbers(Scale):
    """Takes its first numbers: of a vector for each row, those of the first row."""

    def forward(self, x):
        return x * (1 + self.weight.flatten()[: x.shape[-1]])


class LastNumbers(Scale):
    """Takes its last numbers: of a vector for each row, those of the last row."""

    def forward(self, x):
        return x * (1 + self.weight.flatten()[-x.shape[-1] :])


class Reading(nn.Module):
    """A head that reads the embedding's weight, and never calls the module whose weight it is."""

    def __init__(self, embedding: nn.Embedding):
        super().__init__()
        self.read = lambda: embedding.weight

    def forward(self, x):
        return functional.linear(x, self.read())


def llama_with_norm(norm: nn.Module) -> LlamaForCausalLM:
    model = llama()
    model.model.norm = norm
    return model


def llama_with_head(head: nn.Module) -> LlamaForCausalLM:
    model = llama()
    model.lm_head = head
    return model


def ways_found(model: LlamaForCausalLM, **options: Any) -> Ways:
    """What a start makes of it, past the test of members."""
    return zoo.start(model, lowrank=True, **options).perturbation.ways


def test_a_subclass_of_a_known_module_is_not_taken_for_it():
    assert ways_found(llama_with_head(ScaledLinear(32, 99, bias=False))).in_turns() == []
    assert ways_found(llama_with_norm(AddsOne(32))).in_turns() == []


def test_vectors_that_multiply_and_add_need_no_rule():
    zoo.start(llama_with_norm(Scale(32)), lowrank=True)


def scale_what_the_head_gets(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """By a forward of the module's own, as libraries that move weights or count calls put there."""
    head, plain = model.lm_head, model.lm_head.forward
    head.forward = lambda x: plain(1.5 * x)
    return model


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize(
    "make, in_turns",
    [
        (lambda: llama_with_norm(LastNumbers(32)), ["LastNumbers"]),
        (lambda: llama_with_norm(FirstNumbers(32)), ["FirstNumbers"]),
        (lambda: scale_what_the_head_gets(llama()), ["Linear"]),
        (lambda: tied_by_hand(llama()), []),
    ],
    ids=["last numbers", "first numbers", "scaled", "read elsewhere"],
)
def test_members_that_would_not_be_what_their_weights_are(make, in_turns, dtype):
    """Only what is at fault is computed in a simpler way."""
    assert ways_found(make(), dtype=dtype).in_turns() == in_turns


def tied_by_hand(model: LlamaForCausalLM) -> LlamaForCausalLM:
    model.lm_head = Reading(model.model.embed_tokens)
    return model


def hold_by_hand(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The head holds the parameter itself: what a module is lent for it is never seen."""
    model.lm_head = Reading(model.model.embed_tokens)
    weight = model.model.embed_tokens.weight
    model.lm_head.read = lambda: weight
    return model


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_members_that_are_never_what_their_weights_are(dtype):
    line = refusal(hold_by_hand(llama()), lowrank=True, dtype=dtype)
    assert line.startswith(
        "es.perturbation: lowrank computes LlamaForCausalLM otherwise than its perturbed weights"
    )
    assert line.endswith("; use es.perturbation=full")
    zoo.start(hold_by_hand(llama()), lowrank=False, dtype=dtype)


KINDS = [name for name, module in llama().named_modules() if module._parameters and ".1." not in name]


@pytest.mark.parametrize(
    "dtype, master",
    [(FLOAT32, FLOAT32), (BFLOAT16, FLOAT32), (BFLOAT16, BFLOAT16)],
    ids=["float32", "bfloat16", "live"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_no_kind_of_module_is_left_out(kind, dtype, master):
    """A module that gets no noise, one of each kind. 16 bits hide some, so that the base computes, too.

    Where that is no better, one kind after another is perturbed, strongly.
    """
    model = llama()
    paths = [name for name, _ in model.named_modules() if name.replace(".1.", ".0.") == kind]
    # It is left to the modules around it, which are called.
    ways = ways_found(model, dtype=dtype, master=master, before=lambda: take_noise(model, paths))
    assert not any(ways.ways[path].rules for path in paths)


def take_noise(model: LlamaForCausalLM, paths: list[str]) -> None:
    for path in paths:
        del vars(model.get_submodule(path))["forward"]


class Halved(LlamaForCausalLM):
    """Has a table in bfloat16, so that it cannot be computed with in float32."""

    def forward(self, input_ids, past_key_values=None, **others):
        torch.eye(32, dtype=BFLOAT16) @ self.model.norm.weight
        return super().forward(input_ids, past_key_values=past_key_values, **others)


@pytest.mark.parametrize("kind, streams", [(Halved, False), (LlamaForCausalLM, True)])
def test_where_the_base_cannot_compute(monkeypatch, kind, streams):
    """Also where it is on the host, since the device has no room for it."""
    monkeypatch.setattr(OnDevice, "streams", streams)
    model, path, seen = llama(kind), "model.layers.0.self_attn.v_proj", set()
    model.model.norm.register_forward_pre_hook(lambda module, _: seen.add(module.weight.dtype))
    ways = ways_found(model, dtype=BFLOAT16, before=lambda: take_noise(model, [path]))
    assert not ways.ways[path].rules
    assert seen == {BFLOAT16}


class Large(LlamaForCausalLM):
    """Takes more memory in float32 than there is."""

    def forward(self, input_ids, past_key_values=None, **others):
        if self.model.norm.weight.dtype == FLOAT32:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return super().forward(input_ids, past_key_values=past_key_values, **others)


def test_memory_that_is_short_is_no_reason_to_leave_out_a_test():
    line = refusal(llama(Large), lowrank=True, dtype=BFLOAT16)
    assert line.startswith("model: the device has no memory for the test at the start, in float32 (CUDA out")
    assert line.endswith("use model.base=host, model.master=live or a larger device")
    zoo.start(llama(Large), lowrank=True, dtype=BFLOAT16, master=BFLOAT16)


def test_parameters_that_are_tried_one_after_another(monkeypatch):
    """Large models' own weights are not in memory all at once."""
    monkeypatch.setattr(membertest, "ROOM", 0)
    model = llama()
    assert len(membertest.packs_of_kinds(model, dict(model.named_parameters()))) > 5
    zoo.start(model, lowrank=True)
    assert "otherwise than its perturbed weights do" in refusal(hold_by_hand(llama()), lowrank=True)


def test_layers_that_are_not_alike():
    """The second layer's norm is of another class than the first's: it is tried, too."""
    model = llama()
    model.model.layers[1].input_layernorm = FirstNumbers(32)
    assert ways_found(model).in_turns() == ["FirstNumbers"]


@pytest.mark.parametrize("size", [3, 8])
def test_a_size_that_rows_have_by_chance(size):
    """What all rows share is not cut, even where it is as long as there are rows."""
    model = llama_with_norm(Shared())
    started = zoo.start(model, lowrank=True)
    assert started.perturbation.ways.in_turns() == ["Table"]
    ids = torch.randint(4, 99, (2 * size, 2 * size), generator=torch.Generator().manual_seed(size))
    members = [Member(0, 0, 0), Member(1, 1, 0)]  # not moved
    with torch.inference_mode():
        expected = model(ids).logits
        started.perturbation.set(members, 0.0)
        started.perturbation.rows(torch.arange(2).repeat_interleave(size))
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=1e-4)


class Table(nn.Module):
    """Is called with a table of the tokens, (tokens, 1), which all rows share."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full((1,), 0.5))

    def forward(self, x, table):
        return x * (torch.cat([self.weight]) + table)


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Table()

    def forward(self, x):
        return self.inner(x, torch.ones(x.shape[1], 1))
