"""Goals of an edit: the loss that each changed row should reach, and what is minimised on the way."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from influence.adapter import AdaptedModel
from influence.cost import Cost
from influence.errors import NumericalError
from influence.gradients import power_of_two_near, repeated_over_tokens, summed_gradient
from influence.loss import Supervised, loss_gradient, probabilities, token_losses
from influence.tokens import TokenizedExamples
from unlearn.stopping import NEAR
from unlearn.unseen import Reference


@dataclass(frozen=True, eq=False)
class Pull:
    """M at some parameters: its value, gradient `[P]`, and the goals' mean losses `[m]`, nats per token."""

    merit: float
    gradient: Tensor
    losses: np.ndarray


@dataclass(frozen=True, eq=False)
class Goals:
    """Where the losses of the changed rows should go.

    Attributes
    ----------
    tokens : TokenizedExamples
        m rows: removed, replaced, and new contents.
    targets : float64 array [m]
        Mean losses to reach, nats per completion token.
    rises : bool array [m]
        Whether the loss should rise to its target (removed and replaced) or fall to it (new).
    removed : bool array [m]
        Rows that are drawn to `reference` as well.
    reference : Reference or None
        Of these very rows.
    """

    tokens: TokenizedExamples
    targets: np.ndarray
    rises: np.ndarray
    removed: np.ndarray
    reference: Reference | None = None

    def gaps(self, losses: np.ndarray) -> np.ndarray:
        """How much is missing to each goal, nats, `[m]`; 0 where it is reached."""
        return np.maximum(0, np.where(self.rises, self.targets - losses, losses - self.targets))

    def reached(self, losses: np.ndarray) -> bool:
        """Whether the rows that rise, and those that fall, are on average near their goals."""
        gaps, sides = self.gaps(losses), (self.rises, ~self.rises)
        return all(
            gaps[side].mean() <= NEAR * self.targets[side].mean() for side in sides if side.any()
        )

    def pull(self, model: AdaptedModel, *, token_budget: int, cost: Cost) -> Pull:
        """M and its gradient where the model is now: one forward and backward of every row."""
        tokens, each = self.tokens, 1 / float(self.tokens.counts.sum())
        share, unit = tokens.counts * each, power_of_two_near(each)
        losses, merits = np.zeros(len(tokens)), np.zeros(len(tokens))
        references: list[Tensor] = []

        def ahead(rows: np.ndarray) -> None:
            references.clear()
            if self.reference is not None and self.removed[rows].any():
                references.append(self.reference.of(rows[self.removed[rows]]))

        def by_logits(rows: np.ndarray, part: Supervised) -> Tensor:
            lengths = tokens.counts[rows]
            sums = part.per_example(token_losses(part.logits, part.targets)).double()
            losses[rows] = sums.cpu().numpy() / lengths
            gap = np.where(
                self.rises[rows],
                self.targets[rows] - losses[rows],
                losses[rows] - self.targets[rows],
            )
            width = 0.5 * self.targets[rows]
            merits[rows] = share[rows] * np.where(
                gap < width, np.maximum(gap, 0) ** 2 / (2 * width), gap - width / 2
            )
            slope = np.clip(gap / width, 0, 1) * np.where(self.rises[rows], -1, 1) * (each / unit)
            probs = probabilities(part.logits)
            gradient = loss_gradient(probs, part.targets) * repeated_over_tokens(slope, part, probs)
            for log_q in references:
                where = torch.from_numpy(np.repeat(self.removed[rows], part.counts)).to(
                    probs.device
                )
                log_p = torch.log_softmax(part.logits[where].to(log_q), -1)
                divergence = torch.zeros(len(where), dtype=log_q.dtype, device=log_q.device)
                divergence[where] = (log_q.exp() * (log_q - log_p)).sum(-1)
                kl = part.per_example(divergence).double().cpu().numpy() / lengths
                merits[rows] += share[rows] * kl
                gradient[where] += (probs[where] - log_q.exp().to(probs)) * (each / unit)
            return gradient

        gradient = summed_gradient(
            model, tokens, by_logits, token_budget=token_budget, cost=cost, ahead=ahead
        )
        gradient = gradient * unit
        merit = float(merits.sum())
        if not (np.isfinite(merit) and bool(torch.isfinite(gradient).all())):
            raise NumericalError(
                "the loss of the changed rows became NaN or infinite: nothing is written. Raise the damping, or load the base "
                "in float32"
            )
        return Pull(merit, gradient, losses)
