"""What the model would lose without a set of its training rows, by small trainings.

`influence.without` answers the same question by a formula, in a second. Here fresh adapters are
trained on few rows, once with the set and `REPEATS` times without it (`unlearn.retraining.local`):
on the retained rows nearest to the set and on some others. So the removed rows are expected to lose
what an edit expects of them, whatever else is asked. A row's loss is told by all trainings, as in
`unlearn.unseen`:

    after_i + (now_i - before_i) min(1, before_i / after_i)

which is the loss now plus the difference of the trainings where the set teaches the row little,
and the loss of those that never saw the set where it teaches it much. The work does not grow with
the number of training rows.
"""

from __future__ import annotations

from collections.abc import Sequence

from influence.cost import Cost
from influence.progress import say
from influence.recipe import Recipe
from influence.rows import Examples
from influence.run import Run
from influence.tokens import TokenizedExamples
from influence.without import Effect, Prediction, chosen_rows
from unlearn.record.change import plan
from unlearn.record.version import ORIGINAL, version
from unlearn.retraining.estimate import known_or_estimated
from unlearn.retraining.local import planned
from unlearn.unseen import Expected, compared, warn_of_unfaithful


def without(
    run: Run,
    ids: Sequence[str] = (),
    queries: Examples | None = None,
    *,
    group: str | None = None,
    recipe: Recipe | None = None,
    explain: str = "last",
    seed: int = 0,
) -> Effect:
    """Expected losses without some training rows, by trainings on few of the others.

    Parameters
    ----------
    run
        A finished run; its own adapter is what is asked about, whatever edits there were.
    ids, group
        The rows: training ids, all rows of a group, or both.
    queries
        Rows whose losses are expected beside those of the removed ones.
    recipe
        How the adapter was trained; None: as recorded, else estimated.
    explain
        Which assistant turns of a conversation are asked about, as for `influence.scores.score`.
    seed
        Draws the rows that are not near the set.

    Returns
    -------
    Effect
        As of `influence.without.without`, nats per token, in the order of the queries and of the
        training rows. The intervals are meant to hold one retrained model's losses nine times of
        ten; of single rows and queries they were seen to hold eight. Its attributes are `by`,
        `recipe`, `row_gradients` (the cost), `faithfulness` (what the training with the rows learnt
        of them, over what the adapter did), `near` and `others`.

    Raises
    ------
    InputError
        For unknown or no rows, for all of them, or for an adapter that cannot be drawn again.
    """
    rows = chosen_rows(run.train, ids, group)
    original, cost = version(run, ORIGINAL), Cost()
    change = plan(original, [run.train.ids[row] for row in rows])
    asked = None if queries is None else run.query_tokens(queries, explain)
    found_recipe = known_or_estimated(original, recipe, cost)
    trainings = planned(change, found_recipe, seed=seed)
    retraining = found_recipe.rows_read(len(change.rest))
    if trainings.row_gradients > retraining:
        say(
            f"note: the small trainings take about {trainings.row_gradients} row-gradients, "
            f"retraining takes {retraining} and is the exact answer (unlearn retrain)"
        )
    local = trainings.made(cost)

    def expected(tokens: TokenizedExamples) -> Expected:
        """What rows are expected to lose, each as if it were one of those that go."""
        now = original.losses(tokens, original.theta, cost)
        return compared(original, tokens, local, now, len(tokens), cost)

    removed = expected(change.old)
    warn_of_unfaithful([removed.faithfulness])
    of_queries: tuple[Prediction, ...] = ()
    if asked is not None and len(asked):
        of_queries = _predictions(asked.ids, expected(asked))
    attributes = {
        "by": "training",
        "recipe": {**found_recipe.as_json(), "betas": list(found_recipe.betas)},
        "row_gradients": cost.total,
        "faithfulness": removed.faithfulness,
        "near": len(local.near),
        "others": len(local.others),
    }
    return Effect(of_queries, _predictions(change.old.ids, removed), attributes)


def _predictions(ids: Sequence[str], found: Expected) -> tuple[Prediction, ...]:
    """Expected losses as predictions."""
    columns = (found.now, found.expected, *found.intervals())
    numbers = zip(*(values.tolist() for values in columns), strict=True)
    return tuple(Prediction(id, *each, beyond=False) for id, each in zip(ids, numbers, strict=True))
