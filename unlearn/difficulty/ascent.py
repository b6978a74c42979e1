"""Gradient ascent of many copies of one adapter at once, by the optimizer and rate of a protocol.

From the adapter, the mean loss of one row (or of a group) is raised step by step until it reaches a
target. Optimizers act coordinate by coordinate (`unlearn.difficulty.optimizers`), so the
trajectories of many rows, one a line of `[c, P]`, are exactly those of each row alone.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from unlearn.difficulty.protocol import Protocol


class Climb:
    """Copies of an adapter on their way up, with their optimizer's state.

    Attributes
    ----------
    theta : Tensor [c, P]
        Their parameters.
    taken : int array [c]
        Steps that each has taken.
    """

    def __init__(self, theta: Tensor, count: int, protocol: Protocol) -> None:
        self.protocol = protocol
        self.theta = theta.repeat(count, 1)
        self.taken = np.zeros(count, dtype=int)
        self._state = protocol.rule.begin(self.theta)

    def step(self, gradient: Tensor, rows: np.ndarray | None = None) -> None:
        """One step of the copies `rows` [c'] (by default all) along `gradient` [c', P]."""
        every = rows is None or len(rows) == len(self.taken)
        rows = np.arange(len(self.taken)) if rows is None else rows
        places = torch.from_numpy(rows).to(self.theta.device)
        self.taken[rows] += 1
        taken = torch.from_numpy(self.taken[rows]).to(gradient)[:, None]
        state = self._state if every else tuple(values[places] for values in self._state)
        move, after = self.protocol.rule.step(gradient, state, taken, self.protocol.rate)
        if every:  # without copies of what is large
            self.theta += move
            self._state = after
            return
        self.theta[places] += move
        for values, new in zip(self._state, after, strict=True):
            values[places] = new

    def keep(self, rows: np.ndarray) -> None:
        """Go on with the copies `rows` alone."""
        places = torch.from_numpy(rows).to(self.theta.device)
        self.theta, self.taken = self.theta[places], self.taken[rows]
        self._state = tuple(values[places] for values in self._state)

    def first_rate(self, gradient: Tensor) -> np.ndarray:
        """Rise of the loss in a first step along `gradient` [c, P], to first order: [c], nats."""
        return self.protocol.rule.first_rate(gradient, self.protocol.rate)
