"""Changes of an adapter, as if training rows had been absent or different.

By edits through influence, by gradient steps, or by training again; and a forecast of how hard each row
is to unlearn.
"""

from typing import TYPE_CHECKING

from influence.front_door import on_first_use

if TYPE_CHECKING:
    from unlearn import difficulty as difficulty
    from unlearn import methods as methods
    from unlearn import terms as terms
    from unlearn.by_training import without
    from unlearn.edits.by_influence import correct, edit, forecast, relabel, remove
    from unlearn.methods.loop import train
    from unlearn.methods.methods import METHODS, Method
    from unlearn.methods.terms import Term
    from unlearn.record.save import Edit
    from unlearn.record.verify import verify
    from unlearn.retraining.recipe import Recipe
    from unlearn.retraining.retrain import retrain
    from unlearn.retraining.subsets import random_halves, retrain_subsets

_HOMES = {
    "by_training": ("without",),
    "edits.by_influence": ("correct", "edit", "forecast", "relabel", "remove"),
    "methods.loop": ("train",),
    "methods.methods": ("METHODS", "Method"),
    "methods.terms": ("Term",),
    "record.save": ("Edit",),
    "record.verify": ("verify",),
    "retraining.recipe": ("Recipe",),
    "retraining.retrain": ("retrain",),
    "retraining.subsets": ("random_halves", "retrain_subsets"),
}

__all__ = [
    "Edit",
    "METHODS",
    "Method",
    "Recipe",
    "Term",
    "correct",
    "difficulty",
    "edit",
    "forecast",
    "methods",
    "random_halves",
    "relabel",
    "remove",
    "retrain",
    "retrain_subsets",
    "terms",
    "train",
    "verify",
    "without",
]

__getattr__ = on_first_use(
    __name__, _HOMES, {"difficulty": "difficulty", "methods": "methods", "terms": "terms"}
)
