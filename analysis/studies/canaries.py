"""Canaries: training rows that come with the other things they could have said, and their exposure.

The exposure of a canary (`analysis.metrics.exposure`) is measured on the adapter itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from analysis.evaluation.answers import answering, completion
from analysis.metrics.exposure import exposure_of
from influence.errors import BadRow, DataError, InputError
from influence.loss import mean_losses
from influence.rows import Example, Examples
from influence.run import Run
from influence.tokens import TokenizedExamples

#: Sums of losses, nats, that are this close are ties: batches of other shapes round differently. A
#: choice, above the rounding of sums in float32.
TIE = 1e-4


@dataclass(frozen=True, eq=False)
class Canaries:
    """Canaries of a run, ready for a model.

    Attributes
    ----------
    rows : list of int
        Their positions among the training rows.
    starts : list of int
        Canary c has `tokens[starts[c]]` as its own completion, and as candidates those that follow
        it up to `starts[c + 1]`.
    tokens : TokenizedExamples
        Every completion and candidate.
    """

    rows: list[int]
    starts: list[int]
    tokens: TokenizedExamples

    @classmethod
    def of(cls, run: Run, canaries: Mapping[str, Sequence[str]]) -> Canaries:
        """Canaries of the training rows with these ids.

        Raises `DataError` that lists every unusable one.

        `InputError` that lists every unusable one.
        """
        if not canaries:
            raise InputError(
                "no canaries were given; name at least one training row with its candidates, or "
                "leave them out"
            )
        examples: list[Example] = []
        rows, starts, bad = [], [0], []
        for number, (id, candidates) in enumerate(canaries.items(), start=1):
            if id not in run.train:
                bad.append(BadRow(number, id, "no training row has this id"))
                continue
            example = run.train[run.train.index(id)]
            if reason := _unusable(example, candidates):
                bad.append(BadRow(number, id, reason))
                continue
            rows.append(run.train.index(id))
            examples.append(example)
            examples += [
                replace(answering(example, text), id=f"{id}, candidate {i}")
                for i, text in enumerate(candidates, 1)
            ]
            starts.append(len(examples))
        if bad:
            raise DataError(f"{len(bad)} of {len(canaries)} canaries cannot be used:", bad)
        tokens = run.tokenized(Examples(examples))
        if tokens.truncated:
            raise InputError(
                f"{tokens.truncated} of the canaries' completions and candidates are longer than "
                f"the run's max_length ({run.manifest.objective.max_length}), and sums of losses "
                "over cut ones do not compare: give shorter ones"
            )
        return cls(rows, starts, tokens)

    def exposures(self, run: Run) -> NDArray[np.float64]:
        """Exposure of every training row, [n] bits, NaN for rows that are no canaries.

        Completions are ranked by the sum of their losses over all their tokens, the end included:
        by the probability that the model says just this after the prompt. That favours short ones,
        as the model does; candidates of one form (names, numbers of as many digits) make the
        clearest canaries. Sums closer than `TIE` share their average rank.
        """
        budget = run.token_budget
        sums = mean_losses(run.model, self.tokens, token_budget=budget) * self.tokens.counts
        values = np.full(len(run.train), np.nan)
        for row, (start, stop) in zip(self.rows, pairwise(self.starts), strict=True):
            secret, candidates = sums[start], sums[start + 1 : stop]
            tied = np.where(np.abs(candidates - secret) <= TIE, secret, candidates)
            values[row] = exposure_of([secret], [tied]).value
        return values


def _unusable(example: Example, candidates: Sequence[str]) -> str | None:
    """Why a row with these candidates is no canary."""
    if example.answer is None:
        kind = "a text" if example.text is not None else "token ids"
        return f"it is {kind}, without a completion that candidates could replace"
    if isinstance(candidates, str) or not all(
        isinstance(text, str) and text for text in candidates
    ):
        return "its candidates are not a list of non-empty strings"
    if any("\ud800" <= c <= "\udfff" for text in candidates for c in text):
        return "a candidate holds a lone surrogate, which is not text"
    if not candidates:
        return "it has no candidates; give at least one other thing it could have said"
    if completion(example) in candidates:
        return (
            "its own completion is among its candidates: leave it out there, it is counted anyway"
        )
    if len(set(candidates)) < len(candidates):
        return "it has the same candidate twice"
    return None


def read_canaries(path: str | Path) -> dict[str, list[str]]:
    """Read canaries from JSON lines, `{"id", "candidates": [completions]}` each.

    Raises `DataError` that lists every unusable line.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}); give JSON lines with an id and candidates "
            "each"
        ) from None
    canaries: dict[str, list[str]] = {}
    bad: list[BadRow] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            bad.append(BadRow(number, None, f"not JSON that can be read ({error})"))
            continue
        id = row.get("id") if isinstance(row, dict) else None
        usable = isinstance(id, str | int) and not isinstance(id, bool)
        if not usable or not isinstance(row.get("candidates"), list):
            reason = (
                'expected an object with "id" (of a training row) and "candidates" (a list of '
                "strings)"
            )
            bad.append(BadRow(number, None, reason))
        elif str(id) in canaries:
            bad.append(BadRow(number, str(id), "its id is already that of another canary"))
        else:
            canaries[str(id)] = row["candidates"]
    if bad:
        raise DataError(f"{len(bad)} lines of {path} cannot be used:", bad)
    if not canaries:
        raise DataError(f"{path} has no canaries; give JSON lines with an id and candidates each")
    return canaries
