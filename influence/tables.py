"""Tables that people take away, as CSV or Parquet.

The suffix says which. A table is never half written, and replaces another file only when asked to.
"""

from __future__ import annotations

import csv
import os
from pathlib import Path

import pandas as pd

from influence.errors import InputError

SUFFIXES = (".csv", ".parquet")


def checked_table(path: str | Path, overwrite: bool) -> Path:
    """The path of a table to be written.

    Errors: InputError for another suffix, a missing folder, or a file that is there already.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(
            f"{path} was given for a table; expected a name that ends in {' or '.join(SUFFIXES)}"
        )
    if not path.parent.is_dir():
        raise InputError(
            f"{path} cannot be written: there is no folder {path.parent}; make it, or name another"
        )
    if path.is_dir():
        raise InputError(f"{path} is a folder; name a file")
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists: name another file, or give --overwrite to replace it")
    return path


def write_table(table: pd.DataFrame, path: str | Path, *, overwrite: bool = False) -> Path:
    """Write a table, moved into place when it is whole.

    In CSV texts are quoted where they must be, so that no id can end its line.
    """
    path = checked_table(path, overwrite)
    partial = path.with_name(path.name + ".partial")
    if path.suffix.lower() == ".csv":
        returns = any(
            "\r" in str(value) for value in table.select_dtypes(exclude="number").to_numpy().ravel()
        )
        table.to_csv(
            partial, index=False, quoting=csv.QUOTE_NONNUMERIC if returns else csv.QUOTE_MINIMAL
        )
    else:
        table.to_parquet(partial, index=False)
    os.replace(partial, path)
    return path
