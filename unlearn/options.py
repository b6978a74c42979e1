"""Command-line options that several `unlearn` commands share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from influence.errors import InputError
from influence.options import ColumnsOption, option

if TYPE_CHECKING:
    from influence.recipe import Recipe


#: Rows whose prompts are continued to look what is said. A choice.
GENERATED = 20


@dataclass(frozen=True, kw_only=True)
class StartOption:
    """The adapter that a change begins with.

    torchrun takes `--start`, before a `--` on its line, for an abbreviation of its own
    `--start-method`, but not `--start-from`.
    """

    start: str | Path | None = option(
        "Adapter to begin with: an earlier edit's directory, or original. "
        "Default: the last edit's.",
        default=None,
        also=["--start-from"],
        typed=str | None,
    )


@dataclass(frozen=True, kw_only=True)
class RecipeOption:
    """How the adapter was trained: a local retraining follows it (`unlearn.retraining.local`)."""

    recipe: str | Path | Recipe | None = option(
        "JSON: how the adapter was trained (lr, epochs, batch_size ...), for what a model that "
        "never saw the rows would say. Default: as recorded, else estimated.",
        default=None,
        typed=Path | None,
    )


@dataclass(frozen=True, kw_only=True)
class EvidenceOption:
    """What is measured of an edit or training that it does not aim at (`unlearn.evidence`).

    Raises `InputError` for a number below 0.
    """

    generate: int = option(
        "Changed rows and probe rows, of each at most so many, whose prompts are continued to "
        "compare what is said; 0: none, which is faster.",
        default=GENERATED,
    )

    def __post_init__(self) -> None:
        if self.generate < 0:
            raise InputError(f"generate {self.generate} was given; expected 0 (none) or more")


@dataclass(frozen=True, kw_only=True)
class HoldoutOption(ColumnsOption):
    """Held-out and probe rows of an edit or training, and what their columns mean."""

    holdout: Path | None = option(
        "Rows the adapter never saw: measured before and after.", default=None
    )
    probes: Path | None = option(
        "Paraphrases of changed rows, or questions about them: is what they taught still known?",
        default=None,
    )


@dataclass(frozen=True, kw_only=True)
class ForceOption:
    """Whether a result is saved in spite of its damage."""

    LISTED_AFTER: ClassVar[Mapping[str, str]] = {"force": "seed"}

    force: bool = option("Write the adapter whatever the damage.", default=False)
