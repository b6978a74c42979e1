"""Change an adapter as if training rows had been absent or different; so far, by training it again."""

# not on first use, as in `influence`: the function has the name of its module, which an import would put in its place
from unlearn.retrain import Recipe, random_halves, retrain, retrain_subsets

__all__ = ["Recipe", "random_halves", "retrain", "retrain_subsets"]
