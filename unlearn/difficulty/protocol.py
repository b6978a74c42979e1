"""The protocol that defines difficulty: ascent by one optimizer at one rate until a target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from influence.errors import InputError
from influence.recipe import Recipe
from unlearn.difficulty.optimizers import OPTIMIZERS, Optimizer

#: Losses that an ascent can be asked to reach.
TARGETS = ("base", "unseen")


@dataclass(frozen=True)
class Protocol:
    """Ascent on a row's mean loss by one optimizer at one rate until a target.

    Parameters
    ----------
    optimizer
        `adam` or `sgd`, or an `unlearn.difficulty.optimizers.Optimizer`.
    lr
        Learning rate; None: by the stride.
    stride
        Length of an ascent's first move over the adapter's: the same on models of any size, where
        the length of a move at one rate grows with the number of parameters. None: the optimizer's
        own, where no rate is given (`unlearn.difficulty.units.Units.paced`).
    target
        `base`: the base model's loss on the row; `unseen`: the loss that a local retraining expects
        of a model that never saw the row but saw the others (`unlearn.retraining.local`). A group's
        target is the mean of its rows'.
    steps
        The most steps that are taken.
    recipe
        How the run's adapter was trained, for the target `unseen`; None: as recorded, else
        estimated.

    Raises `InputError` for anything else.
    """

    optimizer: str | Optimizer = "adam"
    lr: float | None = None
    target: str = "base"
    steps: int = 200
    recipe: Recipe | None = None
    stride: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.optimizer, Optimizer) and self.optimizer not in OPTIMIZERS:
            raise InputError(
                f"optimizer {self.optimizer!r} was given; expected {' or '.join(OPTIMIZERS)}, or "
                "an Optimizer of your own, as in Momentum()"
            )
        for name, value in (("lr", self.lr), ("stride", self.stride)):
            if value is not None and not 0 < value < float("inf"):
                raise InputError(f"{name} {value!r} was given; expected a number above 0")
        if self.lr is not None and self.stride is not None:
            raise InputError("lr and stride were given together: a rate has one of them; give one")
        if self.target not in TARGETS:
            raise InputError(f"target {self.target!r} was given; expected {' or '.join(TARGETS)}")
        if type(self.steps) is not int or self.steps < 1:
            raise InputError(
                f"steps {self.steps!r} was given; expected a whole number of at least 1"
            )

    @property
    def rule(self) -> Optimizer:
        """The optimizer itself, also where it was given by name."""
        if isinstance(self.optimizer, Optimizer):
            return self.optimizer
        return OPTIMIZERS[self.optimizer]

    @property
    def rate(self) -> float:
        """The learning rate.

        Raises `ValueError` where it follows from a stride that no adapter was given for.
        """
        if self.lr is None:
            raise ValueError("the protocol's rate follows from its stride and an adapter")
        return self.lr

    def record(self) -> dict[str, Any]:
        """The protocol as a file keeps it; the recipe where one was given and targets follow it."""
        record: dict[str, Any] = {
            "optimizer": str(self.rule),
            "lr": self.rate,
            "target": self.target,
            "steps": self.steps,
        }
        if self.recipe is not None and self.target == "unseen":
            record["recipe"] = {**self.recipe.as_json(), "betas": list(self.recipe.betas)}
        return record
