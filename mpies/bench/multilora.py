"""vLLM's own way to have many models at once, multi-LoRA: an adapter for each member, of random factors.

Adapters are on the linear layers inside of the model's layers; they reach neither norms, biases nor tied
embeddings.
"""

from __future__ import annotations

import gc
import itertools
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from mpies.bench.generation import SIGMA, Work
from mpies.bench.timing import Case, Timings, in_turns
from mpies.engines.vllm import host
from mpies.engines.vllm.packing import Packing
from mpies.model import loading

if TYPE_CHECKING:
    from vllm import LLM

LEAST_RANK = 8  # that vLLM has memory for


@dataclass(frozen=True)
class LoraBase:
    """What is measured: a model as it is on disk, its linear layers' shapes by path, and prompts' tokens."""

    path: str
    layers: dict[str, tuple[int, int]]
    prompts: list[list[int]]
    config: Any
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, path: str, model: PreTrainedModel, prompts: list[list[int]]) -> LoraBase:
        outer = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
        layers = {
            name: (module.out_features, module.in_features)
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and id(module) not in outer
        }
        return cls(path, layers, prompts, model.config, model.dtype, model.device)


class Adapters:
    """A vLLM, and adapters on disk for the work's members."""

    def __init__(self, subject: LoraBase, work: Work, folder: str):
        gc.collect()  # a vLLM before this one
        self.llm, self.work, self.folder = _start(subject, work), work, folder
        self.rows = [{"prompt_token_ids": tokens} for tokens in subject.prompts] * work.members
        self._numbers = itertools.count(1)
        for member in range(work.members):
            write_adapter(Path(folder, str(member)), subject, member)

    def new(self) -> list[Any]:
        """Adapters that vLLM has not loaded yet, for each row its member's."""
        from vllm.lora.request import LoRARequest

        numbers = [next(self._numbers) for _ in range(self.work.members)]
        made = [LoRARequest(f"{n}", n, f"{self.folder}/{member}") for member, n in enumerate(numbers)]
        return [one for one in made for _ in range(self.work.prompts)]

    def generate(self, adapters: list[Any] | None) -> list[list[int]]:
        """Every row's answer, of full length."""
        from vllm import SamplingParams

        options = SamplingParams(
            temperature=0.0, max_tokens=self.work.tokens, ignore_eos=True, detokenize=False
        )
        outputs = self.llm.generate(self.rows, options, use_tqdm=False, lora_request=adapters)
        return [list(output.outputs[0].token_ids) for output in outputs]


def measure(subject: LoraBase, work: Work, repeats: int, synchronize: Callable[[], None], say) -> Timings:
    """Seconds of the same rows without adapters, with adapters, and with new ones from disk."""
    with tempfile.TemporaryDirectory() as folder:
        made = Adapters(subject, work, folder)
        loaded: list[Any] = []

        def load() -> None:
            loaded[:] = made.new()
            made.generate(loaded)

        cases = {
            "no adapters": Case(lambda: made.generate(None)),
            "new adapters": Case(load),
            "adapters": Case(lambda: made.generate(loaded)),
        }
        return in_turns(cases, repeats, synchronize, say)


def _start(subject: LoraBase, work: Work) -> LLM:
    rows = work.members * work.prompts
    room = host.Room(rows, max(host.LEAST, work.tokens + max(map(len, subject.prompts))))
    packing = Packing()
    adapters = {
        "load_format": "auto",
        "model_loader_extra_config": {},
        "enable_lora": True,
        "max_loras": work.members,
        "max_cpu_loras": work.members,
        "max_lora_rank": LEAST_RANK,
    }
    folder, cache = loading.folder_of(subject.path), room.bytes(subject.config, subject.dtype)
    made = host.start(folder, subject.dtype, subject.device, room, cache, 0, packing, others=adapters)
    packing.pack()
    return made


def write_adapter(folder: Path, subject: LoraBase, member: int) -> None:
    """An adapter of rank 1 in the files of peft."""
    folder.mkdir()
    numbers = torch.Generator().manual_seed(member)
    tensors = {}
    for path, shape in subject.layers.items():
        for half, size in zip("BA", shape):
            factor = SIGMA**0.5 * torch.randn(size, generator=numbers)
            place = f"base_model.model.{path}.lora_{half}.weight"
            tensors[place] = factor.to(subject.dtype).reshape((-1, 1) if half == "B" else (1, -1))
    save_file(tensors, folder / "adapter_model.safetensors")
    about = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 1,
        "lora_alpha": 1,
        "bias": "none",
        "target_modules": sorted({path.rpartition(".")[2] for path in subject.layers}),
    }
    (folder / "adapter_config.json").write_text(json.dumps(about))
