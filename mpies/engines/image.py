"""Images of prompts: files, or their bytes, which are decoded when a model is to read them."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpies.errors import InputError, reason

if TYPE_CHECKING:
    import PIL.Image

GIVEN = "a file's path, or its bytes"


@dataclass(frozen=True, repr=False)
class Image:
    """An image as it is stored, in a file or here. Equal images have equal bytes, wherever they are."""

    digest: str
    """SHA-256 of the bytes."""
    path: str = ""
    """Of the file; empty: `data` has the bytes."""
    data: bytes = b""

    @classmethod
    def of(cls, given: Any, folder: Path) -> Image:
        """From a path (relative ones are in `folder`), bytes, or {"path": ..., "bytes": ...} of `datasets`.

        Raises InputError for anything else, and for files that cannot be read or hold no image.
        """
        if isinstance(given, Image):
            return given
        if isinstance(given, dict) and set(given) <= {"path", "bytes"}:
            given = given.get("bytes") or given.get("path")
        if isinstance(given, bytes) and given:
            made = cls(hashlib.sha256(given).hexdigest(), data=given)
        elif isinstance(given, str) and given:
            path = folder / Path(given).expanduser()
            made = cls(hashlib.sha256(_bytes_of(path, given)).hexdigest(), str(path))
        else:
            raise InputError(f"given {clipped(given)}, needed is {GIVEN}")
        made.size  # noqa: B018  # what is no image is told now, before the model is loaded
        return made

    @property
    def name(self) -> str:
        """For messages."""
        return self.path or f"the image of {len(self.data):,} bytes"

    @cached_property
    def size(self) -> tuple[int, int]:
        """Width and height, by the head of the file."""
        return self._decoded(_size_upright)

    def open(self) -> PIL.Image.Image:
        """A Pillow image, red, green and blue. Raises InputError if it is damaged or has changed."""
        return self._decoded(_upright)

    def _decoded(self, look: Any) -> Any:
        try:
            import PIL.Image
        except ImportError:
            raise InputError("images need Pillow: pip install 'mpies[images]'") from None
        data = self.data or _bytes_of(Path(self.path), self.path)
        if not self.data and hashlib.sha256(data).hexdigest() != self.digest:
            raise InputError(f"{self.path} has changed since the job began")
        try:
            with warnings.catch_warnings():  # of pictures that would take gigabytes
                warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
                with PIL.Image.open(io.BytesIO(data)) as picture:
                    return look(picture)
        except Exception as error:  # decoders raise whatever there is
            kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
            raise InputError(f"{self.name} is no image that can be read ({kind}{reason(error)})") from None

    def __repr__(self) -> str:
        return f"<image {self.digest}>"

    def __deepcopy__(self, memo: Any) -> Image:
        return self


ORIENTATION, UPRIGHT, ON_THEIR_SIDE = 0x0112, 1, (5, 6, 7, 8)  # of EXIF: how a camera was held


def _orientation(picture: PIL.Image.Image) -> int:
    """By the head of the file: Pillow would read all of a PNG to look for it."""
    told = picture.format != "PNG" or "exif" in picture.info
    return picture.getexif().get(ORIENTATION, UPRIGHT) if told else UPRIGHT


def _size_upright(picture: PIL.Image.Image) -> tuple[int, int]:
    width, height = picture.size
    return (height, width) if _orientation(picture) in ON_THEIR_SIDE else (width, height)


def _upright(picture: PIL.Image.Image) -> PIL.Image.Image:
    """As people see it, and transformers and `datasets` open it."""
    from PIL import ImageOps

    turned = ImageOps.exif_transpose(picture) if _orientation(picture) != UPRIGHT else picture
    return turned.convert("RGB")


def images_in(prompt: str | Iterable[dict[str, Any]]) -> list[Image]:
    """Those of a prompt's messages, in their order."""
    if isinstance(prompt, str):
        return []
    contents = [message["content"] for message in prompt]
    return [
        part["image"] for parts in contents if isinstance(parts, list) for part in parts if "image" in part
    ]


def clipped(value: Any) -> str:
    """A value on one line, not too long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def _bytes_of(path: Path, given: str) -> bytes:
    if given.startswith(("http://", "https://", "data:")):
        raise InputError(f"given {clipped(given)}, needed is {GIVEN}; nothing is downloaded")
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the image {path} ({reason(error)})") from None
