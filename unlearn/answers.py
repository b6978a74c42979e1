"""The command that says by small trainings what the model would lose without some rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from influence import console
from influence.answers import WithoutOptions, opened, tell
from influence.options import option
from unlearn.options import RecipeOption


@dataclass(frozen=True, kw_only=True)
class Without(WithoutOptions, RecipeOption):
    """The options of `unlearn without`."""

    LISTED_AFTER: ClassVar[Mapping[str, str]] = {"recipe": "queries"}

    seed: int = option("Draws the rows that are not near the removed ones.", default=0)


def without(options: Without) -> None:
    """Expect the loss of every query, and of the removed rows themselves, if some training rows go
    together, by training small adapters with and without them (influence without: by a formula).
    """
    from unlearn.by_training import without as by_training
    from unlearn.retraining.recipe import recipe_at

    console.at_least("--seed", options.seed, 0)
    recipe = None if options.recipe is None else recipe_at(options.recipe)
    run, ids, queries = opened(options)
    effect = by_training(
        run,
        ids,
        queries,
        group=options.group,
        recipe=recipe,
        explain=options.explain,
        seed=options.seed,
    )
    work = effect.attributes["row_gradients"]
    how = (
        f"by small trainings on {effect.attributes['near']} near rows, {work:.0f} row-gradients. "
        "The interval is meant to hold the loss of one retrained model nine times of ten; of single "
        "rows it was seen to hold eight (unlearn retrain: the exact answer)."
    )
    tell(effect, options, queries, run.train, how)
