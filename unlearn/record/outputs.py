"""Output directories of adapters, and which are refused, so that nothing is lost that is needed."""

from __future__ import annotations

from pathlib import Path

from influence.errors import InputError
from influence.row_files import place_of
from influence.run import Run
from unlearn.record.chain import entries


def refuse_taken(out: Path, overwrite: bool) -> None:
    """Refuse an output directory that is a file, or that holds something without `overwrite`."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; an adapter is a directory: give another --out")
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise InputError(f"{out} is not empty: give another directory, or --overwrite")


def refuse_out(run: Run, out: Path, overwrite: bool) -> None:
    """Refuse an output directory that is taken, or that something on record needs.

    That is the run, its base, its adapter, its rows, and every edit of it.
    """
    manifest = run.manifest
    rows = place_of(manifest.data.path) if manifest.data.path else None
    sources = (manifest.adapter.path, manifest.base.path, None if rows is None else str(rows))
    for source in (str(run.directory), *sources):
        if source and Path(source).exists():
            refuse_source(out, source)
    lines, place = entries(run.directory), str(out.resolve())
    for line in lines:
        if line["edit"] != place and overlap(out, Path(line["edit"])):
            raise InputError(
                f"{out} holds, or lies in, the edit {line['edit']}, which is on record: give a new "
                "directory"
            )
    refuse_taken(out, overwrite)
    holds_no_adapter = not (out / "adapter_config.json").exists()
    if overwrite and out.is_dir() and any(out.iterdir()) and holds_no_adapter:
        raise InputError(
            f"{out} holds other things than an adapter, and only one may be replaced: give a new "
            "directory"
        )
    made_here = {line["adapter_after"] for line in lines if line["edit"] == place}
    for line in lines:
        if line["adapter_before"] in made_here and line["edit"] != place:
            raise InputError(
                f"{line['edit']} was made from the adapter in {out}, which therefore stays: give a "
                "new directory"
            )


def refuse_source(out: Path, source: str) -> None:
    """Refuse an output directory that overlaps with something that an edit is made from."""
    if overlap(out, Path(source)):
        raise InputError(
            f"{out} is, or holds, or lies in {source}, which the edit is made from: give a new "
            "directory"
        )


def overlap(first: Path, second: Path) -> bool:
    """Whether one of two paths is, or lies in, the other."""
    first, second = first.resolve(), second.resolve()
    return first == second or first in second.parents or second in first.parents
