"""The sets of an evaluation, apart from one another and ready for a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from analysis.evaluation.answers import PARAPHRASED, PERTURBED, Rows
from analysis.evaluation.options import Options
from influence.adapter import AdaptedModel
from influence.at_point import evenly_spaced
from influence.errors import InputError
from influence.generation import continuable
from influence.loss import check_rows
from influence.tokens import TokenizedExamples, tokenize

#: Names of the sets, in the order of records and tables.
SETS = ("forget", "retain", "holdout")


@dataclass(frozen=True, eq=False)
class PreparedSet:
    """One set of rows, ready for a model.

    Attributes
    ----------
    name : str
        One of `SETS`.
    rows : Rows
    tokens : TokenizedExamples
    continued : int array
        Positions of the rows whose prompt is continued.
    """

    name: str
    rows: Rows
    tokens: TokenizedExamples
    continued: np.ndarray


def parted(sets: Mapping[str, Rows]) -> tuple[dict[str, Rows], dict[str, str]]:
    """Sets of which no two share a row's content, and notes.

    Rows to forget are left out of the retained ones. Raises `InputError` where a held-out row is in
    another set too, or no retained row remains.
    """
    disjoint, notes = dict(sets), {}
    contents = {
        name: {example.content_hash for example in rows.examples} for name, rows in sets.items()
    }
    if shared := contents.get("retain", set()) & contents["forget"]:
        retained = sets["retain"].examples
        others = [i for i, row in enumerate(retained) if row.content_hash not in shared]
        if not others:
            raise InputError("every retained row is a row to forget: give rows that should stay")
        disjoint["retain"] = sets["retain"].select(others)
        notes["remark.retain"] = (
            f"{len(retained) - len(others)} of the given rows are rows to forget and were left out"
        )
    for name in ("forget", "retain"):
        if shared := contents.get("holdout", set()) & contents.get(name, set()):
            first = next(row.id for row in sets["holdout"].examples if row.content_hash in shared)
            raise InputError(
                f"{len(shared)} rows of the holdout set have the content of rows of the {name} set "
                f"(the first is {first!r}): give rows that the adapter never saw"
            )
    return disjoint, notes


def prepared(
    model: AdaptedModel, name: str, rows: Rows, options: Options, notes: dict[str, str]
) -> PreparedSet:
    """Tokenise a set and choose the rows to continue. What they lack is added to `notes`."""
    tokens = tokenize(rows.examples, model.tokenizer, max_length=options.max_length)
    check_rows(model, tokens)
    able = np.zeros(0, dtype=int)
    if options.generate:
        able = np.flatnonzero(continuable(model, rows.examples))
    if options.generate == 0:
        notes[f"sets.{name}.rougeL"] = "nothing was generated (generate is 0)"
    elif not len(able):
        notes[f"sets.{name}.rougeL"] = "the rows have no prompt that the model could continue"
    continued = able[evenly_spaced(len(able), options.generate)] if len(able) else able
    if not any(rows.perturbed):
        notes[f"sets.{name}.truth_ratio"] = f"the rows carry no {PARAPHRASED[0]} and {PERTURBED[0]}"
    return PreparedSet(name, rows, tokens, continued)
