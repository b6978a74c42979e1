"""Runs that are grown: rows come to a finished run, go from it, or change, without fitting again.

    influence fit ... --train NEW --run NEWRUN --from OLDRUN

A row stays where its id and its content are the same: then so are its gradient and, at the run's
seed, its sampled labels. Rows that stay are copied; a row that comes is run once at each point; one
that goes is run once where it is part of a sum. A row that changes goes and comes. The adapter, its
points and all options are those of the run before: gradients at another adapter are others.

What adds up, and what does not:

* **Weights.** N_tok (or n) is another, so every row that stays weighs `factor` times what it did,
  the same for all with `token` and `example`: sums are multiplied by it. With `batch:M` the factors
  differ a little from row to row: their mean is taken, their spread is said, and more than
  `MOST_SPREAD` is refused.
* **Stored gradients** are of `l_i` without weight: they stay bit for bit. So does what is made of
  them alone: `identity`, `fisher` (its Gram matrix is formed anew, of stored rows).
* **Second moments** (`kfac`) and traces (`ggn`, `hessian`) are sums over rows: those of the rows that
  come are added, those of the rows that go taken out. The moments are put together from their
  eigenvectors and eigenvalues, which lose no more than the sums' own rounding, relative to a
  moment's largest eigenvalue: 1e-16 in float64, 6e-8 in float32, once for each time a run is grown.
  Taking out multiplies it by at most the ratio of the moment before to the one after, which is
  bounded because no more tokens may come and go than there are afterwards.
* **EK-FAC's eigenvalues** are sums in bases that move with the moments. Where the rows at sampled
  labels are kept (`--growable`) they are formed anew in the new bases, from disk: as from scratch.
  Stored gradients do not serve for it, being at the data's labels. Otherwise the bases stay, and the
  eigenvalues in them are exactly those of the new rows.
* **Features** are whitened by the curvature, so that it stays, as it is for a curvature of drawn rows
  (`--curvature-rows`): the rows before stand for all, and no row that goes is run. At least half of
  the rows must be among those that it, or its bases, were formed of.
* **Adam's metric** that was estimated from gradients stays; one from an optimiser's state is the same.
* **Shared credit**: the rows' similarities are formed anew from what is stored. Losses at a point
  stay where its pass left them; those that none left, of the base as a rule, and the ratio of
  curvature to slope are measured again, on at most `ROWS_OF_ALL` and `RATIO_ROWS` rows of
  `influence.path_time`. Where nothing is stored, all that is left to the scores.

The manifest says what a run was grown from and in what it differs (`grown`). Edits and what
`analysis tune` chose belong to the run before, and are not taken over.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from torch import Tensor

from influence.at_point import StoredTensors
from influence.errors import InputError, MismatchError
from influence.fit_plan import FEATURES, FULL, NONE
from influence.fitted_point import LOSSES
from influence.manifest import GrownRecord, Manifest, Source, differences, digest_of, read_manifest
from influence.prepared import Prepared
from influence.progress import say
from influence.row_files import place_of, read_again
from influence.rows import Examples
from influence.run import Run
from influence.store import open_file

#: Largest difference, relative, between the factors by which rows that stay weigh more or less.
MOST_SPREAD = 0.05
#: Least share of the rows that a curvature, or bases, of the rows before must have been formed of.
LEAST_SHARE = 0.5
#: What differs between the identities of a run and of one that is grown from it.
_OWN = ("data", "grown_from")


@dataclass(frozen=True, eq=False)
class Growth:
    """The rows that stay, come and go between a finished run and the one that is grown from it.

    Attributes
    ----------
    before : Run
        The finished run.
    kept : int array [k]
        Places of the rows that stay, in the new rows.
    places : int array [k]
        Where they are in the run before.
    added : int array
        Places of the rows that come, in the new rows.
    removed : int array
        Places of the rows that go, in the run before.
    changed : int
        Rows that do both: same id, other content.
    factor : float
        New weight of a row that stays, over its old one.
    spread : float
        Largest relative distance of a row's own factor from it.
    """

    before: Run
    kept: np.ndarray
    places: np.ndarray
    added: np.ndarray
    removed: np.ndarray
    changed: int
    factor: float
    spread: float

    @property
    def store(self) -> str:
        """How rows are kept: as they were."""
        if self.before.gradients_stored:
            return FULL
        return FEATURES if self.before.features_stored else NONE

    @cached_property
    def keeps_curvature(self) -> bool:
        """Whether the curvature stays as it is: rows are whitened by it, or it is of drawn rows."""
        run, n = self.before, len(self.before.tokens)
        rows = (n, len(self.kept) + len(self.added))
        drawn = any(len(run.specification.sample(m, run.manifest.seed)) < m for m in rows)
        return drawn or self.store == FEATURES

    @property
    def adds_up(self) -> bool:
        """Whether sums over rows are taken over and added to."""
        return self.before.specification.sums_rows and not self.keeps_curvature

    @cached_property
    def rows_stored(self) -> bool:
        """Whether the gradients at sampled labels of all rows are on disk."""
        return all(point.file("rows").exists() for point in self.before.points)

    def arrays(self, number: int) -> dict[str, Tensor]:
        """What the run before keeps of its curvature at a point."""
        point = self.before.points[number]
        with open_file(point.file("factors"), run_digest=point.digest) as file:
            stored = StoredTensors(file, point.model.device)
            others = ("theta", LOSSES)  # what is not of the curvature
            names = [
                name for name in stored if name not in others and not name.startswith("geometry/")
            ]
            return {name: stored[name] for name in names}

    def record(self) -> GrownRecord:
        """What the manifest says of it."""
        before, specification = self.before.manifest, self.before.specification
        was = before.data.rows if before.grown is None else before.grown.curvature_rows
        stays = self.keeps_curvature
        words = None
        if stays:
            words = "the curvature is that of the rows before, which stand for all"
        elif not specification.undamped:
            words = specification.grown_otherwise(rows=self.rows_stored)
        otherwise = [words] if words else []
        if before.grown is not None:  # what once differed may differ still
            otherwise += [each for each in before.grown.otherwise if each not in otherwise]
        if before.geometry == "adam" and before.optimizer is None:
            otherwise.append("Adam's second moments are those estimated from the rows before")
        if self.adds_up and self.spread > 1e-9:
            otherwise.append(
                f"row weights in sums are right to {100 * self.spread:.2g} % (reduction "
                f"{before.objective.reduction})"
            )
        now = len(self.kept) + len(self.added)
        return GrownRecord(
            run=Source(str(self.before.directory.resolve()), before.digest),
            kept=len(self.kept),
            added=len(self.added),
            removed=len(self.removed),
            changed=self.changed,
            curvature_rows=max(0, was - len(self.removed)) if words else now,
            otherwise=tuple(dict.fromkeys(otherwise)),
        )

    def __str__(self) -> str:
        """What is going to be done, in one line."""
        gone = f", {len(self.removed)} go" if len(self.removed) else ""
        changed = f" ({self.changed} of them changed)" if self.changed else ""
        return (
            f"{len(self.kept):,} rows of {self.before.directory} stay and are not run, "
            f"{len(self.added):,} come{gone}{changed}"
        )


def grow(
    prepared: Prepared, grown_from: str | Path | Run, directory: Path
) -> tuple[Growth, Manifest]:
    """What a prepared fit has in common with a finished run, and its manifest as one grown from it.

    Nothing is written. `MismatchError` where base, adapter, tokenizer or options are others than the
    run's, naming each; `InputError` where growing is not worth it or cannot be right, saying why.
    """
    place = grown_from.directory if isinstance(grown_from, Run) else Path(grown_from)
    if place.resolve() == directory.resolve():
        raise InputError(
            f"{directory} was given as the run to grow and as the one to make: give another --run "
            "directory, the run before is not touched"
        )
    manifest = read_manifest(place)
    _refuse_others(place, manifest, prepared)
    rows = grown_from.train if isinstance(grown_from, Run) else None
    before = Run.open(
        place,
        model=prepared.model,
        train=_rows_before(place, manifest, prepared.train) if rows is None else rows,
        curvature=prepared.curvature,
    )
    growth = _growth(before, prepared)
    record = growth.record()
    _refuse(growth, record, prepared)
    identity = {**prepared.manifest.identity, "grown_from": manifest.digest}
    return growth, replace(
        prepared.manifest,
        identity=identity,
        digest=digest_of(identity),
        precision=manifest.precision,
        grown=record,
    )


def _refuse_others(place: Path, manifest: Manifest, prepared: Prepared) -> None:
    """Refuse a run of another base, adapter, tokenizer, or of other options."""
    there, here = (
        {key: value for key, value in each.items() if key not in _OWN}
        for each in (manifest.identity, prepared.manifest.identity)
    )
    different = differences(there, here, whole=True)
    if manifest.features_stored and manifest.damping != prepared.manifest.damping:
        different.append(
            f"damping, by which its features are whitened, is {manifest.damping} there and "
            f"{prepared.manifest.damping} here"
        )
    if not different:
        return
    advice = "give what it was made from and its options (its manifest.json has them)"
    if there.get("adapter") != here.get("adapter"):
        advice = "at another adapter every row's gradient is another one"
    raise MismatchError(
        f"{place} cannot be grown: {'; '.join(different)}: {advice}, or fit from scratch, without "
        "--from"
    )


def _rows_before(place: Path, manifest: Manifest, train: Examples) -> Examples:
    """The rows of the run before: the first of the new ones, or what its file holds."""
    data = manifest.data
    if (first := train[: data.rows]).digest == data.digest:
        return first  # rows were added at the end, perhaps to the very file
    if data.path is None:
        raise InputError(
            f"{place} was fitted on rows that came from no file: open it with Run.open(..., "
            "train=rows) and give the run itself as grown_from="
        )
    file = place_of(data.path)
    if file is not None and not file.exists():
        raise InputError(
            f"the rows of {place} are not at {data.path} any more, by which it is known which rows "
            "stay and what those that go were: put the file back"
        )
    rows = read_again(data.path, data.columns)
    if rows.digest != data.digest:
        raise MismatchError(
            f"{data.path} has other rows than {place} was fitted on, by which it is known which rows "
            "stay and what those that go were: put the file back as it was, and give the new rows "
            "as another"
        )
    return rows


def _growth(before: Run, prepared: Prepared) -> Growth:
    """Match the rows by id and content."""
    old = {row.id: (place, row.content_hash) for place, row in enumerate(before.train)}
    kept, places, added = [], [], []
    for place, row in enumerate(prepared.train):
        there = old.get(row.id)
        if there is not None and there[1] == row.content_hash:
            kept.append(place)
            places.append(there[0])
        else:
            added.append(place)
    removed = np.setdiff1d(np.arange(len(before.train)), places)
    changed = {before.train[int(place)].id for place in removed}
    changed &= {prepared.train[place].id for place in added}
    ratios = np.ones(1)
    if kept:
        ratios = prepared.weights[kept] / before.weights[places]
    factor = float(ratios.mean())
    return Growth(
        before=before,
        kept=np.array(kept, dtype=int),
        places=np.array(places, dtype=int),
        added=np.array(added, dtype=int),
        removed=removed,
        changed=len(changed),
        factor=factor,
        spread=float(np.abs(ratios / factor - 1).max()),
    )


def _refuse(growth: Growth, record: GrownRecord, prepared: Prepared) -> None:
    """Refuse where nothing differs, and where a fit from scratch is cheaper or alone is right."""
    before, tokens = growth.before, prepared.tokens
    scratch = "fit from scratch, without --from"
    if not len(growth.added) and not len(growth.removed):
        raise InputError(
            f"no row came to {before.directory}, went or changed: use that run as it is"
        )
    moved = int(tokens.lengths[growth.added].sum() + before.tokens.lengths[growth.removed].sum())
    if moved > tokens.lengths.sum():
        raise InputError(
            f"{len(growth.added)} rows come to {before.directory} and {len(growth.removed)} go, which "
            f"is {moved:,} tokens to run where all {len(tokens)} rows are "
            f"{int(tokens.lengths.sum()):,}: {scratch}"
        )
    if record.curvature_rows < LEAST_SHARE * len(tokens):
        raise InputError(
            f"of {len(tokens)} rows {record.curvature_rows} are among those that the curvature of "
            f"{before.directory} was formed of, fewer than half: {scratch}"
        )
    if growth.adds_up and growth.spread > MOST_SPREAD:
        raise InputError(
            f"the weights of the rows that stay change unevenly, by up to {growth.spread:.0%} from "
            f"their mean (reduction {before.manifest.objective.reduction}): {scratch}"
        )


def say_growth(growth: Growth, manifest: Manifest) -> None:
    """Say what is going to be done, and in what it differs from a fit from scratch."""
    say(f"grow: {growth}")
    for words in manifest.grown.otherwise if manifest.grown else ():
        say(f"note: {words}")
