"""The page's section on edits and trainings: what each did, and whether its record still holds."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.explorer.blocks import Block, axis, column, finite, table, text
from analysis.report import words
from analysis.report.groups import groups
from analysis.report.verdicts import tone
from influence.errors import StoreError
from unlearn.record.edit_record import RECORD, EditRecord
from unlearn.record.plain import parse_object, read_plain

if TYPE_CHECKING:
    from unlearn.record.folder import Verification

NATS = "nats per token"
#: Rows of an edit that are shown one by one, and edits whose rows are.
ROWS, EDITS = 200, 20
#: Edits whose answer is said in words, the newest ones.
ANSWERS = 3
_OVERVIEW = (
    column("no.", "whole", "", "Its place in the run's record of edits."),
    column("time", "text", "UTC", "When it was saved."),
    column("what", "text", "", "What was asked of the rows."),
    column("rows", "whole", "", "How many rows were asked for."),
    column("by", "text", "", "The method."),
    column(
        "record",
        "text",
        "",
        "Whether its files are still what the record of edits says. No figure is shown of a folder "
        "whose edit.json is not the one that was recorded.",
    ),
    column("their loss before", "number", NATS, "Mean loss of these rows before."),
    column("after", "number", NATS, "Mean loss of these rows after."),
    column("if never seen", "number", NATS, "Expected of a model that never saw them."),
    column("others before", "number", NATS, "Mean loss of a sample of the untouched rows before."),
    column("after", "number", NATS, "Mean loss of a sample of the untouched rows after."),
    column("others' rise", "percent", "%", "Relative rise of the untouched rows' mean loss."),
    column("held-out after", "number", NATS, "Mean loss after on rows that were never seen."),
    column("cost", "number", "row gradients", "A forward and backward of one row, or 3 forwards."),
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


def blocks(directory: Path) -> list[Block]:
    """What the run's record of edits says; no blocks where there is none."""
    from unlearn.record.chain import checked_manifest, read_chain
    from unlearn.record.verify import verify

    chain = read_chain(directory, checked_manifest(directory))
    verified = verify(directory)
    if not chain.lines and verified.passed:
        return []
    said = (
        "The record of edits and the files of every edit are as they were saved (unlearn verify)."
    )
    if verified.replaced:
        said += " Folders that a later edit replaced hold that one's files."
    if not verified.passed:
        said = f"The record of edits does not hold: {'; '.join(verified.problems[:5])}."
    state = text(said, "good" if verified.passed else "bad")
    if not chain.lines:
        return [state]
    entries = [(place, entry, record_of(entry)) for place, entry in chain.lines]
    numbers = {place: entry["number"] for place, entry in chain.lines}
    rows = [
        _line(entry, record, _state(place, entry, numbers, verified))
        for place, entry, record in entries
    ]
    known = [(entry, record) for _, entry, record in entries if record is not None]
    answers = [each for pair in known[: -ANSWERS - 1 : -1] for each in _answers(*pair)]
    # a record that does not hold is said before what it says
    found = [*answers, state] if verified.passed else [state, *answers]
    found.append(table("Edits and trainings", _OVERVIEW, rows))
    trade = [point for pair in known if (point := _trade(*pair)) is not None]
    if len(trade) > 1:
        found.append(_trade_off(trade))
    for pair in known[-EDITS:]:
        found += _details(*pair)
    return found


def record_of(entry: dict[str, Any]) -> EditRecord | None:
    """The record of a line of the chain; None where its folder does not hold that very one.

    It is known by its SHA-256. It may be gone or changed, or a later edit may lie there.
    """
    try:
        data = read_plain(Path(entry["edit"]) / RECORD)
        if hashlib.sha256(data).hexdigest() != entry["record"]:
            return None
        return EditRecord.salvaged(parse_object(data))
    except (OSError, ValueError, RecursionError, StoreError):
        return None


def _state(
    place: int, entry: dict[str, Any], numbers: dict[int, int], verified: Verification
) -> str:
    """What the verification says of a line; `numbers` are those of all lines, by their place."""
    if place in verified.damaged:
        # a folder that cannot be reached is gone too
        return "NOT verified" if os.path.isdir(entry["edit"]) else "its files are gone"
    later = verified.replaced.get(place)
    if verified.of_record:
        held = "its files hold" if later is None else "replaced later"
        return f"{held}, the record of edits does not hold"
    return "verified" if later is None else f"replaced by no. {numbers[later]}"


def _line(entry: dict[str, Any], record: EditRecord | None, state: str) -> list[Any]:
    method, known = None, [None] * 8
    if record is not None:
        method, losses = record.method.name, record.losses
        known = [
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
    return [*first, method, state, *known, str(entry["edit"])]


def _answers(entry: dict[str, Any], record: EditRecord) -> Iterator[Block]:
    """What an edit did to its rows and to the others, in words (`analysis.report.words`)."""
    name = f"Edit {entry['number']}: {entry['kind']}"
    for group in groups(record):
        said = f"{name}. {words.headline(group, record)} {words.others(record)}"
        yield text(said, tone(group.verdict))


def _trade(entry: dict[str, Any], record: EditRecord) -> tuple[str, float, float] | None:
    """An edit as (name, rise of its rows' loss, relative rise of the others'), if both are known."""
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
