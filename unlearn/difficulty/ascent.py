"""Gradient ascent of many adapters at once: the protocol whose cost `unlearn.difficulty.measured` measures and forecasts.

From the adapter, the mean loss of one row (or of a group) is raised by steps of one optimizer at one rate until it reaches a
target. Adam and SGD act coordinate by coordinate, so the trajectories of many rows, one a line of `[c, P]`, are exactly those of
each row alone.

    Adam   m <- 0.9 m + 0.1 g,  v <- 0.999 v + 0.001 g^2,  theta <- theta + lr m / (1 - 0.9^k) / (sqrt(v / (1 - 0.999^k)) + 1e-8)
    SGD    theta <- theta + lr g

(Kingma and Ba 2015, arXiv 1412.6980, with the defaults of `torch.optim.Adam`.)
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from unlearn.difficulty.protocol import Protocol

#: Adam's, as in `torch.optim.Adam`.
BETAS, EPS = (0.9, 0.999), 1e-8


class Climb:
    """Adapters `theta` [c, P] on their way up, with their optimizer's state and the steps `taken` [c]."""

    def __init__(self, theta: Tensor, count: int, protocol: Protocol) -> None:
        self.protocol = protocol
        self.theta = theta.repeat(count, 1)
        self.taken = np.zeros(count, dtype=int)
        self._moments = (
            (torch.zeros_like(self.theta), torch.zeros_like(self.theta)) if self._adam else ()
        )

    @property
    def _adam(self) -> bool:
        return self.protocol.optimizer == "adam"

    def step(self, gradient: Tensor, rows: np.ndarray | None = None) -> None:
        """One step of the copies `rows` (all of them by default) along `gradient` [their number, P]."""
        rows = np.arange(len(self.taken)) if rows is None else rows
        at = torch.from_numpy(rows).to(self.theta.device)
        self.taken[rows] += 1
        if not self._adam:
            self.theta[at] += self.protocol.rate * gradient
            return
        for moment, beta, new in zip(
            self._moments, BETAS, (gradient, gradient * gradient), strict=True
        ):
            moment[at] = beta * moment[at] + (1 - beta) * new
        k = torch.from_numpy(self.taken[rows]).to(gradient)[:, None]
        first, second = (m[at] / (1 - b**k) for m, b in zip(self._moments, BETAS, strict=True))
        self.theta[at] += self.protocol.rate * first / (second.sqrt() + EPS)

    def keep(self, rows: np.ndarray) -> None:
        """Go on with the copies `rows` alone."""
        at = torch.from_numpy(rows).to(self.theta.device)
        self.theta, self.taken = self.theta[at], self.taken[rows]
        self._moments = tuple(moment[at] for moment in self._moments)

    def first_rate(self, gradient: Tensor) -> np.ndarray:
        """Rise of the loss in a step along `gradient` [c, P], to first order, as a first step takes it: [c], nats."""
        size = gradient.abs().sum(1) if self._adam else (gradient * gradient).sum(1)
        return self.protocol.rate * size.double().cpu().numpy()
