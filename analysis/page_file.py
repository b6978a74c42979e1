"""The HTML file that a page is written to: which names are refused, and writing it whole or not."""

from __future__ import annotations

import os
from pathlib import Path

from influence.errors import InputError, StoreError
from influence.store import write_text


def checked_page(out: str | os.PathLike[str], overwrite: bool) -> Path:
    """The file to write, or `InputError` where it has another ending or is there."""
    out = Path(out)
    if out.suffix.lower() not in (".html", ".htm") or out.is_dir():
        raise InputError(
            f"a page was asked for as {out}; expected a file name that ends in .html: rename it"
        )
    if out.exists() and not overwrite:
        raise InputError(f"{out} exists and would be replaced: give another --out, or --overwrite")
    return out


def write_page(out: Path, html: str) -> None:
    """Write a page as `influence.store.write_text` does, with a `StoreError` where that fails."""
    try:
        write_text(out, html)
    except OSError as error:
        raise StoreError(f"{out} could not be written: {error}") from error
