"""What the page shows of a run, gathered from its directory and from files that are named."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np

from analysis.explorer.inputs import CleaningRow, read_cleaning, read_difficulty, read_record
from analysis.explorer.score_tables import ScoreTable, open_scores, self_influences
from analysis.explorer.texts import Texts
from influence.answers import rows_fitted_on, rows_scored, scores_of, tokenizer_of
from influence.errors import DataError
from influence.manifest import Manifest, read_manifest
from influence.progress import say

#: What an evaluation and a linear datamodeling score must have.
_EVALUATION, _LDS = ("sets", "rows"), ("lds", "low", "high", "per_query")


@dataclass(frozen=True)
class Explored:
    """What the page shows of a run.

    Attributes
    ----------
    directory, manifest
        The run.
    rows, queries : Texts
        Its training rows, and the queries that were scored.
    table : ScoreTable or None
        Their scores.
    self_influence : array float32 [train] or None
        Nats per token.
    cleaning : sequence of CleaningRow or None
        The rows to look at.
    difficulty : mapping or None
        Of a row, by id, what `unlearn difficulty` forecast.
    evaluations, lds : sequence of (name, record)
        What `analysis evaluate` and `analysis lds --json` wrote, and the names of the files.
    tokens : callable or None
        The text of a token; None where scores are not split over tokens.
    """

    directory: Path
    manifest: Manifest
    rows: Texts
    queries: Texts
    table: ScoreTable | None = None
    self_influence: np.ndarray | None = field(default=None, repr=False)
    cleaning: Sequence[CleaningRow] | None = field(default=None, repr=False)
    difficulty: Mapping[str, Mapping[str, Any]] | None = field(default=None, repr=False)
    evaluations: Sequence[tuple[str, Mapping[str, Any]]] = field(default=(), repr=False)
    lds: Sequence[tuple[str, Mapping[str, Any]]] = field(default=(), repr=False)
    tokens: Callable[[int], str] | None = field(default=None, repr=False)

    @property
    def title(self) -> str:
        """The adapter's name, or the run's where the adapter lies nowhere."""
        place = self.manifest.adapter.path
        return Path(place).name if place else self.directory.resolve().name

    @property
    def how_to_split(self) -> str:
        """How scores by token and module come onto the page."""
        return (
            "Scores made with influence score --per-token --per-module are also split over the tokens "
            "of the row and the layers of the adapter; a page keeps that of the strongest rows of "
            "each query (--detail)."
        )

    @cached_property
    def position(self) -> Mapping[str, int]:
        """The position of every training row by its id."""
        return {id: k for k, id in enumerate(self.rows.ids)}

    @cached_property
    def _reasons(self) -> Mapping[str, list[CleaningRow]]:
        found: dict[str, list[CleaningRow]] = {}
        for each in self.cleaning or ():
            found.setdefault(each.id, []).append(each)
        return found

    def facts_of(self, row: int) -> list[dict[str, str]]:
        """What is known of a training row beside its scores: label, value with its unit, help."""
        id, found = self.rows.ids[row], []
        if self.self_influence is not None:
            value = f"{self.self_influence[row]:+.3g} nats per token"
            found.append(("self-influence", value, SELF_HELP))
        if self.difficulty is not None and id in self.difficulty:
            known = self.difficulty[id]
            steps, damage = known.get("steps"), known.get("damage")
            if steps is not None:
                shown = (
                    "out of reach" if np.isinf(steps) else f"{steps:.3g} step{'s' * (steps != 1)}"
                )
                found.append(("to unlearn it", shown, STEPS_HELP))
            if damage is not None:
                found.append(("damage by then", f"{damage:+.3g} nats per token", DAMAGE_HELP))
            if known.get("recommended"):
                found.append(("advice", str(known["recommended"]), str(known.get("reason", ""))))
        found += [
            ("to look at", each.reason, each.evidence or "A reason of the cleaning list.")
            for each in self._reasons.get(id, ())
        ]
        return [dict(zip(("label", "value", "help"), each, strict=True)) for each in found]


SELF_HELP = (
    "Predicted rise of this row's own mean loss if it alone is removed. High: it is remembered "
    "rather than learnt from others."
)
STEPS_HELP = "Forecast steps of gradient ascent until the row's loss reaches its target."
DAMAGE_HELP = "Forecast rise of the mean loss of sixteen other training rows by then."


def gather(
    directory: Path,
    *,
    scores: Path | None = None,
    queries: str | None = None,
    cleaning: Path | None = None,
    difficulty: Path | None = None,
    evaluations: Sequence[Path] = (),
    lds: Sequence[Path] = (),
) -> Explored:
    """What there is to show of a run.

    Parameters
    ----------
    directory
        The run.
    scores
        Its scores. Default: `scores.h5` in it, else `strongest.h5`, else none.
    queries
        The rows that were scored, where they no longer lie where they were.
    cleaning
        The folder that `analysis clean` made.
    difficulty
        The table that `unlearn difficulty` made (.csv).
    evaluations, lds
        What `analysis evaluate --out` and `analysis lds --json` wrote.

    Raises
    ------
    InputError
        Where a file is not there, or is not what it should be.
    MismatchError
        Where the scores are of another run, or the rows have changed since.
    """
    manifest = read_manifest(directory)
    records = [
        (str(p), read_record(p, _EVALUATION, "analysis evaluate --out")) for p in evaluations
    ]
    judged = [(str(p), read_record(p, _LDS, "analysis lds --json")) for p in lds]
    listed = None if cleaning is None else read_cleaning(cleaning)
    forecast = None if difficulty is None else read_difficulty(difficulty)
    examples = rows_fitted_on(directory, manifest.data)
    path = scores or scores_of(directory)
    table, train_ids = None, None if examples is None else examples.ids
    if path is not None:
        table = open_scores(path, manifest.digest, train_ids)
        train_ids = table.train_ids
    own = self_influences(directory / "scores.h5", manifest.digest)
    if own is None and path is not None:
        own = self_influences(path, manifest.digest)
    if train_ids is None:
        say(f"note: the training rows of {directory} are not known any more: only counts are shown")
    elif examples is None and manifest.data.path:
        say(
            f"note: the training rows are not where they were ({manifest.data.path}): only their ids "
            "are shown. Where they were moved, the same influence fit command with the new path says "
            "so to the run, and computes nothing again"
        )
    elif examples is None:
        say("note: the training rows were given in Python and lie in no file: only ids are shown")
    rows = Texts.named(train_ids or []) if examples is None else Texts.of(examples)
    return Explored(
        directory,
        manifest,
        rows,
        Texts.named([]) if table is None else _scored(table, queries),
        table,
        None if own is None else own[0],
        listed,
        forecast,
        records,
        judged,
        _token_texts(manifest) if table is not None and "tokens" in table.splits else None,
    )


def _scored(table: ScoreTable, queries: str | None) -> Texts:
    """The queries of scores, with their texts where these are still what was scored."""
    kept, rows = str(table.attributes.get("queries") or ""), None
    why = f"they are not where they were, or not what they were ({kept})"
    try:
        rows = rows_scored(table.attributes, queries)
    except DataError as error:
        if queries is not None:
            raise
        why = str(error)
    if rows is not None and rows.ids == table.query_ids:
        return Texts.of(rows)
    if kept and "aggregate" not in table.attributes:
        say(
            f"note: of the queries only the ids are shown: {why} (--queries FILE says where they "
            "are)"
        )
    return Texts.named(table.query_ids)


def _token_texts(manifest: Manifest) -> Callable[[int], str] | None:
    """The text of a token by its id, of the run's tokenizer; None where that is not there."""
    tokenizer = tokenizer_of(manifest)
    return None if tokenizer is None else cache(lambda id: _token_text(tokenizer, id))


def _token_text(tokenizer: Any, id: int) -> str:
    """The text of one token, with the blank that it may begin with."""
    piece = tokenizer.convert_ids_to_tokens(id)
    text = tokenizer.decode([id], clean_up_tokenization_spaces=False)
    starts = isinstance(piece, str) and piece.startswith(("▁", "Ġ"))
    return " " + text if starts and not text.startswith(" ") else text
