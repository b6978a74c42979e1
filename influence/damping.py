"""Damping rules, as values: how large lambda is in `C + lambda I`, block by block.

lambda is a positive constant on each block of the curvature (one block or many), the same for every
solver, and recorded with the scores. Rules relative to a spectrum use the block's own; for a
Hessian, whose trace may be negative, the GGN's.

`lambda > 0` is always required: (A, B) -> (R A, B R^-1) leaves the model unchanged, so every LoRA
curvature has at least r^2 null directions per site and `lambda = 0` has no answer.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from influence.curvature.base import Curvature
from influence.errors import InputError, NumericalError

#: A block whose relative lambda falls below this share of the largest block's gets that share
#: instead.
FLOOR = 1e-6
RULES = ("mean", "top", "abs", "time")


@dataclass(frozen=True)
class Damping:
    """How large lambda is: a rule and its number.

    lambda is `value` times the block's mean eigenvalue (`mean`) or its top one (`top`), `value`
    itself (`abs`), or 1 / value (`time`).

    `time:T` is training-time damping: stopping after a total learning rate T holds the parameters
    near their start as a proximal term of strength about 1/T would, in the metric of the optimiser
    (geometry `adam` for Adam).
    """

    rule: str = "mean"
    value: float = 0.1

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise InputError(
                f"damping rule {self.rule!r} was given; expected mean:X, top:X, abs:X or time:T, "
                "as in mean:0.1"
            )
        if not (math.isfinite(self.value) and self.value > 0):
            raise InputError(
                f"damping {self} was given; lambda must be positive: a LoRA curvature has at "
                "least r^2 exact null directions per site, so C + 0 I cannot be inverted. Give a "
                "small positive value, as in mean:0.001"
            )

    def __str__(self) -> str:
        """The rule as the command line writes it."""
        short = f"{self.value:g}"
        return f"{self.rule}:{short if float(short) == self.value else repr(self.value)}"

    @classmethod
    def parse(cls, text: str | Damping) -> Damping:
        """Read `mean:0.1`, `top:0.01`, `abs:1e-3` or `time:0.5`."""
        if isinstance(text, Damping):
            return text
        rule, _, value = str(text).partition(":")
        try:
            number = float(value)
        except ValueError:
            raise InputError(
                f"damping {text!r} was given; expected mean:X, top:X, abs:X or time:T, as in "
                "mean:0.1"
            ) from None
        return cls(rule, number)

    def resolve(self, curvature: Curvature) -> Tensor:
        """Lambda of each block of a fitted curvature, `[blocks]` float64, all positive.

        A block without curvature (every A of a fresh adapter: B = 0) has no scale to be relative
        to; it gets `FLOOR` times the largest block's lambda, with a warning.
        """
        count = len(curvature.blocks)
        if self.rule in ("abs", "time"):
            value = self.value if self.rule == "abs" else 1 / self.value
            return torch.full((count,), value, dtype=torch.float64)
        scale = curvature.mean_eigenvalues() if self.rule == "mean" else curvature.top_eigenvalues()
        lam = self.value * scale.double().cpu()
        largest = float(lam.max())
        if not math.isfinite(largest) or largest <= 0:
            raise NumericalError(
                f"damping {self} is relative to the curvature, and the curvature is {largest:g}: "
                "every gradient vanished or is not finite. Use an absolute rule (abs:1e-6) if "
                "that is expected"
            )
        floor = largest * FLOOR
        if bool((lam < floor).any()):
            warnings.warn(
                f"{int((lam < floor).sum())} of {count} curvature blocks are (nearly) zero; their "
                f"lambda is set to {floor:.1e} instead of {self}",
                stacklevel=2,
            )
        return lam.clamp(min=floor)
