"""How a method of unlearning is run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from influence.errors import InputError
from unlearn.retraining.recipe import Recipe
from unlearn.stopping import Stop


@dataclass(frozen=True)
class Options:
    """How a method is run; what is None is the method's own.

    Parameters
    ----------
    lr
        Learning rate; `auto`: GeN changes it on the way, by the retained rows' loss (`unlearn.methods.automatic_rate`).
    stride
        In place of a rate: the length of the first step's move over the adapter's length, from which the rate follows.
    optimizer
        Name of a class of `torch.optim`, or a callable that takes the parameters and `lr`.
    schedule, warmup
        As in `unlearn.Recipe`: `constant`, `linear`, `cosine` over the most steps; steps of a linear rise.
    batch_size, retain_batch_size
        Forget rows and retained rows in a step.
    steps
        The most steps.
    until
        `base` (the forget rows' mean loss reaches the base model's), `expected` (that of a model that never saw them, as influence
        predicts it), `loss=X` (nats per token), or `steps=N`.
    stop_damage
        Also stop when the retained sample's mean loss has risen by this share.
    control
        Mix the result with the adapter before until this share of the retained rows' likelihood is left.
    max_damage
        Rise of the retained rows' mean loss beyond which the result is not saved without `force`. None: any is saved.
    max_grad_norm
        Clips the combined gradient.
    seed
        Draws batches, random labels, refusals and the measured sample.
    start
        As in `unlearn.edits.options.Options`.
    save_every
        Steps between two saves of a training that can be resumed.
    token_budget
        Tokens that run at a time, padding included; None: the fit's.
    """

    lr: float | str | None = None
    stride: float | None = None
    optimizer: str | Callable[..., torch.optim.Optimizer] | None = None
    schedule: str = "constant"
    warmup: int = 0
    batch_size: int = 32
    retain_batch_size: int | None = None
    steps: int | None = None
    until: str | None = None
    stop_damage: float | None = None
    control: float | None = None
    max_damage: float | None = None
    max_grad_norm: float | None = None
    seed: int = 0
    start: str | Path | None = None
    save_every: int = 25
    token_budget: int | None = None

    def __post_init__(self) -> None:
        if self.lr not in (None, "auto") and not (
            isinstance(self.lr, float | int) and 0 < self.lr < float("inf")
        ):
            raise InputError(f"lr {self.lr!r} was given; expected a number above 0, or auto")
        if self.stride is not None and not 0 < self.stride < float("inf"):
            raise InputError(
                f"stride {self.stride!r} was given; expected a number above 0, as in 0.015"
            )
        if self.stride is not None and self.lr not in (None, "auto"):
            raise InputError(
                f"lr {self.lr} and stride {self.stride} were given, and one follows from the other: give one"
            )
        if isinstance(self.optimizer, str):
            optimizer_class(self.optimizer)
        Recipe(schedule=self.schedule, warmup=self.warmup)
        for name in ("batch_size", "retain_batch_size", "steps", "save_every", "token_budget"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} {value} was given; expected 1 or more")
        if self.max_grad_norm == 0:
            raise InputError(
                "max_grad_norm 0 was given, and nothing would move; expected a number above 0"
            )
        for name in ("stop_damage", "max_damage", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise InputError(f"{name} {value} was given; expected 0 or more, as in 0.1")
        if self.seed < 0:
            raise InputError(f"seed {self.seed} was given; expected 0 or more")
        if self.until is not None:
            Stop.parse(self.until)


def optimizer_class(name: str) -> Callable[..., torch.optim.Optimizer]:
    """The class of `torch.optim` that is called so; `InputError` where there is none that takes plain steps."""
    found = getattr(torch.optim, name, None)
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)) or name in (
        "Optimizer",
        "LBFGS",
        "SparseAdam",
    ):
        raise InputError(
            f"optimizer {name!r} was given; expected a class of torch.optim, as in Adam, AdamW or SGD"
        )
    return found
