"""The options of `unlearn retrain`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from influence.errors import InputError
from influence.options import (
    BudgetOptions,
    ColumnsOption,
    DeviceOption,
    OutputOptions,
    RowsOptions,
    RunOption,
    option,
)

#: Defaults of what goes with --subsets only: the option itself is None where it was not given.
SUBSET_FRACTION, SUBSET_SEED = 0.5, 0


def epochs(text: str) -> tuple[int, ...]:
    """Epochs as they are typed: whole numbers separated by commas, else `InputError`."""
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise InputError(
            f"--keep-epochs {text!r} was given; expected whole numbers, as in 1,3,6,10"
        ) from None


@dataclass(frozen=True, kw_only=True)
class Retrain(RunOption, RowsOptions, ColumnsOption, BudgetOptions, DeviceOption, OutputOptions):
    """Which rows a retraining leaves out, and what else it saves or measures.

    Raises `InputError` for a call that names no set of rows or several, and for options that go
    with the other kind of call, once or on subsets.
    """

    LISTED_AFTER: ClassVar[Mapping[str, str]] = {
        "ids": "out",
        "ids_file": "ids",
        "columns": "queries",
    }

    out: Path = option("Adapter directory to make; with --subsets the npz of losses.")
    all_rows: bool = option("Leave no row out: replay the training.", default=False)
    edit: Path | None = option(
        "Train on the rows as they are after this edit (its directory).", default=None
    )
    keep_epochs: tuple[int, ...] | None = option(
        "Also save the adapter after these epochs: 1,3,6,10.",
        default=None,
        typed=str | None,
        read=epochs,
    )
    stop_after: int | None = option(
        "Stop after this epoch, at the rates of the whole recipe.", default=None
    )
    subsets: int | None = option(
        "Retrain on this many random subsets and measure their losses.", default=None
    )
    fraction: float | None = option(
        f"Share of the rows in a subset. Default: {SUBSET_FRACTION}.", default=None
    )
    subset_seed: int | None = option(
        f"Seed that draws the subsets. Default: {SUBSET_SEED}.", default=None
    )
    queries: Path | None = option(
        "Rows whose losses are measured under every subset's adapter.", default=None
    )
    recipe: Path | None = option("JSON: lr, epochs, batch_size, schedule, seed ...", default=None)

    def __post_init__(self) -> None:
        forms = {
            "--ids": self.ids is not None,
            "--ids-file": self.ids_file is not None,
            "--all-rows": self.all_rows,
            "--edit": self.edit is not None,
            "--subsets": self.subsets is not None,
        }
        if sum(forms.values()) != 1:
            named = " and ".join(name for name, given in forms.items() if given) or "none of them"
            raise InputError(
                "give exactly one of --ids A,B,C, --ids-file FILE (one id per line), --all-rows, "
                f"--edit DIR and --subsets N: {named} was given"
            )
        if self.subsets is not None:
            why = "cannot go with --subsets"
            refused = {"--keep-epochs": self.keep_epochs, "--stop-after": self.stop_after}
        else:
            why = "goes with --subsets N only"
            refused = {
                "--fraction": self.fraction,
                "--subset-seed": self.subset_seed,
                "--queries": self.queries,
                "--columns": self.columns,
            }
        given = [name for name, value in refused.items() if value is not None]
        if given:
            raise InputError(f"{', '.join(given)} {why}: leave it out")
        if self.subsets is not None and self.queries is None:
            raise InputError(
                "--subsets measures the losses of queries: name their file with --queries FILE"
            )
