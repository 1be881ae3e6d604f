"""A model's processor, which makes tokens and pixels of text with images: transformers', for images alone.

`AutoProcessor` loads what reads videos as well, which needs torchvision; and with torchvision, images would
be resized otherwise than without. Here images are always worked on by Pillow, on the CPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mpies.errors import InputError
from mpies.model.folder import locate
from mpies.model.loading import attempt

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_processor(path: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The processor of a model that was loaded from `path`, with this tokenizer.

    Raises InputError for models that read no images, and where it cannot be loaded.
    """
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    kind: Any = PROCESSOR_MAPPING.get(type(model.config), None)
    if kind is None or "image_processor" not in kind.get_attributes():
        raise InputError(
            f"task.train_data: its prompts have images, but {type(model).__name__} reads text only; use a"
            " vision-language model"
        )
    made: Any = type(kind.__name__, (_ForImages, kind), {"given": tokenizer})
    return attempt(path, "the processor of ", made.from_pretrained, locate(path), local_files_only=True)


class _ForImages:
    """What is changed of a processor's class: which parts it is made of."""

    given: Any
    """The tokenizer."""

    @classmethod
    def get_attributes(cls) -> list[str]:
        return cls.__mro__[2].get_attributes()  # type: ignore[attr-defined]  # its own, not this subclass's

    @classmethod
    def _get_arguments_from_pretrained(cls, path: str, *_: Any, **options: Any) -> list[Any]:
        from transformers import AutoImageProcessor
        from transformers.image_processing_backends import PilBackend

        def part(name: str) -> Any:
            if name == "tokenizer":
                return cls.given
            if name != "image_processor":
                return None
            made = AutoImageProcessor.from_pretrained(path, backend="pil", local_files_only=True)
            if not isinstance(made, PilBackend):
                raise TypeError(f"{type(made).__name__} does not work on images by Pillow")
            return made

        return [part(name) for name in cls.get_attributes()]

    def check_argument_for_proper_class(self, name: str, argument: Any) -> Any:
        """Videos and sounds are read by nobody."""
        return type(argument)
