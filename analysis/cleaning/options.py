"""The options of `analysis clean`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar

from analysis.options import RecipeOption, ResamplesOption
from influence.console import at_least
from influence.errors import InputError
from influence.options import (
    BudgetOptions,
    ColumnsOption,
    DeviceOption,
    OutputOptions,
    TrustOption,
    option,
)


@dataclass(frozen=True, kw_only=True)
class Clean(
    ColumnsOption,
    RecipeOption,
    ResamplesOption,
    BudgetOptions,
    DeviceOption,
    TrustOption,
    OutputOptions,
):
    """Makes a list (`run`, `out`), or applies one that was decided (`apply`).

    Raises `InputError` for a call that does both or neither, for options that go with the other one,
    and for numbers out of range.
    """

    LISTED_AFTER: ClassVar[Mapping[str, str]] = {
        "columns": "queries",
        "recipe": "take_suggested",
        "resamples": "seeds",
    }

    run: Path | None = option(
        "Look for rows to fix: the run whose rows are looked at.", default=None, also=["--run-dir"]
    )
    queries: Path | None = option(
        "With --run: good rows, whose answers are right. Without them no row is said to harm.",
        default=None,
    )
    out: Path | None = option(
        "With --run: folder to write the list into (rows.csv and others).", default=None
    )
    most: int = option("With --run: list at most so many rows for each reason.", default=20)
    apply: Path | None = option(
        "In place of --run: folder of a list whose rows.csv was filled in. Trains again.",
        default=None,
    )
    holdout: Path | None = option(
        "With --apply: more rows with right answers to measure the gain on.", default=None
    )
    take_suggested: bool = option(
        "With --apply: do what is suggested where nothing was decided.", default=False
    )
    adapter_out: Path | None = option(
        "With --apply: folder of the cleaned adapter. Default: adapter in the list's folder.",
        default=None,
    )
    seeds: int = option(
        "With --apply: do both trainings so many times, each with another seed.", default=1
    )
    seed: int = option("Draws the resamples of the gain's interval.", default=0)

    def __post_init__(self) -> None:
        if (self.run is None) == (self.apply is None):
            raise InputError(
                "give either --run RUN --out DIR (make a list) or --apply DIR (train again without "
                "the rows that were decided)"
            )
        of_list = ("queries", "out", "most")
        of_training = ("recipe", "holdout", "adapter_out", "take_suggested")
        of_training += ("seeds", "seed", "resamples")
        other, mode = (of_training, "--apply") if self.run is not None else (of_list, "--run")
        usual = {each.name: each.default for each in fields(self)}
        given = [name for name in other if getattr(self, name) != usual[name]]
        if given:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise InputError(f"{flags} goes with {mode} only: leave it out")
        if self.run is not None and self.out is None:
            raise InputError("--run needs --out DIR, the folder to write the list into")
        for flag, value in (("--most", self.most), ("--seeds", self.seeds)):
            at_least(flag, value, 1)
        at_least("--resamples", self.resamples, 1)
        at_least("--seed", self.seed, 0)
