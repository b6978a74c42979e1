"""Change an adapter as if training rows had been absent or different: by closed-form edits, gradient steps, or training again."""

# not on first use, as in `influence`: a function has the name of its module, which an import would put in its place
from unlearn.audit import verify
from unlearn.edits import correct, edit, forecast, relabel, remove
from unlearn.loop import train
from unlearn.methods import METHODS, Method
from unlearn.result import Edit
from unlearn.retrain import Recipe, random_halves, retrain, retrain_subsets
from unlearn.terms import Term

__all__ = [
    "METHODS",
    "Edit",
    "Method",
    "Recipe",
    "Term",
    "correct",
    "edit",
    "forecast",
    "random_halves",
    "relabel",
    "remove",
    "retrain",
    "retrain_subsets",
    "train",
    "verify",
]
