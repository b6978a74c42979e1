"""A recipe where none is known: the rate and epochs that bring rows to the losses they have."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from influence import distributed
from influence.at_point import evenly_spaced
from influence.cost import Cost
from influence.errors import NumericalError
from influence.loss import mean_losses
from influence.progress import say
from unlearn.record.version import Version
from unlearn.retraining.local import fresh
from unlearn.retraining.recipe import Recipe, given_or_recorded
from unlearn.retraining.retrain import TrainingState

#: Rates that are tried, lowest first, and the most epochs at each. A choice: adapters are trained
#: at 1e-4 to 5e-3, small ones at the higher rates.
RATES, EPOCHS = (2e-4, 1e-3, 5e-3), 12

#: Training rows that it tries on, and their batch. A choice.
ROWS, BATCH = 48, 8


#: Row gradients that an estimate costs at the most.
MOST_GRADIENTS = len(RATES) * EPOCHS * ROWS


class _Reached(Exception):
    """The rows have their losses, after this many epochs."""

    def __init__(self, epochs: int) -> None:
        super().__init__(epochs)
        self.epochs = epochs


def known_or_estimated(version: Version, given: str | Path | Recipe | None, cost: Cost) -> Recipe:
    """The recipe that was given or is recorded (`given_or_recorded`), else an estimate."""
    known = given_or_recorded(version.run, given)
    if known is not None:
        return known

    def estimate() -> tuple[Recipe, Cost]:
        """The estimate and its work."""
        spent = Cost()
        return estimated_recipe(version, spent), spent

    found, spent = distributed.at_first(estimate)  # one: what follows is alike everywhere
    cost.gradients += spent.gradients
    cost.forwards += spent.forwards
    return found


def estimated_recipe(version: Version, cost: Cost) -> Recipe:
    """The lowest of `RATES`, constant, that brings some training rows to their losses.

    With the epochs that it took. Where none does, the rate that came nearest, with all `EPOCHS`.
    It is said what was found; `cost` counts at most `len(RATES) * EPOCHS * ROWS` row gradients.
    """
    tokens = version.tokens.select(evenly_spaced(len(version.rows), ROWS))
    model, budget = version.model, version.run.token_budget
    with model.at(version.theta):
        wanted = float(mean_losses(model, tokens, token_budget=budget).mean())
    cost.forwards += len(tokens)
    n, least = len(version.rows), np.inf
    nearest = Recipe(lr=RATES[-1], epochs=EPOCHS, batch_size=BATCH, schedule="constant")

    for rate in RATES:
        lowest = np.inf

        def look(state: TrainingState) -> None:
            """Stop the training where the rows have their losses."""
            nonlocal lowest
            cost.gradients += len(tokens)
            cost.forwards += len(tokens)
            with model.evaluating():
                loss = float(mean_losses(model, tokens, token_budget=budget).mean())
            lowest = min(lowest, loss)
            if loss <= wanted:
                raise _Reached(state.epoch)

        recipe = Recipe(lr=rate, epochs=EPOCHS, batch_size=BATCH, schedule="constant")
        try:
            fresh(model, tokens, recipe, f"looking for a recipe (lr {rate:g})", after_epoch=look)
        except _Reached as reached:
            found = _for_all(replace(recipe, epochs=reached.epochs), len(tokens), n)
            _say(found, len(tokens), wanted, "reached after these epochs")
            return found
        except NumericalError:
            pass  # too high a rate: its losses until then count
        if lowest < least:
            nearest, least = recipe, lowest
    nearest = _for_all(nearest, len(tokens), n)
    _say(nearest, len(tokens), wanted, f"no rate reached it, the lowest was {least:.2f}")
    return nearest


def _for_all(recipe: Recipe, rows: int, n: int) -> Recipe:
    """The recipe of all n rows whose `Recipe.for_rows` is this one for `rows` of them."""
    return replace(recipe, batch_size=max(1, round(recipe.batch_size * (n / rows) ** 0.5)))


def _say(recipe: Recipe, rows: int, wanted: float, how: str) -> None:
    say(
        "warning: no recipe was given and none is recorded beside the adapter: estimated "
        f"lr {recipe.lr:g}, {recipe.epochs} epochs, batches of {recipe.batch_size} from the loss "
        f"of {rows} training rows ({wanted:.2f}; {how}). With --recipe FILE.json, or a run of "
        "influence fit --trainer-output DIR, what a model that never saw the rows would lose is "
        "better known"
    )
