"""Local retraining: what a change of the training rows does, measured on few of them.

A model that never saw the rows S is what retraining without them makes, and that costs a training
on all rows. What S taught beyond the others is decided by S and the retained rows that are most
like S. So fresh adapters are trained from the base, by the run's own recipe, on

    N + O + S'      `REPEATS` times, of different seeds: the rows as they are after the change
    N + O + S       once: the rows as they were

N are the retained rows nearest to S and S', O are others drawn at random, S' are the new contents
where rows change rather than go. All that a small training gets wrong about the run's own (how well
it knows the format, how sure of itself it is) is in both, and the second one says how much it is:
its rows S should have the losses that they have under the adapter. Where it learnt far more about S
than the adapter did, as when few rows stand for thousands, all of them take fewer steps. From what
is left of the difference `unlearn.unseen` makes expected losses, `unlearn.unseen_outputs` expected
outputs.

The work does not grow with the number of training rows. Evidence: benchmarks/README.md, "The loss of
unseen rows".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, nn

from influence import distributed
from influence.adapter import AdaptedModel
from influence.cost import Cost
from influence.errors import InputError
from influence.tokens import TokenizedExamples
from unlearn.record.change import Change
from unlearn.record.version import scaled_to
from unlearn.retraining.recipe import Recipe
from unlearn.retraining.retrain import (
    TrainingState,
    gradients_kept,
    own_randomness,
    refuse_unrepeatable,
    train,
)

#: Trainings on the rows after the change. One retrained model differs from the next, and the mean
#: of two models' outputs is nearer to a third's than either (KL 1.04 instead of 1.28 on tofu-tiny's
#: author 0); their difference says how far one row's number can be trusted.
REPEATS = 2

#: Nearest retained rows: as many as there are changed rows, within these limits; and other rows.
#: Twice as many change the expected loss by 2 % on tofu-tiny and by 1 % on its styled regime, half
#: as many by 8 % (LOG.md, 2026-11-28, "What a model that never saw the rows would say").
FEWEST_NEAR, MOST_NEAR, OTHERS = 16, 256, 20


#: What the training with S may have learnt about S, over what the adapter did: beyond, it is made
#: again with fewer steps, and where these are too few, with more. Of the sets whose adapters were
#: trained on 200 rows it learnt 0.7 to 1.4 times as much, of those of 2,000 rows 1.4 and more
#: (benchmarks/README.md, "The loss of unseen rows").
MOST_LEARNT, LEAST_LEARNT = 1.25, 0.8

#: How much that ratio falls for e times fewer steps: 0.24 to 0.36 on six sets of them (same place).
#: Only the first shorter training goes by it.
FALL = 0.3

#: Logarithm of how many times fewer steps the next training takes, at most: far from where it was
#: found, `FALL` is too small. A choice.
CUT = math.log(4)

#: Trainings with S, at most; the one that comes nearest is taken. A choice.
TRIES = 4


@dataclass(frozen=True, eq=False)
class LocalRetraining:
    """Adapters trained on few rows, as they were before a change and as they are after it.

    Attributes
    ----------
    before : Tensor [P]
        Parameters trained on the rows with S.
    after : list of Tensor [P]
        Parameters of the trainings with S' in its place, `REPEATS` of them.
    near, others : int array
        Positions of the retained rows in the version's rows that all of them saw: the nearest ones,
        and those drawn at random.
    recipe : Recipe
        The recipe of the run's adapter, of which each training takes what suits so few rows
        (`Recipe.for_rows`).
    row_gradients : int
        What it cost.
    share : float
        Share that was taken of the steps that the recipe has for so few rows.
    """

    before: Tensor = field(repr=False)
    after: list[Tensor] = field(repr=False)
    near: np.ndarray
    others: np.ndarray
    recipe: Recipe
    row_gradients: int
    share: float = 1.0


@dataclass(frozen=True, eq=False)
class Try:
    """A training with S: the logarithm of its share of the steps, what it learnt of S over what
    the adapter did, and its parameters [P].
    """

    log_share: float
    learnt: float
    theta: Tensor = field(repr=False)


@dataclass(frozen=True, eq=False)
class Plan:
    """A local retraining before it is made: its rows, its recipe, and what it will cost."""

    change: Change
    near: np.ndarray
    others: np.ndarray
    recipe: Recipe

    @cached_property
    def kept(self) -> TokenizedExamples:
        """The retained rows that it trains on."""
        return self.change.version.tokens.select(np.concatenate([self.near, self.others]))

    @cached_property
    def _before(self) -> TokenizedExamples:
        """The rows as they were: N + O + S, which do not depend on the order of the requests."""
        change = self.change
        return TokenizedExamples.joined([self.kept, change.old.select(np.argsort(change.rows))])

    @cached_property
    def _after(self) -> TokenizedExamples:
        """The rows as they are after the change: N + O + S'."""
        change = self.change
        order = np.argsort(change.rows[change.replaced])
        return TokenizedExamples.joined([self.kept, change.new.select(order)])

    def _recipe(self, tokens: TokenizedExamples, rows: int, repeat: int = 0) -> Recipe:
        """The recipe of one training on some of `rows` rows."""
        recipe = self.recipe.for_rows(rows, len(tokens))
        return replace(recipe, seed=self.recipe.seed + repeat)

    def trainings(self, share: float = 1.0) -> list[tuple[TokenizedExamples, Recipe]]:
        """What is trained on, and how: the rows before the change, then those after it.

        `share`: of the steps that the recipe has for so few rows.
        """
        change, before, after = self.change, self._before, self._after
        rows = len(change.version.rows)
        rows_after = rows - len(change.rows) + len(change.new)
        whole = [
            (before, self._recipe(before, rows)),
            *((after, self._recipe(after, rows_after, repeat)) for repeat in range(REPEATS)),
        ]
        if share == 1:
            return whole
        return [(tokens, recipe.shortened(share, len(tokens))) for tokens, recipe in whole]

    @property
    def row_gradients(self) -> int:
        """Forwards and backwards of a row that it takes, if no training has to be made again."""
        return sum(recipe.rows_read(len(tokens)) for tokens, recipe in self.trainings())

    def made(self, cost: Cost) -> LocalRetraining:
        """Train. `cost` counts the work.

        Of a distributed run's processes all make the trainings with S, and take the first one's
        adapters; those on the rows after the change are dealt out.
        """
        spent = cost.gradients
        base = self._loss(scaled_to(self.change.version, 0.0), cost)
        whole, log_share = base - self._loss(self.change.version.theta, cost), 0.0
        tried: list[Try] = []
        while len(tried) < TRIES:
            theta = self._trained(0, math.exp(log_share), cost)
            learnt = (base - self._loss(theta, cost)) / whole if whole > 0 else 1.0
            tried.append(Try(log_share, learnt, theta))
            if learnt <= MOST_LEARNT and (learnt >= LEAST_LEARNT or len(tried) == 1):
                break
            log_share = _next_try(tried)
        best = min(tried, key=lambda made: abs(made.learnt - 1))
        share = math.exp(best.log_share)
        after = self._trained_after(best.theta, share, cost)
        spent = cost.gradients - spent
        return LocalRetraining(best.theta, after, self.near, self.others, self.recipe, spent, share)

    def _trained_after(self, like: Tensor, share: float, cost: Cost) -> list[Tensor]:
        """The adapters of the trainings on the rows after the change, each by one process.

        `like` [P] has their shape and type.
        """
        after, owners = [], distributed.owners([1.0] * REPEATS)
        me = distributed.rank()
        for repeat, owner in enumerate(owners):
            spent, theta = Cost(), torch.empty_like(like)
            if owner == me:
                with distributed.alone():
                    theta = self._trained(1 + repeat, share, spent)
            else:
                self._count(1 + repeat, share, spent)
            cost.gradients += spent.gradients
            after.append(theta)
        for theta, owner in zip(after, owners, strict=True):
            distributed.hand_out([theta], owner)
        return after

    def _count(self, number: int, share: float, cost: Cost) -> None:
        """Count what one of the `trainings` costs."""
        tokens, recipe = self.trainings(share)[number]
        cost.gradients += recipe.rows_read(len(tokens))

    def _trained(self, number: int, share: float, cost: Cost) -> Tensor:
        """The adapter of one of the `trainings`."""
        trainings = self.trainings(share)
        tokens, recipe = trainings[number]
        self._count(number, share, cost)
        label = f"local retraining {number + 1} of {len(trainings)}"
        return fresh(self.change.version.model, tokens, recipe, label)

    def _loss(self, theta: Tensor, cost: Cost) -> float:
        """Mean loss of S with the adapter at `theta` [P], nats per token."""
        found = self.change.version.losses(self.change.old, theta, cost)
        # what is done next must be the same in every process
        return float(distributed.first(np.array(found.mean())))


def _next_try(tried: Sequence[Try]) -> float:
    """Logarithm of the share of steps at which S should be learnt as well as the adapter did.

    By the line through the last two of `tried`; after the first by `FALL`. At most 0, and no more
    than `CUT` below the last.
    """
    last, slope = tried[-1], FALL
    if len(tried) > 1:
        run, rise = last.log_share - tried[-2].log_share, last.learnt - tried[-2].learnt
        slope = rise / run if run != 0 and rise / run > 0 else FALL
    wanted = last.log_share + (1 - last.learnt) / slope
    return min(0.0, max(last.log_share - CUT, wanted))


def planned(
    change: Change,
    recipe: Recipe,
    *,
    seed: int = 0,
    index: TokenIndex | None = None,
    near: np.ndarray | None = None,
) -> Plan:
    """A local retraining for a change, whose rows are chosen and nothing trained.

    Parameters
    ----------
    change
        What goes and comes.
    recipe
        How the run's adapter was trained, on all its rows.
    seed
        Draws the other rows.
    index
        Of the version's tokens, where several changes of one version share it.
    near
        Positions of the nearest rows in the version's rows, where they were chosen already.

    Raises
    ------
    InputError
        For an adapter that cannot be trained from a fresh start, or where no row would be left.
    """
    try:
        refuse_unrepeatable(change.version.model)
    except InputError as error:
        raise InputError(
            f"{error}. So what a model that never saw the rows would lose is not known here: give "
            "an edit or a training a loss to reach (--until loss=X), a forecast of difficulty the "
            "base's (--target base)"
        ) from None
    retained = change.rest
    if len(retained) + len(change.new) == 0:
        raise InputError(
            "every training row would go: what a model that saw the others would lose on them is "
            "not defined. Say where to stop (--until loss=X), or leave rows"
        )
    if near is None:
        index = index or TokenIndex(change.version.tokens)
        count = min(max(len(change.rows), FEWEST_NEAR), MOST_NEAR)
        near = index.nearest(change.contents, retained, count)
    others = np.setdiff1d(retained, near)
    drawn = np.random.default_rng(seed).permutation(others)[:OTHERS]
    return Plan(change, near, drawn, recipe)


# ---- rows that are most like others --------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class TokenIndex:
    """Rows by the tokens that they hold, weighted by how rare these are (TF-IDF).

    Tokens, not words: so it knows every language that the tokenizer does, and rows without text.
    On tofu-tiny rows found so serve as well as those found by their gradients.
    """

    tokens: TokenizedExamples

    @cached_property
    def _weighting(self) -> Any:
        from sklearn.feature_extraction.text import TfidfTransformer

        return TfidfTransformer(sublinear_tf=True)

    @cached_property
    def _rows(self) -> Any:
        """The rows' weights, `[n, vocabulary]`, each of length 1."""
        return self._weighting.fit_transform(_counts(self.tokens, self._size))

    @cached_property
    def _size(self) -> int:
        """One more than the largest token."""
        return 1 + max(int(row.input_ids.max()) for row in self.tokens)

    def nearest(self, tokens: TokenizedExamples, among: np.ndarray, count: int) -> np.ndarray:
        """`count` positions of `among` [k]: the nearest of each of some rows, then their second.

        By the cosine; of rows with the same rank the nearer ones come first, then the earlier ones.
        So every row has relatives there, also where others have nearer ones.
        """
        mine = self._rows[among]
        wanted = self._weighting.transform(_counts(tokens, self._size))
        rank, nearness = np.full(len(among), len(among)), np.zeros(len(among))
        for row in range(len(tokens)):
            cosines = (mine @ wanted[row].T).toarray().ravel()
            order = np.argsort(-cosines, kind="stable")[:count]
            closer = np.arange(len(order)) < rank[order]
            same = np.arange(len(order)) == rank[order]
            nearness[order] = np.where(
                closer,
                cosines[order],
                np.where(same, np.maximum(nearness[order], cosines[order]), nearness[order]),
            )
            rank[order] = np.minimum(rank[order], np.arange(len(order)))
        return among[np.lexsort((-nearness, rank))[:count]]


def _counts(tokens: TokenizedExamples, size: int) -> Any:
    """How often each row holds each token below `size`, `[n, size]`."""
    ids = [row.input_ids[row.input_ids < size] for row in tokens]
    starts = np.cumsum([0, *map(len, ids)])
    flat = np.concatenate([*ids, np.zeros(0, dtype=np.int64)])
    counts = sparse.csr_matrix((np.ones(len(flat)), flat, starts), shape=(len(ids), size))
    counts.sum_duplicates()
    return counts


# ---- one training --------------------------------------------------------------------------------


def fresh(
    model: AdaptedModel,
    tokens: TokenizedExamples,
    recipe: Recipe,
    label: str = "training steps",
    after_epoch: Callable[[TrainingState], None] | None = None,
) -> Tensor:
    """Parameters `[P]` of a fresh adapter of the model's shape, trained on some rows.

    On the model's own base, in place: no weight of the base is copied. The model is afterwards what
    it was. In a distributed run, the first process's parameters. `label` names it on its bar;
    `after_epoch` is called as in `train`.
    """
    with (
        own_randomness(model),
        model.at(untrained(model, recipe.seed)),
        model.evaluating(model.parameters),
        gradients_kept(model),
    ):
        torch.manual_seed(recipe.seed)  # dropout
        train(model, tokens, recipe, after_epoch=after_epoch, label=label)
        theta = model.snapshot()
    shared = torch.from_numpy(distributed.first(theta.cpu().numpy()))
    return shared.to(theta)


def untrained(model: AdaptedModel, seed: int) -> Tensor:
    """The parameters `[P]` that an adapter of the model's configuration begins with.

    A as PEFT draws it for `init_lora_weights`, B zero but where the configuration says otherwise.
    Raises `InputError` for an initialisation that changes the base or reads data.
    """
    refuse_unrepeatable(model)
    name = model.model.active_adapters[0]
    how = model.model.peft_config[name].init_lora_weights
    generator = torch.Generator().manual_seed(seed)
    leaves = []
    for site in model.sites:
        a, b = (torch.zeros(leaf.weight.shape, dtype=torch.float64) for leaf in (site.A, site.B))
        if how == "orthogonal":
            a, b = _orthogonal(len(a), a.shape[1], len(b), generator)
        elif how == "gaussian":
            nn.init.normal_(a, std=1 / site.layer.r[name], generator=generator)
        else:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
            if how is False:
                nn.init.kaiming_uniform_(b, a=math.sqrt(5), generator=generator)
        leaves += [a, b]
    return model.space.flatten(leaves).to(model.device, model.dtype)


def _orthogonal(
    rank: int, inputs: int, outputs: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r] that span orthogonal halves of the rank, so that B A is 0."""
    drawn = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    q, _ = torch.linalg.qr(drawn(rank, rank))
    even, odd = q[1::2], q[0::2]
    return (drawn(inputs, rank // 2) @ odd).T / 10, (drawn(rank // 2, outputs).T @ even) / 10
