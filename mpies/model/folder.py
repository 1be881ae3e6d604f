"""A model's folder, looked at without reading it: is it there, and does it hold what is loaded from it?"""

from __future__ import annotations

import os
from pathlib import Path

from mpies.errors import InputError
from mpies.model import embedded

TOKENIZERS = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "tekken.json")
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
CONVERT = (
    "AutoModelForCausalLM.from_pretrained(FOLDER, dtype='auto').save_pretrained(NEW) converts them once;"
    " copy the tokenizer's files as well"
)


def locate(path: str) -> str:
    """The folder or hub id that `model.path` stands for; 'quickstart' is the embedded model."""
    if path != "quickstart":
        return os.path.expanduser(path)
    folder = embedded.model_folder()
    if not (folder / "config.json").exists():
        raise InputError(
            f"model.path: {embedded.MODEL_NAME} is not in {folder.parent};"
            " fetch it once with: python -m mpies.quickstart.fetch"
        )
    return str(folder)


def absence(path: str) -> str | None:
    """Why nothing could be loaded from a path; None if there is a folder."""
    folder = Path(path).expanduser()
    if folder.is_dir() or path == "quickstart":
        return None
    if folder.exists():
        return "this is a file, not a folder"
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        return "there is no such folder"
    return (
        "there is no such folder, and it is not in the local Hugging Face cache;"
        " model.allow_download=true permits a download"
    )


def refuse_unusable(path: str) -> None:
    """Raise InputError if there is no folder, or it lacks what no model can be loaded without.

    What only a hub's cache can tell is left to loading.
    """
    folder = Path(locate(path))
    if not folder.is_dir():
        of_the_hub = not path.startswith((".", "/", "~")) and path.count("/") < 2
        if of_the_hub and not folder.exists():
            return
        raise InputError(f"model.path: cannot load {path}: {absence(path)}")
    if not _holds(folder, "*.safetensors") and _holds(folder, *PICKLED):
        raise InputError(
            f"model.path: cannot load {path}: its weights are pickled, and only safetensors are read;"
            f" transformers' {CONVERT}"
        )
    if _holds(folder, "*.safetensors") and not _holds(folder, *TOKENIZERS):
        raise InputError(
            f"model.path: cannot load {path}: it has no tokenizer; copy tokenizer.json and"
            " tokenizer_config.json from the model that it was made from"
        )


def _holds(folder: Path, *patterns: str) -> bool:
    return any(True for pattern in patterns for _ in folder.glob(pattern))
