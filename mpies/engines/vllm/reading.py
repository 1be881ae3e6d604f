"""What vLLM makes of a model's folder: what it cannot share is refused before it is started."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from mpies.engines.vllm import INSTEAD
from mpies.errors import InputError, reason

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from vllm.config import ModelConfig


def examine(folder: str) -> ModelConfig:
    """What vLLM knows of a model by its config.json.

    Raises InputError for a model that vLLM does not know, or keeps in another form.
    """
    with starting():
        from vllm import EngineArgs

        found = EngineArgs(folder, skip_tokenizer_init=True, trust_remote_code=False).create_model_config()
    if found.using_transformers_backend():
        # It computes with transformers' own classes, which it changes: the model beside it, too.
        name = found.hf_config.model_type
        raise InputError(f"engine.name: vllm has no {name} of its own, only transformers'; {INSTEAD}")
    if found.quantization or found.use_mla:
        raise InputError(
            "engine.name: vllm computes with weights that it has made of this model's (quantised, or latent"
            f" attention); {INSTEAD}"
        )
    return found


def layers_of(config: PretrainedConfig) -> list[PretrainedConfig]:
    """Each layer's configuration: of some models they differ, and then the whole one's must not be asked."""
    return list(getattr(config, "per_layer_config", None) or [config] * config.num_hidden_layers)


def has_states(config: ModelConfig) -> bool:
    """Has the model layers whose states cannot be cut back to a prefix?"""
    return bool(config.is_hybrid or config.is_attention_free)


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """vLLM's exceptions while it starts are refusals, in a line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"engine.name: vllm does not start with this model ({type(error).__name__}: {_told(error)});"
            f" {INSTEAD}"
        ) from error


def _told(error: Exception) -> str:
    """The line of vLLM's messages that says most: the last one of pydantic's problems, else the first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = next((line for line in lines if line.startswith("Value error")), reason(error))
    return line.split(" [type=")[0].split(" Supported architectures:")[0][:300]
