"""Cleaning: a list of rows to look at, with reasons, and what removing them changed."""

from typing import TYPE_CHECKING

from influence.front_door import on_first_use

if TYPE_CHECKING:
    from analysis.cleaning.applied import apply
    from analysis.cleaning.cleaning import Cleaning, clean

_HOMES = {
    "cleaning": ("Cleaning", "clean"),
    "applied": ("apply",),
}

__all__ = ["Cleaning", "apply", "clean"]

__getattr__ = on_first_use(__name__, _HOMES)
