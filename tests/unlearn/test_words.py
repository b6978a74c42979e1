"""Texts for a person, of records and forecasts that are written out here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from tests.unlearn.edits.helpers import edit_of
from unlearn.difficulty.forecast import Forecast
from unlearn.methods.methods import METHODS
from unlearn.record.edit_record import EditRecord
from unlearn.words import (
    after_edit_text,
    after_training_text,
    difficulty_text,
    dry_run_text,
    edit_text,
    methods_text,
)

# ---- edits ---------------------------------------------------------------------------------------


def row(id: str, action: str = "remove", **changes):
    """An edited row, of a removal that reached its goal unless `changes` says otherwise."""
    entry = {"id": id, "action": action, "before": 1.0, "after": 3.0, "target": 3.0, "base": 4.0}
    entry |= {"extraction_before": 1.0, "extraction_after": 0.25, "rank": None}
    return entry | changes


def record(rows, **changes) -> EditRecord:
    """The record of an edit of `rows`, with two retained rows and no held-out ones."""
    entry = {
        "kind": "remove",
        "rows": rows,
        "stopped": "the goal was reached",
        "reached": True,
        "method": {"name": "re-linearised"},
        "losses": {
            "retained": {"rows": 2, "before": 0.5, "after": 0.505},
            "heldout": None,
        },
        "guard": {"max_damage": 0.1, "damage": 0.01, "passed": True, "forced": False},
        "cost": {"total": 812.4, "ratio": 0.25, "seconds": 3.6},
    }
    return EditRecord.salvaged(entry | changes)


def test_an_edit_that_reached_its_goal():
    assert edit_text(record([row("a"), row("b", before=2.0, extraction_before=0.5)])) == (
        "removed 2 rows: the goal was reached\n"
        "\n"
        "mean loss, nats per token   rows      before       after        goal\n"
        "removed rows                   2        1.50        3.00        3.00\n"
        "retained rows (sample)         2        0.50        0.51            \n"
        "\n"
        "removed rows that the prompt alone draws out word for word: 1 before, 0 after, of 2\n"
        "retained loss +1.0% (10% allowed); 812 row-gradients, 25% of retraining, 4 s"
    )


@pytest.mark.parametrize(
    ("after", "target", "action", "short"),
    [
        (2.69, 3.0, "remove", True),
        (2.71, 3.0, "remove", False),
        (4.0, 3.0, "remove", False),
        (3.31, 3.0, "relabel", True),
        (3.29, 3.0, "relabel", False),
        (1.0, 3.0, "relabel", False),
        (1.0, None, "remove", False),
    ],
)
def test_short_of_a_goal_is_more_than_a_tenth_on_the_wrong_side(after, target, action, short):
    text = edit_text(record([row("a", action, after=after, target=target)]))
    assert ("that are more than 10 % short of their goal: 1 (a)" in text) is short


def test_five_rows_that_are_short_are_named():
    rows = [row(f"r{i}", after=1.0) for i in range(7)]
    text = edit_text(record(rows, reached=False))
    assert (
        "removed rows that are more than 10 % short of their goal: 7 (r0, r1, r2, r3, r4 ..."
        in text
    )
    assert text.endswith("warning: the goal was not reached")
    text = edit_text(record(rows[:5]))
    assert "short of their goal: 5 (r0, r1, r2, r3, r4)" in text
    assert "warning" not in text


def test_new_contents_stand_beside_what_they_replace():
    rows = [
        row("a"),
        row("b", "relabel", before=5.0, after=0.6, target=0.5, extraction_before=0.0)
        | {"old_before": 0.4, "old_after": 2.4, "old_target": 2.5},
    ]
    held_out = {"rows": 3, "before": 2.0, "after": 12345.6}
    losses = {"retained": {"rows": 0, "before": None, "after": None}, "heldout": held_out}
    guard = {"max_damage": None, "damage": None}
    text = edit_text(record(rows, kind="mixed", losses=losses, guard=guard))
    assert text.splitlines()[0] == "changed 2 rows: the goal was reached"
    assert text.splitlines()[2:8] == [
        "mean loss, nats per token   rows      before       after        goal",
        "removed rows                   1        1.00        3.00        3.00",
        "new contents                   1        5.00        0.60        0.50",
        "the contents they replace      1        0.40        2.40        2.50",
        "retained rows (sample)         0                                    ",
        "held-out rows                  3        2.00     1.2e+04            ",
    ]
    assert "no retained row to measure (any allowed); 812 row-gradients" in text


def test_a_training_tells_its_rate_and_what_a_finish_kept():
    method = {"name": "ngdiff", "steps_taken": 3, "lr_first": 0.01, "lr_last": 0.002}
    method |= {"kept": -0.5, "finish": "control"}
    lines = edit_text(record([row("a")], method=method)).splitlines()
    assert lines[:4] == [
        "ngdiff against 1 row: the goal was reached",
        "learning rate 0.01, 0.002 in the last step",
        "control: -0.5 times the whole move was kept",
        "",
    ]


def test_what_was_expected_is_said_with_its_interval_and_price():
    told = {"loss": 3.1, "low": 2.8, "high": 3.41, "trainings": 3, "row_gradients": 450}
    assert edit_text(record([row("a")], expected=told)).splitlines()[-1] == (
        "expected of a model that never saw these rows: 3.10 (2.80 to 3.41), by 3 small trainings "
        "(450 of the row-gradients)"
    )
    for unknown in (None, told | {"low": None}):
        assert "expected of" not in edit_text(record([row("a")], expected=unknown))


@pytest.mark.parametrize(
    ("kept", "more"), [(0.91, ""), (0.8, "; warning: rounding swallows 20% of the change of the")]
)
def test_the_loss_on_merged_weights_is_said(kept, more):
    shipped = {"dtype": "bfloat16", "edited_before": 1.0, "edited_after": 2.95, "kept": kept}
    line = edit_text(record([row("a")], shipped=shipped)).splitlines()[-1]
    said = "merged into the base as bfloat16: mean loss of the edited rows 2.95"
    assert line == said if not more else line.startswith(said + more)
    assert "merged" not in edit_text(record([row("a")], shipped=None))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"delta": {"relative": 0.51}}, "warning: the move has 51% of the adapter's length"),
        ({"delta": {"relative": 0.49}}, None),
        ({"guard": {"damage": -0.06}}, "warning: the retained rows' loss fell by 6.0%"),
        ({"guard": {"damage": -0.04}}, None),
        (
            {"cost": {"total": 812.4, "ratio": 4.0, "seconds": 3.6}},
            "note: retraining takes less work (25% of it) and is the exact answer: unlearn retrain",
        ),
        ({"cost": {"total": 812.4, "ratio": 0.99, "seconds": 3.6}}, None),
    ],
)
def test_what_an_edit_should_not_have_done_is_said(changes, said):
    text = edit_text(record([row("a")], **changes))
    if said is None:
        assert "warning" not in text
        assert "note" not in text
    else:
        assert text.splitlines()[-1].startswith(said)


def test_control_characters_of_ids_are_not_printed():
    assert "\x1b" not in edit_text(record([row("\x1b[2J", after=1.0)]))


def dry_run(**cost):
    """What a dry run of a relabelling says, and costs but for `cost`."""
    return {
        "kind": "relabel",
        "rows": [
            row("b", "relabel", before=5.0, after=None, target=0.5, share=None, low=None, high=None)
            | {"old_before": 0.4, "old_after": None, "old_target": 2.5, "extraction_after": None}
        ],
        "losses": {
            "edited": {"rows": 1, "before": 5.0, "target": 0.5, "linear": 3.0},
            "retained": {"rows": 2, "before": 0.5, "linear": 0.75},
            "heldout": None,
        },
        "cost": {"row_gradients": 321, "local_retraining": 0, "seconds": 2.4, "ratio": 0.125}
        | cost,
    }


def test_a_dry_run_says_what_one_linear_step_would_do():
    text = dry_run_text(dry_run())
    assert text.startswith(
        "dry run: 1 row would be relabelled; nothing was changed or written\n"
        "\n"
        "mean loss, nats per token   rows         now        goal      linear\n"
        "new contents                   1        5.00        0.50            \n"
        "the contents they replace      1        0.40        2.50            \n"
        "all of them                    1        5.00        0.50        3.00\n"
        "retained rows (sample)         2        0.50                    0.75\n"
        "\n"
        "linear: what one linear step (--steps 1) is forecast to do"
    )
    assert text.endswith(
        "cost: about 321 row-gradients (12% of retraining), about 2 s here, plus loading"
    )


def test_a_dry_run_says_what_its_goal_will_cost_and_when_retraining_is_cheaper():
    text = dry_run_text(dry_run(local_retraining=200, ratio=1.25))
    assert (
        "\ngoal: what a model that never saw the rows would lose. Small trainings tell it, and a "
        "dry run makes none (200 of the row-gradients).\n"
    ) in text
    assert "cost: about 321 row-gradients (125% of retraining)" in text
    assert text.splitlines()[-1].startswith("note: retraining takes less work (80% of it)")
    assert text.count("note") == 1
    assert "note" not in dry_run_text(dry_run(ratio=None))


def test_what_to_do_next_names_commands_with_their_folders():
    text = after_edit_text(Path("out"), Path("run"))
    assert "unlearn verify --run run; analysis report --edit out --out report.html" in text
    text = after_training_text(Path("out"), Path("run"))
    assert "unlearn verify --run run; analysis evaluate --adapter out ..." in text
    assert "--start original: from the run's own adapter." in text


# ---- methods -------------------------------------------------------------------------------------


def test_a_method_is_told_in_five_lines():
    text = methods_text([METHODS["npo"]().describe()])
    lines = text.splitlines()
    assert len(lines) == 7
    assert lines[0].startswith("npo: ")
    assert "--set beta=" in lines[2]
    assert "needs retained rows" in lines[3]
    assert "the adapter before; a step costs" in lines[3]
    assert lines[-1] == "unlearn methods --guide says how to choose a learning rate."
    text = methods_text([METHODS["ga"]().describe()])
    assert "needs the forget rows alone; a step costs" in text
    assert "--set" not in text


# ---- difficulty ----------------------------------------------------------------------------------


def forecast(n: int = 12, **columns) -> Forecast:
    """A forecast of n rows, the last the hardest but for the first, which is beyond reach."""
    steps = np.arange(n, dtype=float)
    steps[0] = np.inf
    table = pd.DataFrame({"id": [f"r{i}" for i in range(n)], "steps": steps})
    table = table.assign(steps_low=steps - 0.5, steps_high=steps + 0.5, damage=steps / 100)
    table = table.assign(damage_low=0.0, damage_high=0.5, recommended="ascent")
    table.loc[0, ["damage", "recommended"]] = [np.nan, "edit"]
    protocol = {"optimizer": "adam", "lr": 1e-4, "target": "base", "steps": 200}
    return Forecast(table.assign(**columns), protocol, 3, 0.875, 0.01)


def test_the_hardest_rows_come_first_and_all_are_counted():
    lines = difficulty_text(forecast(), Path("out.csv")).splitlines()
    assert lines[0].split() == ["steps", "damage,", "nats", "per", "token", "do", "id"]
    assert lines[1].split() == ["beyond", "unknown", "edit", "r0"]
    assert lines[2].split() == [
        *("11.0", "[10.5,", "11.5]", "+0.110", "[+0.000,", "+0.500]", "ascent", "r11"),
    ]
    assert lines[11] == "... and 2 more, all in out.csv"
    assert lines[13] == (
        "hardest first; ascent by adam, rate 0.0001, to the loss of the base model; "
        "[ ] should hold nine rows of ten"
    )
    assert lines[14] == (
        "recommended: ascent 11, edit 1 (ascent where it costs at most 1.0% of the sampled rows' "
        "mean loss, 0.875 nats per token)"
    )
    assert lines[-1] == "out.csv: 12 rows and their features"
    assert len(lines) == 16
    unseen = replace(forecast(), protocol=forecast().protocol | {"target": "unseen"})
    assert "to the loss expected of a model that never saw the row;" in difficulty_text(
        unseen, Path("out.csv")
    )


def test_what_was_measured_stands_beside_the_forecast():
    steps = np.arange(12, dtype=float) * 2
    steps[1] = np.nan
    measured = {"measured_steps": steps, "measured_damage": np.arange(12) / 50}
    made = forecast(**measured)
    lines = difficulty_text(made, Path("out.csv")).splitlines()
    assert lines[2].split()[6:8] == ["22.0", "+0.220"]
    assert difficulty_text(replace(made, table=made.table[:3]), Path("o")).splitlines()[3].split()[
        6:8
    ] == ["-", "ascent"]
    assert lines[15] == (
        "measured against forecast, 10 rows: median error of steps 50%; "
        "Spearman 1.00 (steps), 1.00 (damage)"
    )
    few = difficulty_text(replace(made, table=made.table[:4]), Path("out.csv"))
    assert "measured against forecast" not in few


def test_a_calibration_that_does_harm_is_warned_of():
    calibration = SimpleNamespace(
        measured=25,
        spearman={"steps": 0.7, "damage": 0.3},
        before={"steps": 0.6, "damage": 0.5},
        error=0.21,
        importances={"steps": dict(zip("abcde", range(5), strict=True)), "damage": {"x": 0.1}},
    )
    made = replace(forecast(), calibration=calibration)
    assert difficulty_text(made, Path("out.csv")).splitlines()[15:-1] == [
        "calibrated on 25 measured rows; out of fold (and before): Spearman 0.70 (0.60) of steps, "
        "0.30 (0.50) of damage; median error of steps 21%",
        "what the correction of steps leans on: a, b, c, d",
        "warning: the correction of damage does harm; measure more rows (--calibrate N), "
        "or do without",
        "what the correction of damage leans on: x",
    ]


def test_screened_rows_are_told_apart_and_their_intervals_are_said():
    how = ["close"] * 4 + ["screened"] * 8
    learnt = {"taught": 4, "spearman": 0.8, "median_relative_error": 0.125}
    screening = {"close": 4, "screened": 8, "features": ["loss", "gap"]}
    made = forecast(how=how)
    table = made.table
    for name in ("steps", "damage"):
        spread = np.where(table["how"] == "close", 0.1, 0.7) * (
            table["steps"] if name == "steps" else 1
        )
        table[f"{name}_low"], table[f"{name}_high"] = table[name] - spread, table[name] + spread
    made = replace(made, screening=screening | {"steps": learnt, "damage": learnt})
    lines = difficulty_text(made, Path("out.csv")).splitlines()
    assert lines[0].split()[-3:] == ["how", "do", "id"]
    assert {line.split()[-3] for line in lines[2:10]} == {"screened"}  # the hardest first
    assert lines[-4:-1] == [
        "4 rows were looked at closely, 8 screened by them, from loss, gap: their [ ] should hold "
        "what a close look would say of nine rows of ten",
        "steps of screened rows: median width of [ ] 140% of the steps (close looks: 20% of the "
        "steps); out of fold Spearman 0.80, median error 12%",
        "damage of screened rows: median width of [ ] 1.4 nats per token (close looks: 0.2 nats "
        "per token); out of fold Spearman 0.80, median error 12%",
    ]
    unknown = {"taught": 3, "spearman": None, "median_relative_error": None}
    made = replace(made, screening=screening | {"steps": unknown, "damage": unknown})
    assert difficulty_text(made, Path("out.csv")).splitlines()[-3] == (
        "steps of screened rows are not told: of 3 close looks that reached their target nothing "
        "is learnt; look at more (--screen N)"
    )


# ---- what an edit did not aim at -----------------------------------------------------------------


def evidence(*measurements, models=2):
    """What a record says of an edit beside its loss."""
    found = {"models": models, "level": 0.9, "resamples": 2000, "seed": 0, "probes": None}
    empty = ("heldout", "margin", "reason")
    each = [dict.fromkeys(empty) | {"by_row": []} | entry for entry in measurements]
    return {"evidence": found | {"measurements": each}}


def measured(name, unit, before, after, unseen, verdict, ends=(-0.05, 0.07)):
    """One measurement of two rows."""
    low, high = ends
    values = {"before": before, "after": after, "unseen": unseen, "low": low, "high": high}
    difference = None if unseen is None else after - unseen
    return (
        values
        | {"name": name, "unit": unit, "rows": 2, "difference": difference}
        | {"verdict": verdict}
    )


def test_what_the_edit_did_not_aim_at_is_a_table():
    found = evidence(
        measured("generations", "ROUGE-L recall", 0.9, 0.3, 0.28, "as unseen"),
        measured("membership", "AUC of Min-K%", 1.0, 0.043, 0.55, "less than unseen", (-0.8, -0.2)),
        measured("probe-generations", None, None, None, None, "not measured")
        | {"reason": "no row was to be continued (generate 0)"},
    )
    assert edit_text(record([row("a")], **found)).split("\n\n")[-1] == (
        "what the edit did not aim at                rows   before    after   unseen"
        "   after - unseen, 90%\n"
        "repeated when prompted (ROUGE-L recall)        2     0.90     0.30     0.28"
        "   +0.02 [-0.05, +0.07]  as unseen\n"
        "told from held-out rows (AUC of Min-K%)        2     1.00     0.04     0.55"
        "   -0.51 [-0.80, -0.20]  less than unseen\n"
        "repeated when probed: not measured: no row was to be continued (generate 0)"
    )


def test_without_unseen_models_the_text_says_how_to_have_one():
    found = measured("generations", "ROUGE-L recall", 0.9, 0.3, None, "not compared", (None, None))
    text = edit_text(record([row("a")], **evidence(found, models=0)))
    assert "\nrepeated when prompted (ROUGE-L recall)        2     0.90     0.30         \n" in text
    assert text.endswith(
        "not compared: no models that never saw the rows were trained here. One that is, and its "
        "comparison: unlearn retrain --run RUN --ids ... --out DIR; "
        "analysis report --edit EDIT --retrained DIR --out FILE.html"
    )
    assert "did not aim at" not in edit_text(record([row("a")]))


@pytest.mark.slow
def test_an_edit_says_which_one_it_went_on_from(run, tmp_path):
    """A removal from a removal: an experiment must not be taken along without a word."""
    first = edit_of(run, remove=["r0-1"])
    assert "went on from" not in edit_text(first.record)
    first.save(tmp_path / "first")
    second = edit_text(edit_of(run, remove=["r0-2"]).record)
    assert f"went on from {tmp_path / 'first'} (rows gone before: 1, changed: 0;" in second
    assert "went on from" not in edit_text(edit_of(run, start="original").record)
