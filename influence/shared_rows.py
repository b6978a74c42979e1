"""Losses and gradients of rows that several processes share out.

Every process calls these with the same rows, runs some of them, and has the answers of all. Within
`influence.distributed.alone`, and with one process, they are what they share out. All processes
raise what one of them finds wrong: an answer that is not finite is looked at once it is whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from influence import distributed
from influence.adapter import AdaptedModel
from influence.cost import Cost
from influence.errors import NumericalError
from influence.gradients import loss_sum_gradient
from influence.loss import mean_losses
from influence.tokens import TokenizedExamples

T = TypeVar("T")


def by_row(count: int, work: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Numbers of `count` rows, `[..., count]` float64, of which each process makes some.

    `work` gives those of some places `[k]`, `[..., k]`; it is not called where there are none. An
    error of one process is that of all.
    """
    return np.stack(dealt(count, lambda places: list(np.moveaxis(work(places), -1, 0))), -1)


def dealt(count: int, work: Callable[[np.ndarray], list[T]]) -> list[T]:
    """Answers of `count` things in all processes, of which each makes some.

    `work` gives those of some places `[k]`, and exchanges nothing. A `NumericalError` of one process
    is raised by all.
    """
    places, several = distributed.shard(np.arange(count)), distributed.world() > 1
    made: dict[int, T] = {}
    failed: dict[int, str] = {}
    with distributed.alone():
        if len(places):
            try:
                made = dict(zip(places.tolist(), work(places), strict=True))
            except NumericalError as error:
                if not several:
                    raise
                failed = {int(places[0]): str(error)}
    if not several:
        return list(made.values())
    for message in distributed.told_by_all(failed).values():
        raise NumericalError(message)
    return list(distributed.told_by_all(made).values())


def shared_losses(
    model: AdaptedModel, tokens: TokenizedExamples, *, token_budget: int = 4096
) -> np.ndarray:
    """`influence.loss.mean_losses` of rows that are shared out, `[n]` float64, nats."""
    if distributed.world() == 1 or not len(tokens):
        return mean_losses(model, tokens, token_budget=token_budget)
    return by_row(
        len(tokens),
        lambda places: mean_losses(model, tokens.select(places), token_budget=token_budget),
    )


def shared_gradient(
    model: AdaptedModel,
    tokens: TokenizedExamples,
    weights: np.ndarray,
    *,
    token_budget: int,
    cost: Cost | None = None,
) -> tuple[Tensor, np.ndarray]:
    """`influence.gradients.loss_sum_gradient` of rows that are shared out: `[P]` and `[n]`.

    `cost` counts all rows, in every process.
    """
    if distributed.world() == 1:
        return loss_sum_gradient(model, tokens, weights, token_budget=token_budget, cost=cost)
    places = distributed.shard(np.arange(len(tokens)))
    if cost is not None:
        cost.gradients += len(tokens)
    gradient, mine = loss_sum_gradient(
        model, tokens.select(places), weights[places], token_budget=token_budget
    )
    losses = distributed.assembled(torch.from_numpy(mine), places, len(tokens))
    return distributed.add_up(gradient), losses.numpy()
