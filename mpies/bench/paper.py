"""The paper's procedure (arXiv 2509.24372, algorithm 2), as a yardstick.

Noise comes from torch.randn in the model's dtype and is added to the weights in place, tensor by
tensor; after the evaluation the same noise is drawn again and subtracted. The update draws every
member's noise once more. Members are evaluated one after another with transformers' `generate`.
"""

from __future__ import annotations

import torch
from transformers import GenerationConfig, PreTrainedModel


def add_noise(tensors: list[torch.Tensor], seed: int, scale: float) -> None:
    """tensor += scale * randn(seed), in place."""
    for tensor in tensors:
        tensor.add_(_noise(tensor, seed).mul_(scale))


def perturb_and_restore(tensors: list[torch.Tensor], seed: int, sigma: float) -> None:
    """What perturbing costs a member: there and back."""
    add_noise(tensors, seed, sigma)
    add_noise(tensors, seed, -sigma)


def update(tensors: list[torch.Tensor], seeds: list[int], coefficients: list[float]) -> None:
    """tensor += sum_i coefficient_i * randn(seed_i)."""
    for tensor in tensors:
        total = torch.zeros_like(tensor)
        for seed, coefficient in zip(seeds, coefficients, strict=True):
            total.add_(_noise(tensor, seed).mul_(coefficient))
        tensor.add_(total)


def _noise(tensor: torch.Tensor, seed: int) -> torch.Tensor:
    generator = torch.Generator(tensor.device).manual_seed(seed)
    return torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype, device=tensor.device)


@torch.inference_mode()
def generate(model: PreTrainedModel, prompts: list[list[int]], tokens: int) -> None:
    """`tokens` new tokens for each prompt, in one batch, by transformers."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    settings = GenerationConfig(do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens, pad_token_id=0)
    model.generate(ids, attention_mask=mask, generation_config=settings)  # type: ignore[operator]
