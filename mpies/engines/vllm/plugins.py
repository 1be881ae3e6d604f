"""What vLLM lets its users put in: a loader, an executor and a way to choose tokens. Imports vLLM."""

from __future__ import annotations

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


class CounterBased(LogitsProcessor):
    """Chooses the tokens of requests that come with draws, as `engines/sampler.py` defines them.

    What is not chosen is made impossible, so that greedy decoding takes what is.
    """

    KEY = "mpies"

    def __init__(self, vllm_config, device: torch.device, is_pin_memory: bool):
        self.rows: dict[int, tuple[tuple[int, float, int, int], list[int]]] = {}

    @staticmethod
    def parameters(draws: Draws, row: int) -> dict[str, tuple[int, float, int, int]]:
        """`extra_args` of the request for one of the draws' answers."""
        first = int(draws.places(np.array(row), 0))
        return {CounterBased.KEY: (draws.seed, draws.temperature, int(draws.numbers[row]), first)}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self.rows, batch_update, self._state)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        if not self.rows:
            return logits
        rows = sorted(self.rows)
        (seed, temperature, *_), _ = self.rows[rows[0]]  # the same for a call's requests
        numbers = np.array([self.rows[row][0][2] for row in rows], dtype=np.uint64)
        places = np.array([self.rows[row][0][3] + len(self.rows[row][1]) for row in rows], dtype=np.uint64)
        index = torch.tensor(rows, device=logits.device)
        sampler = Sampler(Draws(seed, temperature, numbers))
        chosen = sampler(logits[index], torch.arange(len(rows)), places)
        logits[index] = -torch.inf
        logits[index, chosen] = 0.0
        return logits

    @staticmethod
    def _state(parameters: SamplingParams, prompt, answer: list[int]):
        draws = (parameters.extra_args or {}).get(CounterBased.KEY)
        return (tuple(draws), answer) if draws else None


class Forced(LogitsProcessor):
    """Chooses the tokens of requests that come with their answers, one after another.

    Others are made impossible. vLLM takes log-probabilities from logits as they were before.
    """

    KEY = "mpies_forced"

    def __init__(self, vllm_config, device: torch.device, is_pin_memory: bool):
        self.rows: dict[int, tuple[list[int], list[int]]] = {}

    @staticmethod
    def parameters(answer: list[int]) -> dict[str, list[int]]:
        """`extra_args` of the request."""
        return {Forced.KEY: answer}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self.rows, batch_update, self._state)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        if self.rows:
            rows = torch.tensor(list(self.rows), device=logits.device)
            following = [given[len(answer)] for given, answer in self.rows.values()]
            logits[rows] = -torch.inf
            logits[rows, torch.tensor(following, device=logits.device)] = 0.0
        return logits

    @staticmethod
    def _state(parameters: SamplingParams, prompt, answer: list[int]):
        given = (parameters.extra_args or {}).get(Forced.KEY)
        return (list(given), answer) if given else None
