"""Tiny random models that read images, each with a processor of its own kind, as folders and as pictures."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import PIL.Image
import tiny
import torch
import zoo
from mpi4py import MPI
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast

from mpies import config, replica
from mpies.engines.image import Image
from mpies.replica import Replica
from mpies.tasks.base import Task

TOKENS = ["<image>", "<start>", "<end>", "<pad_image>", "<fake>", "<global-img>"]
FIRST = len(tiny.SPECIAL + tiny.CHARACTERS)
IMAGE, START, END = FIRST, FIRST + 1, FIRST + 2
TEXT = zoo.SIZES | {"vocab_size": 112, "max_position_embeddings": 256, "num_hidden_layers": 1}
# transformers' cache would believe in a window that a Llama does not have.
LLAMA = {key: value for key, value in TEXT.items() if key != "sliding_window"} | {"model_type": "llama"}
PATCHES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}

# What Qwen's families have in common.
MARKS_OF_QWEN = {
    "image_token_id": IMAGE,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
    "video_token_id": FIRST + 3,
}
ROPE_OF_QWEN = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
    "num_hidden_layers": 2,
}
TOWER_OF_QWEN = {
    **{"depth": 2, "hidden_size": 16, "num_heads": 2, "intermediate_size": 32},
    **{"out_hidden_size": 32, "patch_size": 4},
}
IMAGES_OF_QWEN = {
    **{"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 4, "merge_size": 2},
    **{"temporal_patch_size": 2, "min_pixels": 64, "max_pixels": 1024},
}

# An architecture's configuration, its image processor's, its processor's, and how a prompt says "an image".
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], str]] = {
    # Positions in three dimensions; images of any size; windows.
    "qwen2_5_vl": (
        {
            "text_config": TEXT | ROPE_OF_QWEN | {"model_type": "qwen2_5_vl_text"},
            "vision_config": TOWER_OF_QWEN | {"window_size": 16, "fullatt_block_indexes": [1]},
            **MARKS_OF_QWEN,
        },
        IMAGES_OF_QWEN,
        {"processor_class": "Qwen2_5_VLProcessor"},
        "<start><image><end>",
    ),
    # Linear attention; transformers has a class for the decoder alone as well.
    "qwen3_5": (
        {
            "text_config": TEXT | zoo.LINEAR | ROPE_OF_QWEN,
            "vision_config": TOWER_OF_QWEN | {"num_position_embeddings": 64},
            **MARKS_OF_QWEN,
        },
        IMAGES_OF_QWEN,
        {"processor_class": "Qwen3VLProcessor"},
        "<start><image><end>",
    ),
    # Every image token sees all of its image.
    "gemma3": (
        {
            "text_config": TEXT | {"num_hidden_layers": 2, "sliding_window_pattern": 2},
            "vision_config": PATCHES | {"image_size": 28, "patch_size": 14},
            "mm_tokens_per_image": 4,
            "tie_word_embeddings": False,
            "image_token_index": IMAGE,
            "boi_token_index": START,
            "eoi_token_index": END,
        },
        {"image_processor_type": "Gemma3ImageProcessor", "size": {"height": 28, "width": 28}},
        {"processor_class": "Gemma3Processor", "image_seq_length": 4},
        "<start>",
    ),
    # Pixels of a prompt's images in one row; content in parts only.
    "idefics3": (
        {
            "text_config": LLAMA,
            "vision_config": PATCHES | {"image_size": 32, "patch_size": 8},
            "scale_factor": 2,
            "image_token_id": IMAGE,
        },
        {"image_processor_type": "Idefics3ImageProcessor", "do_image_splitting": False}
        | {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 32}},
        {"processor_class": "Idefics3Processor", "image_seq_len": 4},
        "<image>",
    ),
    "llava": (
        {
            "text_config": LLAMA,
            "vision_config": PATCHES
            | {"model_type": "clip_vision_model", "image_size": 28, "patch_size": 14, "projection_dim": 16},
            "image_token_index": IMAGE,
            "image_seq_length": 4,
        },
        {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 28}}
        | {"crop_size": {"height": 28, "width": 28}},
        {"processor_class": "LlavaProcessor", "patch_size": 14, "num_additional_image_tokens": 1}
        | {"vision_feature_select_strategy": "default"},
        "<image>",
    ),
}


def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """One token per printable ASCII character, and those for images."""
    made = tiny.tokenizer()
    made.add_special_tokens({"additional_special_tokens": TOKENS})
    names = {"image_token": "<image>", "boi_token": "<start>", "eoi_token": "<end>"}
    names |= {"fake_image_token": "<fake>", "global_image_token": "<global-img>"}
    made = PreTrainedTokenizerFast(
        tokenizer_object=made.backend_tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens=names,
    )
    as_text = "" if kind == "idefics3" else "{% if m.content is string %}{{ m.content }}{% else %}"
    made.chat_template = (
        "{% for m in messages %}<bos>{{ m.role }}: " + as_text + "{% for p in m.content %}"
        "{% if p.type == 'image' %}" + KINDS[kind][3] + "{% elif p.type == 'text' %}{{ p.text }}{% endif %}"
        "{% endfor %}" + ("{% endif %}" if as_text else "") + "<eos>{% endfor %}"
        "{% if add_generation_prompt %}<bos>assistant: {% endif %}"
    )
    return made


def save_model(folder: Path, kind: str, dtype: torch.dtype = torch.float32) -> Path:
    """A Hugging Face folder of a random model and its processor."""
    configuration, images, processor, _ = KINDS[kind]
    settings = configuration | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(kind, **settings)
    model = zoo.filled(AutoModelForImageTextToText.from_config, config).to(dtype)
    model.get_output_embeddings().weight.data[IMAGE] = 0  # what no answer should say
    model.save_pretrained(folder)
    tokenizer(kind).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(images | processor))
    (folder / "processor_config.json").write_text(json.dumps(processor))
    return folder


def picture(width: int, height: int, seed: int = 0) -> bytes:
    """A PNG file of noise."""
    pixels = torch.randint(
        0, 256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    stream = io.BytesIO()
    PIL.Image.fromarray(pixels.numpy()).save(stream, "PNG")
    return stream.getvalue()


def asked(*images: bytes, text: str) -> list[dict[str, Any]]:
    parts = [{"type": "image", "image": Image.of(image, Path())} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}] if parts else text}]


# Of different lengths, one with two images, one with none.
PROMPTS = [
    asked(picture(24, 16), text="What is it?"),
    asked(picture(16, 16, 1), picture(16, 32, 2), text="Which?"),
    asked(text="Say something that is a little longer."),
    asked(picture(32, 24, 3), text="?"),
]


def start(folder: Path, *overrides: str) -> Replica:
    """A replica as a run has it, whose task asks `PROMPTS`."""
    torch.set_num_threads(1)
    given = [f"model.path={folder}", "model.device=cpu", "model.dtype=float32", "run.directory=none"]
    given += ["engine.batch_size=12", "es.perturbation=full", "task.name=conciseness", *overrides]
    task = Task("test", [{"prompt": prompt} for prompt in PROMPTS], [], lambda *_, **__: [])
    return replica.build(MPI.COMM_SELF, config.load(given), task)
