"""Versions of an adapter: what a run was fitted on, and what each edit made of it.

A run's factors and gradients stay those of the adapter it was fitted on. An edit makes a new
adapter and a new set of training rows, and the next edit starts from there: removed rows are no
training rows any more, and changed rows are what they were changed into. Which edits there were is
read from the run's audit chain. The record of the one that is started from, whose bytes the chain
vouches for, says which rows are gone and which changed by then (`lineage`), so the folders of
earlier edits may go.
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
from influence.cost import Cost
from influence.errors import InputError, StoreError
from influence.path import read_parameters, scaled
from influence.row_files import read_examples
from influence.rows import Examples
from influence.run import Run
from influence.shared_rows import shared_losses
from influence.store import read_json
from influence.tokens import TokenizedExamples
from unlearn.record import chain, verify
from unlearn.record.edit_record import RECORD, EditRecord

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
    path : str or None
        The adapter's folder; None where it is nowhere on disk.
    digest : str
        What `AdaptedModel.adapter_digest` gives for it.
    edits : int
        How many edits led here.
    head : str
        Hash of the chain's last line when this was read.
    latest : bool
        Whether the last edit was asked for, whichever that is: another one that is saved meanwhile
        comes in the way.
    """

    run: Run
    theta: Tensor = field(repr=False)
    rows: Examples
    positions: np.ndarray = field(repr=False)
    changed: frozenset[str]
    removed: frozenset[str]
    path: str | None
    digest: str
    edits: int
    head: str
    latest: bool = False

    @property
    def model(self) -> AdaptedModel:
        """The run's model, which `model.at(theta)` puts at this version."""
        return self.run.model

    @cached_property
    def tokens(self) -> TokenizedExamples:
        """The rows' tokens: those of the fit, and of the changed rows their new ones."""
        rows = list(self.run.tokens.select(self.positions))
        places = [place for place, id in enumerate(self.rows.ids) if id in self.changed]
        if places:
            rendering = self.run.manifest.objective.rendering
            changed = rendering.tokenize(self.rows.select(places), self.model.tokenizer)
            for place, tokens in zip(places, changed, strict=True):
                rows[place] = tokens
        return TokenizedExamples(rows, self.rows.ids)

    def losses(
        self,
        tokens: TokenizedExamples,
        theta: Tensor,
        cost: Cost,
        *,
        token_budget: int | None = None,
    ) -> np.ndarray:
        """Mean losses of rows with the adapter at `theta` [P], nats per completion token, `[n]`.

        Several processes share the rows out. `cost` counts their forwards. At most `token_budget`
        tokens run at a time, by default as many as in the fit.
        """
        cost.forwards += len(tokens)
        budget = token_budget or self.run.token_budget
        with self.model.at(theta):
            return shared_losses(self.model, tokens, token_budget=budget)

    @cached_property
    def weights(self) -> np.ndarray:
        """The weights `w` [n] of the rows in the fit's objective, its N_tok (or n) kept."""
        if not self.changed:
            return self.run.weights[self.positions].copy()
        return self.run.row_weights.changed(self.positions, self.tokens.counts)


def scaled_to(version: Version, scale: float) -> Tensor:
    """A version's parameters `[P]` with every B multiplied by `scale`, 0 being the base."""
    with version.model.at(version.theta):
        return scaled(version.model, scale)


def version(run: Run, adapter: str | Path | None = None) -> Version:
    """The version of a run at one of its adapters.

    `adapter` is the folder of an edit of this run, or `original`, the adapter it was fitted on;
    without one it is the last edit's.

    Raises
    ------
    InputError
        For an adapter that is neither.
    StoreError
        For a broken chain, a record that is not the chain's, or weights that are not the record's.
    """
    lines, original = chain.entries(run.directory), run.manifest.adapter.path
    start = Version(
        run=run,
        theta=run.model.snapshot(),
        rows=run.train,
        positions=np.arange(len(run.train)),
        changed=frozenset(),
        removed=frozenset(),
        path=original,
        digest=run.manifest.identity["adapter"],
        edits=0,
        head=lines[-1]["hash"] if lines else chain.START,
        latest=adapter is None,
    )
    if adapter is None:
        line = lines[-1] if lines else None
    elif str(adapter) == ORIGINAL or _is_at(original, adapter):
        line = None
    else:
        line = _line_of(run, lines, adapter)
    return start if line is None else _edited(start, line, _record(line))


def _is_at(original: str | None, adapter: str | Path) -> bool:
    """Whether a path is that of the adapter that the run was fitted on."""
    return bool(original) and Path(adapter).resolve() == Path(str(original)).resolve()


def _line_of(run: Run, lines: list[dict[str, Any]], adapter: str | Path) -> dict[str, Any]:
    """The last line of the chain about an edit's folder, or an `InputError`."""
    place = str(Path(adapter).resolve())
    for line in reversed(lines):
        if line["edit"] == place:
            return line
    last = ", ".join(line["edit"] for line in lines[-5:]) or "none so far"
    raise InputError(
        f"{adapter} is no adapter of the run {run.directory}: give {ORIGINAL!r} (the adapter it "
        "was "
        f"fitted on, {run.manifest.adapter.path}) or the folder of an edit of it ({last})"
    )


def _record(line: dict[str, Any]) -> EditRecord:
    """The record that a line of the chain names, its folder checked file by file."""
    folder = Path(line["edit"])
    problems = [f"{folder} does not exist"]
    if folder.is_dir():
        problems = verify.verify(adapter=folder).problems
    path = folder / RECORD
    if not problems and hashlib.sha256(path.read_bytes()).hexdigest() != line["record"]:
        problems = [f"{path} is not the record that the run's audit chain names"]
    record = EditRecord.salvaged({} if problems else read_json(path))
    if not problems and None in (record.lineage.removed, record.lineage.changed):
        problems = [f"{path} does not say which rows are gone and which changed (lineage)"]
    if problems:
        raise StoreError(
            f"edit {line['number']} cannot be followed: {problems[0]}. Restore its folder (unlearn "
            f"verify says what is wrong), or start from another adapter (--start {ORIGINAL})"
        )
    return record


def _edited(original: Version, line: dict[str, Any], record: EditRecord) -> Version:
    """The version that an edit made, with the rows that its record says were left by then."""
    folder = Path(line["edit"])
    theta = read_parameters(original.model, folder)
    removed, changed = (
        frozenset(ids or ()) for ids in (record.lineage.removed, record.lineage.changed)
    )
    contents = {row.id: row for row in read_examples(folder / CHANGED)} if changed else {}
    kept = [place for place, id in enumerate(original.rows.ids) if id not in removed]
    rows = Examples(contents.get(original.rows[place].id, original.rows[place]) for place in kept)
    with original.model.at(theta):
        digest = original.model.adapter_digest
    if digest != line["adapter_after"] or rows.digest != record.data.after:
        raise StoreError(
            f"{folder} does not hold the adapter and rows of edit {line['number']}: see unlearn "
            "verify"
        )
    return replace(
        original,
        theta=theta,
        rows=rows,
        positions=original.positions[kept],
        changed=changed,
        removed=removed,
        path=str(folder),
        digest=digest,
        edits=record.lineage.edits or 0,
    )
