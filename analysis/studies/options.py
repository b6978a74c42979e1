"""The options of the studies' commands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from analysis.options import RecipeOption, ResamplesOption
from influence.console import at_least
from influence.errors import InputError
from influence.options import (
    BudgetOptions,
    ColumnsOption,
    CountOption,
    DeviceOption,
    OutputOptions,
    RunOption,
    TrustOption,
    option,
)


@dataclass(frozen=True, kw_only=True)
class Memorization(
    RunOption,
    CountOption,
    ColumnsOption,
    ResamplesOption,
    BudgetOptions,
    DeviceOption,
    TrustOption,
    OutputOptions,
):
    """The options of `analysis memorization`."""

    LISTED_AFTER: ClassVar[Mapping[str, str]] = {
        "columns": "holdout",
        "k": "out",
        "resamples": "k",
    }

    truth: Path | None = option(
        "npz of retrained adapters' losses (unlearn retrain --subsets): what is measured.",
        default=None,
    )
    dampings: tuple[str, ...] | None = option(
        "Self-influence with this damping too. May be repeated. "
        "Default: mean:0.01, mean:0.1, mean:1.",
        default=None,
        flag="--damping",
        typed=list[str] | None,
        read=tuple,
    )
    canaries: Path | None = option(
        'JSON lines {"id", "candidates"}: what else a training row\'s completion could have been.',
        default=None,
    )
    holdout: Path | None = option(
        "Rows like the training rows that the adapter never saw.",
        default=None,
        also=["--heldout"],
    )
    out: Path | None = option(
        "Table to write (.csv or .parquet), one line per training row.", default=None
    )
    seed: int = option("Of the intervals, and of the halves of the reliability.", default=0)

    def __post_init__(self) -> None:
        at_least("-k", self.k, 1)
        if self.seed < 0 or self.resamples < 1:
            raise InputError(
                f"--seed {self.seed} and --resamples {self.resamples} were given; "
                "expected at least 0 and 1"
            )


@dataclass(frozen=True, kw_only=True)
class Ood(
    RunOption, ColumnsOption, RecipeOption, BudgetOptions, DeviceOption, TrustOption, OutputOptions
):
    """The options of `analysis ood`."""

    LISTED_AFTER: ClassVar[Mapping[str, str]] = {"columns": "other", "recipe": "out"}

    holdout: Path = option(
        "Rows of the training rows' domain that no model saw: .jsonl, .parquet ...",
        also=["--heldout"],
    )
    other: Path = option("Rows of another domain.")
    out: Path = option("Folder for adapters, measurements, ood.csv, ood.json, ood.png.")
    per_kind: int = option("Rows to plant of each of the four kinds.", default=8)
    repeats: int = option("How often each planted row is among the rows.", default=1)
    references: int = option("Adapters to train without the planted rows, for exposure.", default=2)
    optimizer: str = option("Of the ascent: adam or sgd.", default="adam")
    seed: int = option("Of the planting, the sample of rows and the intervals.", default=0)

    def __post_init__(self) -> None:
        at_least("--seed", self.seed, 0)
