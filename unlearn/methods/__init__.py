"""Gradient-based unlearning: methods as compositions of parts, run by one loop."""

from typing import TYPE_CHECKING

from influence.front_door import on_first_use

if TYPE_CHECKING:
    from unlearn.methods.loop import train
    from unlearn.methods.methods import METHODS, Method, method_of
    from unlearn.methods.options import Options
    from unlearn.methods.targets import Setup, Target, TargetRule
    from unlearn.methods.terms import Term

_HOMES = {
    "methods": ("METHODS", "Method", "method_of"),
    "loop": ("train",),
    "options": ("Options",),
    "targets": ("Setup", "Target", "TargetRule"),
    "terms": ("Term",),
}

__all__ = [
    "METHODS",
    "Method",
    "Options",
    "Setup",
    "Target",
    "TargetRule",
    "Term",
    "method_of",
    "train",
]

__getattr__ = on_first_use(__name__, _HOMES)
