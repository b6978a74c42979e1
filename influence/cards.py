"""Results shown in notebooks: a line of text, and a small card of HTML.

Everything that comes from rows, files or names is escaped, and no style sheet, script or address
is used. Colours are those of the notebook, so that a card is readable on light and on dark.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import islice
from typing import TYPE_CHECKING, Any

from influence.messages import one_line, printable

if TYPE_CHECKING:
    from influence.run import Run
    from influence.scorefile import Scores

#: Characters of a row, and queries, that a card shows.
PREVIEW, QUERIES = 60, 3
#: Characters of any other text.
LONGEST = 160

_LINE = "1px solid rgba(128,128,128,.35)"
_CARD = f"display:inline-block;max-width:100%;overflow-x:auto;border:{_LINE};border-radius:6px;padding:.5em .8em"
_CELL = "padding:.1em .7em .1em 0;vertical-align:top;border:0;background:none"


def line(name: str, *facts: str) -> str:
    """`Name(fact, fact, ...)` on one line."""
    return f"{name}({', '.join(printable(fact).replace(chr(10), ' ') for fact in facts if fact)})"


def card(
    title: str,
    facts: Mapping[str, object],
    columns: Sequence[str] = (),
    rows: Iterable[Sequence[object]] = (),
    note: str = "",
) -> str:
    """A card: a title, facts by name, and a table. All of it is plain text and is escaped here."""
    parts = [f"<div style='font-weight:600'>{_text(title)}</div>"]
    listed = "".join(
        f"<tr>{_cell(name, faint=True)}{_cell(value)}</tr>"
        for name, value in facts.items()
        if value
    )
    if listed:
        parts.append(_table(listed))
    lines = "".join(f"<tr>{''.join(map(_cell, cells))}</tr>" for cells in rows)
    if lines:
        head = "".join(_cell(name, faint=True) for name in columns)
        parts.append(_table(f"<tr>{head}</tr>{lines}"))
    if note:
        parts.append(f"<div style='opacity:.7;margin-top:.3em'>{_text(note)}</div>")
    return f"<div style='{_CARD}'>{''.join(parts)}</div>"


def _table(lines: str) -> str:
    return f"<table style='border:0;border-collapse:collapse;margin:.4em 0 0;background:none'>{lines}</table>"


def _cell(value: object, faint: bool = False) -> str:
    """A cell of a table; numbers to the right, text in its own direction."""
    numeric = isinstance(value, _Number)
    style = _CELL + (";opacity:.7" if faint else "")
    style += (
        ";text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums"
        if numeric
        else ";text-align:left"
    )
    return f"<td style='{style}'>{_text(value)}</td>"


def _text(value: object) -> str:
    """Escaped text on one line, apart from its neighbours' direction."""
    return f"<bdi>{escape(one_line(str(value), LONGEST))}</bdi>"


class _Number(str):
    """A number as text."""

    __slots__ = ()


def number(value: float | None, form: str = ".3g") -> str:
    """A number for a card; a dash where it is not known."""
    known = value is not None and value == value
    return _Number(format(value, form) if known else "–")


# ---- runs and scores -----------------------------------------------------------------------------


def run_facts(run: Run) -> dict[str, Any]:
    """What a run is, by name."""
    manifest = run.manifest
    data, adapter = manifest.data, manifest.adapter
    stored = "whole gradients" if run.gradients_stored else ""
    stored = stored or ("rows in few bytes" if run.features_stored else "none")
    return {
        "directory": str(run.directory),
        "base": manifest.base.path or "a live model",
        "adapter": f"{adapter.path or 'a live model'} ({adapter.parameters:,} parameters)",
        "training rows": f"{data.rows:,} ({data.supervised_tokens:,} supervised tokens)",
        "curvature": f"{run.fitted_name}, damping {manifest.damping}",
        "points of the path": ", ".join(point.label for point in manifest.points),
        "stored": stored,
        "edited since": manifest.now.adapter.path if manifest.now is not None else "",
    }


def run_line(run: Run) -> str:
    """A run on one line."""
    facts = run_facts(run)
    return line(
        "Run",
        repr(facts["directory"]),
        f"{run.manifest.data.rows:,} training rows",
        facts["curvature"],
        f"points {facts['points of the path']}",
    )


def run_card(run: Run) -> str:
    """A run as a card."""
    return card("Run", run_facts(run))


def scores_line(scores: Scores) -> str:
    """Scores on one line."""
    queries, rows = scores.values.shape
    attributes = scores.attributes
    failed = int((~scores.converged.astype(bool)).sum())
    return line(
        "Scores",
        f"{queries:,} queries x {rows:,} training rows",
        f"{attributes.get('measurement', 'loss')} in {attributes.get('unit', '?')}",
        f"credit {attributes.get('credit', 'additive')}",
        f"{failed} queries not converged" if failed else "",
        "by module" if scores.modules is not None else "",
        "by token" if scores.tokens is not None else "",
    )


def scores_card(scores: Scores) -> str:
    """Scores as a card, with the strongest rows of the first queries."""
    from influence.answers import describe

    attributes = scores.attributes
    queries, rows = scores.values.shape
    failed = int((~scores.converged.astype(bool)).sum())
    facts = {
        "measurement": f"{attributes.get('measurement', 'loss')}, {attributes.get('unit', '?')}",
        "made with": describe(attributes) if "points" in attributes else "",
        "not converged": f"{failed} queries" if failed else "",
        "split": " and ".join(
            name
            for name, part in (("by module", scores.modules), ("by token", scores.tokens))
            if part is not None
        ),
    }
    texts = scores.train_rows
    table = []
    for query in islice(range(queries), QUERIES):
        for kind, entries in zip(("proponent", "opponent"), scores.top(query, 1), strict=True):
            for entry in entries:
                text = "" if texts is None else texts[entry.index].preview(PREVIEW)
                shown = number(entry.score, "+.2e")
                table.append((scores.query_ids[query], kind, shown, entry.id, text))
    more = queries - QUERIES
    return card(
        f"Scores: {queries:,} queries x {rows:,} training rows",
        facts,
        ("query", "strongest", "score", "row", ""),
        table,
        f"and {more:,} more queries: .top(query), .to_frame()" if more > 0 else "",
    )
