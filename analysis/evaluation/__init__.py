"""Evaluation of an unlearned adapter: is it forgotten, is the rest still there?"""

from typing import TYPE_CHECKING

from influence.front_door import on_first_use

if TYPE_CHECKING:
    from analysis.evaluation.evaluation import evaluate
    from analysis.evaluation.options import Options

_HOMES = {
    "evaluation": ("evaluate",),
    "options": ("Options",),
}

__all__ = [
    "Options",
    "evaluate",
]

__getattr__ = on_first_use(__name__, _HOMES)
