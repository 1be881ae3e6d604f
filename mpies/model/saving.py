"""Writing a model as a Hugging Face folder, which appears whole or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from mpies.errors import InputError, StorageError, reason
from mpies.model.loading import folder_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MARK = "mpies.json"
PROCESSOR = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    origin: dict[str, Any] | None = None,
) -> None:
    """Write the model as it is live, with tokenizer and generation settings: a Hugging Face folder.

    `origin` (run_uuid, generation, digest) goes along as mpies.json. The folder appears whole or not
    at all; one that was written by this function before is replaced. Raises StorageError, and
    InputError if the folder holds anything else.
    """
    refuse_overwriting(folder)
    folder = folder.resolve()
    # Names that nobody gives to a copy of their own.
    partial, old = (folder.with_name(f".{folder.name}.mpies-{what}") for what in ("partial", "old"))
    try:
        for left in (partial, old):  # by a save that was killed
            shutil.rmtree(left, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        if model.name_or_path:
            _copy_processor(Path(folder_of(model.name_or_path)), partial)
        (partial / MARK).write_text(json.dumps(origin or {}, indent=1) + "\n")
        for file in partial.iterdir():
            shutil.copymode(partial / MARK, file)  # safetensors writes files that only we may read
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise StorageError(f"{folder}: cannot write the model ({reason(error)})") from None


def _copy_processor(origin: Path, folder: Path) -> None:
    """What reads a model's images is no part of what is tuned."""
    for name in PROCESSOR:
        if (origin / name).is_file() and not (folder / name).exists():
            shutil.copyfile(origin / name, folder / name)


def refuse_overwriting(folder: Path) -> None:
    """Raise InputError if the folder holds anything that `save` did not write."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; name another folder for the model")
    if folder.exists() and any(folder.iterdir()) and not (folder / MARK).exists():
        raise InputError(f"{folder}: holds other things already; name another folder for the model")
