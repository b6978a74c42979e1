"""The directory of a run: whose it is, which files in it are a run's, and what only a fit needs.

A directory belongs to one run, told by its identity: a fit goes on with its own unfinished run,
returns its own finished one, and replaces another only where it is told to. Nothing else that lies
there is ever touched.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from influence.at_point import run_file
from influence.curvature import Specification
from influence.curvature.base import ALWAYS
from influence.errors import InputError, MismatchError
from influence.fitted_point import CHECKPOINT
from influence.kept import RECIPE, ROWS, forget_adapter
from influence.manifest import (
    AUDIT,
    Manifest,
    begun_manifest,
    differences,
    recorded_identity,
    write_manifest,
)
from influence.progress import say

#: The files of a run, but for those of its points from the second on.
FILES = (
    *("manifest.json", "factors.h5", "gradients.h5", "features.h5", "rows.h5", "kernel.h5"),
    *("inverse.h5", "scores.h5", "strongest.h5"),
    *(CHECKPOINT,),
    *(ROWS, RECIPE),
)


def finished_before(directory: Path, manifest: Manifest) -> bool:
    """Whether the directory holds this very run, complete."""
    if not (directory / "manifest.json").is_file():
        return False
    if differences(recorded_identity(directory), manifest.identity, whole=True):
        return False
    return begun_manifest(directory).complete


def claim(
    directory: Path, manifest: Manifest, curvature: Specification, overwrite: bool
) -> Manifest | None:
    """Make the directory this fit's own: return the manifest of a finished identical fit, or
    None to go on.
    """
    path = directory / "manifest.json"
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory} is a file; give a directory for the run")
    if overwrite and (directory / AUDIT).exists():
        raise InputError(
            f"{directory} holds the record of edits ({AUDIT}), which is evidence and never "
            "replaced: give another --run directory"
        )
    if path.exists():
        different = differences(recorded_identity(directory), manifest.identity, whole=True)
        if not different and not overwrite:
            existing = begun_manifest(directory)
            if not existing.complete:
                return None
            tidy(directory, existing, curvature)
            return _follow_latest_call(directory, existing, manifest)
        if different and not overwrite:
            raise MismatchError(
                f"{directory} holds a run made from something else: {'; '.join(different)}. Give "
                "another --run directory, or --overwrite to replace it"
            )
    elif directory.exists() and any(directory.iterdir()):
        foreign = [path.name for path in _own_files(directory)]
        held = f", but {', '.join(foreign)}" if foreign else ""
        if foreign or not overwrite:
            raise InputError(
                f"{directory} is not empty and holds no run (no manifest.json{held}): give a new "
                "directory"
            )
    directory.mkdir(parents=True, exist_ok=True)
    if path.exists():
        # a run of ours was here: away with the factors that analysis tune fitted below it
        for below in (directory / "tune").glob("*/manifest.json"):
            shutil.rmtree(below.parent)
        forget_adapter(directory)
    for old in _own_files(directory):
        old.unlink()
    write_manifest(directory, manifest)
    return None


def _follow_latest_call(directory: Path, existing: Manifest, asked: Manifest) -> Manifest:
    """A finished run's manifest with what is no part of its factors: damping, and where the same
    things lie now.
    """
    data = existing.data
    if asked.data.path is not None:
        data = replace(data, path=asked.data.path, columns=asked.data.columns)
    current = replace(
        existing,
        damping=asked.damping,
        # how far training went is told by the damped curvature
        path=existing.path if asked.damping == existing.damping else None,
        base=replace(existing.base, path=asked.base.path or existing.base.path),
        adapter=replace(existing.adapter, path=asked.adapter.path or existing.adapter.path),
        data=data,
    )
    if current.damping != existing.damping:
        chosen = (
            "; later ones use what analysis tune chose (analysis tune --forget drops it)"
            if existing.tuned
            else ""
        )
        say(
            f"note: the damping of {directory} was {existing.damping} and is now "
            f"{current.damping}; "
            f"scores made before keep theirs{chosen}"
        )
    if current != existing:
        write_manifest(directory, current)
    return current


def _own_files(directory: Path) -> list[Path]:
    """The files of a run that lie in a directory, whatever its number of points."""
    numbered = [
        path
        for name in ("factors", "gradients", "features", "rows", "kernel", "inverse")
        for path in directory.glob(f"{name}-*.h5")
    ]
    return [path for name in FILES if (path := directory / name).exists()] + numbered


def tidy(directory: Path, manifest: Manifest, curvature: Specification) -> None:
    """Remove what only an unfinished fit needs (also where it was killed before it could)."""
    (directory / CHECKPOINT).unlink(missing_ok=True)
    kept = {
        "rows": curvature.reads_rows == ALWAYS or (manifest.growable and manifest.gradients_stored),
        "gradients": manifest.gradients_stored,
        "features": manifest.features_stored,
    }
    for name in (name for name, wanted in kept.items() if not wanted):
        for number in range(len(manifest.points)):
            run_file(directory, name, number).unlink(missing_ok=True)
