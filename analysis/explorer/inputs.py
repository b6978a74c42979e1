"""Tables and records beside a run that the page shows, read from files that others made."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from analysis.spreadsheets import read_table, unescaped
from influence.errors import InputError, StoreError
from influence.store import read_json

#: The table in the folder of a cleaning list, and the columns that it must have.
CLEANING, CLEANING_COLUMNS = "rows.csv", ("id", "reason", "score", "evidence")
#: Columns of the list that are not shown: the order in the file says the one, the rows the other.
NOT_SHOWN = ("rank", "text")
#: The columns of a table of difficulty that are read as numbers.
DIFFICULTY_NUMBERS = (
    *("steps", "steps_low", "steps_high", "damage", "damage_low", "damage_high"),
    *("measured_steps", "measured_damage", "loss", "base_loss", "tokens", "self_influence"),
)


@dataclass(frozen=True)
class CleaningRow:
    """A row of a cleaning list: why it should be looked at, how much speaks for it, and what.

    `gain` is the predicted fall of the loss of others if it goes, nats per token; `others` has the
    other columns in which something stands.
    """

    id: str
    reason: str
    score: float | None
    evidence: str
    gain: float | None = None
    others: Mapping[str, str] = field(default_factory=dict)


def read_cleaning(folder: Path) -> list[CleaningRow]:
    """The list that `analysis clean --out` made, in its order, as it was or as it was filled in."""
    path = folder if folder.suffix == ".csv" else folder / CLEANING
    table = read_table(path, CLEANING_COLUMNS, "analysis clean --out")
    others = [name for name in table.columns if name not in (*CLEANING_COLUMNS, *NOT_SHOWN, "gain")]
    return [
        CleaningRow(
            unescaped(row["id"]),
            unescaped(row["reason"]),
            number(row["score"]),
            unescaped(row["evidence"]),
            number(row.get("gain", "")),
            {name: unescaped(row[name]) for name in others if row[name]},
        )
        for row in table.rows
    ]


def read_difficulty(path: Path) -> dict[str, dict[str, Any]]:
    """The table that `unlearn difficulty --out` made, by id: numbers as such, infinity too."""
    if path.suffix == ".parquet":
        raise InputError(
            f"{path} is a Parquet table; expected a .csv: give one to unlearn difficulty --out"
        )
    table = read_table(path, ("id", "steps", "damage"), "unlearn difficulty --out")
    known = [name for name in DIFFICULTY_NUMBERS if name in table.columns]
    found = {}
    for row in table.rows:
        values: dict[str, Any] = {name: number(row[name], infinite=True) for name in known}
        values |= {name: row.get(name, "") for name in ("recommended", "reason", "how")}
        found[row["id"]] = values
    return found


def read_record(path: Path, needed: Sequence[str], maker: str) -> dict[str, Any]:
    """A JSON object with the keys that it must have, made by the command `maker`."""
    if not path.is_file():
        raise InputError(f"{path} does not exist: make it with {maker}")
    try:
        record = read_json(path)
    except (StoreError, RecursionError) as error:
        raise InputError(f"{path} is no JSON object ({error}): make it with {maker}") from error
    if missing := [key for key in needed if key not in record]:
        raise InputError(
            f"{path} lacks {', '.join(missing)}; expected the record that {maker} writes"
        )
    return record


def number(text: str, *, infinite: bool = False) -> float | None:
    """The number that a cell holds; None where it holds none, or infinity unless `infinite`."""
    try:
        value = float(text)
    except ValueError:
        return None
    if math.isnan(value) or (math.isinf(value) and not infinite):
        return None
    return value


def in_text(value: Any) -> str:
    """A value of a record as text for a table."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
