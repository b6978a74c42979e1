"""Texts for a person: of methods, forecasts of difficulty, edits and trainings."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from influence import console

if TYPE_CHECKING:  # a command's help does not wait for torch
    from unlearn.difficulty import Forecast
    from unlearn.record.edit_record import (
        CostRecord,
        EditRecord,
        Guard,
        MeasurementRecord,
        RowRecord,
    )

#: What an edit of each kind does to rows.
DONE = {"remove": "removed", "relabel": "relabelled", "correct": "corrected", "mixed": "changed"}
#: An edit's move over the adapter's length, and the fall of the retained rows' loss, beyond which it
#: is warned of. Choices: edits of four worlds moved by 6 to 37 % and lowered it by at most 1.2 %, that
#: of SmolLM2's author moved by 63 % (benchmarks/README.md, "The loss of unseen rows").
FAR, FELL = 0.5, 0.05
#: Share of the change of the weights that rounding must leave. A choice.
SWALLOWED = 0.9
#: A row is short of its goal where its loss is more than this from it, relative to it.
SHORT = 0.1
#: Rows that a table shows, and ids that a line names.
SHOWN_ROWS, SHOWN_IDS = 10, 5
#: What an edit did not aim at, by the name of the measurement (`unlearn.evidence`).
MEASURED = {
    "generations": "repeated when prompted",
    "membership": "told from held-out rows",
    "probe-losses": "loss of probe rows",
    "probe-generations": "repeated when probed",
}


# ---- methods ---------------------------------------------------------------------------------


def methods_text(table: Sequence[Mapping[str, Any]]) -> str:
    """The methods of `table`, which has what their `describe` returns, each in a few lines."""
    lines = [line for row in table for line in _method_lines(row)]
    return "\n".join([*lines, "", "unlearn methods --guide says how to choose a learning rate."])


def _method_lines(row: Mapping[str, Any]) -> list[str]:
    from unlearn.methods.methods import METHODS

    composed = ("targets", "forget", "retain")
    parts = [f"{part} {row[part]}" for part in composed if row[part] is not None]
    parts += [f"combine {row['combine']}"] * (row["retain"] is not None)
    parts += [f"finish {row['finish']}"] * (row["finish"] is not None)
    parameters = inspect.signature(METHODS[row["name"]]).parameters
    numbers = [f"{name}={parameter.default}" for name, parameter in parameters.items()]
    parts += [f"--set {', '.join(numbers)}"] * bool(numbers)
    needs = [f"retained rows ({row['retain_rows']})"] * row["needs_retain"]
    needs += ["the adapter before"] * row["needs_reference"]
    cost, costs = row["cost_per_step"], []
    if row["forget"] is not None:
        costs.append(f"{cost['per_forget_row']:.3g} row-gradients for each forget row")
    if row["needs_retain"]:
        costs.append(f"{cost['per_retain_row']:.3g} for each retained row")
    rate = f"first step {row['stride']:.1%} of the adapter's length"
    if row["lr"] == "auto":
        rate = "automatic rate"
    needed = " and ".join(needs) or "the forget rows alone"
    return [
        f"{row['name']}: {row['title']}",
        f"    {row['source']}",
        f"    {'; '.join(parts)}",
        f"    needs {needed}; a step costs {' and '.join(costs)}",
        f"    {row['optimizer']}, {rate}; until {row['until']}, at most {row['steps']} steps",
    ]


# ---- difficulty ------------------------------------------------------------------------------


def difficulty_text(forecast: Forecast, out: Path) -> str:
    """A forecast: the hardest rows, the recommendations, what was measured, the calibration."""
    table = forecast.table.sort_values("steps", ascending=False, kind="stable")
    protocol, measured = forecast.protocol, "measured_steps" in table
    head = f"{'steps':>20}  {'damage, nats per token':>26}"
    head += f"  {'measured':>14}" if measured else ""
    head += f"  {'how':<8}" if forecast.screening else ""
    lines = [f"{head}  do       id"]
    shown = table.head(SHOWN_ROWS).itertuples()
    lines += [_difficulty_line(row, measured, bool(forecast.screening)) for row in shown]
    if len(table) > SHOWN_ROWS:
        lines.append(f"... and {len(table) - SHOWN_ROWS} more, all in {out}")
    target = "expected of a model that never saw the row"
    if protocol["target"] == "base":
        target = "of the base model"
    counts = forecast.table["recommended"].value_counts()
    recommended = ", ".join(f"{method} {count}" for method, count in counts.items())
    lines += [
        "",
        f"hardest first; ascent by {protocol['optimizer']}, rate {protocol['lr']:g}, "
        f"to the loss {target}; [ ] should hold nine rows of ten",
        f"recommended: {recommended} (ascent where it costs at most {forecast.max_damage:.1%} of "
        f"the sampled rows' mean loss, {forecast.retained_loss:.3f} nats per token)",
    ]
    if measured and forecast.calibration is None:
        lines += _error_lines(forecast)
    lines += _calibration_lines(forecast)
    lines += _screening_lines(forecast)
    lines.append(f"{out}: {_rows(len(table))} and their features")
    return console.printable("\n".join(lines))


def _difficulty_line(row: Any, measured: bool, screened: bool) -> str:
    """One row of the table of difficulty, from pandas' `itertuples`."""
    from math import isfinite, isnan

    steps, damage = "beyond", "unknown"
    if isfinite(row.steps):
        steps = f"{row.steps:.1f} [{row.steps_low:.1f}, {row.steps_high:.1f}]"
    if isfinite(row.damage):
        damage = f"{row.damage:+.3f} [{row.damage_low:+.3f}, {row.damage_high:+.3f}]"
    line = f"{steps:>20}  {damage:>26}"
    if measured:
        took = f"{row.measured_steps:.1f} {row.measured_damage:+.3f}"
        line += f"  {'-' if isnan(row.measured_steps) else took:>14}"
    line += f"  {row.how:<8}" if screened else ""
    return f"{line}  {row.recommended:<8} {row.id}".replace("\n", " ")


def _error_lines(forecast: Forecast) -> list[str]:
    """How far the forecast was from what was measured, where three rows or more were."""
    import numpy as np

    both: Any = forecast.table[["steps", "measured_steps", "damage", "measured_damage"]]
    both = both[np.isfinite(both).all(axis=1) & (both["measured_steps"] > 0)]
    if len(both) <= 2:
        return []
    error = (both["steps"] / both["measured_steps"] - 1).abs().median()
    rank = both.corr("spearman")
    steps = rank.loc["steps", "measured_steps"]
    damage = rank.loc["damage", "measured_damage"]
    return [
        f"measured against forecast, {len(both)} rows: median error of steps {error:.0%}; "
        f"Spearman {steps:.2f} (steps), {damage:.2f} (damage)"
    ]


def _screening_lines(forecast: Forecast) -> list[str]:
    """How many rows were looked at closely, and how wide the intervals of the others are."""
    screening, table = forecast.screening, forecast.table
    if screening is None:
        return []
    lines = [
        f"{screening['close']} rows were looked at closely, {screening['screened']} screened by "
        f"them, from {', '.join(screening['features'])}: their [ ] should hold what a close look "
        "would say of nine rows of ten"
    ]
    for name in ("steps", "damage"):
        learnt, some = screening[name], table[table[name] > 0]
        if learnt["median_relative_error"] is None:
            lines.append(
                f"{name} of screened rows are not told: of {learnt['taught']} close looks that "
                "reached their target nothing is learnt; look at more (--screen N)"
            )
            continue
        spread: Any = some[f"{name}_high"] - some[f"{name}_low"]
        form = "{:.2g} nats per token"
        if name == "steps":
            spread, form = spread / some["steps"], "{:.0%} of the steps"
        medians = spread.groupby(some["how"]).median()
        wide = {how: form.format(width) for how, width in medians.items()}
        lines.append(
            f"{name} of screened rows: median width of [ ] {wide.get('screened', '-')} (close "
            f"looks: {wide.get('close', '-')}); out of fold Spearman {learnt['spearman']:.2f}, "
            f"median error {learnt['median_relative_error']:.0%}"
        )
    return lines


def _calibration_lines(forecast: Forecast) -> list[str]:
    """How good the corrected forecasts are, and what the corrections lean on."""
    calibration = forecast.calibration
    if calibration is None:
        return []
    rank, before = calibration.spearman, calibration.before
    lines = [
        f"calibrated on {calibration.measured} measured rows; out of fold (and before): "
        f"Spearman {rank['steps']:.2f} ({before['steps']:.2f}) of steps, "
        f"{rank['damage']:.2f} ({before['damage']:.2f}) of damage; "
        f"median error of steps {calibration.error:.0%}"
    ]
    for name, importances in calibration.importances.items():
        if rank[name] < before[name] - 0.02:
            lines.append(
                f"warning: the correction of {name} does harm; measure more rows (--calibrate N), "
                "or do without"
            )
        features = ", ".join(list(importances)[:4])
        lines.append(f"what the correction of {name} leans on: {features}")
    return lines


# ---- edits and trainings ---------------------------------------------------------------------


@dataclass(frozen=True)
class MeanLosses:
    """Mean losses of some rows, nats per token, None where there is none."""

    title: str
    rows: int | None
    before: float | None
    target: float | None = None
    after: float | None = None
    linear: float | None = None


def edit_text(record: EditRecord) -> str:
    """What an edit or a training did."""
    method = record.method.settings
    done = f"{record.method.name} against" if "steps_taken" in method else DONE[record.kind]
    lines = [f"{done} {_rows(len(record.rows))}: {record.stopped}"]
    lines += _start_lines(record)
    if method.get("lr_last") is not None:
        lines.append(
            f"learning rate {method['lr_first']:.3g}, {method['lr_last']:.3g} in the last step"
        )
    if method.get("kept") is not None:
        lines.append(f"{method['finish']}: {method['kept']:+.3g} times the whole move was kept")
    losses = _means_by_kind(record.rows)
    retained, held_out = record.losses.retained, record.losses.heldout
    losses.append(
        MeanLosses("retained rows (sample)", retained.rows, retained.before, after=retained.after)
    )
    if held_out is not None:
        losses.append(
            MeanLosses("held-out rows", held_out.rows, held_out.before, after=held_out.after)
        )
    columns = {"before": "before", "after": "after", "goal": "target"}
    lines += ["", _loss_table(losses, columns), ""]
    removed = [row for row in record.rows if row.action == "remove"]
    renewed = [row for row in record.rows if row.action != "remove"]
    lines += _outcome_lines("removed rows", removed) + _outcome_lines("new contents", renewed)
    lines.append(f"{_damage(record.guard)}; {_cost(record.cost)}")
    lines += _expectation_lines(record) + _shipped_lines(record) + _warnings(record)
    lines += _evidence_lines(record)
    return console.printable("\n".join(lines))


def _expectation_lines(record: EditRecord) -> list[str]:
    """What is expected of a model that never saw the rows, and where that is from."""
    found = record.expected
    if found is None or found.loss is None or found.low is None or found.high is None:
        return []
    return [
        "expected of a model that never saw these rows: "
        f"{found.loss:.2f} ({found.low:.2f} to {found.high:.2f}), by {found.trainings} small "
        f"trainings ({found.row_gradients} of the row-gradients)"
    ]


def _evidence_lines(record: EditRecord) -> list[str]:
    """What the edit did not aim at, before, after, and under models that never saw the rows."""
    if record.evidence is None or not record.evidence.measurements:
        return []
    found = record.evidence.measurements
    head = f"{'what the edit did not aim at':<42}{'rows':>6}"
    head += "".join(f"{column:>9}" for column in ("before", "after", "unseen"))
    lines = ["", f"{head}   after - unseen, {record.evidence.level or 0:.0%}"]
    lines += [_evidence_line(each) for each in found if each.after is not None]
    for each in found:
        if each.after is None:
            lines.append(f"{MEASURED.get(each.name, each.name)}: not measured: {each.reason}")
    if not record.evidence.models:
        lines.append(
            "not compared: no models that never saw the rows were trained here. One that is, and "
            "its comparison: unlearn retrain --run RUN --ids ... --out DIR; "
            "analysis report --edit EDIT --retrained DIR --out FILE.html"
        )
    return lines


def _evidence_line(found: MeasurementRecord) -> str:
    """One measurement, as a line of text."""
    title = f"{MEASURED.get(found.name, found.name)} ({found.unit})"
    values = (found.before, found.after, found.unseen)
    line = f"{title:<42}{found.rows or 0:>6}" + "".join(f"{_number(v):>9}" for v in values)
    if found.difference is None or found.low is None or found.high is None:
        return line
    return (
        f"{line}   {found.difference:+.2f} [{found.low:+.2f}, {found.high:+.2f}]  {found.verdict}"
    )


def _shipped_lines(record: EditRecord) -> list[str]:
    """The edited rows' loss on merged and rounded weights, and what rounding left."""
    shipped = record.shipped
    if shipped is None or shipped.edited_after is None or shipped.kept is None:
        return []
    line = (
        f"merged into the base as {shipped.dtype}: mean loss of the edited rows "
        f"{shipped.edited_after:.2f}"
    )
    if shipped.kept < SWALLOWED:
        line += f"; warning: rounding swallows {1 - shipped.kept:.0%} of the change of the weights"
    return [line]


def _warnings(record: EditRecord) -> list[str]:
    """What an edit should not have done, each with what to do."""
    lines = []
    if record.reached is False:
        lines.append("warning: the goal was not reached")
    moved, damage, cost = record.delta.relative, record.guard.damage, record.cost
    if moved is not None and moved > FAR:
        lines.append(
            f"warning: the move has {moved:.0%} of the adapter's length (more than {FAR:.0%}): "
            "much of the adapter is another one now. Look at what it says (analysis evaluate), "
            "or retrain"
        )
    if damage is not None and damage < -FELL:
        lines.append(
            f"warning: the retained rows' loss fell by {-damage:.1%}: the edit trained on them, "
            "which nobody asked for. Take fewer steps, or --rest 0"
        )
    if cost.ratio is not None and cost.ratio > 1:
        lines.append(_retraining_is_cheaper(cost.ratio))
    return lines


def _retraining_is_cheaper(ratio: float) -> str:
    """That retraining, the exact answer, takes less work, and how to have it."""
    return (
        f"note: retraining takes less work ({1 / ratio:.0%} of it) and is the exact answer: "
        "unlearn retrain --run RUN --ids ... --out DIR"
    )


def _start_lines(record: EditRecord) -> list[str]:
    """Which edit it went on from, where there was one."""
    asked = {request.id for request in record.requests}
    gone = [id for id in record.lineage.removed or () if id not in asked]
    changed = [id for id in record.lineage.changed or () if id not in asked]
    if not (gone or changed):
        return []
    return [
        f"it went on from {record.adapter.before.path} (rows gone before: {len(gone)}, changed: "
        f"{len(changed)}; --start original: from the run's own adapter)"
    ]


def after_edit_text(out: Path, run: Path) -> str:
    """What to do with an edited adapter."""
    return (
        f"{out}: the edited adapter. Ship its configuration, weights and tokenizer; keep edit.json "
        "and delta.safetensors, which leads back to the old adapter.\n"
        f"Next: unlearn verify --run {run}; analysis report --edit {out} --out report.html"
    )


def after_training_text(out: Path, run: Path) -> str:
    """What to do with a trained adapter."""
    return (
        f"{out}: the adapter. Ship its configuration, weights and tokenizer; keep edit.json, "
        "steps.jsonl and delta.safetensors, which leads back to the old adapter.\n"
        f"Next: unlearn verify --run {run}; analysis evaluate --adapter {out} ...\n"
        "The next edit or training of this run starts from it; "
        "--start original: from the run's own adapter."
    )


def dry_run_text(ahead: Mapping[str, Any]) -> str:
    """What an edit would do, of what `unlearn.forecast` returns."""
    from unlearn.record.edit_record import RowRecord

    rows = [RowRecord(**row) for row in ahead["rows"]]
    losses = _means_by_kind(rows) + [
        MeanLosses(title, **ahead["losses"][name])
        for title, name in (
            ("all of them", "edited"),
            ("retained rows (sample)", "retained"),
            ("held-out rows", "heldout"),
        )
        if ahead["losses"][name] is not None
    ]
    columns = {"now": "before", "goal": "target", "linear": "linear"}
    cost = ahead["cost"]
    ratio = "" if cost["ratio"] is None else f" ({cost['ratio']:.0%} of retraining)"
    goal, cheaper = "", ""
    if cost["local_retraining"]:
        goal = (
            "goal: what a model that never saw the rows would lose. Small trainings tell it, and a "
            f"dry run makes none ({cost['local_retraining']} of the row-gradients).\n"
        )
    if (cost["ratio"] or 0) > 1:
        cheaper = f"\n{_retraining_is_cheaper(cost['ratio'])}"
    return (
        f"dry run: {_rows(len(rows))} would be {DONE[ahead['kind']]}; "
        f"nothing was changed or written\n\n{_loss_table(losses, columns)}\n\n"
        f"{goal}"
        "linear: what one linear step (--steps 1) is forecast to do; on an adapter that memorizes "
        "it is far off, and only the default, which takes several, gets there.\n"
        f"cost: about {cost['row_gradients']} row-gradients{ratio}, "
        f"about {cost['seconds']:.0f} s here, plus loading{cheaper}"
    )


def _means_by_kind(rows: Sequence[RowRecord]) -> list[MeanLosses]:
    """Mean losses of the removed rows, the new contents and the old ones they replace."""
    removed = [row for row in rows if row.action == "remove"]
    renewed = [row for row in rows if row.action != "remove"]
    kinds = (
        ("removed rows", removed, ""),
        ("new contents", renewed, ""),
        ("the contents they replace", renewed, "old_"),
    )
    means = []
    for title, chosen, prefix in kinds:
        if chosen:
            values = {
                name: _mean([getattr(row, prefix + name) for row in chosen])
                for name in ("before", "after", "target")
            }
            means.append(MeanLosses(title, len(chosen), **values))
    return means


def _mean(values: Sequence[float | None]) -> float | None:
    """Mean of the values that are there, None where none is."""
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None


def _loss_table(losses: Sequence[MeanLosses], columns: Mapping[str, str]) -> str:
    """Mean losses as lines of text, with a field of `MeanLosses` under each heading."""
    lines = [f"{'mean loss, nats per token':<26}{'rows':>6}" + "".join(f"{c:>12}" for c in columns)]
    for entry in losses:
        cells = [_number(getattr(entry, field)) for field in columns.values()]
        lines.append(f"{entry.title:<26}{entry.rows:>6}" + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if abs(value) < 1e4 else f"{value:.2g}"


def _outcome_lines(title: str, rows: Sequence[RowRecord]) -> list[str]:
    """How many rows the prompt alone draws out, and which are short of their goal."""
    if not rows:
        return []
    before = sum(row.extraction_before == 1 for row in rows)
    after = sum(row.extraction_after == 1 for row in rows)
    lines = [
        f"{title} that the prompt alone draws out word for word: "
        f"{before} before, {after} after, of {len(rows)}"
    ]
    short = [row.id for row in rows if _falls_short(row)]
    if short:
        named = ", ".join(short[:SHOWN_IDS]) + (" ..." if len(short) > SHOWN_IDS else "")
        lines.append(f"{title} that are more than 10 % short of their goal: {len(short)} ({named})")
    return lines


def _falls_short(row: RowRecord) -> bool:
    """Whether a row is more than `SHORT` from its goal, on the wrong side."""
    if row.target is None or row.after is None:
        return False
    if row.action == "remove":
        return row.after < (1 - SHORT) * row.target
    return row.after > (1 + SHORT) * row.target


def _damage(guard: Guard) -> str:
    damage = "no retained row to measure"
    if guard.damage is not None:
        damage = f"retained loss {guard.damage:+.1%}"
    limit = guard.max_damage
    allowed = "any" if limit is None or limit == float("inf") else f"{100 * limit:g}%"
    return f"{damage} ({allowed} allowed)"


def _cost(cost: CostRecord) -> str:
    ratio = "" if cost.ratio is None else f", {cost.ratio:.0%} of retraining"
    return f"{cost.total:.0f} row-gradients{ratio}, {cost.seconds:.0f} s"


def _rows(count: int) -> str:
    return f"{count} row" if count == 1 else f"{count} rows"
