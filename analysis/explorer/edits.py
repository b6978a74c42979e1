"""The page's section on edits and trainings: what each did, and whether its record still holds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from analysis.explorer.blocks import Block, axis, column, finite, table, text
from influence.errors import StoreError
from influence.manifest import Manifest
from unlearn.record.edit_record import RECORD, EditRecord
from unlearn.record.plain import parse_object, read_plain

NATS = "nats per token"
#: Rows of an edit that are shown one by one, and edits whose rows are.
ROWS, EDITS = 200, 20
_OVERVIEW = (
    column("no.", "whole", "", "Its place in the run's record of edits."),
    column("time", "text", "UTC", "When it was saved."),
    column("what", "text", "", "What was asked of the rows."),
    column("rows", "whole", "", "How many rows were asked for."),
    column("by", "text", "", "The method."),
    column("their loss before", "number", NATS, "Mean loss of these rows before."),
    column("after", "number", NATS, "Mean loss of these rows after."),
    column("if never seen", "number", NATS, "Expected of a model that never saw them."),
    column("others before", "number", NATS, "Mean loss of a sample of the untouched rows before."),
    column("after", "number", NATS, "Mean loss of a sample of the untouched rows after."),
    column("others' rise", "percent", "%", "Relative rise of the untouched rows' mean loss."),
    column("held-out after", "number", NATS, "Mean loss after on rows that were never seen."),
    column("cost", "number", "row gradients", "A forward and backward of one row, or 3 forwards."),
    column("record", "text", "", "Whether its files are still what the record says."),
    column("folder", "text", "", "Where its adapter was saved."),
)
_MEASURED = (
    column("measurement", "text", "", "Something that the edit did not aim at."),
    column("of", "text", "", "What it is a mean of."),
    column("rows", "whole", "", "Rows that it is of."),
    column("before", "number", "", "Its value under the adapter before."),
    column("after", "number", "", "Its value after."),
    column("never seen", "number", "", "Mean under models that never saw the rows."),
    column("difference", "number", "", "After, less never seen."),
    column("from", "number", "", "Lower end of its interval, nine times of ten."),
    column("to", "number", "", "Upper end of its interval."),
    column(
        "verdict", "text", "", "By the rule of unlearn/evidence.py; or why it was not measured."
    ),
)
_ROWS = (
    column("id", "id", "", "The row."),
    column("what", "text", "", "What was asked of it."),
    column("loss before", "number", NATS, "Its loss before; of its new content, if it has one."),
    column("after", "number", NATS, "Its loss after."),
    column("to reach", "number", NATS, "The loss that it should have after."),
    column("base", "number", NATS, "Its loss under the base model, without any adapter."),
    column("recited before", "percent", "% of its text", "Share that greedy decoding gives alone."),
    column("after", "percent", "% of its text", "The same after."),
    column("answer before", "number", "ROUGE-L", "How much of its answer the adapter still gave."),
    column("after", "number", "ROUGE-L", "The same after."),
    column("never seen", "number", "ROUGE-L", "The same of models that never saw it."),
)


def blocks(directory: Path, manifest: Manifest) -> list[Block]:
    """What the run's record of edits says; no blocks where there is none."""
    from unlearn.record.chain import read_chain
    from unlearn.record.verify import verify

    chain = read_chain(directory, manifest)
    if not chain.lines and not chain.problems:
        return []
    verified = verify(directory)
    said = (
        "The record of edits and the files of every edit are as they were saved (unlearn verify)."
    )
    if not verified.passed:
        said = f"The record of edits does not hold: {'; '.join(verified.problems[:5])}."
    found = [text(said, "good" if verified.passed else "bad")]
    entries = [(entry, record_of(Path(entry["edit"]))) for _, entry in chain.lines]
    rows = [_line(entry, record, verified.problems) for entry, record in entries]
    found.append(table("Edits and trainings", _OVERVIEW, rows))
    trade = [point for pair in entries if (point := _trade(*pair)) is not None]
    if len(trade) > 1:
        found.append(_trade_off(trade))
    for entry, record in entries[-EDITS:]:
        if record is not None:
            found += _details(entry, record)
    return found


def record_of(folder: Path) -> EditRecord | None:
    """What can be read of the record of an edit; None where there is none any more."""
    try:
        return EditRecord.salvaged(parse_object(read_plain(folder / RECORD)))
    except (OSError, ValueError, RecursionError, StoreError):
        return None


def _line(entry: dict[str, Any], record: EditRecord | None, problems: list[str]) -> list[Any]:
    folder = str(entry["edit"])
    sound = not any(folder in each or f"line {entry['number']}:" in each for each in problems)
    state = "verified" if sound else "NOT verified"
    known: list[Any] = [None] * 9
    if record is None:
        state = "its files are gone" if not Path(folder).is_dir() else state
    else:
        losses = record.losses
        known = [
            record.method.name,
            losses.edited.before,
            losses.edited.after,
            losses.edited.target,
            losses.retained.before,
            losses.retained.after,
            losses.retained.change,
            None if losses.heldout is None else losses.heldout.after,
            record.cost.total,
        ]
    first = [entry["number"], entry["time"], entry["kind"], len(entry["ids"])]
    return [*first, *known, state, folder]


def _trade(entry: dict[str, Any], record: EditRecord | None) -> tuple[str, float, float] | None:
    """An edit as (name, rise of its rows' loss, relative rise of the others'), if both are known."""
    if record is None:
        return None
    edited, change = record.losses.edited, finite(record.losses.retained.change)
    before, after = finite(edited.before), finite(edited.after)
    if change is None or before is None or after is None:
        return None
    return f"{entry['number']}: {entry['kind']}, {record.method.name}", after - before, change


def _trade_off(points: list[tuple[str, float, float]]) -> Block:
    names, gained, lost = zip(*points, strict=True)
    series = {
        "name": "edits",
        "x": list(gained),
        "y": [100 * value for value in lost],
        "names": list(names),
    }
    return {
        "kind": "plot",
        "plot": "scatter",
        "title": "What forgetting cost the other rows",
        "help": "Each point is an edit. Right: its rows are forgotten more. Up: others lost more.",
        "x": axis("rise of the edited rows' mean loss", NATS),
        "y": axis("rise of the retained rows' mean loss", "%"),
        "series": [series],
    }


def _details(entry: dict[str, Any], record: EditRecord) -> Iterator[Block]:
    """What was measured of one edit, and row by row."""
    name = f"Edit {entry['number']}: {entry['kind']}, {record.method.name}"
    measurements = () if record.evidence is None else record.evidence.measurements or ()
    if measurements:
        yield table(f"{name}. What it did not aim at", _MEASURED, map(_measured, measurements))
    answers = {
        row.id: row
        for each in measurements
        if each.name == "generations"
        for row in each.by_row or ()
    }
    rows = []
    for row in record.rows[:ROWS]:
        said = answers.get(row.id)
        values = (row.before, row.after, row.target, row.base)
        recited = (row.extraction_before, row.extraction_after)
        given = (None,) * 3 if said is None else (said.before, said.after, said.unseen)
        rows.append([row.id, row.action, *values, *recited, *given])
    if rows:
        more = f" (the first {ROWS} of {len(record.rows)})" if len(record.rows) > ROWS else ""
        yield table(f"{name}. Its rows{more}", _ROWS, rows)


def _measured(each: Any) -> list[Any]:
    verdict = " ".join(filter(None, (each.verdict, each.reason and f"({each.reason})")))
    numbers = (each.before, each.after, each.unseen, each.difference, each.low, each.high)
    return [each.name, each.unit, each.rows, *numbers, verdict]
