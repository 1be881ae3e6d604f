"""Tiny random models of transformers' architectures, each built of its configuration alone, at once.

All parameters are random, norms' weights and biases as well, and large enough for each to be seen in the
logits: with what initialisers give, a norm that is computed wrong looks right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import tiny
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mpies.engines import selftest
from mpies.engines.hf import HfEngine
from mpies.engines.text import Text
from mpies.es.population import Member
from mpies.model import linear_cpu
from mpies.model.lowrank import LowRank
from mpies.model.perturbation import Full, Perturbation
from mpies.model.weights import Weights, take_over
from mpies.noise import definition
from mpies.noise.cpu import CpuKernels

# Most configurations know their sizes by these names, and ignore what they do not know. The vocabulary is
# that of tiny.tokenizer(). Windows are shorter than prompts, so that they are looked through.
SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "sliding_window": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Attention that keeps compressed keys and values; a mixture of experts; Mamba 2 and linear attention.
LATENT = {"num_key_value_heads": 4, "head_dim": 4, "kv_lora_rank": 8, "q_lora_rank": 8}
LATENT |= {"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2}
EXPERTS |= {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "n_shared_experts": 1}
EXPERTS |= {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
LINEAR |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
LINEAR |= {"layer_types": ["linear_attention", "full_attention"]}
# Of a block: two with the same noise, and another.
MEMBERS = [Member(0, 5, 1), Member(1, 5, -1), Member(2, 2**63 + 8, 1)]
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}
SHARED_EMBEDDING = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 99}

# What an architecture needs besides; None: what it does not take. An architecture's name is transformers'
# `model_type`, after which a colon and a word tell of a form of it.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "afmoe": EXPERTS,
    "apertus": {},
    "arcee": {},
    "aria_text": EXPERTS | {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
    "axk1": EXPERTS | LATENT,
    "axk2": EXPERTS | LATENT,
    "bamba": MAMBA | {"attn_layer_indices": [1]},
    "biogpt": {},
    "bitnet": {},
    "bloom": {},
    "codegen": {"rotary_dim": 8},
    "cohere": {"logit_scale": 1.0},
    "cohere2": {"logit_scale": 1.0},
    "cohere2_moe": EXPERTS | {"logit_scale": 1.0},
    "ctrl": {},
    "cwm": {},
    "deepseek_v2": EXPERTS | LATENT,
    "deepseek_v3": EXPERTS | LATENT,
    "deepseek_v32": EXPERTS | LATENT,
    "deepseek_v4": EXPERTS | LATENT,
    "diffllama": {},
    "doge": {},
    "dots1": EXPERTS,
    "ernie4_5": {},
    "ernie4_5_moe": EXPERTS | {"moe_num_experts": 4, "moe_k": 2},
    "exaone4": {},
    "exaone_moe": EXPERTS,
    "falcon": {"head_dim": None},
    "falcon:alibi": {"head_dim": None, "alibi": True},
    "falcon:new": {"head_dim": None, "new_decoder_architecture": True},
    "falcon_h1": MAMBA | {"mamba_d_ssm": 64},
    "falcon_mamba": {},
    "flex_olmo": EXPERTS,
    "gemma": {},
    "gemma2": {},
    "gemma3": {"text_config": SIZES, "vision_config": VISION, "mm_tokens_per_image": 4},
    "gemma3_text": {},
    "gemma3n_text": SHARED_EMBEDDING
    | {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "laurel_rank": 4,
        "activation_sparsity_pattern": None,
    }
    | {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "gemma4_text": SHARED_EMBEDDING | {"global_head_dim": 8, "num_kv_shared_layers": 0},
    "gemma4_unified_text": SHARED_EMBEDDING | {"global_head_dim": 8, "num_kv_shared_layers": 0},
    "glm": {},
    "glm4": {},
    "glm4_moe": EXPERTS,
    "glm4_moe_lite": EXPERTS | LATENT,
    # Of few heads, many scores are 0, and which keys are looked at of those is up to padding.
    "glm_moe_dsa": EXPERTS | LATENT | {"index_n_heads": 16, "index_head_dim": 8, "index_topk": 8},
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 8}
    | {"num_hidden_layers": None},
    "gpt_neox": {},
    "gpt_neox_japanese": {},
    "gpt_oss": EXPERTS,
    "gptj": {"rotary_dim": 8},
    "granite": {},
    "granite_swa": {},
    "granitemoe": EXPERTS,
    "granitemoe_swa": EXPERTS,
    "granitemoehybrid": EXPERTS | MAMBA | {"layer_types": ["mamba", "attention"]},
    "granitemoeshared": EXPERTS,
    "helium": {},
    "hrm_text": {},
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": EXPERTS,
    "hy_v3": EXPERTS,
    "hyperclovax": {},
    "inkling_text": EXPERTS | {"logits_mup_width_multiplier": 1.0},
    "internlm3": {},
    "iquestcoder": {},
    "jais2": {},
    "jamba": EXPERTS | {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "jetmoe": EXPERTS,
    "laguna": EXPERTS,
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": EXPERTS | {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "llama": {},
    "llama4_text": EXPERTS | {"attention_chunk_size": 8},
    "longcat_flash": EXPERTS | LATENT,
    "mamba": {},
    "mamba2": {"num_heads": 8},
    "mellum": EXPERTS,
    "mimo_v2_flash": EXPERTS,
    "minicpm3": LATENT,
    "minimax": EXPERTS,
    "minimax_m2": EXPERTS,
    "minimax_m3_vl_text": EXPERTS,
    "ministral": {},
    "ministral3": {},
    "mistral": {},
    "mixtral": EXPERTS,
    "modernbert-decoder": {},
    "mpt": {},
    "nanochat": {},
    "nemotron": {},
    "nemotron_h": MAMBA
    | {"layers_block_type": ["mamba", "attention"], "mamba_num_heads": 4, "mamba_head_dim": 16}
    | {"n_groups": 1, "ssm_state_size": 8},
    "olmo": {},
    "olmo2": {},
    "olmo3": {},
    "olmo_hybrid": LINEAR,
    "olmoe": EXPERTS,
    "openai-gpt": {},
    "opt": {},
    "persimmon": {"qk_layernorm": True},
    "phi": {},
    "phi:qk": {"qk_layernorm": True},
    "phi3": {},
    "phimoe": EXPERTS,
    "qwen2": {},
    "qwen2_moe": EXPERTS,
    "qwen3": {},
    "qwen3_5_moe_text": EXPERTS | LINEAR,
    "qwen3_5_text": LINEAR,
    "qwen3_moe": EXPERTS,
    "qwen3_next": EXPERTS | LINEAR,
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 8},
    "rwkv": {"attention_hidden_size": 32},
    "seed_oss": {},
    "smollm3": {},
    "solar_open": EXPERTS,
    "stablelm": {},
    "stablelm:qk": {"qk_layernorm": True},
    "starcoder2": {},
    "vaultgemma": {},
    "xglm": {},
    "xlstm": {"num_heads": 4},
    "youtu": LATENT,
    "zamba2": MAMBA | {"layers_block_type": ["mamba", "hybrid"], "num_mem_blocks": 1},
}


def kind_of(name: str) -> str:
    """transformers' `model_type` of an architecture."""
    return name.partition(":")[0]


def missing(names: Iterable[str] = ARCHITECTURES) -> list[str]:
    """Those that the installed transformers does not have, or whose configurations it cannot make.

    transformers 5.4 says of some settings that they are numbers, and a newer huggingface_hub believes it.
    """
    return [name for name in names if not _can_be_made(name)]


def _can_be_made(name: str) -> bool:
    if kind_of(name) not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return False
    try:
        configuration(name)
    except Exception as error:
        return "expected int, got bool" not in str(error) and "<class 'int'>" not in str(error)
    return True


def configuration(name: str, **changes: Any) -> PreTrainedConfig:
    """An architecture's; `changes` are more of its settings."""
    settings = SIZES | ARCHITECTURES[name] | changes
    given = {key: value for key, value in settings.items() if value is not None}
    return AutoConfig.for_model(kind_of(name), **given)


def build(name: str, **changes: Any) -> PreTrainedModel:
    """A model with random weights, in float32, for inference; the same every time."""
    return filled(AutoModelForCausalLM.from_config, configuration(name, **changes))


def filled(make: Callable[[PreTrainedConfig], PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """What `make` makes of a configuration, with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make(config).float()
        randomise(model)
    return model.eval()


@torch.no_grad()
def randomise(model: torch.nn.Module) -> None:
    """Matrices become random. Vectors stay near what they are about: scales near 1, states' rates bounded."""
    for parameter in model.parameters():
        noise = torch.randn_like(parameter).mul_(0.2)
        parameter.copy_(noise if parameter.dim() > 1 else parameter + noise)


@dataclass(frozen=True)
class Started:
    """A model with its weights, a perturbation and an engine."""

    model: PreTrainedModel
    weights: Weights
    perturbation: Perturbation
    engine: HfEngine


def start(
    model: PreTrainedModel,
    lowrank: bool,
    dtype: torch.dtype = torch.float32,
    before: Callable[[], None] = lambda: None,
    master: torch.dtype = torch.float32,
) -> Started:
    """Put together as `replica` does, on the CPU, with noise of rank 1 or full, and past the self-test.

    `before` is called just before that. Raises InputError, as a start does.
    """
    weights = take_over(model, dtype, torch.device("cpu"), CpuKernels(1), int(lowrank), master)
    linear_cpu.install(model)
    perturbation = LowRank(model, weights, 1) if lowrank else Full(weights)
    text = Text(model, tiny.tokenizer(), chat_template=False)
    options = {"on_rows": perturbation.rows, "version": lambda: weights.version}
    engine = HfEngine(model, text, max_new_tokens=12, batch_size=9, **options)
    before()
    selftest.check(model, weights, perturbation, engine)
    return Started(model, weights, perturbation, engine)


def materialised(weights: Weights, member: Member, sigma: float) -> Iterator[tuple[str, torch.Tensor]]:
    """A member's own parameters, by the definition of noise of rank 1."""
    for name, base in weights.base.items():
        number, values = weights.ids[name], base.numpy()
        if values.ndim == 2:
            a, b = definition.factors(member.seed, number, values.shape, 1)
            noise = a.T @ b
        elif values.ndim == 3 and min(values.shape[1:]) > 1:  # experts
            pairs = (definition.factors(member.seed, number, one.shape, 1, i) for i, one in enumerate(values))
            noise = np.stack([a.T @ b for a, b in pairs])
        else:
            noise = definition.normal(member.seed, number, 0, values.size)
        yield name, torch.from_numpy(values + np.float32(sigma * member.sign) * noise.reshape(values.shape))
