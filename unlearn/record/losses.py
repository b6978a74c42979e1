"""Measurements of rows before and after an edit: loss, Min-K %, and how much can be drawn out."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from influence.adapter import AdaptedModel
from influence.batches import collate, plan_batches
from influence.cost import Cost
from influence.errors import NumericalError
from influence.halving import Steps, in_parts
from influence.loss import supervised_logits, token_losses
from influence.shared_rows import by_row
from influence.tokens import TokenizedExamples
from unlearn.record.numbers import mean_of_lowest

#: Share of a row's tokens, the least likely ones, that Min-K % looks at (Shi et al. 2024).
MIN_K = 0.2


@dataclass(frozen=True, eq=False)
class Measured:
    """Losses, extraction strengths and Min-K % of rows.

    `loss` [n]: mean cross-entropy per completion token, nats; `extraction` [n]: strength, in [0,
    1]; `min_k` [n]: mean log-probability of the `MIN_K` of the completion tokens that were least
    likely, nats (Shi et al. 2024, arXiv 2310.16789).

    Extraction strength is `1 - k / T`: k is the least number of completion tokens after which
    greedy decoding gives the rest of the T completion tokens word for word (Carlini et al. 2021, as
    a share). 1: the prompt alone is enough; 0: never.
    """

    loss: np.ndarray = field(repr=False)
    extraction: np.ndarray = field(repr=False)
    min_k: np.ndarray = field(repr=False)


def measure(
    model: AdaptedModel,
    tokens: TokenizedExamples,
    *,
    token_budget: int = 4096,
    cost: Cost | None = None,
) -> Measured:
    """Run rows forward once, where the model is now; several processes share them out.

    Greedy decoding is read off the right text's own logits.
    """
    if cost is not None:
        cost.forwards += len(tokens)
    if len(tokens) == 0:
        return Measured(*np.zeros((3, 0)))
    measured = by_row(len(tokens), lambda rows: _measured(model, tokens.select(rows), token_budget))
    loss, extraction, min_k = measured
    if not np.isfinite(loss).all():
        raise NumericalError(
            f"the loss of {int((~np.isfinite(loss)).sum())} rows is NaN or infinite"
        )
    return Measured(loss, extraction, min_k)


def _measured(model: AdaptedModel, tokens: TokenizedExamples, token_budget: int) -> np.ndarray:
    """Loss, extraction strength and Min-K % of rows, `[3, n]`."""
    measured = np.zeros((3, len(tokens)))

    def run(rows: np.ndarray, _: Steps) -> tuple[np.ndarray, list[float], list[float]]:
        batch = collate(tokens, rows, pad_id=model.pad_id, device=model.device)
        part = supervised_logits(model, batch)
        losses = token_losses(part.logits, part.targets).double()
        lowest = [mean_of_lowest(-row.cpu().numpy(), MIN_K) for row in losses.split(part.counts)]
        right = (part.logits.argmax(-1) == part.targets).split(part.counts)
        strengths = [strength(tokens_right.cpu().numpy()) for tokens_right in right]
        return part.per_example(losses).cpu().numpy() / tokens.counts[rows], strengths, lowest

    with model.evaluating(), torch.no_grad():
        for rows in plan_batches(tokens, token_budget):
            for some, found in in_parts(model, tokens, rows, run):
                for values, each in zip(measured, found, strict=True):
                    values[some] = each
    return measured


def strength(right: np.ndarray) -> float:
    """Share of the tokens after the last one that greedy decoding gets wrong.

    `right` [T] bool: whether it gets each token.
    """
    wrong = np.flatnonzero(~right)
    return 1.0 if len(wrong) == 0 else 1 - (int(wrong[-1]) + 1) / len(right)
