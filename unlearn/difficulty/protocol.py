"""What difficulty means: ascent by one optimizer at one rate until a target."""

from __future__ import annotations

from dataclasses import dataclass

from influence.errors import InputError

#: Default rates, those of the protocol that published figures of this project use.
RATES = {"adam": 1e-4, "sgd": 5e-3}


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
            raise InputError(
                f"optimizer {self.optimizer!r} was given; expected {' or '.join(RATES)}"
            )
        if self.lr is not None and not 0 < self.lr < float("inf"):
            raise InputError(f"lr {self.lr!r} was given; expected a number above 0")
        if self.target not in ("base", "unseen"):
            raise InputError(f"target {self.target!r} was given; expected base or unseen")
        if type(self.steps) is not int or self.steps < 1:
            raise InputError(
                f"steps {self.steps!r} was given; expected a whole number of at least 1"
            )

    @property
    def rate(self) -> float:
        """The learning rate."""
        return RATES[self.optimizer] if self.lr is None else self.lr

    def record(self) -> dict[str, str | float | int]:
        """As a file keeps it."""
        return {
            "optimizer": self.optimizer,
            "lr": self.rate,
            "target": self.target,
            "steps": self.steps,
        }
