"""Stopping rules, and where steps ended: what edits and trainings share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Self

import numpy as np
from torch import Tensor

from influence.errors import InputError

#: How near to its goal, relative to it, a loss must come.
NEAR = 0.03


@dataclass(frozen=True)
class Until:
    """A stopping rule: `expected`, `loss=X` (nats per token), `steps=N`, `norm=X` (length of the whole move), `converged`."""

    WORDS: ClassVar[tuple[str, ...]] = ("expected", "converged")
    NUMBERS: ClassVar[tuple[str, ...]] = ("loss", "steps", "norm")
    CHOICES: ClassVar[str] = "expected, loss=X (nats per token), steps=N, norm=X, converged"

    kind: str = "expected"
    value: float | None = None

    @classmethod
    def parse(cls, text: str | Self) -> Self:
        """From `loss=2.5` and so on."""
        if isinstance(text, cls):
            return text
        kind, equals, number = str(text).partition("=")
        if kind in cls.WORDS and not equals:
            return cls(kind)
        try:
            value = float(number)
        except ValueError:
            value = float("nan")
        sound = np.isfinite(value) and value > 0 and (kind != "steps" or value == round(value))
        if kind not in cls.NUMBERS or not sound:
            raise InputError(
                f"stopping rule {text!r} was given; expected one of {cls.CHOICES}, with X above 0 and N whole"
            )
        return cls(kind, value)

    def __str__(self) -> str:
        """As it is typed."""
        return self.kind if self.value is None else f"{self.kind}={self.value:g}"


@dataclass(frozen=True)
class Step:
    """One step: its number, length, the radius it had to stay in, M's predicted and measured fall, and what came of it.

    `forget` is the mean loss of the rows that rise, `learn` of those that fall, after it; `retained` that of the drawn retained
    rows before it, and `damage` its relative rise so far; nats per token.
    """

    step: int
    length: float
    radius: float | None
    predicted: float
    measured: float
    accepted: bool
    forget: float | None
    learn: float | None
    retained: float | None
    damage: float | None


@dataclass(frozen=True, eq=False)
class Walk:
    """Where the steps led: parameters `[P]`, the steps, and why they ended. `reached`: the stopping rule held."""

    theta: Tensor
    steps: list[Step] = field(repr=False)
    stopped: str
    reached: bool | None


class Stop(Until):
    """A stopping rule: `base`, `expected`, `loss=X` or `steps=N`."""

    WORDS = ("base", "expected")
    NUMBERS = ("loss", "steps")
    CHOICES = "base, expected, loss=X (nats per token), steps=N"
