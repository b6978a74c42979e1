"""Goals of an edit: the loss that each changed row should reach, and the merit of getting there.

`unlearn.edits.steps` has the formula of the merit M. Its gradient is taken by the logits, row by
row of a batch, and sent back once: no autograd graph of the terms is built.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from influence import distributed
from influence.adapter import AdaptedModel
from influence.cost import Cost
from influence.errors import NumericalError
from influence.gradients import power_of_two_near, repeated_over_tokens, summed_gradient
from influence.loss import (
    Supervised,
    less_labels,
    loss_gradient,
    position_chunks,
    probability_chunks,
    token_losses,
)
from influence.tokens import TokenizedExamples
from unlearn.stopping import NEAR
from unlearn.unseen_outputs import ExpectedOutputs

#: Share of a row's target at which the hinge turns from a parabola into a line. At 0.5 the removed
#: author's KL to retraining is 1.53, at 0.2 it is 2.00 (LOG.md, 2026-11-21, "Closed-form edits").
BEND = 0.5


@dataclass(frozen=True, eq=False)
class Merit:
    """M at some parameters.

    Attributes
    ----------
    value : float
        M, nats per token.
    gradient : Tensor [P]
        By the LoRA parameters.
    losses : float64 array [m]
        Mean loss of each row, nats per token.
    """

    value: float
    gradient: Tensor
    losses: np.ndarray


@dataclass(frozen=True, eq=False)
class Goals:
    """Where the losses of the changed rows should go.

    Attributes
    ----------
    tokens : TokenizedExamples
        m rows: those that go or change, and new contents.
    targets : float64 array [m]
        Mean losses to reach, nats per completion token.
    rises : bool array [m]
        Whether the loss should rise to its target (rows that go or change) or fall to it (new).
    outputs : ExpectedOutputs or None
        Of these very rows, which their outputs are drawn to as well.
    """

    tokens: TokenizedExamples
    targets: np.ndarray
    rises: np.ndarray
    outputs: ExpectedOutputs | None = None

    def gaps(self, losses: np.ndarray) -> np.ndarray:
        """How much is missing to each target, nats, `[m]`, and 0 where it is reached."""
        return np.maximum(0, _missing(losses, self.targets, self.rises))

    def reached(self, losses: np.ndarray) -> bool:
        """Whether the rows that rise, and those that fall, are on average near their targets.

        Or beyond: a row that is short of its own target is made up for by one that is past it,
        because two retrained models differ on single rows as much.
        """
        missing, sides = _missing(losses, self.targets, self.rises), (self.rises, ~self.rises)
        return all(
            missing[side].mean() <= NEAR * self.targets[side].mean() for side in sides if side.any()
        )

    def merit(self, model: AdaptedModel, *, token_budget: int, cost: Cost) -> Merit:
        """M and its gradient where the model is now: one forward and backward of every row.

        Several processes share the rows out.

        Raises `NumericalError` where either is NaN or infinite.
        """
        tokens, per_token = self.tokens, 1 / float(self.tokens.counts.sum())
        share, unit = tokens.counts * per_token, power_of_two_near(per_token)
        losses, values = np.zeros(len(tokens)), np.zeros(len(tokens))
        log_q: Tensor | None = None
        own = distributed.shard(np.arange(len(tokens)))
        if self.outputs is not None:
            self.outputs.share_exponent()
        spent = cost.forwards

        def before_batch(rows: np.ndarray) -> None:
            # Outputs that are not in memory move the model, which no graph may see.
            nonlocal log_q
            log_q = None
            if self.outputs is not None:
                log_q = self.outputs.of(own[rows])

        def by_logits(rows: np.ndarray, part: Supervised) -> Tensor:
            rows = own[rows]
            targets, rises = self.targets[rows], self.rises[rows]
            sums = part.per_example(token_losses(part.logits, part.targets)).double()
            losses[rows] = sums.cpu().numpy() / tokens.counts[rows]
            hinge, slope = _hinge(_missing(losses[rows], targets, rises), BEND * targets)
            values[rows] = share[rows] * hinge
            # M falls where a loss that should rise does.
            slope = slope * np.where(rises, -1, 1) * (per_token / unit)
            factors = repeated_over_tokens(slope, part)
            if log_q is None:
                return loss_gradient(part.logits, part.targets, factors)
            divergence = _divergence(log_q, part)
            values[rows] += share[rows] * (divergence / tokens.counts[rows])
            gradient = torch.empty_like(part.logits)
            for at, probs in probability_chunks(part.logits):
                apart = (probs - log_q[at].exp().to(probs)) * (per_token / unit)
                hinged = less_labels(probs, part.targets[at]).mul_(factors[at, None].to(probs))
                gradient[at] = hinged + apart
            return gradient

        gradient = summed_gradient(
            model,
            tokens.select(own),
            by_logits,
            token_budget=token_budget,
            before_batch=before_batch,
        )
        cost.gradients += len(tokens)
        forwards = np.array([cost.forwards - spent])
        sums = torch.from_numpy(np.concatenate([losses, values, forwards]))
        distributed.add_up({"gradient": gradient, "sums": sums})
        losses, values = sums[:-1].numpy().reshape(2, -1)
        cost.forwards = spent + int(sums[-1])
        gradient = gradient * unit
        value = float(values.sum())
        if not (np.isfinite(value) and bool(torch.isfinite(gradient).all())):
            raise NumericalError(
                "the loss of the changed rows became NaN or infinite: nothing is written. "
                "Raise the damping, or load the base in float32"
            )
        return Merit(value, gradient, losses)


def _missing(losses: np.ndarray, targets: np.ndarray, rises: np.ndarray) -> np.ndarray:
    """How far each loss is from its target, nats, and below 0 where it is beyond."""
    return np.where(rises, targets - losses, losses - targets)


def _hinge(x: np.ndarray, width: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`h(x)` and its derivative: 0 for x <= 0, a parabola up to `width`, then a line of slope 1."""
    value = np.where(x < width, np.maximum(x, 0) ** 2 / (2 * width), x - width / 2)
    return value, np.clip(x / width, 0, 1)


def _divergence(log_q: Tensor, part: Supervised) -> np.ndarray:
    """`KL(q || p)` summed over each row's tokens, `[b]`."""
    by_token = []
    for at in position_chunks(part.logits):
        log_p = torch.log_softmax(part.logits[at].to(log_q), -1)
        by_token.append((log_q[at].exp() * (log_q[at] - log_p)).sum(-1))
    return part.per_example(torch.cat(by_token)).double().cpu().numpy()
