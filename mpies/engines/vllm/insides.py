"""What mpies uses of vLLM's insides, which any release may change: one table, compared at every start.

A name that is gone, or that takes other arguments, is told by name before anything is computed. That what is
there computes what it did is for the tests at start to see (engine.py, selftest.py). Attributes of layers
(`skip_bias_add`, `output_partition_sizes`) are not in it: a start reads them, and is refused without. Imports
vLLM.
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
EXPERTS = "model_executor.layers.fused_moe.experts.cpu_moe"
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
    # Within it, members are copied to the GPU: before, it waits for the copies of the step before.
    Inside("v1.worker.gpu_model_runner", "GPUModelRunner.synchronize_input_prep", ()),
    Inside("v1.worker.gpu_input_batch", "InputBatch.req_ids"),
    Inside("v1.worker.gpu_input_batch", "CachedRequestState"),
    # reading.py, windows.py: what vLLM makes of a model's folder.
    Inside("engine.arg_utils", "EngineArgs.create_model_config", ()),
    Inside("config.model", "ModelConfig.using_transformers_backend", ()),
    *_of("config.model", ["ModelConfig.is_hybrid", "ModelConfig.is_attention_free", "ModelConfig.use_mla"]),
    # layers.py: what is replaced.
    Inside("model_executor.layers.linear", "UnquantizedLinearMethod.apply", ("layer", "x", "bias")),
    Inside(
        "model_executor.layers.linear",
        "UnquantizedLinearMethod.create_weights",
        ("layer", "input_size_per_partition", "output_partition_sizes"),
    ),
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
    Inside("model_executor.layers.layernorm", "LayerNorm.forward"),
    # host.py, packing.py: what vLLM does to weights on CPUs, and its products.
    Inside(
        "model_executor.layers.utils", "dispatch_cpu_unquantized_gemm", ("layer", "remove_weight"), on="cpu"
    ),
    Inside("_custom_ops", "_supports_onednn", on="cpu"),
    Inside("_custom_ops", "create_onednn_mm", ("weight", "primitive_cache_size"), on="cpu"),
    Inside("_custom_ops", "onednn_mm", ("dnnl_handler", "x", "bias"), on="cpu"),
    Inside(EXPERTS, "CPUUnquantizedExperts.process_weights_after_loading", ("layer",), on="cpu"),
    Inside(EXPERTS, "CPUUnquantizedExperts._padded_intermediate_size", ("moe_config",), on="cpu"),
    Inside(EXPERTS, "CPUUnquantizedExperts.apply", ("output", "hidden_states", "w1", "w2"), on="cpu"),
    Inside(EXPERTS, "CPUUnquantizedExperts.isa", on="cpu"),
    Inside("_custom_ops", "cpu_prepack_moe_weight", ("weight", "isa"), on="cpu"),
)

# Layers of single models, which low rank knows by their names: one that is gone is refused as any other that
# is not known. Compared by the tests alone, since importing a model's module takes its while.
OF_MODELS = (
    Inside("model_executor.models.commandr", "LayerNorm.forward", ("hidden_states", "residuals")),
    Inside("model_executor.models.commandr", "RMSNorm.forward", ("hidden_states", "residuals")),
    Inside("model_executor.models.nemotron", "NemotronLayerNorm1P.forward"),
    Inside("model_executor.models.opt", "OPTLearnedPositionalEmbedding.forward", ("positions",)),
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
