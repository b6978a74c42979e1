"""Edits as a whole: their keywords, their cost, what they leave untouched and record."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from dataclasses import fields

import numpy as np
import pytest
import torch

import influence
import unlearn
from influence.errors import NumericalError, ToolkitError
from influence.recipe import Recipe
from influence.solvers import CG
from tests.conftest import build_model, examples, rows, teach
from tests.helpers import statuses, untouched
from tests.unlearn.edits.helpers import ANSWERS, TASKS, edit_of
from unlearn.edits import goals
from unlearn.edits.options import Options
from unlearn.edits.prepared import PreparedEdit
from unlearn.record import before_after
from unlearn.record import losses as losses_module
from unlearn.record.losses import measure

# ---- keywords ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["edit", "remove", "relabel", "correct", "forecast"])
def test_the_keywords_and_defaults_are_those_of_the_options(name):
    parameters = inspect.signature(getattr(unlearn, name)).parameters
    own = {"run", "ids", "changes", "remove", "relabel", "correct", "holdout", "probes"}
    keywords = {key: value for key, value in parameters.items() if key not in own}
    assert {key: value.default for key, value in keywords.items()} == {
        field.name: field.default for field in fields(Options)
    }
    assert all(value.kind is value.KEYWORD_ONLY for value in keywords.values())


@pytest.mark.parametrize("name", ["edit", "remove", "relabel", "correct", "forecast"])
def test_every_keyword_reaches_the_options(monkeypatch, name):
    """Each gets a value of its own; the edit is prepared with just these."""
    values = {
        "steps": 7,
        "until": "steps=5",
        "max_damage": 0.25,
        "rest": 3,
        "curvature": "ekfac",
        "damping": "abs:1",
        "at": "0.6",
        "solver": "cg",
        "start": "original",
        "seed": 11,
        "generate": 5,
    }
    given = []

    def prepare(run, remove, relabel, correct, holdout, probes, options):
        given.append((run, remove, relabel, correct, holdout, probes, options))
        raise NumericalError("far enough")

    monkeypatch.setattr("unlearn.edits.by_influence.prepare", prepare)
    change = {"remove": ["a"]} if name in ("edit", "forecast") else {}
    positional = [] if change else [["a"] if name == "remove" else {"a": "b"}]
    with pytest.raises(NumericalError, match="far enough"):
        getattr(unlearn, name)(
            "run", *positional, holdout="rows", probes="others", **change, **values
        )
    *_, holdout, probes, options = given[0]
    assert options == Options(**values)
    assert given[0][0] == "run"
    assert (holdout, probes) == ("rows", "others")
    changes = dict(zip(("remove", "relabel", "correct"), given[0][1:4], strict=True))
    expected = {"remove": ["a"], "relabel": {"a": "b"}, "correct": {"a": "b"}}
    kind = "remove" if change else name
    assert {key: value for key, value in changes.items() if value} == {kind: expected[kind]}


def test_three_names_are_one_edit(runs):
    run = runs("fisher")
    for name in ("remove", "relabel", "correct"):
        edit = getattr(unlearn, name)(run, TASKS[name][name], steps=1)
        assert torch.equal(edit.delta, unlearn.edit(run, steps=1, **TASKS[name]).delta)


# ---- what an edit costs and leaves untouched -----------------------------------------------------


def test_the_same_seed_gives_the_same_edit_bit_for_bit(run):
    first, again, other = (edit_of(run, until="steps=3", steps=40, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.delta, again.delta)
    assert not torch.equal(first.delta, other.delta)
    differing = {key for key in first.report if first.report[key] != again.report[key]}
    assert differing <= {"created", "cost"}
    assert {k for k, v in first.report["cost"].items() if v != again.report["cost"][k]} <= {
        "seconds",
        "ratio",
    }


class Counter:
    """Rows that the model runs forward, by a hook on its own forward.

    What goes on from keys and values that are kept is the same row still.
    """

    def __init__(self, model):
        self.rows = 0
        self.handle = model.model.get_base_model().register_forward_pre_hook(
            self.count, with_kwargs=True
        )

    def count(self, _module, args, kwargs):
        kept = kwargs.get("past_key_values")
        if kept is None or kept.get_seq_length() == 0:
            self.rows += len(kwargs["input_ids"] if "input_ids" in kwargs else args[0])


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 1},
        {"until": "steps=3", "steps": 40},
        {"until": "steps=2", "steps": 40, "rest": 0, "relabel": ANSWERS, "remove": ["r0-1"]},
        {"steps": 1, "curvature": "identity"},
    ],
)
@pytest.mark.parametrize("with_holdout", [False, True])
def test_the_cost_is_the_rows_that_were_run(run, options, with_holdout):
    holdout = influence.examples_from_rows(rows(5, seed=9)) if with_holdout else None
    run.points  # noqa: B018
    counter = Counter(run.model)
    try:
        edit = edit_of(run, holdout=holdout, **options)
    finally:
        counter.handle.remove()
    cost = edit.report["cost"]
    assert cost["row_gradients"] + cost["row_forwards"] == counter.rows
    assert cost["total"] == pytest.approx(cost["row_gradients"] + cost["row_forwards"] / 3)


def test_the_cost_counts_the_products_of_a_matrix_free_curvature(run):
    counter = Counter(run.model)
    try:
        edit = edit_of(
            run, steps=1, curvature="ggn", at="0.8", damping="abs:1", solver=CG(tolerance=1e-2)
        )
    finally:
        counter.handle.remove()
    cost = edit.report["cost"]
    assert cost["row_gradients"] + cost["row_forwards"] >= counter.rows


def state_of(model):
    flags = [(name, p.requires_grad) for name, p in model.model.named_parameters()]
    return model.snapshot(), flags, [module.training for module in model.model.modules()]


def assert_same(before, after):
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


@pytest.mark.parametrize("options", [{"steps": 1}, {"until": "steps=2", "steps": 40}])
def test_the_model_is_as_before_after_an_edit(run, options):
    run.model.model.train()
    next(iter(run.model.parameters)).requires_grad_(True)
    try:
        before = state_of(run.model)
        edit = edit_of(run, **options)
        assert_same(before, state_of(run.model))
        assert edit.delta.any()
    finally:
        run.model.model.eval()
        next(iter(run.model.parameters)).requires_grad_(False)


@pytest.mark.parametrize("broken", ["merit", "solve", "forecast"])
def test_the_model_is_as_before_after_an_exception(run, monkeypatch, broken):
    def fail(*_arguments, **_options):
        raise NumericalError("broken on purpose")

    if broken == "merit":
        monkeypatch.setattr(goals, "token_losses", fail)
    else:
        monkeypatch.setattr(PreparedEdit, broken, fail)
    before = state_of(run.model)
    with untouched(run.directory), pytest.raises(NumericalError, match="on purpose"):
        edit_of(run, until="loss=30")
    assert_same(before, state_of(run.model))


def test_a_forecast_tells_what_the_one_shot_edit_predicts_and_writes_nothing(run):
    with untouched(run.directory):
        before = state_of(run.model)
        foreseen = unlearn.forecast(run, remove=["r0-0", "r0-3"], steps=1)
        assert_same(before, state_of(run.model))
        edit = edit_of(run, steps=1)
    assert foreseen["losses"]["edited"]["linear"] == pytest.approx(
        edit.report["losses"]["edited"]["predicted"], rel=1e-6
    )
    assert foreseen["losses"]["edited"]["before"] == edit.report["losses"]["edited"]["before"]
    assert foreseen["requests"] == edit.report["requests"]
    assert all(row["after"] is None for row in foreseen["rows"])
    json.dumps(foreseen)


@pytest.mark.parametrize("options", [{"steps": 1}, {"until": "steps=4", "steps": 4}])
def test_a_forecast_knows_about_what_the_edit_costs(run, options):
    recipe = Recipe(epochs=2, batch_size=4)
    options = {"remove": ["r0-0", "r0-3"], "rest": 4, "max_damage": 1e6, "recipe": recipe} | options
    foreseen = unlearn.forecast(run, **options)["cost"]
    cost = unlearn.edit(run, **options).report["cost"]
    assert foreseen["row_gradients"] == pytest.approx(cost["total"], rel=0.25)
    assert foreseen["seconds"] >= 0


def test_a_small_linear_edit_is_forecast_to_first_order(run):
    """The predicted loss is the measured one, up to a square of the move."""
    edit = edit_of(run, steps=1, damping="abs:30")
    losses = edit.report["losses"]["edited"]
    moved = losses["after"] - losses["before"]
    assert losses["predicted"] - losses["before"] == pytest.approx(moved, rel=0.1)
    assert moved > 0


def test_all_rows_relabelled_leaves_no_retained_row_and_still_works(run):
    edit = unlearn.relabel(run, {id: " at dawn the" for id in run.train.ids}, steps=2)
    assert edit.report["losses"]["retained"]["rows"] == 0
    assert edit.report["guard"]["damage"] is None
    assert edit.passed
    # The local retraining has no retained row either, and tells the new contents' losses.
    found = edit.report["expected"]
    assert (found["near"], found["others"]) == (0, 0)
    assert all(row["low"] < row["target"] < row["high"] for row in edit.report["rows"])
    assert edit.report["data"]["rows_after"] == 12


def test_every_error_of_an_edit_is_one_of_the_toolkit(run):
    for change in (
        {"remove": ["nobody"]},
        {"relabel": {"r0-1": ""}},
        {"correct": {"r0-1": {"text": "a"}}},
    ):
        with pytest.raises(ToolkitError):
            unlearn.edit(run, **change)


def test_losses_in_the_record_are_those_of_a_plain_measure(run):
    edit = edit_of(run, steps=1, relabel=ANSWERS)
    change = edit.change
    with run.model.at(edit.theta):
        new, old = measure(run.model, change.new), measure(run.model, change.old)
    entries = edit.report["rows"]
    assert [entry["after"] for entry in entries] == pytest.approx(new.loss.tolist(), rel=1e-5)
    assert [entry["old_after"] for entry in entries] == pytest.approx(old.loss.tolist(), rel=1e-5)
    assert [entry["extraction_after"] for entry in entries] == new.extraction.tolist()


def test_a_grown_run_is_edited_like_one_from_scratch(tmp_path):
    """Growable: the curvature takes sampled rows out that the run keeps for another purpose."""
    sites = {"layers": 1, "target_modules": ["q_proj", "v_proj"]}
    model = teach(build_model("llama", **sites), examples(8), steps=5)
    options = {"path": (1.0,), "store": "full", "growable": True}
    every, first = examples(8), examples(8)[:6]
    before = influence.fit(model, first, directory=tmp_path / "before", **options)
    run = influence.fit(model, every, directory=tmp_path / "run", grown_from=before, **options)
    scratch = influence.fit(model, every, directory=tmp_path / "scratch", **options)
    deltas = []
    for each in (run, scratch):
        edit = unlearn.remove(each, ids=[every[1].id, every[7].id], steps=1)
        deltas.append(edit.delta)
    torch.testing.assert_close(deltas[0], deltas[1], rtol=0, atol=1e-10)
    unlearn.remove(run, ids=[every[7].id], steps=1).save(tmp_path / "edited")
    assert (tmp_path / "run" / "audit.jsonl").exists()
    assert unlearn.verify(adapter=tmp_path / "edited").problems == []


# ---- several processes ---------------------------------------------------------------------------


def numbers(value, name: str = "") -> dict[str, object]:
    """What a record holds, one entry for each leaf; not when and how fast it was made."""
    if isinstance(value, dict):
        items = [(key, part) for key, part in value.items() if key not in ("created", "seconds")]
    elif isinstance(value, list | tuple):
        items = list(enumerate(value))
    else:
        return {name: value}
    found = {}
    for key, part in items:
        found |= numbers(part, f"{name}/{key}")
    return found


def same_record(found: dict, expected: dict, tolerance: float, less: Sequence[str] = ()) -> None:
    """The same entries, but for those named in `less`."""
    found, expected = (
        numbers({key: part for key, part in each.items() if key not in less})
        for each in (found, expected)
    )
    assert list(found) == list(expected)
    for name, value in expected.items():
        if isinstance(value, float):
            assert found[name] == pytest.approx(value, rel=tolerance, abs=tolerance, nan_ok=True), (
                name
            )
        elif "digest" not in name:
            assert found[name] == value, name


#: Edits at the adapter itself, by the run's curvature: re-linearised, linear, carried to the end.
SHARED = [
    ("ekfac", "mixed", {"until": "steps=2"}),
    ("fisher", "correct", {"steps": 1}),
    ("ggn", "remove", {"steps": 1, "solver": CG(tolerance=1e-12)}),
    ("ggn", "relabel", {"until": "converged", "solver": CG(tolerance=1e-12)}),
]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_any_number_of_processes_makes_the_edit_of_one(runs, tmp_path, processes):
    holdout = influence.examples_from_rows(rows(5, seed=9))

    def made(name: str, task: str, options: dict):
        more = {"rest": 3, "max_damage": 1e6, "holdout": holdout}
        more["recipe"] = Recipe(epochs=2, batch_size=4, lr=1e-3)
        return unlearn.edit(runs(name), **TASKS[task], **(more | options))

    some = SHARED if processes == 3 else SHARED[:2]
    expected = [made(*each) for each in some]

    def work(rank: int) -> None:
        for (name, task, options), alone in zip(some, expected, strict=True):
            edit = made(name, task, options)
            tolerance = 1e-10 if "solver" not in options else 1e-8
            size = float(alone.delta.norm())
            assert float((edit.delta - alone.delta).norm()) <= tolerance * size, name
            # the last iterations of a solver are of rounding alone
            less = ["cost", "residual", "stopped"] if "solver" in options else []
            same_record(edit.report, alone.report, 100 * tolerance, less)

    assert statuses(work, tmp_path, processes) == [0] * processes


@pytest.mark.slow
def test_an_edit_by_expected_losses_in_two_processes(run, tmp_path):
    """Trainings are dealt out, rows of measurements and steps are shared; float32."""
    asked = {
        "holdout": influence.examples_from_rows(rows(5, seed=9)),
        "probes": influence.examples_from_rows(rows(3, seed=8)),
        "recipe": Recipe(epochs=2, batch_size=4, lr=1e-3),
        "generate": 3,
    }
    expected = edit_of(run, **asked)
    assert expected.report["expected"]["trainings"] == 3

    def work(rank: int) -> None:
        edit = edit_of(run, **asked)
        size = float(expected.delta.norm())
        assert float((edit.delta - expected.delta).norm()) <= 1e-4 * size
        cost, alone = edit.report["cost"], expected.report["cost"]
        for name in ("row_gradients", "row_forwards"):
            assert cost[name] == alone[name], name
        assert edit.report["stopped"] == expected.report["stopped"]
        same_record(edit.report["losses"], expected.report["losses"], 1e-4)
        same_record(edit.report["evidence"], expected.report["evidence"], 1e-3)

    assert statuses(work, tmp_path, 2) == [0, 0]


def test_what_is_not_a_number_in_one_process_is_told_by_all(run, tmp_path, monkeypatch):
    real = before_after.measure

    def work(rank: int) -> None:
        def measure(model, tokens, **options):
            monkeypatch.setattr(losses_module, "_measured", broken if rank else measured)
            return real(model, tokens, **options)

        def broken(model, tokens, budget):
            return np.full((3, len(tokens)), np.nan)

        measured = losses_module._measured
        monkeypatch.setattr(before_after, "measure", measure)
        with pytest.raises(NumericalError, match="is NaN or infinite"):
            edit_of(run, until="steps=1")

    assert statuses(work, tmp_path, 2) == [0, 0]
