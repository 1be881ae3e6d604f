"""transformers' architectures, one by one: computed as their weights say, or refused by name.

What is right is worked out here, from members' weights written out by the noise's definition and from plain
forward passes over one row; the self-test of the start (engines/selftest.py) has to come to the same end.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import transformers
import zoo
from transformers import DynamicCache, PreTrainedModel

from mpies.errors import InputError

pytestmark = pytest.mark.lengthy

SIGMA, MEMBERS = 0.05, zoo.MEMBERS
# Of very different lengths, the last longer than any window; rows leave where answers end.
PROMPTS = ["3 + 5 =", "a", "What comes next in the sequence: 2, 4, 6, 8, ?"]
STOPS = set(range(0, 99, 7))
CLOSE = 1e-4  # of logits in float32, and of log-probabilities
TIE = 0.01  # what an answer's token may be below the likeliest: Mamba 2 rounds short steps otherwise


@dataclass(frozen=True)
class Outcome:
    """What the refusal says; None: not refused, and equal."""

    refusal: str | None = None
    in_turns: tuple[str, ...] = ()
    """Classes of modules that low rank computes member by member."""


def turns(*modules: str) -> Outcome:
    return Outcome(in_turns=modules)


def undecodable(model: str) -> Outcome:
    return Outcome(rf"^engine\.name: hf cannot decode {model}, which keeps no keys and values$")


def hybrid(*modules: str) -> Outcome:
    """Before 5.5 or so, transformers' cache had no states."""
    if hasattr(DynamicCache, "has_previous_state"):
        return turns(*modules)
    return Outcome(r"hf cannot compute \w+ in float32 \(\w+: .*previous_state")


EQUAL = Outcome()

OUTCOMES: dict[str, Outcome] = {
    "afmoe": EQUAL,
    "apertus": EQUAL,
    "arcee": EQUAL,
    "aria_text": EQUAL,
    "axk1": EQUAL,
    "axk2": EQUAL,
    "bamba": hybrid("BambaMixer"),
    "biogpt": EQUAL,
    "bitnet": EQUAL,
    "bloom": EQUAL,
    "codegen": EQUAL,
    "cohere": EQUAL,
    "cohere2": EQUAL,
    "cohere2_moe": EQUAL,
    "ctrl": EQUAL,
    "cwm": EQUAL,
    "deepseek_v2": EQUAL,
    "deepseek_v3": EQUAL,
    "deepseek_v32": EQUAL,
    "deepseek_v4": turns("DeepseekV4GroupedLinear", "DeepseekV4HyperConnection"),
    "diffllama": turns("DiffLlamaAttention"),
    "doge": EQUAL,
    "dots1": EQUAL,
    "ernie4_5": EQUAL,
    "ernie4_5_moe": turns("Ernie4_5_MoeStatics"),
    "exaone4": EQUAL,
    "exaone_moe": EQUAL,
    "falcon": EQUAL,
    "falcon:alibi": EQUAL,
    "falcon:new": EQUAL,
    "falcon_h1": hybrid("FalconH1Mixer"),
    "falcon_mamba": hybrid("FalconMambaMixer"),
    "flex_olmo": EQUAL,
    "gemma": EQUAL,
    "gemma2": EQUAL,
    "gemma3": EQUAL,
    "gemma3_text": EQUAL,
    "gemma3n_text": turns("Gemma3nTextAltUp"),
    "gemma4_text": EQUAL,
    "gemma4_unified_text": EQUAL,
    "glm": EQUAL,
    "glm4": EQUAL,
    "glm4_moe": EQUAL,
    "glm4_moe_lite": EQUAL,
    "glm_moe_dsa": EQUAL,
    "gpt2": EQUAL,
    "gpt_bigcode": EQUAL,
    "gpt_neo": EQUAL,
    "gpt_neox": EQUAL,
    "gpt_neox_japanese": EQUAL,
    "gpt_oss": EQUAL,
    "gptj": EQUAL,
    "granite": EQUAL,
    "granite_swa": EQUAL,
    "granitemoe": EQUAL,
    "granitemoe_swa": EQUAL,
    "granitemoehybrid": hybrid("GraniteMoeHybridMambaLayer"),
    "granitemoeshared": EQUAL,
    "helium": EQUAL,
    "hrm_text": EQUAL,
    "hunyuan_v1_dense": EQUAL,
    "hunyuan_v1_moe": EQUAL,
    "hy_v3": EQUAL,
    "hyperclovax": EQUAL,
    "inkling_text": turns("InklingSharedExperts"),
    "internlm3": EQUAL,
    "iquestcoder": EQUAL,
    "jais2": EQUAL,
    "jamba": hybrid("JambaMambaMixer"),
    "jetmoe": turns("JetMoeMoE", "JetMoeParallelExperts", "JetMoeAttention"),
    "laguna": EQUAL,
    "lfm2": hybrid(),
    "lfm2_moe": hybrid(),
    "lfm3": hybrid(),
    "llama": EQUAL,
    "llama4_text": turns("Llama4TextMoe"),
    "longcat_flash": turns("LongcatFlashExperts"),
    "mamba": hybrid("MambaMixer"),
    "mamba2": hybrid("Mamba2Mixer"),
    "mellum": EQUAL,
    "mimo_v2_flash": EQUAL,
    "minicpm3": EQUAL,
    "minimax": Outcome(r"^engine\.name: hf cannot compute MiniMaxForCausalLM in float32 \(ValueError: "),
    "minimax_m2": EQUAL,
    "minimax_m3_vl_text": EQUAL,
    "ministral": EQUAL,
    "ministral3": EQUAL,
    "mistral": EQUAL,
    "mixtral": EQUAL,
    "modernbert-decoder": EQUAL,
    "mpt": EQUAL,
    "nanochat": EQUAL,
    "nemotron": EQUAL,
    "nemotron_h": hybrid("NemotronHMamba2Mixer"),
    "olmo": EQUAL,
    "olmo2": EQUAL,
    "olmo3": EQUAL,
    "olmo_hybrid": hybrid(),
    "olmoe": EQUAL,
    "openai-gpt": undecodable("OpenAIGPTLMHeadModel"),
    "opt": EQUAL,
    "persimmon": EQUAL,
    "phi": EQUAL,
    "phi:qk": EQUAL,
    "phi3": EQUAL,
    "phimoe": EQUAL,
    "qwen2": EQUAL,
    "qwen2_moe": EQUAL,
    "qwen3": EQUAL,
    "qwen3_5_moe_text": hybrid(),
    "qwen3_5_text": hybrid(),
    "qwen3_moe": EQUAL,
    "qwen3_next": hybrid(),
    "recurrent_gemma": Outcome(r"^engine\.name: hf (computes|cannot compute) RecurrentGemmaForCausalLM "),
    "rwkv": undecodable("RwkvForCausalLM"),
    "seed_oss": EQUAL,
    "smollm3": EQUAL,
    "solar_open": EQUAL,
    "stablelm": EQUAL,
    "stablelm:qk": EQUAL,
    "starcoder2": EQUAL,
    "vaultgemma": EQUAL,
    "xglm": EQUAL,
    "xlstm": undecodable("xLSTMForCausalLM"),
    "youtu": EQUAL,
    "zamba2": hybrid("Zamba2MambaMixer"),
}

# Each stands for a way in which architectures differ, those among them that were once computed wrong; the
# others' tests are run with whole jobs.
QUICK = {"llama", "qwen3", "gpt2", "falcon", "stablelm:qk", "gemma", "gemma3_text", "nemotron", "xglm"}
QUICK |= {"minicpm3", "opt", "diffllama", "minimax", "bamba", "recurrent_gemma"}
QUICK |= {"qwen2", "qwen3_moe", "qwen3_5_text", "gpt_oss", "olmoe"}

MISSING = zoo.missing()
PRESENT = [
    pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow)
    for name in OUTCOMES
    if name not in MISSING
]
architectures = pytest.mark.parametrize("name", PRESENT)


def start(name: str, lowrank: bool) -> zoo.Started:
    started = zoo.start(zoo.build(name), lowrank)
    started.engine.text.stops = STOPS
    return started


@torch.inference_mode()
def told(model: PreTrainedModel, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Log-probabilities at an answer's places, by one plain forward: float32 (tokens, vocabulary)."""
    ids = torch.tensor([prompt + answer])
    return torch.log_softmax(model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float(), dim=-1)


def assert_greedy(subject: zoo.Started, answers: list[list[int]]) -> None:
    """They are what the weights that are shown answer when each prompt is asked alone."""
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        chances = told(subject.model, subject.engine.text.encode(prompt), answer)
        below = chances.max(dim=-1).values - chances[range(len(answer)), answer]
        assert below.max() < TIE, f"{prompt!r}: {below.tolist()}"
        assert (answer[-1] in STOPS or len(answer) == 12) and not STOPS & set(answer[:-1])


def test_the_table_is_about_the_whole_zoo():
    assert set(OUTCOMES) == set(zoo.ARCHITECTURES)
    assert set(OUTCOMES) > QUICK


def test_architectures_that_this_version_of_transformers_lacks():
    if MISSING:
        pytest.skip(f"transformers {transformers.__version__} lacks {', '.join(MISSING)}")


@architectures
def test_full_noise(name):
    """Answers in batches, and how likely they are: as one row at a time, without cache and padding."""
    if words := OUTCOMES[name].refusal:
        assert_refused(name, words, lowrank=False)
        return
    subject = start(name, lowrank=False)
    subject.perturbation.set(MEMBERS[:1], SIGMA)
    answers = subject.engine.generate(PROMPTS).ids
    assert_greedy(subject, answers)
    found = subject.engine.log_probabilities(PROMPTS, answers)
    for prompt, answer, values in zip(PROMPTS, answers, found, strict=True):
        expected = told(subject.model, subject.engine.text.encode(prompt), answer)[range(len(answer)), answer]
        np.testing.assert_allclose(values, expected.numpy(), atol=CLOSE, rtol=0)


@architectures
def test_low_rank(name):
    """A block of members: as each member's own weights."""
    if words := OUTCOMES[name].refusal:
        assert_refused(name, words, lowrank=True)
        return
    subject = start(name, lowrank=True)
    assert set(subject.perturbation.ways.in_turns()) == set(OUTCOMES[name].in_turns)
    model, perturbation = subject.model, subject.perturbation
    ids = torch.randint(4, 99, (2, 19), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        plain = model(ids).logits
        perturbation.set(MEMBERS, SIGMA)
        perturbation.rows(torch.arange(len(MEMBERS)).repeat_interleave(len(ids)))
        block = model(ids.repeat(len(MEMBERS), 1)).logits.view(len(MEMBERS), *plain.shape)
        completions = subject.engine.generate_block(PROMPTS, len(MEMBERS))
        perturbation.clear()
        assert torch.equal(model(ids).logits, plain), "nothing is left of the block"
        for member, logits, answered in zip(MEMBERS, block, completions, strict=True):
            subject.weights.show(zoo.materialised(subject.weights, member, SIGMA))
            expected = model(ids).logits
            assert (expected - plain).abs().max() > 1, "the perturbation is large enough to be seen"
            torch.testing.assert_close(logits, expected, atol=CLOSE, rtol=CLOSE)
            assert_greedy(subject, answered.ids)


# Its positions are a table in the checkpoint's dtype.
ONLY_AS_STORED = {"xglm"}


@architectures
@pytest.mark.parametrize("lowrank", [False, True], ids=["full", "lowrank"])
def test_a_start_in_bfloat16(name, lowrank):
    """What float32 lets through is not refused because of rounding."""
    if OUTCOMES[name].refusal:
        with pytest.raises(InputError):
            zoo.start(zoo.build(name), lowrank, torch.bfloat16)
    elif name in ONLY_AS_STORED:
        with pytest.raises(
            InputError, match=r"in bfloat16 .*; use model\.dtype=float32, engine\.name=vllm or"
        ):
            zoo.start(zoo.build(name), lowrank, torch.bfloat16)
    else:
        zoo.start(zoo.build(name), lowrank, torch.bfloat16)


def assert_refused(name: str, words: str, lowrank: bool) -> None:
    with pytest.raises(InputError) as refusal:
        start(name, lowrank)
    line = str(refusal.value)
    assert re.search(words, line), line
    assert "\n" not in line


# Keys' biases move all of a token's scores alike, where positions are not rotated into them.
UNSEEN = re.compile(r"k_proj\.bias$")


@pytest.mark.parametrize("name", sorted(QUICK - set(MISSING)))
def test_every_parameter_is_seen_in_the_logits(name):
    """Else equal logits would prove little: a norm that is computed wrong has to show."""
    model = zoo.build(name)
    ids = torch.randint(4, 99, (2, 19), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        plain = model(ids).logits
        for key, parameter in model.named_parameters():
            before = parameter.clone()
            parameter.add_(
                torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)), alpha=SIGMA
            )
            seen = (model(ids).logits - plain).abs().max()
            parameter.copy_(before)
            assert seen > 10 * CLOSE or UNSEEN.search(key), f"{key}: {seen:.1g}"
