"""The options of `unlearn difficulty`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from influence.console import at_least
from influence.errors import InputError
from influence.options import (
    BudgetOption,
    ColumnsOption,
    LoadingOptions,
    OutputOptions,
    RowsOptions,
    RunOption,
    option,
)
from unlearn.options import RecipeOption


@dataclass(frozen=True, kw_only=True)
class Difficulty(
    RunOption,
    RowsOptions,
    ColumnsOption,
    BudgetOption,
    LoadingOptions,
    OutputOptions,
    RecipeOption,
):
    """Which rows are forecast or measured, and how.

    Raises `InputError` for options that do not go together, and for numbers out of range.
    """

    LISTED_AFTER: ClassVar[Mapping[str, str]] = {
        "ids_file": "ids",
        "columns": "holdout",
        "recipe": "target",
    }

    out: Path = option("Table to write: .csv or .parquet.")
    ids: str | None = option(
        """Ids of the rows, separated by commas; or a JSON list, as in '["a,b", "c"]'. """
        "Default: all.",
        default=None,
    )
    by_group: bool = option(
        "All rows of a group (their field of that name) are unlearned together; "
        "--ids names any row of it.",
        default=False,
    )
    measure: bool = option("Also unlearn every row alone and add what it took.", default=False)
    calibrate: int | None = option(
        "Unlearn this many rows (drawn by --seed) and correct the forecasts by them.", default=None
    )
    target: str = option(
        "Loss to reach: base (the base model's) or unseen (expected by local retrainings, each for "
        "some ten rows; the work is said before).",
        default="base",
    )
    optimizer: str = option("adam or sgd.", default="adam")
    lr: float | None = option(
        "Learning rate of the ascent, in the place of --stride.", default=None
    )
    stride: float | None = option(
        "Length of the first move over the adapter's: the same on models of any size. Default: "
        "0.0016 (adam), 0.0006 (sgd).",
        default=None,
    )
    steps: int = option("The most steps.", default=200)
    screen: int | None = option(
        "Rows (or groups) that are looked at closely where more are asked for; the others are "
        "forecast by them, with wider intervals. 0: all closely. Default: 400.",
        default=None,
    )
    memory: float | None = option(
        "GB that copies of the adapter may take: how many rows run at a time, one at least. "
        "Default: half of what is free.",
        default=None,
    )
    looks: int = option("Gradients a row; 1 is a line scan.", default=5)
    max_damage: float = option(
        "Share of the retained loss that ascent may cost where it is recommended.", default=0.01
    )
    holdout: Path | None = option("Rows the adapter never saw; measured too.", default=None)
    seed: int = option(
        "Draws the retained sample, and the rows of --calibrate and --screen.", default=0
    )

    def __post_init__(self) -> None:
        measuring = self.measure or self.calibrate is not None
        if self.calibrate is not None and self.measure:
            raise InputError(
                "--calibrate and --measure were given together: --measure unlearns all rows and "
                "corrects nothing"
            )
        if self.screen and self.measure:
            raise InputError(
                "--screen and --measure were given together: --measure unlearns all rows; leave "
                "--screen out, or measure some of the rows (--calibrate N)"
            )
        if self.memory is not None and not self.memory > 0:
            raise InputError(f"--memory {self.memory} was given; expected GB above 0, as in 4")
        at_least("--looks", self.looks, 1)
        at_least("--seed", self.seed, 0)
        at_least("--max-damage", self.max_damage, 0)
        if self.holdout is not None and not measuring:
            raise InputError(
                "--holdout was given: it is for --measure or --calibrate; leave it out here"
            )
        if self.recipe is not None and self.target == "base":
            raise InputError("--recipe was given: it is for --target unseen; leave it out here")

    @property
    def close_looks(self) -> int:
        """How many rows are looked at closely where more are asked for; 0: all."""
        from unlearn.difficulty.screening import SCREEN

        if self.measure:
            return 0
        return SCREEN if self.screen is None else self.screen
