"""Figures of one to many runs."""

from mpies.analyze.figures.figure import draw
from mpies.analyze.figures.panels import PANELS

__all__ = ["PANELS", "draw"]
