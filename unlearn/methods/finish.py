"""What is made of a trained adapter: the finishes of methods.

A finish is `(Trained) -> theta` [P], run once after the last step. One of your own is a function of
a `Trained`, or a frozen dataclass with `__call__`; its `__str__` is what the methods' table shows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from influence.errors import InputError, NumericalError
from unlearn.methods.combine import above_zero

#: Largest multiple of a move that task arithmetic subtracts. A choice.
LARGEST = 16.0
#: Halvings of an interval when a finish looks for a share of a move. A choice: 1 % of the interval.
HALVINGS = 7


@dataclass(frozen=True, eq=False)
class Trained:
    """The two ends of a training, and what a finish may measure.

    Attributes
    ----------
    before, after : Tensor [P]
        The adapter before and after the training.
    forget_loss, retain_loss : callables
        From an adapter `[P]` to the mean loss of the forget rows and of the retained rows, nats.
    goal : float
        The mean loss that the forget rows should reach.
    """

    before: Tensor
    after: Tensor
    forget_loss: Callable[[Tensor], float]
    retain_loss: Callable[[Tensor], float]
    goal: float

    def at(self, share: float) -> Tensor:
        """`before + share (after - before)`, `[P]`."""
        return self.before + share * (self.after - self.before)


@dataclass(frozen=True)
class Negated:
    """Task arithmetic: `before - a (after - before)`, away from fine-tuning on the forget rows.

    Ilharco et al. 2023, arXiv 2212.04089. Without `scale` a is the least one, up to `LARGEST`, that
    brings the forget rows to their goal, or else the one of the highest loss. A and B are negated,
    not their product: beside `-a dW` that has a term `a^2 dB dA`, which knows no sign, so large a
    need not forget more.
    """

    scale: float | None = None

    def __post_init__(self) -> None:
        if self.scale is not None:
            above_zero("scale", self.scale, or_zero=True)

    def __call__(self, trained: Trained) -> Tensor:
        """The negated move from the adapter before, `[P]`."""
        if self.scale is not None:
            return trained.at(-self.scale)
        losses: dict[float, float] = {}

        def reached(a: float) -> bool:
            """Whether the forget rows are at their goal, `a` times the move away from it."""
            try:
                losses[a] = trained.forget_loss(trained.at(-a))
            except NumericalError:  # so far out that nothing is finite
                return True
            return losses[a] >= trained.goal

        high = 1.0
        while not reached(high) and high < LARGEST:
            high *= 2
        if losses.get(high, trained.goal) < trained.goal:
            return trained.at(-max(losses, key=lambda a: losses[a]))
        return trained.at(-bisect(reached, 0.0 if high == 1 else high / 2, high))

    def __str__(self) -> str:
        """As the methods' table shows it."""
        return f"before - {'a' if self.scale is None else f'{self.scale:g}'} (after - before)"


@dataclass(frozen=True)
class Controlled:
    """Unlearning with control: as much of the move as leaves `bar` of the retained likelihood.

    Wang et al. 2024, arXiv 2406.09179: methods are compared at equal retention. The likelihood is
    the geometric mean per token, so the retained rows' mean loss may rise by `-log(bar)` nats.
    `first` is another finish that comes before.
    """

    bar: float = 0.9
    first: Callable[[Trained], Tensor] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.bar < 1:
            raise InputError(
                f"control {self.bar:g} was given; "
                "expected a share of the likelihood between 0 and 1, as in 0.9"
            )

    def __call__(self, trained: Trained) -> Tensor:
        """The mixture of both ends, `[P]`."""
        if self.first is not None:
            trained = replace(trained, after=self.first(trained))
        allowed = trained.retain_loss(trained.before) - float(
            torch.log(torch.tensor(self.bar, dtype=torch.float64))
        )
        lost = lambda share: trained.retain_loss(trained.at(share)) > allowed  # noqa: E731
        if not lost(1.0):
            return trained.after
        return trained.at(bisect(lost, 0.0, 1.0, above=False))

    def __str__(self) -> str:
        """As the methods' table shows it."""
        first = "" if self.first is None else f"{name_of(self.first)}; "
        return f"{first}mix with before until likelihood {self.bar:g} of the retained rows is left"


def bisect(holds: Callable[[float], bool], low: float, high: float, *, above: bool = True) -> float:
    """Bisection for where `holds` begins between low and high.

    Gives the end of the last interval where it does (`above`), or does not.
    """
    for _ in range(HALVINGS):
        half = (low + high) / 2
        low, high = (low, half) if holds(half) else (half, high)
    return high if above else low


def name_of(part: Any) -> str:
    """What a part is called in the methods' table: a function's name, or a value's text."""
    if inspect.isfunction(part):
        return part.__name__
    return str(part) if type(part).__str__ is not object.__str__ else type(part).__name__
