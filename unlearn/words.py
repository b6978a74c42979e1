"""What a person reads of edits, trainings and forecasts."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from influence import console


def methods_text(table: list[dict[str, Any]]) -> str:
    """The methods, each in a few lines."""
    from unlearn.methods.methods import METHODS

    lines = []
    for row in table:
        cost = row["cost_per_step"]
        parts = [
            f"{part} {row[part]}"
            for part in ("targets", "forget", "retain")
            if row[part] is not None
        ]
        parts += [f"combine {row['combine']}"] * (row["retain"] is not None)
        parts += [f"finish {row['finish']}"] * (row["finish"] is not None)
        rate = (
            "automatic rate"
            if row["lr"] == "auto"
            else f"first step {row['stride']:.1%} of the adapter's length"
        )
        needs = [f"retained rows ({row['retain_rows']})"] * row["needs_retain"]
        needs += ["the adapter before"] * row["needs_reference"]
        costs = [f"{cost['per_forget_row']:.3g} row-gradients for each forget row"] * (
            row["forget"] is not None
        )
        costs += [f"{cost['per_retain_row']:.3g} for each retained row"] * row["needs_retain"]
        numbers = [
            f"{name}={one.default}"
            for name, one in inspect.signature(METHODS[row["name"]]).parameters.items()
        ]
        lines += [
            f"{row['name']}: {row['title']}",
            f"    {row['source']}",
            f"    {'; '.join(parts)}" + (f"; --set {', '.join(numbers)}" if numbers else ""),
            f"    needs {' and '.join(needs) or 'the forget rows alone'}; a step costs {' and '.join(costs)}",
            f"    {row['optimizer']}, {rate}; until {row['until']}, at most {row['steps']} steps",
        ]
    return "\n".join([*lines, "", "unlearn methods --guide says how to choose a learning rate."])


def difficulty_text(forecast: Any, out: Path) -> str:
    """The hardest rows, how many of each recommendation, what was measured and what the calibration says, for a person."""
    import numpy as np

    table = forecast.table.sort_values("steps", ascending=False, kind="stable")
    protocol, shown = forecast.protocol, "measured_steps" in table
    heads = f"{'steps':>20}  {'damage, nats per token':>26}"
    lines = [heads + (f"  {'measured':>14}" if shown else "") + "  do       id"]
    for row in table.head(10).itertuples():
        steps = (
            f"{row.steps:.1f} [{row.steps_low:.1f}, {row.steps_high:.1f}]"
            if np.isfinite(row.steps)
            else "beyond"
        )
        damage = "unknown"
        if np.isfinite(row.damage):
            damage = f"{row.damage:+.3f} [{row.damage_low:+.3f}, {row.damage_high:+.3f}]"
        line = f"{steps:>20}  {damage:>26}"
        if shown:
            line += f"  {'-' if np.isnan(row.measured_steps) else f'{row.measured_steps:.1f} {row.measured_damage:+.3f}':>14}"
        lines.append(f"{line}  {row.recommended:<8} {row.id}".replace("\n", " "))
    if len(table) > 10:
        lines.append(f"... and {len(table) - 10} more, all in {out}")
    told = forecast.table["recommended"].value_counts()
    aim = (
        "of the base model"
        if protocol["target"] == "base"
        else "expected of a model that never saw the row"
    )
    lines += [
        "",
        f"hardest first; ascent by {protocol['optimizer']}, rate {protocol['lr']:g}, to the loss {aim}; [ ] should hold nine rows of ten",
        "recommended: "
        + ", ".join(f"{method} {count}" for method, count in told.items())
        + f" (ascent where it costs at most {forecast.max_damage:.1%} of the sampled rows' mean loss, "
        f"{forecast.retained_loss:.3f} nats per token)",
    ]
    if shown:
        both = forecast.table[["steps", "measured_steps", "damage", "measured_damage"]]
        both = both[np.isfinite(both).all(axis=1) & (both["measured_steps"] > 0)]
        if len(both) > 2 and forecast.calibration is None:
            error = (both["steps"] / both["measured_steps"] - 1).abs().median()
            rank = both.corr("spearman")
            lines.append(
                f"measured against forecast, {len(both)} rows: median error of steps {error:.0%}; Spearman "
                f"{rank.loc['steps', 'measured_steps']:.2f} (steps), {rank.loc['damage', 'measured_damage']:.2f} (damage)"
            )
    if (found := forecast.calibration) is not None:
        lines.append(
            f"calibrated on {found.measured} measured rows; out of fold (and before): Spearman {found.spearman['steps']:.2f} "
            f"({found.before['steps']:.2f}) of steps, {found.spearman['damage']:.2f} ({found.before['damage']:.2f}) of damage; "
            f"median error of steps {found.error:.0%}"
        )
        for name, falls in found.importances.items():
            if found.spearman[name] < found.before[name] - 0.02:
                lines.append(
                    f"warning: the correction of {name} does harm; measure more rows (--calibrate N), or do without"
                )
            lines.append(f"what the correction of {name} leans on: " + ", ".join(list(falls)[:4]))
    lines.append(f"{out}: {_rows(len(table))} and their features")
    return console.printable("\n".join(lines))


def _loss_table(
    title: str, rows: list[tuple[str, dict[str, Any] | None]], columns: list[tuple[str, str]]
) -> str:
    """Mean losses as lines of text."""
    head = f"{title:<26}{'rows':>6}" + "".join(f"{name:>12}" for name, _ in columns)
    lines = [head]
    for name, found in rows:
        if found is not None:
            shown = "".join(f"{_number(found.get(key)):>12}" for _, key in columns)
            lines.append(f"{name:<26}{found['rows']:>6}{shown}")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if abs(value) < 1e4 else f"{value:.2g}"


WHAT = {"remove": "removed", "relabel": "relabelled", "correct": "corrected", "mixed": "changed"}


def edit_text(report: dict[str, Any]) -> str:
    """What an edit did, for a person."""
    losses, guard, cost = report["losses"], report["guard"], report["cost"]
    columns = [("before", "before"), ("after", "after"), ("goal", "target")]
    measured = _by_kind(report["rows"])
    measured += [
        ("retained rows (sample)", losses["retained"]),
        ("held-out rows", losses["heldout"]),
    ]
    method = report["method"]
    done = f"{method['name']} against" if "steps_taken" in method else WHAT[report["kind"]]
    lines = [f"{done} {_rows(len(report['rows']))}: {report['stopped']}", ""]
    if method.get("kept") is not None:
        lines[1:1] = [f"{method['finish']}: {method['kept']:+.3g} times the whole move was kept"]
    if method.get("lr_last") is not None:
        lines[1:1] = [
            f"learning rate {method['lr_first']:.3g}, {method['lr_last']:.3g} in the last step"
        ]
    lines += [_loss_table("mean loss, nats per token", measured, columns), ""]
    for title, chosen in (("removed rows", True), ("new contents", False)):
        rows = [row for row in report["rows"] if (row["action"] == "remove") == chosen]
        if rows:
            first, now = (
                sum(row[key] == 1 for row in rows)
                for key in ("extraction_before", "extraction_after")
            )
            lines.append(
                f"{title} that the prompt alone draws out word for word: {first} before, {now} after, of {len(rows)}"
            )
            short = [row for row in rows if _falls_short(row)]
            if short:
                named = ", ".join(row["id"] for row in short[:5]) + (
                    " ..." if len(short) > 5 else ""
                )
                lines.append(
                    f"{title} that are more than 10 % short of their goal: {len(short)} ({named})"
                )
    ratio = "" if cost["ratio"] is None else f", {cost['ratio']:.0%} of retraining"
    damage = (
        "no retained row to measure"
        if guard["damage"] is None
        else f"retained loss {guard['damage']:+.1%}"
    )
    allowed = "any" if guard["max_damage"] == float("inf") else f"{100 * guard['max_damage']:g}%"
    lines.append(
        f"{damage} ({allowed} allowed); {cost['total']:.0f} row-gradients{ratio}, {cost['seconds']:.0f} s"
    )
    if report["reached"] is False:
        lines.append("warning: the goal was not reached")
    return console.printable("\n".join(lines))


def _rows(count: int) -> str:
    return f"{count} row" if count == 1 else f"{count} rows"


def _falls_short(row: dict[str, Any]) -> bool:
    """Whether a row is more than a tenth from its goal, on the wrong side."""
    if row["target"] is None:
        return False
    if row["action"] == "remove":
        return row["after"] < 0.9 * row["target"]
    return row["after"] > 1.1 * row["target"]


def _by_kind(rows: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any] | None]]:
    """Mean losses of the removed rows, the new contents and the old ones they replace."""
    kinds = {
        "removed rows": (
            [row for row in rows if row["action"] == "remove"],
            "before",
            "after",
            "target",
        ),
        "new contents": (
            [row for row in rows if row["action"] != "remove"],
            "before",
            "after",
            "target",
        ),
        "the contents they replace": (
            [row for row in rows if row["action"] != "remove"],
            "old_before",
            "old_after",
            "old_target",
        ),
    }
    found: list[tuple[str, dict[str, Any] | None]] = []
    for title, (chosen, *keys) in kinds.items():
        known = (
            [[row[key] for row in chosen if row[key] is not None] for key in keys] if chosen else []
        )
        means = [sum(values) / len(values) if values else None for values in known]
        if chosen:
            found.append(
                (
                    title,
                    {
                        "rows": len(chosen),
                        **dict(zip(("before", "after", "target"), means, strict=True)),
                    },
                )
            )
    return found


def dry_run_text(ahead: dict[str, Any]) -> str:
    """What an edit would do, for a person."""
    losses, cost = ahead["losses"], ahead["cost"]
    columns = [("now", "before"), ("goal", "target"), ("linear", "linear")]
    named = [*_by_kind(ahead["rows"]), ("all of them", losses["edited"])]
    named += [("retained rows (sample)", losses["retained"]), ("held-out rows", losses["heldout"])]
    table = _loss_table("mean loss, nats per token", named, columns)
    ratio = "" if cost["ratio"] is None else f" ({cost['ratio']:.0%} of retraining)"
    return (
        f"dry run: {_rows(len(ahead['rows']))} would be {WHAT[ahead['kind']]}; nothing was changed or written\n\n{table}\n\n"
        "goal: where the edit stops (removed rows: the loss expected of a model that never saw them; new contents: the retained "
        "rows' loss).\nlinear: what one linear step (--steps 1) is forecast to do; where that is far from the goal, only the "
        "default, which takes several, will get there.\n"
        f"cost: about {cost['row_gradients']} row-gradients{ratio}, about {cost['seconds']:.0f} s here, plus loading"
    )
