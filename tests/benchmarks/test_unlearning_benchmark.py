"""The benchmark of unlearning methods: its rule of tuning, its tables, and the docs' own method."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import unlearn
from tests.conftest import build_model, examples, fit_end
from unlearn.methods.methods import METHODS
from unlearn.retraining.recipe import Recipe

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import tuning  # noqa: E402
import unlearning  # noqa: E402


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return fit_end(
        build_model(layers=1), examples(12), directory=tmp_path_factory.mktemp("benchmark") / "run"
    )


@pytest.fixture
def bounded(tmp_path):
    """The method of docs/methods.md, as it stands there."""
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(# bounded\.py\n.*?)```", page, re.DOTALL)
    assert len([line for line in block.splitlines() if line.strip()]) <= 10
    (tmp_path / "bounded.py").write_text(block)
    return f"{tmp_path / 'bounded.py'}:bounded"


def test_the_method_of_the_docs_runs_in_the_loop(run, bounded):
    """What it minimises at first is the mean probability of the forget rows' completion tokens, by
    a plain forward.
    """
    edit = unlearn.train(run, bounded, run.train.ids[:3], until="steps=3")
    probabilities = []
    for row in run.tokens[:3]:
        ids = torch.as_tensor(row.input_ids)[None]
        with torch.no_grad():
            p = (
                run.model.model(input_ids=ids)
                .logits.softmax(-1)[0, :-1]
                .gather(-1, ids[0, 1:, None])[:, 0]
            )
        probabilities += p[torch.as_tensor(row.supervised)[1:]].tolist()
    assert len(edit.log) == 3
    assert edit.log[0]["forget_term"] == pytest.approx(np.mean(probabilities), rel=1e-9)
    assert edit.report["method"]["name"] == "bounded"


EDIT = "edit by influence"
#: Of a small training.
RECIPE = Recipe(epochs=16, batch_size=4)


def case_of(run, rows=3):
    """The removal of the first rows, as `edit_cases.Case` has it."""
    return SimpleNamespace(
        run=run, ids=run.train.ids[:rows], rows_after=len(run.train) - rows, task="t"
    )


def test_the_method_of_the_docs_runs_in_the_benchmark(run, bounded):
    """Half of sixteen epochs of nine rows buys six steps of three rows and the nine."""
    (method,) = unlearning.methods([], [bounded])
    edit = unlearning.run_method(case_of(run), method, 3.0, 0, 1e9, None, RECIPE, 0.5)
    assert len(edit.log) == 9 * 16 // 2 // (3 + 9)
    assert edit.log[0]["lr"] == pytest.approx(3 * method.lr)


def test_a_rate_is_scaled_where_it_is_found_automatically(run):
    """Three times NGDiff's stride: the first move is three times as long, unless GeN changed it."""
    first = [
        unlearning.run_method(case_of(run), METHODS["ga"](), factor, 0, 1e9, None, RECIPE, 0.5).log[
            0
        ]["move_norm"]
        for factor in (1.0, 3.0)
    ]
    assert first[1] == pytest.approx(3 * first[0], rel=1e-6)


def test_steps_are_what_the_budget_buys_and_at_most_the_methods_own():
    """A step of ascent + descent runs 20 + 32 rows, one among nine rows 20 + 9; task
    arithmetic takes 30 at most, and plain ascent on two rows 200.
    """
    steps = unlearning.most_steps
    assert steps(METHODS["ga-gd"](), 20, 180, 2700) == 2700 // 52
    assert steps(METHODS["ga-gd"](), 50, 180, 2700) == 2700 // 64
    assert steps(METHODS["ga-gd"](), 20, 9, 2700) == 2700 // 29
    assert steps(unlearning.FINE_TUNING, 20, 180, 2700) == 2700 // 32
    assert steps(METHODS["task-arithmetic"](), 20, 180, 2700) == 30
    assert steps(METHODS["ga"](), 2, 180, 2970) == 200
    assert steps(METHODS["ga"](), 20, 180, 5) == 1


def test_fine_tuning_looks_at_the_retained_rows_alone(run):
    """Its first direction is the gradient of their mean loss, by plain autograd."""
    case = case_of(run)
    edit = unlearning.run_method(case, unlearning.FINE_TUNING, 1.0, 0, 1e9, None, RECIPE, 0.5)
    model, total, count = run.model, 0.0, 0
    for parameter in model.parameters:
        parameter.requires_grad_(True)
    for row in run.tokens[3:]:
        ids = torch.as_tensor(np.array(row.input_ids))
        log_p = model.model(input_ids=ids[None]).logits.log_softmax(-1)[0, :-1]
        own = torch.as_tensor(np.array(row.supervised))[1:]
        total = total - log_p.gather(-1, ids[1:, None])[:, 0][own].sum()
        count += int(own.sum())
    gradient = torch.cat(
        [part.flatten() for part in torch.autograd.grad(total / count, model.parameters)]
    )
    for parameter in model.parameters:
        parameter.requires_grad_(False)
    assert edit.log[0]["forget_loss"] is None
    assert edit.log[0]["direction_norm"] == pytest.approx(float(gradient.norm()), rel=1e-6)


@pytest.mark.slow
def test_the_goal_is_what_the_edit_expects(run):
    """The record of a default edit, which makes the same local retraining by itself."""
    goal = unlearning.goal_of(case_of(run), RECIPE)
    found = unlearning.run_edit(case_of(run), EDIT, 0, RECIPE).report["expected"]
    assert goal.loss == pytest.approx(found["loss"], rel=1e-9)
    assert (goal.low, goal.high) == pytest.approx((found["low"], found["high"]), rel=1e-9)
    assert goal.work == found["row_gradients"] > 0


def test_a_line_parts_the_goals_work_from_the_edits(run):
    ruler = SimpleNamespace(measure=lambda theta: {"forget": 1.0, "retained": 1.0})
    edit = unlearning.run_edit(case_of(run), EDIT, 0, RECIPE)
    made = unlearning.line_of(edit, ruler, 1.02)
    record = edit.record
    assert made["goal work"] == record.expected.row_gradients
    assert made["goal work"] + made["work"] == pytest.approx(record.cost.total)
    assert made["reached"]
    method = unlearning.run_method(case_of(run), METHODS["ga"](), 1.0, 0, 1e9, None, RECIPE, 0.5)
    given = unlearning.line_of(method, ruler, 1.04)
    assert given["goal work"] == 0
    assert not given["reached"]


def line(power, forget, retained, reached, **more):
    return {
        "method": "m",
        "power": power,
        "seed": 0,
        "forget": forget,
        "retained": retained,
        "reached": reached,
    } | more


def test_the_kept_rate_reaches_the_goal_at_the_least_damage():
    """Of two that reach the goal the one with the lower retained loss, not the lowest of all.

    Else the nearest to the goal, and of equal ones the nearest to the method's own.
    """
    lines = [line(-1, 2.0, 0.8, False), line(0, 4.1, 1.2, True), line(1, 4.3, 1.5, True)]
    assert tuning.kept_power(lines) == 0
    assert tuning.kept_power([lines[0], line(1, 2.5, 2.0, False)]) == 1
    assert tuning.kept_power([{"power": 1, "failed": "NaN"}, line(-1, 2.0, 0.8, False)]) == -1
    assert tuning.kept_power([{"power": 1, "failed": "NaN"}, {"power": 0, "failed": "NaN"}]) == 0
    assert tuning.kept_power([line(-1, 4.1, 1.2, True), line(0, 4.1, 1.2, True)]) == 0


def grid_of(loss, tmp_path, fails=()):
    """The powers that are run in turn where power p has retained loss `loss(p)`, and the kept."""
    lines, order = tuning.Lines(tmp_path / "runs.jsonl"), []

    def run(power):
        order.append(power)
        failed = {"method": "m", "power": power, "seed": 0, "failed": "NaN"}
        lines.add(failed if power in fails else line(power, 4.0, loss(power), True))

    kept = tuning.tune(lines, "m", 0, run)
    return order, kept, tuning.at_edge(lines.of(method="m"))


@pytest.mark.parametrize(
    ("best", "order", "edge"),
    [
        (0, [0, 1, -1], False),
        (-2, [0, 1, -1, -2, -3], False),
        (3, [0, 1, 2, 3, 4], False),
        (9, [0, 1, 2, 3, 4], True),
    ],
)
def test_the_grid_is_widened_until_both_neighbours_are_worse(tmp_path, best, order, edge):
    found, kept, at_edge = grid_of(lambda power: abs(power - best), tmp_path)
    assert (found, kept, at_edge) == (order, min(best, tuning.FARTHEST), edge)


def test_a_training_that_fails_is_a_worse_neighbour(tmp_path):
    assert grid_of(lambda power: -power, tmp_path, fails=(2,)) == ([0, 1, 2], 1, False)


def test_a_second_call_runs_what_is_missing(tmp_path):
    lines = tuning.Lines(tmp_path / "runs.jsonl")
    for power in (0, 1):
        lines.add(line(power, 4.0, abs(power), True))
    again, run = tuning.Lines(tmp_path / "runs.jsonl"), []
    tuning.tune(
        again, "m", 0, lambda power: run.append(again.add(line(power, 4, abs(power), True)))
    )
    assert [made["power"] for made in run] == [-1]


@pytest.fixture
def lines(tmp_path):
    """Doing nothing, retraining (200 row-gradients), and a method at four rates and two seeds."""
    lines = tuning.Lines(tmp_path / "runs.jsonl")
    goal = {"goal": 4.0, "low": 3.5, "high": 4.5, "found by": 60}
    nothing = {"method": unlearning.BEFORE, "forget": 1.0, "retained": 0.9, "heldout": 5.0}
    work = {"goal work": 0, "heldout": 5.0, "kl_forget": 1.0}
    lines.add(goal | nothing | work | {"work": 0, "reached": False})
    true = {"method": unlearning.RETRAINED, "seed": 0, "forget": 4.0, "retained": 1.0}
    lines.add(true | work | {"work": 200, "reached": True})
    lines.add(line(-2, 1.5, 0.95, False, **work, work=80.0))
    lines.add(line(-1, 5.0, 1.5, True, **work, work=10.0))
    lines.add(line(0, 4.0, 1.2, True, **work, work=20.0))
    lines.add(line(1, 0, 0, False) | {"failed": "NaN"})
    lines.add(line(0, 4.2, 1.4, True, **work, work=20.0) | {"seed": 1})
    edit = {"method": EDIT, "seed": 0, "forget": 4.1, "retained": 0.9, "damage": 0.034}
    lines.add(edit | work | {"work": 40, "goal work": 50, "reached": True})
    return lines


def test_a_row_has_means_work_tuning_and_the_spread_over_neighbours(lines):
    """Distances |f / 4 - 1| + |r / 1 - 1| of 0.25 + 0.5, 0.2 and 10 (failed): a spread of 9.8; the
    fourth rate is no neighbour. Given the goal (60) and 20 itself: 80 of 200. Its runs took 110,
    and the goal once.
    """
    row = unlearning.summary(lines, "m")
    assert row["rate"] == "1"
    assert row["spread"] == pytest.approx(10 - 0.2)
    assert row["forget"] == pytest.approx([4.1, 4.0, 4.2])
    assert row["goal"] == [60, 60, 60]
    assert row["ratio"] == pytest.approx(80 / 200)
    assert row["runs"] == 4
    assert row["all"] == pytest.approx((80 + 10 + 20 + 60) / 200)
    assert row["reached"] == row["seeds"] == 2


def test_an_edit_is_not_tuned_and_pays_for_its_goal(lines):
    row = unlearning.summary(lines, EDIT)
    assert (row["rate"], row["runs"], row["spread"], row["all"]) == ("", 0, None, None)
    assert (row["goal"][0], row["itself"][0]) == (50, 40)
    assert row["ratio"] == pytest.approx(90 / 200)


def test_a_table_and_its_second_part(lines, tmp_path):
    """Below 1.1 x 0.9 the method has one run, which is short of the goal."""
    names = [unlearning.BEFORE, unlearning.RETRAINED, EDIT, "m", "other"]
    text, rows = unlearning.table(lines, 10, names)
    assert "| m | 1 | 4.10 [4.00, 4.20] | 1.30 [1.20, 1.40] |" in text
    assert "| m | 0.11 | 1.50 | 0.95 | 5.00 | 1.00 | 80 | no |" in text
    assert "lose: 3.4%" in text
    assert text.startswith("### Forget 10 % (goal 4.00 [3.50, 4.50])")
    assert [row["method"] for row in rows] == names[:-1]
    unlearning.plot(rows, 10, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
