"""How figures look, and the files that they become: the same figure is the same file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from mpies.errors import InputError
from mpies.text import clip

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.typing import RcKeyType

# Looked up while a figure is drawn, not only while it is made.
LOOK: dict[RcKeyType, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "axes.grid": False,
    "text.parse_math": False,  # a $ in a path or a setting is a $
}
UNDATED: dict[str, dict[str, Any]] = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}


def form_of(output: str) -> str:
    """png, svg or pdf, by the ending of the file that --output names. Raises InputError for others."""
    form = Path(output).suffix.lower().removeprefix(".")
    if form not in UNDATED:
        endings = ", ".join(f".{form}" for form in UNDATED)
        raise InputError(f"--output: given {clip(output, 60)}, allowed is a name that ends in {endings}")
    return form


def save(figure: Figure, target: Path | BinaryIO, form: str, dpi: int = 150) -> None:
    """Write a figure as png, svg or pdf; `dpi`: pixels per inch of a png."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "mpies"}):
        figure.savefig(target, format=form, dpi=dpi, metadata=UNDATED[form])
