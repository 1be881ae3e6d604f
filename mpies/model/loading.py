"""Finding and loading a causal language model and its tokenizer; choosing the live dtype.

safetensors only, no code from model folders, no hub access unless it is asked for.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from mpies.errors import InputError, reason
from mpies.model.folder import absence, locate, refuse_unusable
from mpies.model.tensor_files import TensorFiles

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def choose_dtype(setting: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The live dtype for `model.dtype` on a device, and why."""
    if setting != "auto":
        return getattr(torch, setting), "as set"
    if device.type != "cpu":
        if torch.cuda.get_device_capability(device) >= (8, 0):
            return torch.bfloat16, "the GPU computes in it"
        return torch.float32, "the GPU has no bfloat16"
    flags = _cpu_flags()
    for flag in ("amx_bf16", "avx512_bf16"):
        if flag in flags:
            return torch.bfloat16, f"the CPU has {flag}"
    return torch.float32, "the CPU has no fast bfloat16"


def base_dtype(master: str, live: torch.dtype) -> torch.dtype:
    """The dtype of the base weights for `model.master`."""
    return live if master == "live" else torch.float32


def load(
    path: str, allow_download: bool, model_class: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model on the CPU, in its checkpoint's dtype, for inference, and its tokenizer.

    `model_class`: transformers' name for the class that it had when a run began, where there may be several;
    empty: in versions that did not note it. None: no run has begun.

    Raises InputError when it is not there or cannot be read.
    """
    refuse_unusable(path)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not allow_download:
        _stay_offline()
    import transformers
    from transformers import AutoTokenizer, GenerationConfig

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    place = locate(path)
    options = {"trust_remote_code": False, "local_files_only": not allow_download}
    config = _configuration(path, **options)
    kind = _kind_of(config, model_class)
    if (Path(place) / "generation_config.json").is_file():
        # transformers would go on without it, and so without its stop tokens.
        attempt(path, "the generation_config.json of ", GenerationConfig.from_pretrained, place)
    tokenizer = attempt(path, "the tokenizer of ", AutoTokenizer.from_pretrained, place, **options)
    model, info = attempt(
        path,
        "",
        kind.from_pretrained,
        place,
        dtype="auto",
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        **options,
    )
    # transformers would go on with random values.
    absent = sorted(str(key) for kind in ("missing_keys", "mismatched_keys") for key in info[kind])
    if absent:
        raise InputError(
            f"model.path: {path} lacks {len(absent)} weights that fit its config.json, {absent[0]} among them"
        )
    attempt(path, "the embeddings of ", _restore_padding, model, path)
    if not tokenizer.chat_template:
        tokenizer.chat_template = _template_of_processor(Path(place))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer


@torch.no_grad()
def _restore_padding(model: PreTrainedModel, path: str) -> None:
    """Embeddings of padding become as they are in the files.

    transformers 5.23 makes some of them zero whenever it has loaded a model (Youtu's), which are tuned as all
    others are: a tuned model would be read as another.
    """
    padding = {
        f"{name}.weight": (module.weight, module.padding_idx)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None
    }
    emptied = {name: place for name, place in padding.items() if not place[0][place[1]].any()}
    try:
        files = TensorFiles(path) if emptied else None
    except InputError:  # transformers finds them in other ways: most such rows are zero there, too
        return
    for name, (weight, row) in emptied.items():
        if files and name in files:
            weight[row] = files.read_row(name, row)


def outline(path: str, allow_download: bool, model_class: str | None = None) -> torch.nn.Module:
    """The model without its weights: parameters have shapes, but no values and no memory.

    Raises InputError when its configuration is not there or cannot be read.
    """
    if not allow_download:
        _stay_offline()
    options = {"trust_remote_code": False, "local_files_only": not allow_download}
    config = _configuration(path, **options)
    with torch.device("meta"):
        return attempt(path, "", _kind_of(config, model_class).from_config, config, trust_remote_code=False)


def _configuration(path: str, **options: Any) -> Any:
    """What config.json says. Raises InputError for models that write no text, or not by a decoder alone."""
    from transformers import AutoConfig

    config = attempt(path, "the configuration of ", AutoConfig.from_pretrained, locate(path), **options)
    if getattr(config, "quantization_config", None):
        # Some are widened as they are loaded, and would be saved as something else.
        raise InputError(
            f"model.path: {path} is quantised, by its config.json; quantised models cannot be tuned: take the"
            " model in bfloat16 or float32"
        )
    if getattr(config, "is_encoder_decoder", False):
        kind = "an encoder-decoder model"  # of some of them, transformers would load half
    elif _kind_of(config):
        return config
    else:
        kind = "no causal language model"
    raise InputError(
        f"model.path: cannot load {path}: {config.model_type} is {kind}; mpies tunes text decoders, such as"
        " Llama and Qwen2"
    )


def _kind_of(config: Any, model_class: str | None = None) -> Any:
    """transformers' loader for models of a configuration; None if they are none that write text.

    Of models that read images and text, the whole; transformers has a class for the decoder alone of some
    (Qwen3.5, Llama 4), which earlier versions took.
    """
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        whole = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        return AutoModelForImageTextToText if whole else None
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForCausalLM
    decoder: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    is_part = decoder.config_class is not type(config)
    if is_part and model_class not in ("", decoder.__name__):
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def _template_of_processor(folder: Path) -> str | None:
    """The chat template, where a vision model's folder has it in a file that tokenizers do not read."""
    try:
        return json.loads((folder / "chat_template.json").read_text())["chat_template"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def folder_of(path: str) -> str:
    """The folder with the files of a model that was loaded before: a hub id's is in the local cache."""
    place = locate(path)
    if Path(place).is_dir():
        return place
    from huggingface_hub import snapshot_download

    return snapshot_download(place, local_files_only=True)


def _stay_offline() -> None:
    """No library asks the hub for anything, whether it was imported before or will be."""
    from huggingface_hub import constants

    os.environ["HF_HUB_OFFLINE"] = "1"
    constants.HF_HUB_OFFLINE = True


def attempt(path: str, what: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call a loader of transformers; whatever it raises is bad input."""
    try:
        return function(*arguments, **options)
    except Exception as error:
        absent = absence(path)
        kind = "damaged safetensors file, " if isinstance(error, SafetensorError) else ""
        why = f"{path}: {absent}" if absent else f"{what}{path}: {kind}{reason(error)}"
        raise InputError(f"model.path: cannot load {why}") from error


def _cpu_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    line = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return set(line.split())
