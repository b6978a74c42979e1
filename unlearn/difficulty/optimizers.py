"""Optimizers of the ascent, as values: the step on many copies, and what depends on the optimizer.

An optimizer is one frozen dataclass. Its `name`, the state it begins with and its step are all that
an ascent needs; the constants of the forecast have defaults for an optimizer whose ascents nobody
has measured yet. Steps act coordinate by coordinate, so the copies of a stack `[c, P]` never see
each other.

    Adam   m <- b1 m + (1 - b1) g,  v <- b2 v + (1 - b2) g^2
           move = lr m / (1 - b1^k) / (sqrt(v / (1 - b2^k)) + eps)
    SGD    move = lr g

(Kingma and Ba 2015, arXiv 1412.6980, with the defaults of `torch.optim.Adam`.) To add one, write
its class here and enter it in `OPTIMIZERS`, or hand an object to `Protocol(optimizer=...)`: nothing
else knows an optimizer by name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar

import numpy as np

if TYPE_CHECKING:  # what is typed at a command line is checked without torch
    from torch import Tensor


@dataclass(frozen=True)
class Optimizer(ABC):
    """A rule of steps uphill, with what a forecast of its ascents has to know.

    Attributes
    ----------
    name
        What records and files call it.
    stride
        Length of a first move over the adapter's, where a protocol names no rate.
    faster
        How many times shorter an ascent is than the rise of its first step suggests. Sets where
        the coarse ascent looks, not what it finds.
    """

    name: ClassVar[str]
    # Choices for an optimizer that was never measured: no lag, and the widest interval below.
    stride: ClassVar[float] = 0.0016
    faster: ClassVar[float] = 2.0

    @abstractmethod
    def begin(self, theta: Tensor) -> tuple[Tensor, ...]:
        """State of the copies `theta` [c, P] before a first step: tensors with a line a copy."""

    @abstractmethod
    def step(
        self, gradient: Tensor, state: tuple[Tensor, ...], taken: Tensor, rate: float
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Moves [c, P] of one step along `gradient` [c, P], and the state after it.

        `taken` [c, 1]: which step it is of each copy, the first one 1.
        """

    def first_rate(self, gradient: Tensor, rate: float) -> np.ndarray:
        """Rise of the loss in a first step along `gradient` [c, P], to first order: [c], nats."""
        taken = gradient.new_ones(len(gradient), 1)
        move, _ = self.step(gradient, self.begin(gradient), taken, rate)
        return (move * gradient).sum(1).double().cpu().numpy()

    def lateness(
        self, steps: np.ndarray, rise: np.ndarray, first: np.ndarray, last: np.ndarray
    ) -> np.ndarray:
        """Steps of a stride that the ascent itself would not take: [c].

        `steps` [c] with a carried gradient raised the losses by `rise` [c]; a first step along the
        gradients at the stride's two ends would raise them by `first` and `last` [c].
        """
        return np.zeros(len(steps))

    def log_lag(self, looks: int, acceleration: np.ndarray) -> np.ndarray:
        """Logarithm of how many times longer the coarse ascents are than the ascents: [c].

        `acceleration` [c]: how many times longer than they are the first step's rise suggests.
        """
        return np.zeros(len(acceleration))

    def log_width(self, looks: int, log_lag: np.ndarray) -> np.ndarray:
        """Logarithm of the upper end of the interval of the steps over the forecast, [c].

        Of the lower end it is the negative. A choice for an optimizer that was never measured.
        """
        return np.full(len(log_lag), 0.3 if looks >= 3 else 1.2)

    def __str__(self) -> str:
        """The name, and every field that is not at its default: `adam`, `adam(eps=0.1)`."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        defaults = {field.name: field.default for field in fields(self)}
        changed = [f"{key}={value}" for key, value in values.items() if value != defaults[key]]
        return self.name + (f"({', '.join(changed)})" if changed else "")


@dataclass(frozen=True)
class Adam(Optimizer):
    """Adam with bias correction.

    `stride` is about a rate of 1e-4 on the testbed. What the lag and the width say were found on
    60 rows of the testbed, its two other regimes and the demo, and judged on SmolLM2 and on the demo
    with another seed, which then made the width's first part larger (benchmarks/README.md,
    "Difficulty of unlearning"; LOG.md, 2026-11-28). `faster` is a choice.
    """

    name: ClassVar[str] = "adam"
    stride: ClassVar[float] = 0.0016
    faster: ClassVar[float] = 1.9

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def begin(self, theta: Tensor) -> tuple[Tensor, ...]:
        """Both moments, [c, P] each, at 0."""
        return theta.new_zeros(theta.shape), theta.new_zeros(theta.shape)

    def step(
        self, gradient: Tensor, state: tuple[Tensor, ...], taken: Tensor, rate: float
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """`lr m / (1 - b1^k) / (sqrt(v / (1 - b2^k)) + eps)`, and both moments."""
        # In place wherever a tensor is this step's own: P may be tens of millions.
        first, second = (moment * beta for moment, beta in zip(state, self.betas, strict=True))
        first.add_(gradient, alpha=1 - self.betas[0])
        second.addcmul_(gradient, gradient, value=1 - self.betas[1])
        size = (second / (1 - self.betas[1] ** taken)).sqrt_().add_(self.eps)
        move = (first / (1 - self.betas[0] ** taken)).mul_(rate).div_(size)
        return move, (first, second)

    def first_rate(self, gradient: Tensor, rate: float) -> np.ndarray:
        """`lr |g|_1`: the first step is `lr sign(g)`, but for `eps`."""
        return rate * gradient.abs().sum(1).double().cpu().numpy()

    def log_lag(self, looks: int, acceleration: np.ndarray) -> np.ndarray:
        """`(ln a / looks)^1.5`.

        Between two looks the gradient grows faster than it is carried forward, by what it grows in
        one stride: the more looks share the growth, the less is missed.
        """
        return np.asarray((np.log(np.maximum(acceleration, 1.0)) / looks) ** 1.5)

    def log_width(self, looks: int, log_lag: np.ndarray) -> np.ndarray:
        """`0.02 (5 / looks)^2.5 + 0.4 L`, L the lag's logarithm; of more than five looks as of five."""
        return 0.02 * (5 / min(looks, 5)) ** 2.5 + 0.4 * log_lag


@dataclass(frozen=True)
class SGD(Optimizer):
    """Plain gradient steps.

    `stride` is about a rate of 5e-3 on the testbed. `LAGS` were found on 50 of its rows; `faster`
    and the width are choices, the latter in view of what the forecasts of four worlds missed.
    """

    name: ClassVar[str] = "sgd"
    stride: ClassVar[float] = 0.0006
    faster: ClassVar[float] = 4.0
    #: How many times longer the coarse ascent is with one, two and three looks. Beyond, the excess
    #: over 1 falls as their number.
    LAGS: ClassVar[tuple[float, float, float]] = (5.0, 1.5, 1.15)

    def begin(self, theta: Tensor) -> tuple[Tensor, ...]:
        """Nothing."""
        return ()

    def step(
        self, gradient: Tensor, state: tuple[Tensor, ...], taken: Tensor, rate: float
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """`lr g`."""
        return rate * gradient, ()

    def first_rate(self, gradient: Tensor, rate: float) -> np.ndarray:
        """`lr |g|_2^2`."""
        return rate * (gradient * gradient).sum(1).double().cpu().numpy()

    def log_lag(self, looks: int, acceleration: np.ndarray) -> np.ndarray:
        """That of `LAGS`: of how the gradient grows, `lateness` has taken account."""
        lag = self.LAGS[looks - 1] if looks <= 3 else 1 + (self.LAGS[2] - 1) * 3 / looks
        return np.full(len(acceleration), np.log(lag))

    def lateness(
        self, steps: np.ndarray, rise: np.ndarray, first: np.ndarray, last: np.ndarray
    ) -> np.ndarray:
        """`h - rise / mean(lr |g|^2)`, the logarithmic mean between the stride's ends.

        Where the gradient grows, a flow of the same length is faster than the stride: it takes
        `dt = dl / |g|^2`, and `|g|^2` taken to be linear in l gives the logarithmic mean.
        """
        ratio = last / first
        ratio = np.where(np.abs(ratio - 1) > 1e-6, ratio, 1.0 + 1e-6)  # ln 1 = 0 would divide
        mean = first * (ratio - 1) / np.log(ratio)
        return np.where(rise > 0, steps - rise / mean, 0)


#: Optimizers by the name that a person types.
OPTIMIZERS: dict[str, Optimizer] = {rule.name: rule for rule in (Adam(), SGD())}
