"""The options of `analysis evaluate` and `analysis removal`, without the libraries they need."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from analysis.options import RecipeOption, ResamplesOption
from influence.console import at_least
from influence.errors import InputError
from influence.options import (
    AdapterOptions,
    BudgetOption,
    BudgetOptions,
    ColumnsOption,
    DeviceOption,
    LengthOption,
    MemoryOption,
    OutputOptions,
    RunOption,
    TrustOption,
    TypedLoadingOptions,
    option,
)

#: Attempts to bring forgotten rows back, see `analysis.metrics.probes`.
PROBES = ("relearn", "quantise")


@dataclass(frozen=True, kw_only=True)
class Options(LengthOption, BudgetOption):
    """How to evaluate.

    The help beside each field says what it is. Raises `InputError` for a number out of range, and
    for a probe that there is none of.
    """

    generate: int = option(
        "Continue at most so many prompts of each set, for ROUGE; 0: none.", default=32
    )
    #: Tokens after which a continuation ends; not on the command line.
    max_new_tokens: int = 128
    probes: tuple[str, ...] = option(
        "relearn (train on a few forget rows, watch the others) or quantise. May be repeated.",
        default=(),
        flag="--probe",
        typed=list[str] | None,
        read=tuple,
    )
    texts: bool = option(
        "Write the rows' texts and what was generated into the record too.", default=False
    )
    seed: int = option("Of the bootstrap, and of the rows learned again.", default=0)

    def __post_init__(self) -> None:
        for name, value, least in (
            ("generate", self.generate, 0),
            ("max_new_tokens", self.max_new_tokens, 1),
            ("max_length", self.max_length, 2),
            ("token_budget", self.token_budget, 1),
            ("seed", self.seed, 0),
        ):
            if value is not None and value < least:
                raise InputError(f"{name} {value} was given; expected at least {least}")
        for probe in self.probes:
            if probe not in PROBES:
                raise InputError(f"probe {probe!r} was given; expected {' or '.join(PROBES)}")


@dataclass(frozen=True, kw_only=True)
class Evaluate(
    AdapterOptions, ColumnsOption, Options, MemoryOption, TypedLoadingOptions, OutputOptions
):
    """The options of `analysis evaluate`."""

    LISTED_AFTER: ClassVar[Mapping[str, str]] = {
        "columns": "holdout",
        "model": "reference",
        "out": "model",
        "seed": "dtype",
    }

    forget: Path = option("Rows that should be forgotten: .jsonl, .parquet or a datasets folder.")
    retain: Path | None = option("Rows that should still be known.", default=None)
    holdout: Path | None = option("Rows of the same kind that the adapter never saw.", default=None)
    reference: str | None = option(
        "Adapter of the same rank and layers to compare with: best one trained without the forget "
        "rows.",
        default=None,
    )
    out: Path | None = option("Record to write (.json), with every row.", default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        out = self.out
        if out is not None and out.exists() and not self.overwrite:
            raise InputError(
                f"{out} exists and would be replaced: give another --out, or --overwrite"
            )
        if out is not None and not out.parent.is_dir():
            raise InputError(
                f"there is no folder {out.parent} to write {out.name} into: make it, "
                "or give another --out"
            )
        if self.texts and out is None and not self.json:
            raise InputError("--texts goes into the record: give --out FILE.json, or --json")


def shares(texts: Iterable[str | float]) -> tuple[float, ...]:
    """Shares as they are typed: numbers separated by commas, else `InputError`."""
    parts = [part for text in texts for part in str(text).split(",")]
    try:
        return tuple(float(part) for part in parts)
    except ValueError:
        raise InputError(
            f"--share {','.join(parts)!r} was given; expected numbers separated by commas, as in "
            "0.01,0.05"
        ) from None


@dataclass(frozen=True, kw_only=True)
class RemovalOptions(ResamplesOption):
    """Which rows are left out, and how often a training is repeated.

    The help beside each field says what it is. Raises `InputError` for a number out of range.
    """

    share: tuple[float, ...] = option(
        "Shares of the training rows to leave out, at least one row each.",
        default=(0.01, 0.05),
        typed=list[str],
        read=shares,
    )
    scores: tuple[Path, ...] = option(
        "Also the rows that these files name (one or more): HDF5 of influence score, or .npy and "
        ".npz arrays [query, train] of other tools, positive where a row helped.",
        default=(),
        typed=list[Path] | None,
        read=tuple,
        several=True,
    )
    draws: int = option("Random sets of rows to leave out, for every share.", default=5)
    seeds: int = option(
        "Train every set under so many seeds: the recipe's, the next ...", default=1
    )
    seed: int = option("Draws the random rows, and the bootstrap.", default=0)

    def __post_init__(self) -> None:
        if not self.share or not all(0 < share < 1 for share in self.share):
            given = ",".join(f"{share:g}" for share in self.share) or "nothing"
            raise InputError(f"--share {given} was given; expected numbers between 0 and 1")
        if len(set(self.share)) < len(self.share):
            raise InputError("--share names a number twice: name each once")
        for flag in ("draws", "seeds", "resamples"):
            at_least(f"--{flag}", getattr(self, flag), 1)
        at_least("--seed", self.seed, 0)


@dataclass(frozen=True, kw_only=True)
class Removal(
    RunOption,
    RecipeOption,
    ColumnsOption,
    RemovalOptions,
    BudgetOptions,
    DeviceOption,
    TrustOption,
    OutputOptions,
):
    """The options of `analysis removal`."""

    LISTED_AFTER: ClassVar[Mapping[str, str]] = {"columns": "queries", "recipe": "columns"}

    queries: Path = option("Rows whose mean loss the methods are judged by, as one set.")
    out: Path = option(
        "Record to write (.json). Beside it the run's scores (.scores.h5) and the losses (.losses.npz)."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_place(self.out)


def refuse_place(out: Path) -> None:
    """Refuse a place where no record of a removal can be written."""
    if out.suffix != ".json":
        raise InputError(f"--out {out} was given; expected a file that ends in .json")
    if not out.parent.is_dir():
        raise InputError(
            f"there is no folder {out.parent} to write {out.name} into: make it, or give another "
            "--out"
        )
