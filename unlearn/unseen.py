"""What a model that never saw some rows would lose on them, measured by a local retraining.

With `L_now` a row's loss under the adapter, and `L_before`, `L_after` those under adapters trained
on few rows with and without the change (`unlearn.retraining.local`), a model that was trained on
the rows as they are after the change is expected to lose

    expected_i = L_after,i + (L_now,i - L_before,i) L_before,i / L_after,i

on each changed row i, L_after a mean over the trainings without it. The second term is what the
small trainings get wrong about the run's own, where it can be seen: on rows that both saw. It
counts as far as what is left of a row's loss once it is seen is what an unseen row loses too: whole
where rows are hardly learnt, and next to nothing where they are memorized, for how well a row is
recited says nothing about rows that are not. New contents j, which those trainings saw, are
expected to lose L_after,j times the ratio of L_now and L_before over the rows S.

The interval of a row's loss, under one retrained model, has two parts: how far the local trainings
differ from one another, and what is systematic about them, `SYSTEMATIC` of the expected loss. Of a
mean over rows the first part falls with their number, and the second stays.

Where it fails is said beside the evidence, in benchmarks/README.md ("The loss of unseen rows").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from scipy import stats

from influence.at_point import AtPoint
from influence.cost import Cost
from influence.progress import say
from influence.run import Run
from influence.tokens import TokenizedExamples
from unlearn.record.change import Change
from unlearn.record.version import Version, scaled_to
from unlearn.retraining.local import LocalRetraining, planned
from unlearn.retraining.recipe import Recipe

#: Standard deviation of the expected mean loss of a set of rows over that loss, besides what the
#: local trainings' differences say: the root mean square of all that the estimate is off by over 27
#: sets of seven worlds, one retrained model's chance among it. It is 0.04 in the three worlds that
#: the estimate was found on and on SmolLM2, 0.19 in the demo, whose losses are small, and 0.11 with
#: 2,000 rows (benchmarks/README.md, "The loss of unseen rows").
SYSTEMATIC = 0.11

#: The share of an interval that should hold the retrained model's loss.
COVERAGE = 0.9

#: Share of what the adapter learnt about the changed rows that the local training with them must
#: have learnt too; below it the estimate is said to be of little worth. A choice.
FAITHFUL = 0.75


def middle_point(run: Run) -> AtPoint:
    """The point in the middle of the run's path."""
    return run.points[len(run.points) // 2]


@dataclass(frozen=True, eq=False)
class Expected:
    """Losses of the changed rows S and of their new contents, nats per completion token.

    The m rows are S, then the new contents, in the change's order.

    Attributes
    ----------
    now, base : float64 array [m]
        Under the adapter, and under the base alone.
    before : float64 array [m]
        Under the local training that saw S.
    after : float64 array [repeats, m]
        Under those that saw the new contents instead.
    changed : int
        How many of the m rows are S.
    local : LocalRetraining
        The trained adapters.
    """

    now: np.ndarray
    base: np.ndarray
    before: np.ndarray
    after: np.ndarray
    changed: int
    local: LocalRetraining = field(repr=False)

    @property
    def expected(self) -> np.ndarray:
        """Losses of a model trained on the rows as they are after the change, `[m]`."""
        after, old = self.after.mean(0), slice(0, self.changed)
        kept = np.minimum(1.0, self.before / np.maximum(after, 1e-12))
        found = after + kept * (self.now - self.before)
        seen = self.now[old].mean() / max(float(self.before[old].mean()), 1e-12)
        found[self.changed :] = after[self.changed :] * np.clip(seen, 0.5, 2.0)
        return np.maximum(0, found)

    @property
    def faithfulness(self) -> float:
        """What the local training with S learnt about S, over what the adapter did.

        1 where it has the adapter's losses, 0 where it has the base's.
        """
        of_s = slice(0, self.changed)
        learnt = float((self.base - self.now)[of_s].sum())
        if learnt <= 0:
            return 1.0
        return float((self.base - self.before)[of_s].sum()) / learnt

    def interval(self, rows: np.ndarray) -> tuple[float, float]:
        """The interval of the mean loss of some of the m rows under one retrained model."""
        mean = self.expected[rows].mean()
        low, high = self._around(mean, len(rows))
        return float(low), float(high)

    def intervals(self) -> tuple[np.ndarray, np.ndarray]:
        """The intervals of the single rows, `[m]` each."""
        return self._around(self.expected, 1)

    def _around(self, losses: np.ndarray, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """The intervals of expected `losses`, each a mean over so many rows."""
        width = _quantile() * np.sqrt((SYSTEMATIC * losses) ** 2 + self._variance / rows)
        return np.maximum(0, losses - width), losses + width

    @property
    def _variance(self) -> float:
        """Variance of one retrained model's loss on a row about the mean of the local ones.

        That of the local trainings, pooled over S, once for it and once over their number.
        """
        repeats = len(self.after)
        within = self.after[:, : self.changed].var(0, ddof=1).mean()
        return float(within * (1 + 1 / repeats))


def _quantile() -> float:
    """How many standard deviations the interval reaches to each side."""
    return float(stats.norm.ppf((1 + COVERAGE) / 2))


def expected_losses(
    change: Change, recipe: Recipe, now: np.ndarray, new_now: np.ndarray, cost: Cost, *, seed: int
) -> Expected:
    """Estimate the losses of a model trained on the rows as they are after a change.

    Parameters
    ----------
    change
        What goes and comes.
    recipe
        How the run's adapter was trained.
    now, new_now : float64 array [s], [r]
        Losses of S and of the new contents under the adapter.
    cost
        Counts the trainings' row gradients, and the forwards of the m rows under each adapter.
    seed
        Draws the rows that are neither changed nor near.
    """
    local = planned(change, recipe, seed=seed).made(cost)
    found = expectation(change, local, now, new_now, cost)
    warn_of_unfaithful([found.faithfulness])
    return found


def warn_of_unfaithful(shares: Sequence[float]) -> None:
    """Say where local trainings learnt far less of the rows than the adapter knows, or far more.

    `shares`: the `Expected.faithfulness` of one or several.
    """
    least, most = max(0.0, min(shares)), max(shares)
    if most > 1 / FAITHFUL:
        say(
            f"warning: the local retraining learnt {most:.1f} times what the adapter knows of the "
            "changed rows, also with fewer steps: what a model that never saw them would lose is "
            "not well known"
        )
    if least < FAITHFUL:
        say(
            f"warning: the local retraining learnt only {least:.0%} of what the adapter knows of "
            "the changed rows: what a model that never saw them would lose is not well known. Is "
            "this the recipe that the adapter was trained by (--recipe FILE.json)?"
        )


def expectation(
    change: Change, local: LocalRetraining, now: np.ndarray, new_now: np.ndarray, cost: Cost
) -> Expected:
    """The same, by a local retraining that was made."""
    both = np.concatenate([now, new_now])
    return compared(change.version, change.contents, local, both, len(now), cost)


def compared(
    version: Version,
    rows: TokenizedExamples,
    local: LocalRetraining,
    now: np.ndarray,
    changed: int,
    cost: Cost,
) -> Expected:
    """Losses of any rows under the base and a local retraining, beside those `now` [m].

    The first `changed` of them count as rows that go, the others as new contents.
    """
    losses = partial(version.losses, rows, cost=cost)
    return Expected(
        now=now,
        base=losses(scaled_to(version, 0.0)),
        before=losses(local.before),
        after=np.stack([losses(theta) for theta in local.after]),
        changed=changed,
        local=local,
    )


def base_losses(
    version: Version, tokens: TokenizedExamples, *, token_budget: int, cost: Cost
) -> np.ndarray:
    """Losses of rows under the base alone, nats per completion token, `[m]`."""
    return version.losses(tokens, scaled_to(version, 0.0), cost, token_budget=token_budget)
