"""A study of planted rows for a person: two tables and a few lines."""

from __future__ import annotations

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from analysis.studies.ood import Study
from analysis.studies.planting import OUTSIDE

#: Short head and format of each mean.
HEADS = {
    "tokens": ("tok", ".0f"),
    "start": ("loss", ".2f"),
    "target": ("goal", ".2f"),
    "steps": ("steps", ".1f"),
    "damage": ("damage", ".3f"),
    "area": ("area", ".3f"),
    "leverage": ("lever", ".3g"),
    "genex_start": ("gen", ".1f"),
    "genex_end": ("gen end", ".1f"),
    "relex_start": ("rel", ".1f"),
    "relex_end": ("rel end", ".1f"),
}
#: Head and digits of each comparison.
COMPARED = {
    "steps": ("steps, ratio", 2),
    "damage": ("damage, difference", 4),
    "matched": ("at equal nats, difference", 4),
}


def tables(made: Study) -> list[Table]:
    """Means by kind, and the comparisons with the partners, at most 100 columns wide."""
    means = _table("means of the planted rows, each unlearned alone", "kind")
    for short, _ in HEADS.values():
        means.add_column(short, justify="right", no_wrap=True)
    for kind, row in made.means().iterrows():
        values = [(row[name], form) for name, (_, form) in HEADS.items()]
        cells = ("" if np.isnan(value) else f"{value:{form}}" for value, form in values)
        means.add_row(Text(str(kind)), *cells)
    means.caption = Text(
        "nats per token; gen, rel: generalized and relative exposure, bits per token, before and "
        "at the goal (base's loss)"
    )
    means.caption_justify = "left"
    against = _table(f"against partners of the same length, {made.level:.0%} intervals", "kind")
    for head, _ in COMPARED.values():
        against.add_column(head, justify="right", overflow="fold")
    for kind in (*OUTSIDE, "all"):
        cells = []
        for quantity, (_, digits) in COMPARED.items():
            entry = made.compared(kind, quantity)
            value, low, high = (f"{entry[key]:.{digits}f}" for key in ("value", "low", "high"))
            cells.append(f"{value} [{low}, {high}]")
        against.add_row(Text(kind), *cells)
    return [means, against]


def _table(title: str, first: str) -> Table:
    table = Table(
        title=Text(title),
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
    )
    table.add_column(first, no_wrap=True)
    return table


def lines(made: Study) -> list[str]:
    """The two verdicts, what speaks beside them, and notes."""
    answers, groups = made.verdicts, made.apart
    rhos = "; ".join(
        f"{entry['forecast']} with {entry['measure']} {entry['spearman']:.2f} [{entry['low']:.2f}, "
        f"{entry['high']:.2f}]"
        for entry in made.correlations
        if entry["measure"] != "damage"
    )
    sets = "; ".join(
        f"{row['kind']} {row['damage']:.3f}"
        + ("" if row["kind"] == "in" else f" [{row['low']:+.3f}, {row['high']:+.3f}]")
        for row in made.sets.to_dict("records")
    )
    return [
        f"do rows from outside need more steps? {answers['steps']}",
        f"is their trade-off better (less damage at the goal)? {answers['damage']} (at equal nats "
        f"forgotten: {answers['matched']}; per nat: {answers['per_nat']})",
        f"damage of whole kinds unlearned at once, and how much more than in: {sets}",
        f"Spearman over all rows: {rhos}",
        f"groups of one difficulty instead of mixed ones: damage {groups['homogeneous']:.3f} "
        f"instead of {groups['mixed']:.3f}, difference [{groups['low']:.3f}, "
        f"{groups['high']:.3f}]; does it help? {groups['helps']}",
        *(f"note: {note}" for note in made.notes),
    ]
