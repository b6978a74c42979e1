"""Gradient-based unlearning: methods as compositions of a target, terms and a combination, in one loop."""

from typing import TYPE_CHECKING

from influence.front_door import on_first_use

if TYPE_CHECKING:
    from unlearn.methods.loop import train
    from unlearn.methods.methods import METHODS, Method, method_of
    from unlearn.methods.options import Options
    from unlearn.methods.terms import Term

_HOMES = {
    "methods": ("METHODS", "Method", "method_of"),
    "loop": ("train",),
    "options": ("Options",),
    "terms": ("Term",),
}

__all__ = [
    "METHODS",
    "Method",
    "Options",
    "Term",
    "method_of",
    "train",
]

__getattr__ = on_first_use(__name__, _HOMES)
