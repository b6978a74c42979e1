"""The demo: invented people, a small model, and everything that the toolkit does to it."""

from typing import TYPE_CHECKING

from influence.front_door import on_first_use

if TYPE_CHECKING:
    from analysis.demo.corpus import Corpus, make_corpus
    from analysis.demo.training import mean_losses, train_adapter, train_base
    from analysis.demo.walkthrough import demo

_HOMES = {
    "corpus": ("Corpus", "make_corpus"),
    "training": ("mean_losses", "train_adapter", "train_base"),
    "walkthrough": ("demo",),
}

__all__ = [
    "Corpus",
    "demo",
    "make_corpus",
    "mean_losses",
    "train_adapter",
    "train_base",
]

__getattr__ = on_first_use(__name__, _HOMES)
