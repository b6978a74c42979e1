"""The versions of an adapter: what a run was fitted on, and what each edit made of it.

A run's factors and gradients stay those of the adapter it was fitted on. An edit makes a new adapter and a new set of
training rows; the next edit starts from there: removed rows are no training rows any more, and changed rows are what they
were changed into. Which edits there were is read from the run's audit chain and the records it names, whose bytes the
chain vouches for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from influence.adapter import AdaptedModel
from influence.data import Example, Examples, TokenizedExamples, read_examples, tokenize
from influence.errors import InputError, MismatchError, StoreError
from influence.loss import weights
from influence.path import read_parameters
from influence.run import Run
from influence.store import read_json
from unlearn import audit

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
            changed = tokenize(self.rows.select(places), self.model.tokenizer, max_length=max_length)
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
    entries = audit.entries(run.directory)
    own = run.manifest["adapter"]
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
    )
    if adapter is None:
        entry = entries[-1] if entries else None
    elif str(adapter) == ORIGINAL or (own["path"] and Path(adapter).resolve() == Path(own["path"]).resolve()):
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
    line: list[tuple[dict[str, Any], dict[str, Any]]] = []
    while entry is not None:
        record = _record(entry)
        line.append((entry, record))
        entry = _parent(entry, record, entries)
    for entry, record in reversed(line):
        start = _edited(start, entry, record)
    return start


def _parent(entry: dict[str, Any], record: dict[str, Any], entries: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The edit that an edit started from: the latest earlier one with the adapter and the rows it started with."""
    for other in reversed(entries[: entry["number"] - 1]):
        same = other["adapter_after"] == entry["adapter_before"]
        if same and _record(other)["data"]["after"] == record["data"]["before"]:
            return other
    return None


def _record(entry: dict[str, Any]) -> dict[str, Any]:
    """The record that a line of the chain names, its folder checked file by file."""
    folder = Path(entry["edit"])
    problems = audit.verify(adapter=folder).problems if folder.is_dir() else [f"{folder} does not exist"]
    path = folder / audit.RECORD
    if not problems and hashlib.sha256(path.read_bytes()).hexdigest() != entry["record"]:
        problems = [f"{path} is not the record that the run's audit chain names"]
    if problems:
        raise StoreError(
            f"edit {entry['number']} cannot be followed: {problems[0]}. Restore its folder (unlearn verify says what is "
            f"wrong), or start from another adapter (--start {ORIGINAL})"
        )
    return read_json(path)


def _edited(before: Version, entry: dict[str, Any], record: dict[str, Any]) -> Version:
    """The version that one edit made of the one before it."""
    folder = Path(entry["edit"])
    if entry["adapter_before"] != before.digest or record["data"]["before"] != before.rows.digest:
        raise MismatchError(f"edit {entry['number']} was made from another adapter or other rows: see unlearn verify")
    theta = read_parameters(before.model, folder)
    removed = {request["id"] for request in record["requests"] if request["action"] == "remove"}
    others = {request["id"] for request in record["requests"]} - removed
    contents = {row.id: row for row in read_examples(folder / CHANGED)} if others else {}
    rows, positions = _with(before, removed, contents)
    with before.model.at(theta):
        digest = before.model.adapter_digest
    if digest != entry["adapter_after"] or rows.digest != record["data"]["after"]:
        raise StoreError(f"{folder} does not hold the adapter and rows of edit {entry['number']}: see unlearn verify")
    return Version(
        before.run,
        theta,
        rows,
        positions,
        frozenset(before.changed - removed | others),
        before.removed | removed,
        str(folder),
        digest,
        before.edits + 1,
    )


def _with(before: Version, removed: Iterable[str], changed: dict[str, Example]) -> tuple[Examples, np.ndarray]:
    gone = set(removed)
    kept = [place for place, id in enumerate(before.rows.ids) if id not in gone]
    rows = Examples(changed.get(before.rows[place].id, before.rows[place]) for place in kept)
    return rows, before.positions[kept]
