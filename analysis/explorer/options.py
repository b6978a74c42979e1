"""The options of `analysis report`, without the libraries that it needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from influence.errors import InputError
from influence.options import DeviceOption, OutputOptions, option

#: Rows of either end of each query whose scores a page splits over tokens and modules.
DETAIL = 20


@dataclass(frozen=True, kw_only=True)
class ExploredOptions:
    """What a page on a run shows beside what the run's directory holds."""

    scores: Path | None = option(
        "Which scores of the run to show. Default: scores.h5 in RUN, or else strongest.h5 there.",
        default=None,
    )
    queries: str | None = option(
        "The file of the run's scored queries, where it has been moved.", default=None
    )
    cleaning: Path | None = option(
        "Directory that analysis clean made of the run, to tick its rows.", default=None
    )
    difficulty: Path | None = option(
        "Table that unlearn difficulty made of the run (.csv).", default=None
    )
    evaluations: tuple[Path, ...] = option(
        "Records that analysis evaluate made of the run's adapters (one or more).",
        default=(),
        flag="--evaluation",
        typed=list[Path] | None,
        read=tuple,
        several=True,
    )
    lds: tuple[Path, ...] = option(
        "What analysis lds --json printed of the run (one or more files).",
        default=(),
        typed=list[Path] | None,
        read=tuple,
        several=True,
    )


@dataclass(frozen=True, kw_only=True)
class Report(ExploredOptions, DeviceOption, OutputOptions):
    """The options of `analysis report`."""

    LISTED_AFTER: ClassVar[Mapping[str, str]] = {
        "scores": "retrained",
        "queries": "scores",
        "cleaning": "queries",
        "difficulty": "cleaning",
        "evaluations": "difficulty",
        "lds": "evaluations",
        "detail": "lds",
        "retrained": "out",
        "holdout": "retrained",
    }

    edit: Path | None = option(
        "Adapter folder made by unlearn remove, relabel, correct or train.", default=None
    )
    run: Path | None = option(
        "In place of --edit: the run to explore, with its queries, rows and edits.",
        default=None,
        also=["--run-dir"],
    )
    out: Path = option("Page to write (.html).")
    retrained: Path | None = option(
        "With --edit: adapter made by unlearn retrain --edit: how near is the edit to it? Loads the "
        "model.",
        default=None,
    )
    holdout: Path | None = option("With --retrained: rows that neither adapter saw.", default=None)
    detail: int = option(
        "With --run: rows of either end of each query whose tokens and layers are kept, where the "
        "scores are split over them.",
        default=DETAIL,
    )

    def __post_init__(self) -> None:
        if (self.edit is None) == (self.run is None):
            raise InputError(
                "give either --edit ADAPTER (a page on one edit) or --run RUN (a page to explore a "
                "run)"
            )
        if self.holdout is not None and self.retrained is None:
            raise InputError("--holdout goes with --retrained DIR: leave it out")
        if self.run is not None and self.retrained is not None:
            raise InputError("--retrained goes with --edit: leave it out")
        with_run = {
            "--scores": self.scores,
            "--queries": self.queries,
            "--cleaning": self.cleaning,
            "--difficulty": self.difficulty,
            "--evaluation": self.evaluations,
            "--lds": self.lds,
        }
        given = [name for name, value in with_run.items() if value]
        if self.edit is not None and given:
            raise InputError(f"{', '.join(given)} goes with --run: leave it out")
        if self.detail < 0:
            raise InputError(f"--detail {self.detail} was given; expected 0 or more")
