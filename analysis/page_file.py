"""The HTML file that a page is written to: which names are refused, and writing it whole or not."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from influence.errors import InputError, StoreError


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
    """Write a page, its folder too where it is missing; what was there stays until the page is whole.

    Raises `StoreError` where the file cannot be written.
    """
    partial = out.with_name(out.name + ".partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(html.encode("utf-8"))
        os.replace(partial, out)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise StoreError(f"{out} could not be written: {error}") from error
