"""Edits and forecasts shown in notebooks: a line of text, and a small card of HTML.

The cards are those of `influence.cards`: all text is escaped there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from influence.cards import card, line, number

if TYPE_CHECKING:
    from unlearn.difficulty.forecast import Forecast
    from unlearn.record.edit_record import EditRecord

#: Lines of a table that a card shows.
LINES = 5


def edit_line(record: EditRecord) -> str:
    """An edit on one line: what was asked, how it was made, and the losses it moved."""
    losses = record.losses
    return line(
        "Edit",
        f"{record.kind} {_rows(len(record.requests))}",
        str(record.method.name or "?"),
        f"edited {_moved(losses.edited.before, losses.edited.after)}",
        f"retained {_moved(losses.retained.before, losses.retained.after)} nats per token",
        "not saved: too much damage" if _failed(record) else "",
    )


def edit_card(record: EditRecord) -> str:
    """An edit as a card: its losses before and after, in nats per token."""
    losses = record.losses
    sets: dict[str, Any] = {
        "edited": losses.edited,
        "retained": losses.retained,
        "held-out": losses.heldout,
    }
    table = [
        (name, number(each.rows, ",d"), *map(number, (each.before, each.after)))
        for name, each in sets.items()
        if each is not None and each.rows
    ]
    guard = record.guard
    allowed = "" if guard.max_damage is None else f", {guard.max_damage:.1%} allowed"
    facts = {
        "how": record.method.name,
        "stopped": record.stopped,
        "loss to reach": str(number(losses.edited.target)) if losses.edited.target else "",
        "rise of the retained loss": "" if guard.damage is None else f"{guard.damage:.1%}{allowed}",
    }
    return card(
        f"Edit: {record.kind} {_rows(len(record.requests))}",
        facts,
        ("nats per token", "rows", "before", "after"),
        table,
        "The retained rows lost too much: .save() refuses without force."
        if _failed(record)
        else "",
    )


def forecast_line(forecast: Forecast) -> str:
    """A forecast on one line."""
    steps = forecast.table["steps"].to_numpy(float)
    middle = number(float(np.median(steps))) if len(steps) else "–"
    return line(
        "Forecast",
        f"{len(forecast):,} units",
        f"median {middle} steps of {forecast.protocol.get('optimizer', '?')}",
        f"recommended {_advice(forecast)}" if len(steps) else "",
        "calibrated" if forecast.calibration is not None else "",
    )


def forecast_card(forecast: Forecast) -> str:
    """A forecast as a card: what is forecast, and its first units."""
    protocol = forecast.protocol
    facts = {
        "ascent": f"{protocol.get('optimizer', '?')}, at most {protocol.get('steps', '?')} steps, "
        f"until the {protocol.get('target', '?')} loss",
        "recommended": _advice(forecast),
        "retained rows' loss": f"{forecast.retained_loss:.3g} nats per token",
        "calibrated": "" if forecast.calibration is None else "yes",
    }
    table = [
        (
            row["id"],
            number(row["steps"]),
            f"{row['steps_low']:.3g} to {row['steps_high']:.3g}",
            number(row["damage"], "+.2e"),
            row["recommended"],
        )
        for row in forecast.table.head(LINES).to_dict("records")
    ]
    more = len(forecast) - LINES
    return card(
        f"Forecast: {len(forecast):,} units",
        facts,
        ("unit", "steps", "interval", "damage (nats per token)", "recommended"),
        table,
        f"and {more:,} more: .table" if more > 0 else "",
    )


def _advice(forecast: Forecast) -> str:
    """How many units each way of unlearning is recommended for."""
    counts = forecast.table["recommended"].value_counts()
    return ", ".join(f"{name} for {count:,}" for name, count in counts.items())


def _rows(count: int) -> str:
    return f"{count:,} row{'s' * (count != 1)}"


def _failed(record: EditRecord) -> bool:
    return record.guard.passed is False and not record.guard.forced


def _moved(before: float | None, after: float | None) -> str:
    return f"{number(before)} to {number(after)}"
