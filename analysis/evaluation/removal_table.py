"""The table of a removal, for a person: how much worse the queries are without the named rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from influence.messages import printable

#: Characters of a method's name that are shown, the last ones: of a file they tell it from others.
NAME = 17


def tables(record: Mapping[str, Any]) -> list[Table]:
    """A table for every share, the method first whose rows are missed most."""
    shares = dict.fromkeys(entry["share"] for entry in record["removals"])
    return [_of_share(record, share) for share in shares]


def _of_share(record: Mapping[str, Any], share: float) -> Table:
    entries = [entry for entry in record["removals"] if entry["share"] == share]
    rows = entries[0]["rows"]
    title = f"without {rows} of {record['rows']} rows ({share:.3g}), rise of the loss"
    table = Table(
        title=Text(title),
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
    )
    table.add_column("named by", overflow="fold")
    interval = f"{record['level']:.0%} interval"
    for head in ("rise", interval, "over random", interval):
        table.add_column(head, justify="right", no_wrap=True)
    for entry in sorted(entries, key=lambda entry: -entry["rise"]["mean"]):
        name = printable(entry["method"]).replace("\n", " ")
        shown = name if len(name) <= NAME else f"...{name[3 - NAME :]}"
        table.add_row(Text(shown), *_cells(entry["rise"]), *_cells(entry["over_random"]))
    return table


def _cells(part: Mapping[str, float | None] | None) -> tuple[str, str]:
    if part is None:
        return "", ""
    interval = "" if part["low"] is None else f"{part['low']:+.4f} to {part['high']:+.4f}"
    return f"{part['mean']:+.4f}", interval


def lines(record: Mapping[str, Any]) -> list[str]:
    """What the tables are about, and which methods name too few rows."""
    queries, seeds = len(record["query_ids"]), record["request"]["seeds"]
    draws = record["request"]["draws"]
    said = [
        f"mean loss of {queries} quer{'y' if queries == 1 else 'ies'}, {record['unit']}; with all "
        f"rows {record['reference']['loss']:.4f}; {seeds} seed{'s' * (seeds > 1)} of the training, "
        f"{draws} draw{'s' * (draws > 1)} of random rows; intervals over queries"
    ]
    said += [f"{method} is left out: {reason}" for method, reason in record["left_out"].items()]
    for entry in record["removals"]:
        if entry["positive"] is not None and entry["positive"] < entry["rows"]:
            said.append(
                f"{entry['method']} names {entry['rows']} of {record['rows']} rows, of which "
                f"{entry['positive']} helped by its own scores"
            )
    return [printable(line).replace("\n", " ") for line in said]
