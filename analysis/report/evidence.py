"""The page's section on what the edit did not aim at: lines, marks and sentences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from analysis.report.drawings import Axis
from analysis.report.groups import measurements
from analysis.report.verdicts import NOT_MEASURED, finite, tone
from analysis.report.words import count, measured, share, text
from unlearn.record.edit_record import EditRecord, MeasurementRecord, RowMeasured
from unlearn.unseen import FAITHFUL
from unlearn.words import MEASURED

#: What a measurement is, by its name, for people who do not read code.
EXPLAINED = {
    "generations": "Repeated when prompted: the adapter is given what a row begins with and goes on "
    "by itself; the share of the row's words that it then says in the row's order, at most "
    "128 tokens.",
    "membership": "Told from held-out rows: of all pairs of a changed and a held-out row, the share in "
    "which the changed one looks more like a row that was trained on, by its least likely tokens "
    "(0.50: a coin).",
    "probe-losses": "Loss of probe rows: paraphrases of the rows, or questions about them, that were "
    "given with the edit.",
    "probe-generations": "Repeated when probed: the same as above, of probe rows.",
}
#: Rows that a sentence names, at most.
NAMED = 3


def section(record: EditRecord) -> dict[str, Any] | None:
    """What the template shows, None where the record has no such measurements."""
    found = measurements(record)
    if not found:
        return None
    shown = [each for each in found if finite(each.after) is not None]
    sentences = [EXPLAINED[each.name] for each in shown if each.name in EXPLAINED]
    return {
        "lines": [_line(each) for each in shown],
        "compared": any(finite(each.unseen) is not None for each in shown),
        "how": " ".join(sentences),
        "remarks": [*_how_compared(record, shown), *_unmeasured(found), *_most_left(shown)],
    }


def _line(found: MeasurementRecord) -> tuple[Any, ...]:
    """One measurement: title, unit, axis, marks, cells, verdict and its colour."""
    values = (found.before, found.after, found.unseen)
    of_share = found.unit is not None and "nats" not in found.unit
    axis = Axis(0.0, 1.0, (0.0, 0.5, 1.0), 150) if of_share else Axis.over(values, 150)
    names = ("before", "after", "goal")
    marks = {name: axis.x(value) for name, value in zip(names, values, strict=True)}
    rows = f"{finite(found.rows):,.0f}" if finite(found.rows) is not None else NOT_MEASURED
    cells = [rows, *(measured(value) for value in values[: 3 if found.unseen is not None else 2])]
    if found.unseen is not None:
        low, high = signed(found.low), signed(found.high)
        cells.append(f"{signed(found.difference)} [{low}, {high}]")
    title = MEASURED.get(found.name, text(found.name, 40))
    word = text(found.verdict or NOT_MEASURED, 40)
    return title, text(found.unit or "", 40), axis, marks, cells, word, tone(word)


def signed(value: float | None) -> str:
    """A difference, with its sign."""
    number = finite(value)
    return "?" if number is None else f"{number:+.2f}" if abs(number) < 1e6 else f"{number:+.2g}"


def _how_compared(record: EditRecord, shown: Sequence[MeasurementRecord]) -> list[str]:
    """What the values are held against."""
    if not shown:
        return []
    models = None if record.evidence is None else finite(record.evidence.models)
    if not models:
        return [
            "Not compared: no models that never saw the rows were trained for this edit, so these "
            "numbers alone do not say whether the rows are forgotten. Training again does (below)."
        ]
    level = None if record.evidence is None else record.evidence.level
    sentences = [
        f"Unseen: the mean of {count(models, 'small model')} trained without the rows. [ ]: the "
        "difference to a model trained again without them, in "
        f"{share(level)} of a bootstrap over rows and models. As unseen: the interval includes 0 and "
        "is narrow, or is so near to 0 that it counts as none (0.1 of what is repeated, 0.2 of the "
        "share of pairs, a tenth of a loss; choices)."
    ]
    learnt = None if record.expected is None else finite(record.expected.faithfulness)
    if learnt is not None and learnt < FAITHFUL:
        sentences.append(
            f"A small model trained with the rows learnt only {share(max(0.0, learnt))} of what the "
            "adapter knew of them: the comparison is of little worth."
        )
    return sentences


def _unmeasured(found: Sequence[MeasurementRecord]) -> list[str]:
    """Why something was not measured."""
    return [
        f"{NOT_MEASURED.capitalize()}: {MEASURED.get(each.name, text(each.name, 40))} "
        f"({text(each.reason or 'no reason is recorded')})."
        for each in found
        if finite(each.after) is None
    ]


def _most_left(shown: Sequence[MeasurementRecord]) -> list[str]:
    """The rows of which most is left, where that is more than in models that never saw them."""
    sentences = []
    for each in shown:
        if each.verdict != "more than unseen":
            continue
        sign = -1 if each.unit is not None and "nats" in each.unit else 1
        excess = [(sign * left, row) for row in each.by_row or () if (left := _left(row))]
        most = sorted(excess, key=lambda pair: -pair[0])[:NAMED]
        named = [
            f"{text(row.id, 80)} ({measured(row.after)} for {measured(row.unseen)})"
            for left, row in most
            if left > 0
        ]
        if named:
            title = MEASURED.get(each.name, text(each.name, 40))
            sentences.append(f"Most above the unseen models, {title}: {', '.join(named)}.")
    return sentences


def _left(row: RowMeasured) -> float | None:
    """How far a row is from the models that never saw it."""
    after, unseen = finite(row.after), finite(row.unseen)
    return None if after is None or unseen is None else after - unseen
