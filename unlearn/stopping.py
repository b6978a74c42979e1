"""Stopping rules of edits and trainings, and the record of where the steps ended."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np

from influence.errors import InputError

if TYPE_CHECKING:  # the command line reads the rules before it needs torch
    from torch import Tensor

#: A mean loss is at its target when it is this near, relative to the target. A choice.
NEAR = 0.03


@dataclass(frozen=True)
class StoppingRule:
    """A rule of one kind, with a number where the kind takes one: the base of the rules below.

    Attributes
    ----------
    kind : str
        One of `WORDS` or `NUMBERS`.
    value : float or None
        The number of a kind in `NUMBERS`, finite and above 0; None for `WORDS`.
    """

    WORDS: ClassVar[tuple[str, ...]] = ()
    NUMBERS: ClassVar[tuple[str, ...]] = ()
    CHOICES: ClassVar[str] = ""

    kind: str = "expected"
    value: float | None = None

    @classmethod
    def parse(cls, text: str | Self) -> Self:
        """Read a rule as it is typed, `loss=2.5` for one. Raises `InputError` for anything else."""
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
                f"stopping rule {text!r} was given; expected one of {cls.CHOICES}, "
                "with X above 0 and N whole"
            )
        return cls(kind, value)

    def __str__(self) -> str:
        """The rule as it is typed."""
        return self.kind if self.value is None else f"{self.kind}={self.value:g}"


class EditRule(StoppingRule):
    """When an edit stops.

    `expected`, `loss=X` (nats per token), `steps=N`, `norm=X` (length of the whole move), or
    `converged`.
    """

    WORDS = ("expected", "converged")
    NUMBERS = ("loss", "steps", "norm")
    CHOICES = "expected, loss=X (nats per token), steps=N, norm=X, converged"

    @property
    def by_loss(self) -> bool:
        """Whether the rule looks at the changed rows' losses."""
        return self.kind in ("expected", "loss")


class TrainingRule(StoppingRule):
    """When a training stops: `base`, `expected`, `loss=X` (nats per token) or `steps=N`."""

    WORDS = ("base", "expected")
    NUMBERS = ("loss", "steps")
    CHOICES = "base, expected, loss=X (nats per token), steps=N"


@dataclass(frozen=True)
class StepRecord:
    """One step of an edit, as `edit.json` lists it, with losses in nats per token.

    Attributes
    ----------
    step : int
        Its number, from 1.
    length, radius : float
        Its length, and the radius of the trust region that it had to stay in (None: not yet known).
    predicted, measured : float
        Fall of the merit M (`unlearn.edits.steps`) by the linear forecast, and as it was.
    accepted : bool
        Whether the step was kept; else it was taken back.
    forget, learn : float or None
        Mean loss, after the step, of the rows that rise and of those that fall.
    retained, damage : float or None
        Mean loss of the drawn retained rows before the step, and its relative rise since the start.
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
class Ending:
    """Where the steps of an edit or training ended.

    Attributes
    ----------
    theta : Tensor [P]
        The parameters there.
    steps : list of StepRecord
        The steps of an edit; empty for trainings, which have a log of their own.
    stopped : str
        Why the steps ended, for the reader of the record.
    reached : bool or None
        Whether the stopping rule held.
    """

    theta: Tensor
    steps: list[StepRecord] = field(repr=False)
    stopped: str
    reached: bool | None
