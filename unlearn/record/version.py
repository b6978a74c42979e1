"""The versions of an adapter: what a run was fitted on, and what each edit made of it.

A run's factors and gradients stay those of the adapter it was fitted on. An edit makes a new adapter and a new set of
training rows; the next edit starts from there: removed rows are no training rows any more, and changed rows are what they
were changed into. Which edits there were is read from the run's audit chain; the record of the one that is started from, whose bytes the
chain vouches for, says which rows are gone and which changed by then (`lineage`), so the folders of earlier edits may go.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from influence.adapter import AdaptedModel
from influence.errors import InputError, StoreError
from influence.loss import weights
from influence.path import read_parameters
from influence.rows import Examples, read_examples
from influence.run import Run
from influence.store import read_json
from influence.tokens import TokenizedExamples, tokenize
from unlearn.record import chain, verify
from unlearn.record.folder import RECORD

#: What the run's own adapter is called where a version is asked for.
ORIGINAL = "original"
#: The rows that an edit changed, in its adapter directory.
CHANGED = "changed_rows.jsonl"


@dataclass(frozen=True)
class Version:
    """An adapter of a run and the rows it stands for.

    Attributes
    ----------
    run : Run
        The run that all of it began with, its model at the run's own adapter.
    theta : Tensor [P]
        The adapter's parameters.
    rows : Examples
        The training rows, in the fit's order.
    positions : int array [n]
        Where each row is, or was before it changed, in `run.train`.
    changed : frozenset of str
        Ids of the rows that earlier edits changed: the run's stored gradients are not theirs.
    removed : frozenset of str
        Ids of the rows that earlier edits removed.
    path, digest : str
        The adapter's folder, and what `AdaptedModel.adapter_digest` gives for it.
    edits : int
        How many edits led here.
    head : str
        Hash of the chain's last line when this was read.
    latest : bool
        Whether the last edit was asked for, whichever that is: another one that is saved meanwhile comes in the way.
    """

    run: Run
    theta: Tensor = field(repr=False)
    rows: Examples
    positions: np.ndarray = field(repr=False)
    changed: frozenset[str]
    removed: frozenset[str]
    path: str
    digest: str
    edits: int
    head: str
    latest: bool = False

    @property
    def model(self) -> AdaptedModel:
        """The run's model; `model.at(theta)` puts it at this version."""
        return self.run.model

    @cached_property
    def tokens(self) -> TokenizedExamples:
        """The rows' tokens: the fit's, and the changed rows' own."""
        own = list(self.run.tokens.select(self.positions))
        places = [place for place, id in enumerate(self.rows.ids) if id in self.changed]
        if places:
            max_length = self.run.manifest["objective"]["max_length"]
            changed = tokenize(
                self.rows.select(places), self.model.tokenizer, max_length=max_length
            )
            for place, tokens in zip(places, changed, strict=True):
                own[place] = tokens
        return TokenizedExamples(own, self.rows.ids)

    @cached_property
    def weights(self) -> np.ndarray:
        """The weights `w` of the rows in the fit's objective, `[n]` float64: its N_tok (or n) is kept."""
        w = self.run.weights[self.positions].copy()
        if self.changed and self.run.manifest["objective"]["reduction"] == "example":
            w = weights(self.tokens.counts, "example") * len(w) / self.run.manifest["data"]["rows"]
        return w


def version(run: Run, adapter: str | Path | None = None) -> Version:
    """The version of a run at one of its adapters.

    `adapter` is the folder of an edit of this run, or `original`, the adapter it was fitted on; without one it is the last
    edit's. Raises `InputError` for an adapter that is neither; `StoreError` for a broken chain, a record that is not the
    chain's, or weights that are not the record's.
    """
    entries = chain.entries(run.directory)
    own = run.manifest["adapter"]
    head = entries[-1]["hash"] if entries else chain.START
    start = Version(
        run,
        run.model.snapshot(),
        run.train,
        np.arange(len(run.train)),
        frozenset(),
        frozenset(),
        own["path"],
        run.manifest["identity"]["adapter"],
        0,
        head,
    )
    if adapter is None:
        entry = entries[-1] if entries else None
    elif str(adapter) == ORIGINAL or (
        own["path"] and Path(adapter).resolve() == Path(own["path"]).resolve()
    ):
        entry = None
    else:
        place = str(Path(adapter).resolve())
        found = [entry for entry in entries if entry["edit"] == place]
        if not found:
            known = ", ".join(entry["edit"] for entry in entries[-5:]) or "none so far"
            raise InputError(
                f"{adapter} is no adapter of the run {run.directory}: give {ORIGINAL!r} (the adapter it was fitted on, "
                f"{own['path']}) or the folder of an edit of it ({known})"
            )
        entry = found[-1]
    found = start if entry is None else _edited(start, entry, _record(entry))
    return replace(found, latest=adapter is None)


def _record(entry: dict[str, Any]) -> dict[str, Any]:
    """The record that a line of the chain names, its folder checked file by file."""
    folder = Path(entry["edit"])
    problems = (
        verify.verify(adapter=folder).problems if folder.is_dir() else [f"{folder} does not exist"]
    )
    path = folder / RECORD
    if not problems and hashlib.sha256(path.read_bytes()).hexdigest() != entry["record"]:
        problems = [f"{path} is not the record that the run's audit chain names"]
    if problems:
        raise StoreError(
            f"edit {entry['number']} cannot be followed: {problems[0]}. Restore its folder (unlearn verify says what is "
            f"wrong), or start from another adapter (--start {ORIGINAL})"
        )
    return read_json(path)


def _edited(original: Version, entry: dict[str, Any], record: dict[str, Any]) -> Version:
    """The version that an edit made: its record says which rows of the fit are gone and which changed, its own and earlier."""
    folder = Path(entry["edit"])
    theta = read_parameters(original.model, folder)
    lineage = record["lineage"]
    contents = (
        {row.id: row for row in read_examples(folder / CHANGED)} if lineage["changed"] else {}
    )
    gone = set(lineage["removed"])
    kept = [place for place, id in enumerate(original.rows.ids) if id not in gone]
    rows = Examples(contents.get(original.rows[place].id, original.rows[place]) for place in kept)
    with original.model.at(theta):
        digest = original.model.adapter_digest
    if digest != entry["adapter_after"] or rows.digest != record["data"]["after"]:
        raise StoreError(
            f"{folder} does not hold the adapter and rows of edit {entry['number']}: see unlearn verify"
        )
    return replace(
        original,
        theta=theta,
        rows=rows,
        positions=original.positions[kept],
        changed=frozenset(lineage["changed"]),
        removed=frozenset(gone),
        path=str(folder),
        digest=digest,
        edits=lineage["edits"],
    )
