"""Tables of memorization, for a person."""

from __future__ import annotations

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from analysis.studies.memorization import MEMORIZATION, Memorization
from influence.messages import printable

#: Short head of each column, and what it is.
HEADS = {
    MEMORIZATION: ("mem", "counterfactual memorization"),
    "counterfactual_error": ("+-", "its standard error"),
    "c_score": ("C", "C-score"),
    "self_influence": ("self", "self-influence"),
    "loss": ("loss", "of the adapter"),
    "base_loss": ("base", "loss of the base"),
    "extraction_strength": ("extr", "extraction strength"),
    "exposure": ("bits", "exposure of the canary"),
    "relative_exposure": ("rel", "relative exposure, bits per token"),
}


def tables(result: Memorization, k: int = 10) -> list[Table]:
    """The k most memorized rows, and the agreement with every measurement.

    At most 80 columns wide.
    """
    agreements = (
        _agreement(result, measure)
        for measure in dict.fromkeys(entry["measure"] for entry in result.agreement)
    )
    return [_rows(result, k), *(table for table in agreements if table is not None)]


def _rows(result: Memorization, k: int) -> Table:
    """The k most memorized rows, and the agreement with every measurement.

    At most 80 columns wide.
    """
    most = result.most(k)
    heads = {name: head for name, head in HEADS.items() if name in most}
    by = heads[next(iter(heads))][1]
    table = _table(f"highest {by}: {len(most)} of {len(result.table)} rows", "id", 16)
    table.caption = Text("; ".join(f"{short}: {what}" for short, what in heads.values()))
    table.caption_justify = "left"
    for short, _ in heads.values():
        table.add_column(short, justify="right", no_wrap=True)
    for id, values in zip(most["id"], most[list(heads)].to_numpy(), strict=True):
        table.add_row(Text(printable(id).replace("\n", " ")), *map(_cell, values))
    return table


def _agreement(result: Memorization, measure: str) -> Table | None:
    """Agreement of every forecast with one measurement. None where no correlation is defined."""
    entries = [
        entry
        for entry in result.agreement
        if entry["measure"] == measure and not np.isnan(entry["spearman"])
    ]
    if not entries:
        return None
    title = f"Spearman with the {HEADS[measure][1]} ({entries[0]['rows']} rows)"
    table = _table(title, "forecast", 32)
    for head in ("rho", f"{result.level:.0%}, over rows", "over adapters"):
        table.add_column(head, justify="right", no_wrap=True)
    for entry in entries:
        ends = ((entry["low"], entry["high"]), (entry["adapters_low"], entry["adapters_high"]))
        intervals = ("" if np.isnan(low) else f"{low:.2f} to {high:.2f}" for low, high in ends)
        table.add_row(Text(entry["forecast"]), f"{entry['spearman']:.2f}", *intervals)
    return table


def _table(title: str, first: str, width: int) -> Table:
    table = Table(
        title=Text(title),
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
    )
    table.add_column(first, max_width=width, no_wrap=True, overflow="ellipsis")
    return table


def _cell(value: float) -> str:
    """A number in five or six characters."""
    return "" if np.isnan(value) else f"{value:.{3 if 0 <= value < 10 else 2}f}"
