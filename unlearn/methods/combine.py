"""How the gradients of the forget term and of the retain term become one direction.

`combine(forget, retain, step)` takes both gradients `[P]` (None where a method has no such term),
accumulated over the whole step and summed over all processes, and gives the gradient `[P]` that the
optimizer gets. With g_F the gradient of the forget rows' loss (so that the term -CE has -g_F) and
g_R that of the retained rows' loss:

    weighted     -g_F + w g_R                    Yao et al. 2024, arXiv 2402.15159 (w = 1)
    normalised   -g_F / |g_F| + g_R / |g_R|      NGDiff, Bu et al. 2024, arXiv 2410.22086
    sparse       g_R + c (1 - t/T) sign(theta)   l1-sparse, Jia et al. 2023, arXiv 2304.04934

where T is the number of steps. `normalised` gives g with `<g_R, g> >= 0 >= <g_F, g>`: a step along
-g lowers the retained loss and raises the forget loss to first order, and it is zero only where
both gradients are parallel.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from influence.errors import InputError


@dataclass(frozen=True, eq=False)
class Step:
    """Where a training stands: step `number` (from 0) of at most `steps`, at `theta` [P]."""

    number: int
    steps: int
    theta: Tensor


@dataclass(frozen=True)
class Weighted:
    """The sum of both, the retain term times `retain_weight`."""

    retain_weight: float = 1.0

    def __post_init__(self) -> None:
        above_zero("retain_weight", self.retain_weight, or_zero=True)

    def __call__(self, forget: Tensor | None, retain: Tensor | None, step: Step) -> Tensor:
        """`forget + w retain`, `[P]`."""
        if forget is None or retain is None:
            gradient = forget if retain is None else retain
            assert gradient is not None
            return gradient
        return forget + self.retain_weight * retain

    def __str__(self) -> str:
        """As the methods' table shows it."""
        return "sum" if self.retain_weight == 1 else f"forget + {self.retain_weight:g} retain"


@dataclass(frozen=True)
class Normalised:
    """The sum of both, each divided by its length."""

    def __call__(self, forget: Tensor | None, retain: Tensor | None, step: Step) -> Tensor:
        """`forget / |forget| + retain / |retain|`, `[P]`, where a zero gradient stays zero."""
        assert forget is not None
        assert retain is not None
        return unit(forget) + unit(retain)

    def __str__(self) -> str:
        """As the methods' table shows it."""
        return "sum of unit gradients"


@dataclass(frozen=True)
class Sparse:
    """The retain term with an l1 penalty on the parameters that falls linearly to zero."""

    penalty: float = 5e-4

    def __post_init__(self) -> None:
        above_zero("penalty", self.penalty, or_zero=True)

    def __call__(self, forget: Tensor | None, retain: Tensor | None, step: Step) -> Tensor:
        """`retain + c (1 - t/T) sign(theta)`, `[P]`."""
        assert retain is not None
        return retain + self.penalty * (1 - step.number / step.steps) * step.theta.sign()

    def __str__(self) -> str:
        """As the methods' table shows it."""
        return f"retain + {self.penalty:g} (1 - t/T) sign(theta)"


def unit(v: Tensor) -> Tensor:
    """`v / |v|`, where zero stays zero."""
    largest = v.abs().max()
    if not largest > 0:
        return v
    scaled = v / largest  # so that no square underflows or overflows
    return scaled / scaled.norm()


def above_zero(name: str, value: float, *, or_zero: bool = False) -> None:
    """Refuse a method's number that is not finite, below zero, or zero unless `or_zero`."""
    if not (0 <= value < float("inf")) or (value == 0 and not or_zero):
        bound = "of at least" if or_zero else "above"
        raise InputError(f"{name} {value:g} was given; expected a number {bound} 0")
