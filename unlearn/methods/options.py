"""The options of a training by gradient steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from influence.errors import InputError
from influence.options import option
from unlearn.options import EvidenceOption, RecipeOption, StartOption

if TYPE_CHECKING:  # a command's help does not wait for torch
    import torch


def learning_rate(text: str) -> float | str:
    """A rate as it is typed: a number, or `auto`. Raises `InputError` for anything else."""
    if text == "auto":
        return text
    try:
        return float(text)
    except ValueError:
        raise InputError(f"--lr {text!r} was given; expected a number above 0, or auto") from None


@dataclass(frozen=True, kw_only=True)
class Options(StartOption, RecipeOption, EvidenceOption):
    """How a method is run.

    The help beside each field says what it is. Where a field is None the method's own value holds;
    with `max_damage` None any result may be saved. `optimizer` may also be a callable that takes
    the parameters and `lr`.

    Raises `InputError` for a value that no training can be run with.
    """

    LISTED_AFTER: ClassVar[Mapping[str, str]] = {"start": "max_damage", "recipe": "until"}

    until: str | None = option(
        "base (the rows' loss reaches the base model's; the usual default), expected, loss=X, "
        "or steps=N.",
        default=None,
    )
    lr: float | str | None = option(
        "Learning rate, or auto (GeN). Default: by --stride.",
        default=None,
        typed=str | None,
        read=learning_rate,
    )
    stride: float | None = option(
        "Length of the first step over the adapter's. Default: the method's own.", default=None
    )
    steps: int | None = option("The most steps. Default: the method's own.", default=None)
    batch_size: int = option("Rows to unlearn in a step.", default=32)
    retain_batch_size: int | None = option(
        "Retained rows in a step. Default: as many.", default=None
    )
    optimizer: str | Callable[..., torch.optim.Optimizer] | None = option(
        "A class of torch.optim. Default: the method's own.", default=None, typed=str | None
    )
    schedule: str = option("constant, linear or cosine.", default="constant")
    warmup: int = option("Steps of a linear rise.", default=0)
    max_grad_norm: float | None = option("Clips the combined gradient.", default=None)
    stop_damage: float | None = option(
        "Also stop when the retained rows' loss has risen by this share.", default=None
    )
    control: float | None = option(
        "Mix with the adapter before until this share of the retained rows' likelihood is left.",
        default=None,
    )
    max_damage: float | None = option(
        "Allowed relative rise of the retained rows' loss; beyond it nothing is written.",
        default=None,
    )
    token_budget: int | None = option(
        "Tokens that run at a time, padding included. Default: the fit's.", default=None
    )
    save_every: int = option("Steps between two saves of the unfinished training.", default=25)
    seed: int = option("Draws batches, random labels and refusals.", default=0)

    def __post_init__(self) -> None:
        from unlearn.retraining.recipe import Recipe
        from unlearn.stopping import TrainingRule

        super().__post_init__()
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
                f"lr {self.lr} and stride {self.stride} were given, and one follows from the "
                "other: give one"
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
            TrainingRule.parse(self.until)


def optimizer_class(name: str) -> Callable[..., torch.optim.Optimizer]:
    """The class of `torch.optim` that is called so.

    Raises `InputError` where there is none, or none that takes plain steps.
    """
    from torch import optim

    optimizer = getattr(optim, name, None)
    if (
        not isinstance(optimizer, type)
        or not issubclass(optimizer, optim.Optimizer)
        or name in ("Optimizer", "LBFGS", "SparseAdam")
    ):
        raise InputError(
            f"optimizer {name!r} was given; expected a class of torch.optim, as in Adam, AdamW "
            "or SGD"
        )
    return optimizer
