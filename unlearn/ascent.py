"""Gradient ascent of many adapters at once: the protocol whose cost `unlearn.difficulty` measures and forecasts.

From the adapter, the mean loss of one row (or of a group) is raised by steps of one optimizer at one rate until it reaches a
target. Adam and SGD act coordinate by coordinate, so the trajectories of many rows, one a line of `[c, P]`, are exactly those of
each row alone.

    Adam   m <- 0.9 m + 0.1 g,  v <- 0.999 v + 0.001 g^2,  theta <- theta + lr m / (1 - 0.9^k) / (sqrt(v / (1 - 0.999^k)) + 1e-8)
    SGD    theta <- theta + lr g

(Kingma and Ba 2015, arXiv 1412.6980, with the defaults of `torch.optim.Adam`.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from influence.errors import InputError

#: Default rates, those of the protocol that published figures of this project use.
RATES = {"adam": 1e-4, "sgd": 5e-3}
#: Adam's, as in `torch.optim.Adam`.
BETAS, EPS = (0.9, 0.999), 1e-8


@dataclass(frozen=True)
class Protocol:
    """What difficulty means: ascent on a row's mean loss by one optimizer at one rate until a target.

    Parameters
    ----------
    optimizer
        `adam` or `sgd`.
    lr
        Learning rate; None: 1e-4 for adam, 5e-3 for sgd.
    target
        `base`: the base model's loss on the row; `unseen`: the loss that `unlearn.unseen` expects of a model that never saw
        the row but saw the others. A group's target is the mean of its rows'.
    steps
        The most steps that are taken.
    """

    optimizer: str = "adam"
    lr: float | None = None
    target: str = "base"
    steps: int = 200

    def __post_init__(self) -> None:
        if self.optimizer not in RATES:
            raise InputError(f"optimizer {self.optimizer!r} was given; expected {' or '.join(RATES)}")
        if self.lr is not None and not 0 < self.lr < float("inf"):
            raise InputError(f"lr {self.lr!r} was given; expected a number above 0")
        if self.target not in ("base", "unseen"):
            raise InputError(f"target {self.target!r} was given; expected base or unseen")
        if type(self.steps) is not int or self.steps < 1:
            raise InputError(f"steps {self.steps!r} was given; expected a whole number of at least 1")

    @property
    def rate(self) -> float:
        """The learning rate."""
        return RATES[self.optimizer] if self.lr is None else self.lr

    def record(self) -> dict[str, str | float | int]:
        """As a file keeps it."""
        return {"optimizer": self.optimizer, "lr": self.rate, "target": self.target, "steps": self.steps}


class Climb:
    """Adapters `theta` [c, P] on their way up, with their optimizer's state and the steps `taken` [c]."""

    def __init__(self, theta: Tensor, count: int, protocol: Protocol) -> None:
        self.protocol = protocol
        self.theta = theta.repeat(count, 1)
        self.taken = np.zeros(count, dtype=int)
        self._moments = (torch.zeros_like(self.theta), torch.zeros_like(self.theta)) if self._adam else ()

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
        for moment, beta, new in zip(self._moments, BETAS, (gradient, gradient * gradient), strict=True):
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
