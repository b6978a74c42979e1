"""Change an adapter as if training rows had been absent or different: by closed-form edits, or by training it again."""

# not on first use, as in `influence`: a function has the name of its module, which an import would put in its place
from unlearn.audit import verify
from unlearn.edits import Edit, correct, edit, forecast, relabel, remove
from unlearn.retrain import Recipe, random_halves, retrain, retrain_subsets

__all__ = [
    "Edit",
    "Recipe",
    "correct",
    "edit",
    "forecast",
    "random_halves",
    "relabel",
    "remove",
    "retrain",
    "retrain_subsets",
    "verify",
]
