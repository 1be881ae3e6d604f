"""Making a vLLM for a rank: on its device, within its memory, quiet, and with nothing that ranks share.

vLLM is imported here for the first time, after its environment is set.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType, SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

from mpies.engines.base import Prompt
from mpies.engines.text import Text
from mpies.engines.vllm import mapping
from mpies.engines.vllm.environment import set_environment
from mpies.engines.vllm.insides import refuse_changed
from mpies.engines.vllm.packing import Packing, WatchedWeights
from mpies.engines.vllm.reading import examine, has_states, layers_of, starting
from mpies.errors import InputError
from mpies.model.lowrank import count_noise
from mpies.model.storage import copies_bytes
from mpies.model.weights import Tensors, Weights
from mpies.noise import Kernels
from mpies.text import size

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel
    from vllm import LLM

    from mpies.engines.vllm.lowrank import BlocksInVllm

BLOCK = 128  # tokens that the cache is handed out in on CPUs; fewer on GPUs
LEAST = 16  # tokens of an answer with its prompt: those of the tests at start
PREFILL = 8192  # tokens of prompts read at a time
# Of the memory that is free when vLLM starts, the share that it has to find still free a moment later. It
# has no other meaning, for the cache is given in bytes; the rest is slack for what CUDA takes meanwhile.
SHARE = 0.5
# CUDA graphs: up to so many answers a step, vLLM captures them by itself; beyond the second number, a step
# takes so long that launching it is no matter.
CAPTURED, WORTH_CAPTURING = 512, 2048
# Bytes beyond weights and cache: activations, CUDA graphs, log-probabilities, and noise's scratch.
RESERVE = {"cpu": 2**29, "cuda": 3 * 2**30}
# Matrices that are one in transformers, and so many parts in vLLM.
PARTS = {"qkv_proj": 3, "query_key_value": 3, "gate_up_proj": 2}


@dataclass(frozen=True)
class Room:
    """What the cache has to hold: `rows` answers at a time, of up to `tokens` tokens with their prompts."""

    rows: int
    tokens: int

    @classmethod
    def of(cls, text: Text, prompts: Iterable[Prompt], rows: int, new: int, given: bool = False) -> Room:
        """For these prompts, with up to `new` tokens more.

        `given`: and what is given after them, of as many again, as far as the model has positions.
        """
        longest = max((len(text.encode(prompt)) for prompt in prompts), default=0)
        tokens = longest + new
        if given:
            tokens = max(tokens, min(tokens + new, text.positions or tokens + new))
        return cls(rows, max(LEAST, tokens))

    def bytes(self, config: PretrainedConfig, dtype: torch.dtype, rows: int | None = None) -> int:
        """Of keys and values, for so many answers (all of them), in whole blocks and two to spare."""
        a_token = 2 * dtype.itemsize * sum(_width(layer) for layer in layers_of(config.get_text_config()))
        rows = self.rows if rows is None else rows
        return (rows * -(-self.tokens // BLOCK) + 2) * BLOCK * a_token


def _width(layer: PretrainedConfig) -> int:
    """Numbers of a token's keys in a layer."""
    if not hasattr(layer, "num_attention_heads"):
        raise InputError(f"engine.name: vllm is for models with attention, not for {layer.model_type}")
    heads = getattr(layer, "num_key_value_heads", None) or layer.num_attention_heads
    return heads * (getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads)


def refuse_too_long(room: Room, config: PretrainedConfig) -> None:
    """Raise InputError if vLLM does not know places as far as the longest prompt's answer.

    What all engines share (`Text.positions`) is no less, and more for a model that YaRN stretches beyond its
    configuration's own number, where vLLM refuses to start.
    """
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    if most and room.tokens > most:
        raise InputError(
            f"engine.max_new_tokens: the longest prompt and its answer may have {room.tokens} tokens, but"
            f" vLLM knows places up to {most} of this model; use {room.tokens - most} less, or engine.name=hf"
        )


@dataclass(frozen=True)
class Noise:
    """A block's, of low rank: so many members."""

    members: int
    rank: int

    def bytes(self, base: Tensors, dtype: torch.dtype) -> int:
        """Of all buffers, nobody's among them; a matrix that is several parts of vLLM's has a B for each."""
        numbers = count_noise((tensor.shape for tensor in base.values()), self.rank)
        for name, tensor in base.items():
            module = name.removesuffix(".weight").rpartition(".")[2]
            numbers += (PARTS[module] - 1) * self.rank * tensor.shape[-1] if module in PARTS else 0
        return (self.members + 1) * numbers * dtype.itemsize


def cache_bytes(
    room: Room,
    config: PretrainedConfig,
    dtype: torch.dtype,
    device: str,
    parameters: int,
    free: int,
    noise: int = 0,
    scratch: int = 0,
) -> int:
    """Bytes for the cache, of `free` bytes: what the run needs, or less, so that fewer answers run at once.

    `noise`: bytes of a block's; `scratch`: those that the base is worked on in, beyond what is reserved.
    Raises InputError, with the numbers, if one answer does not fit beside these and the live weights.
    """
    live = parameters * dtype.itemsize * (2 if device == "cpu" else 1)  # see packing.py
    most, least = room.bytes(config, dtype), room.bytes(config, dtype, 1)
    rest = RESERVE[device] + scratch
    left = free - live - noise - rest
    if left < least:
        block = f", the noise of a block {size(noise)}" if noise else ""
        smaller = "es.block, engine.max_new_tokens" if noise else "engine.max_new_tokens"
        raise InputError(
            f"engine.name: vllm does not fit: the base weights leave {size(free)}, but live weights take"
            f" {size(live)}{block}, the cache of one answer of {room.tokens} tokens {size(least)}, and the"
            f" rest {size(rest)}; use a smaller {smaller} or model, or a larger device"
        )
    return min(most, left)


class Host:
    """A rank's vLLM, once `hold` was called: it holds the live weights.

    `free`: bytes that this rank can have, before the base weights are there. `invariant`: with kernels whose
    results do not depend on the batch; `turns`: what was read of a conversation is kept for its next turn.
    Raises InputError for prompts that are too long for the model.
    """

    def __init__(
        self,
        folder: str,
        config: PretrainedConfig,
        room: Room,
        dtype: torch.dtype,
        device: torch.device,
        free: int,
        local_rank: int,
        noise: Noise | None = None,
        invariant: bool = False,
        turns: bool = False,
    ):
        refuse_too_long(room, config)
        self.invariant = invariant
        self.turns = turns
        self.room = room
        self.noise = noise
        self.llm: LLM | None = None
        self.cache = 0
        """Bytes of vLLM's cache, once it is there."""
        self.packing = Packing()
        self._start = folder, config, dtype, device, free, local_rank

    def hold(self, model: PreTrainedModel, base: Tensors) -> Tensors:
        """Start vLLM; views of its parameters in the shapes and by the names of `base`, which is the model's.

        Raises InputError if vLLM does not fit beside the base weights, or is not to be had with this model.
        """
        folder, config, dtype, device, free, local_rank = self._start
        parameters = sum(tensor.numel() for tensor in base.values())
        left = free - sum(tensor.nbytes for tensor in base.values() if tensor.device.type == device.type)
        noise = self.noise.bytes(base, dtype) if self.noise else 0
        scratch = copies_bytes(base, device)
        self.cache = cache_bytes(self.room, config, dtype, device.type, parameters, left, noise, scratch)
        # Set whatever the user has set, since the run file tells the setting.
        os.environ["VLLM_BATCH_INVARIANT"] = str(int(self.invariant))
        set_environment(local_rank)  # vLLM is asked first here
        others = {"enable_prefix_caching": self.turns}
        self.llm = start(
            folder, dtype, device, self.room, self.cache, local_rank, self.packing, self.noise, others
        )
        self.turns = self.llm.llm_engine.vllm_config.cache_config.enable_prefix_caching
        (self.runner,) = self.llm.collective_rpc(lambda worker: worker.model_runner)
        views = mapping.find_views(self.runner.get_model(), base, dtype, model, device)
        self.packing.made = views.made
        return views.live

    def weigh(
        self, model: PreTrainedModel, base: Tensors, live: Tensors, kernels: Kernels, rank: int
    ) -> Weights:
        """The weights whose live ones are in vLLM: `Weights` of the same arguments."""
        self.packing.weights = WatchedWeights(model, base, live, kernels, rank)
        return self.packing.weights

    def perturb_in_blocks(self, weights: Weights) -> BlocksInVllm:
        """The perturbation of a block of members: vLLM was started for it, and holds these weights."""
        from mpies.engines.vllm.lowrank import BlocksInVllm
        from mpies.engines.vllm.members import follow
        from mpies.engines.vllm.plugins import Unfilled

        assert self.noise, "it was started without"
        layers = vars(self.runner.get_model())[Unfilled.LAYERS]
        follow(self.runner, layers.members)
        return BlocksInVllm(weights, layers)

    def tell_room(self) -> str:
        """What the cache has room for, if that is less than was asked for: '' otherwise."""
        _, config, dtype, *_ = self._start
        fixed, one = self.room.bytes(config, dtype, 0), self.room.bytes(config, dtype, 1)
        answers = (self.cache - fixed) // (one - fixed)
        if answers >= self.room.rows:
            return ""
        return f"vllm, {answers} of engine.batch_size={self.room.rows} answers at a time: memory is short"

    @property
    def rows_besides(self) -> int:
        """Answers that transformers can read at once in a part of what vLLM leaves free."""
        _, config, dtype, device, *_ = self._start
        return max(1, RESERVE[device.type] // 4 // self.room.bytes(config, dtype, 1))


def start(
    folder: str,
    dtype: torch.dtype,
    device: torch.device,
    room: Room,
    cache: int,
    local_rank: int,
    packing: Packing,
    noise: Noise | None = None,
    others: Mapping[str, Any] = MappingProxyType({}),
) -> LLM:
    """A vLLM whose parameters are all zero and stay where they are.

    cache: bytes. `packing` gets the layers that vLLM would repack. With `noise`, its layers have room for a
    block's. `others`: options of vLLM's beside these, or in their place. Raises InputError for models that
    vLLM does not know or keeps in another form.
    """
    set_environment(local_rank)
    threads, preloaded = torch.set_num_threads, os.environ.get("LD_PRELOAD")
    try:
        with warnings.catch_warnings(), starting():
            warnings.simplefilter("ignore")
            refuse_changed(device.type)  # before anything of it is replaced
            if has_states(examine(folder)):
                others = {**others, "enable_prefix_caching": False}
            with _mended(device, packing):
                made = _make(folder, dtype, device, room, cache, noise, others)
    finally:
        torch.set_num_threads = threads  # which vLLM replaces on CPUs
        if preloaded is None:  # what vLLM wants for its own subprocesses, which there are none of
            os.environ.pop("LD_PRELOAD", None)
        else:
            os.environ["LD_PRELOAD"] = preloaded
    return made


def _make(
    folder: str,
    dtype: torch.dtype,
    device: torch.device,
    room: Room,
    cache: int,
    noise: Noise | None,
    others: Mapping[str, Any],
) -> LLM:
    from vllm import LLM

    from mpies.engines.vllm.plugins import CounterBased, Executor, Forced, Unfilled

    Unfilled.register()
    options: dict[str, Any] = {"enforce_eager": True}
    if device.type == "cuda":
        options = options_on_gpus(*torch.cuda.mem_get_info(device), room.rows)
    options |= {
        "runner": "generate",
        "skip_tokenizer_init": True,
        "trust_remote_code": False,
        "dtype": str(dtype).removeprefix("torch."),
        "load_format": Unfilled.NAME,
        "model_loader_extra_config": {"members": (noise.members, noise.rank)} if noise else {},
        "use_tqdm_on_load": False,
        "max_model_len": room.tokens,
        "max_num_seqs": room.rows,
        "max_num_batched_tokens": max(PREFILL, room.rows),
        "kv_cache_memory_bytes": cache,
        # A cached prefix would be of other weights after the next perturbation; see `VllmEngine.keep`.
        "enable_prefix_caching": False,
        # What the folder suggests for sampling would make fitness depend on more than the weights.
        "generation_config": "vllm",
        "logits_processors": [CounterBased, Forced],
        # As they are before those choose: see Forced.
        "logprobs_mode": "raw_logprobs",
        "distributed_executor_backend": Executor.on(device),
        "disable_log_stats": True,
    }
    return LLM(folder, **(options | dict(others)))


def options_on_gpus(free: int, total: int, rows: int) -> dict[str, Any]:
    """vLLM's options where the device has `free` of `total` bytes left, for so many answers at a time."""
    options: dict[str, Any] = {"gpu_memory_utilization": SHARE * free / total}
    if rows > CAPTURED:
        most = 16 * -(-min(rows, WORTH_CAPTURING) // 16)  # vLLM captures multiples of 16
        options["compilation_config"] = {"max_cudagraph_capture_size": most}
    return options


@contextlib.contextmanager
def _mended(device: torch.device, packing: Packing) -> Iterator[None]:
    """What vLLM does while it starts, without what does not suit.

    On CPUs it repacks the weights of layers and experts after loading, and forgets the originals. It binds
    the process's memory to a node, which is the launcher's business. And, from 0.31 on, it looks through the
    attributes of all modules for objects with a `__dict__`, which llvmlite's library claims to have, as it
    claims all.
    """
    if device.type != "cpu":
        yield
        return
    from vllm.model_executor.layers import utils

    dispatcher: Any = SimpleNamespace()
    with contextlib.suppress(ImportError):
        dispatcher = importlib.import_module("vllm.triton_utils.dispatcher")

    experts: Any = SimpleNamespace()
    with contextlib.suppress(ImportError, AttributeError):  # insides.py tells what is gone
        name = "vllm.model_executor.layers.fused_moe.experts.cpu_moe"
        experts = importlib.import_module(name).CPUUnquantizedExperts

    def take_experts(kernel: Any, layer: Any) -> None:
        packing.take_experts(kernel, layer)

    def attributes(value: Any) -> Mapping[str, Any]:
        found = vars(value)
        return found if isinstance(found, Mapping) else {}

    with (
        mock.patch.object(utils, "dispatch_cpu_unquantized_gemm", packing.take),
        mock.patch.object(experts, "process_weights_after_loading", take_experts, create=True),
        mock.patch.object(torch.ops._C, "init_cpu_memory_env", lambda nodes: None, create=True),
        mock.patch.object(dispatcher, "vars", attributes, create=True),
    ):
        yield
