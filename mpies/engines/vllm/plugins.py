"""What vLLM lets its users put in: a loader, an executor and a way to choose tokens. Imports vLLM."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from vllm import SamplingParams
from vllm.model_executor.model_loader import get_model_loader, register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.v1.executor.uniproc_executor import UniProcExecutor
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from mpies.engines.base import Draws
from mpies.engines.sampler import Sampler
from mpies.engines.vllm.layers import install
from mpies.engines.vllm.members import Members


class Unfilled(BaseModelLoader):
    """Loads nothing: the weights are written in place later.

    With `members` among its options, the model computes with a block of members (see layers.py), which
    are made known to it before anything is compiled: (how many, rank of the noise).
    """

    NAME = "mpies"
    LAYERS = "mpies_layers"

    @classmethod
    def register(cls) -> None:
        from vllm.config.load import LoadConfig

        try:
            get_model_loader(LoadConfig(load_format=cls.NAME))
        except ValueError:
            register_model_loader(cls.NAME)(cls)

    def download_model(self, model_config) -> None:
        pass

    def load_model(self, vllm_config, model_config, prefix: str = "") -> nn.Module:
        model = super().load_model(vllm_config, model_config, prefix)
        options = self.load_config.model_loader_extra_config
        if options:
            scheduler, device = vllm_config.scheduler_config, torch.device(vllm_config.device_config.device)
            block, rank = options["members"]
            members = Members(block, scheduler.max_num_batched_tokens, device)
            vars(model)[self.LAYERS] = install(model, members, rank)
        return model

    def load_weights(self, model: nn.Module, model_config) -> None:
        for parameter in model.parameters():
            parameter.data.zero_()


class Executor(UniProcExecutor):
    """In this process, on the GPU of this rank's choice: vLLM's own would take the first."""

    index = 0

    @classmethod
    def on(cls, device: torch.device) -> type[Executor]:
        return type("Executor", (cls,), {"index": device.index or 0})

    def _distributed_args(self) -> tuple[str, int, int]:
        method, rank, _ = super()._distributed_args()
        return method, rank, self.index


class Chooses(LogitsProcessor):
    """Chooses the tokens of requests that bring `KEY` among their `extra_args`.

    What is not chosen is made impossible, so that greedy decoding takes what is.
    """

    KEY = ""

    def __init__(self, vllm_config, device: torch.device, is_pin_memory: bool):
        self.rows: dict[int, tuple[Any, list[int]]] = {}
        """What each row's request has brought, and its tokens so far."""

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self.rows, batch_update, self._state)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        if self.rows:
            rows = sorted(self.rows)
            index = torch.tensor(rows, device=logits.device)
            chosen = self.choose(logits[index], [self.rows[row] for row in rows])
            logits[index] = -torch.inf
            logits[index, chosen] = 0.0
        return logits

    def choose(self, logits: torch.Tensor, rows: list[tuple[Any, list[int]]]) -> torch.Tensor:
        """Those rows' next tokens, int64 (rows,), from logits (rows, vocabulary)."""
        raise NotImplementedError

    def _state(self, parameters: SamplingParams, prompt, answer: list[int]):
        brought = (parameters.extra_args or {}).get(self.KEY)
        return (brought, answer) if brought else None


class CounterBased(Chooses):
    """For requests that come with draws, as `engines/sampler.py` defines them."""

    KEY = "mpies"

    @staticmethod
    def parameters(draws: Draws, row: int) -> dict[str, tuple[int, float, int, int]]:
        """`extra_args` of the request for one of the draws' answers."""
        first = int(draws.places(np.array(row), 0))
        return {CounterBased.KEY: (draws.seed, draws.temperature, int(draws.numbers[row]), first)}

    def choose(self, logits: torch.Tensor, rows: list[tuple[Any, list[int]]]) -> torch.Tensor:
        (seed, temperature, *_), _ = rows[0]  # the same for a call's requests
        numbers = np.array([number for (*_, number, _), _ in rows], dtype=np.uint64)
        places = np.array([first + len(answer) for (*_, first), answer in rows], dtype=np.uint64)
        return Sampler(Draws(seed, temperature, numbers))(logits, torch.arange(len(rows)), places)


class Forced(Chooses):
    """For requests that come with their answers: their tokens, one after another.

    vLLM takes log-probabilities from logits as they were before.
    """

    KEY = "mpies_forced"

    @staticmethod
    def parameters(answer: list[int]) -> dict[str, list[int]]:
        """`extra_args` of the request."""
        return {Forced.KEY: answer}

    def choose(self, logits: torch.Tensor, rows: list[tuple[Any, list[int]]]) -> torch.Tensor:
        return torch.tensor([given[len(answer)] for given, answer in rows], device=logits.device)
