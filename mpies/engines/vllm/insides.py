"""What mpies uses of vLLM's insides, which any release may change: one table, compared at every start.

A name that is gone, or that takes other arguments, is told by name before anything is computed. That what is
there computes what it did is for the tests at start to see (engine.py, selftest.py). Imports vLLM.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from mpies.engines.vllm import INSTEAD, version
from mpies.errors import InputError


@dataclass(frozen=True)
class Inside:
    """A name in one of vLLM's modules, and the arguments that it takes; None where it is not called so."""

    module: str
    name: str
    arguments: tuple[str, ...] | None = None
    on: str = ""
    """The device type that it is used on alone."""

    def problem(self) -> str | None:
        """What is not as it was; None if all is."""
        try:
            found: Any = importlib.import_module(f"vllm.{self.module}")
            for part in self.name.split("."):
                found = getattr(found, part)
        except (ImportError, AttributeError):
            return f"there is no vllm.{self.module}.{self.name}"
        if self.arguments is None:
            return None
        given = tuple(name for name in inspect.signature(found).parameters if name != "self")
        if given[: len(self.arguments)] == self.arguments:
            return None
        return f"vllm.{self.module}.{self.name} takes {', '.join(given) or 'nothing'}"


def _of(module: str, names: Iterable[str]) -> Iterator[Inside]:
    return (Inside(module, name) for name in names)


NORM = ("x", "residual")
INSIDES = (
    # plugins.py: how a model is loaded, where it is computed, how tokens are chosen.
    *_of("model_executor.model_loader", ["get_model_loader", "register_model_loader"]),
    Inside(
        "model_executor.model_loader.base_loader",
        "BaseModelLoader.load_model",
        ("vllm_config", "model_config", "prefix"),
    ),
    Inside(
        "model_executor.model_loader.base_loader", "BaseModelLoader.load_weights", ("model", "model_config")
    ),
    Inside("v1.executor.uniproc_executor", "UniProcExecutor._distributed_args", ()),
    Inside("v1.sample.logits_processor", "LogitsProcessor.update_state", ("batch_update",)),
    Inside("v1.sample.logits_processor", "LogitsProcessor.apply", ("logits",)),
    Inside(
        "v1.sample.logits_processor.builtin",
        "process_dict_updates",
        ("req_entries", "batch_update", "new_state"),
    ),
    # members.py: whose tokens a step has.
    Inside(
        "v1.worker.gpu_model_runner",
        "GPUModelRunner._prepare_inputs",
        ("scheduler_output", "num_scheduled_tokens"),
    ),
    Inside("v1.worker.gpu_input_batch", "InputBatch.req_ids"),
    Inside("v1.worker.gpu_input_batch", "CachedRequestState"),
    # layers.py: what is replaced.
    Inside("model_executor.layers.linear", "UnquantizedLinearMethod.apply", ("layer", "x", "bias")),
    *_of(
        "model_executor.layers.linear",
        [
            "ReplicatedLinear",
            "ColumnParallelLinear",
            "MergedColumnParallelLinear",
            "QKVParallelLinear",
            "RowParallelLinear",
        ],
    ),
    *_of("model_executor.layers.vocab_parallel_embedding", ["VocabParallelEmbedding", "ParallelLMHead"]),
    Inside(
        "model_executor.layers.vocab_parallel_embedding",
        "UnquantizedEmbeddingMethod.apply",
        ("layer", "x", "bias"),
    ),
    Inside(
        "model_executor.layers.vocab_parallel_embedding",
        "UnquantizedEmbeddingMethod.embedding",
        ("layer", "input_"),
    ),
    Inside("model_executor.layers.layernorm", "RMSNorm.forward_native", NORM),
    Inside("model_executor.layers.layernorm", "GemmaRMSNorm.forward_native", NORM),
    # host.py, packing.py: what vLLM does to weights on CPUs, and its products.
    Inside(
        "model_executor.layers.utils", "dispatch_cpu_unquantized_gemm", ("layer", "remove_weight"), on="cpu"
    ),
    Inside("_custom_ops", "_supports_onednn", on="cpu"),
    Inside("_custom_ops", "create_onednn_mm", ("weight", "primitive_cache_size"), on="cpu"),
    Inside("_custom_ops", "onednn_mm", ("dnnl_handler", "x", "bias"), on="cpu"),
)

# Read by vLLM from the environment: what it does not know would be set in vain.
VARIABLES = (
    "VLLM_BATCH_INVARIANT",
    "VLLM_CACHE_ROOT",
    "VLLM_ENABLE_V1_MULTIPROCESSING",
    "VLLM_USE_V2_MODEL_RUNNER",
    "VLLM_USE_FLASHINFER_SAMPLER",
    "VLLM_LOGGING_LEVEL",
    "VLLM_NO_USAGE_STATS",
)


def changed(device: str, insides: Iterable[Inside] = INSIDES) -> list[str]:
    """What of the table is not as it was, on a device of this type."""
    from vllm import envs

    found = [inside.problem() for inside in insides if inside.on in ("", device)]
    missing = [f"it does not know {name}" for name in VARIABLES if name not in envs.environment_variables]
    return [problem for problem in found if problem] + missing


def refuse_changed(device: str) -> None:
    """Raise InputError, with what has changed, unless vLLM's insides are those that mpies knows."""
    if problems := changed(device):
        raise InputError(
            f"engine.name: vllm {version()} is not inside as mpies knows it: {'; '.join(problems)}; {INSTEAD}"
        )
