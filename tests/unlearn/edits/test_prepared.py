"""The three ways to make an edit, against dense matrices and stationary points."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import influence
import unlearn
from influence.errors import InputError, NumericalError
from influence.loss import mean_losses
from influence.setting import Setting
from influence.solvers import CG, LiSSA
from tests.conftest import examples, fit_end
from tests.helpers import untouched
from tests.oracles import dense_objective
from tests.unlearn.edits.helpers import (
    ANSWERS,
    F64,
    SPECS,
    TASKS,
    edit_of,
    ekfac_after,
    expected_delta,
    lambda_of,
    near,
    plain_gradient,
    rows_after,
)
from unlearn.edits import prepared
from unlearn.edits.steps import walk

# ---- one-shot ------------------------------------------------------------------------------------


#: Curvatures whose matrix is made of a product for each parameter: two tasks cover what goes, what
#: comes and both reductions, the other two are slow tests.
PAIRS = [
    pytest.param(
        name,
        task,
        marks=[pytest.mark.slow] * (name in ("ggn", "hessian") and task in ("remove", "correct")),
    )
    for name in SPECS
    for task in TASKS
]


@pytest.mark.parametrize(("name", "task"), PAIRS)
def test_the_one_shot_edit_is_the_dense_one(runs, name, task):
    run = runs(name, "token" if task in ("remove", "relabel") else "example")
    edit = unlearn.edit(run, steps=1, **TASKS[task])
    near(edit.delta, expected_delta(run, name, task), 1e-8)
    assert edit.report["residual"]["solver"] < 1e-8
    assert edit.report["kind"] == task


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fisher", "ggn", "ekfac"])
@pytest.mark.parametrize("task", ["remove", "correct"])
def test_the_other_reduction_keeps_the_weights_of_the_fit_too(runs, name, task):
    run = runs(name, "example" if task == "remove" else "token")
    near(unlearn.edit(run, steps=1, **TASKS[task]).delta, expected_delta(run, name, task), 1e-8)


@pytest.mark.parametrize("solver", ["cg", "pcg", "lissa"])
def test_iterative_solvers_give_the_direct_edit(mini, tmp_path, solver):
    run = fit_end(mini, examples(7), curvature=SPECS["ekfac"], directory=tmp_path / "run")
    options = {"steps": 1, "curvature": "ggn", "damping": "abs:0.3", **TASKS["mixed"]}
    direct = unlearn.edit(run, **options)
    near(unlearn.edit(run, solver=solver, **options).delta, direct.delta, 1e-2)
    tight = {"cg": CG(tolerance=1e-9), "lissa": LiSSA(tolerance=1e-9, max_iterations=2000)}
    if solver in tight:
        edit = unlearn.edit(run, solver=tight[solver], **options)
        near(edit.delta, direct.delta, 1e-7)
        assert edit.report["residual"]["tolerance"] == 1e-9
        assert edit.report["residual"]["solver"] <= 1e-9


def test_a_solve_that_does_not_converge_is_an_error_and_no_edit(runs):
    with pytest.raises(NumericalError, match=r"did not converge.*Nothing is written"):
        unlearn.remove(
            runs("ekfac"),
            ["r0-1"],
            steps=1,
            curvature="ggn",
            solver=CG(tolerance=1e-12, max_iterations=1),
        )


@pytest.mark.parametrize("name", ["ekfac", "ggn"])
def test_several_points_add_up_with_the_factors_of_the_scores(mini, tmp_path, name):
    run = influence.fit(
        mini,
        examples(7),
        curvature=SPECS[name],
        damping="mean:0.5",
        directory=tmp_path / "run",
        path=(0.4, 0.8),
    )
    setting = Setting.of(run, tuned=False, calibrated=False)
    (tokens, w), gone, come = rows_after(run, "mixed")
    expected = torch.zeros(mini.space.size, dtype=F64)
    for scale, factor, point in zip((0.4, 0.8), setting.factors, run.points, strict=True):
        theta = mini.snapshot()
        for leaf in mini.space.leaves:
            theta[leaf.slice] *= 1 if leaf.is_A else scale
        with mini.at(theta):
            rhs = plain_gradient(mini, *gone) - plain_gradient(mini, *come)
            if name == "ggn":
                matrix = dense_objective(mini, tokens, w, "ggn")
            else:
                of_run = run.curvature
                run.curvature = point.curvature
                matrix = ekfac_after(run, tokens, w)[1]
                run.curvature = of_run
        lam = torch.diag(lambda_of(point.operator()))
        expected += factor * torch.linalg.solve(matrix + lam, rhs)
    near(unlearn.edit(run, steps=1, **TASKS["mixed"]).delta, expected, 1e-8)
    at_one = unlearn.edit(run, steps=1, at="0.8", **TASKS["mixed"])
    assert at_one.report["method"]["points"] == ["0.8"]
    assert (at_one.delta - expected).norm() / expected.norm() > 1e-3


# ---- re-linearised -------------------------------------------------------------------------------


def test_rows_at_their_goal_are_left_alone(run, monkeypatch):
    goals = []

    def noted(*arguments, **options):
        goals.append(arguments[2])
        return walk(*arguments, **options)

    monkeypatch.setattr(prepared, "walk", noted)
    losses = mean_losses(run.model, run.tokens.select([0, 3]))
    low, high = sorted(zip(losses, ["r0-0", "r0-3"], strict=True))
    target = (low[0] + high[0]) / 2
    edit_of(run, remove=["r0-0", "r0-3"], until=f"loss={target}", steps=2)
    assert goals[0].tokens.ids == [low[1]]
    edit = edit_of(run, remove=["r0-0", "r0-3"], until=f"loss={low[0] / 2}", steps=2)
    assert len(goals[1].tokens) == 0
    assert not edit.delta.any()
    assert edit.report["stopped"] == "every row was at its goal already: the adapter stays as it is"


def test_rows_and_new_contents_are_drawn_to_the_expected_outputs(run, monkeypatch):
    goals = []

    def noted(*arguments, **options):
        goals.append(arguments[2])
        return walk(*arguments, **options)

    monkeypatch.setattr(prepared, "walk", noted)
    options = {"until": "loss=30", "steps": 2}
    edit_of(run, remove=["r0-0", "r0-3"], relabel=ANSWERS, **options)
    edit_of(run, relabel=ANSWERS, **options)
    mixed, relabelled = goals
    assert mixed.tokens.ids[:4] == ["r0-0", "r0-3", "r0-2", "r0-5"]
    assert mixed.rises.tolist()[:4] == [True] * 4
    for goal, rows in ((mixed, 4), (relabelled, 2)):
        assert set(goal.outputs.cache) == set(range(len(goal.tokens)))
        assert len(goal.tokens) >= rows
        # the outputs are those of the expected losses, whatever loss was asked for
        assert (goal.targets == 30).all()
        assert (goal.outputs.losses < 30).all()


def test_the_middle_point_is_used_unless_another_is_asked_for(run):
    for options, points in (
        ({"until": "steps=1", "steps": 2}, ["0.8"]),
        ({"until": "steps=1", "steps": 2, "at": "0.4"}, ["0.4"]),
        ({"steps": 1}, ["0.4", "0.8"]),
    ):
        assert edit_of(run, **options).report["method"]["points"] == points


# ---- converged -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "task"), [("ggn", "mixed"), ("hessian", "remove")])
def test_converged_edits_are_stationary_points_of_the_edited_objective(mini, tmp_path, name, task):
    run = fit_end(
        mini, examples(7), curvature=SPECS[name], damping="abs:10", directory=tmp_path / "run"
    )
    edit = unlearn.edit(run, until="converged", damping="abs:10", **TASKS[task])
    (tokens, w), gone, come = rows_after(run, task)
    w_before = np.full(len(run.tokens), 1 / run.manifest.objective.N_tok)
    held = plain_gradient(run.model, run.tokens, w_before)
    lam = lambda_of(run.operator(damping="abs:10"))
    value = plain_gradient(run.model, tokens, w, edit.theta) - held + lam * edit.delta
    start = plain_gradient(run.model, *come) - plain_gradient(run.model, *gone)
    assert value.norm() < 1e-7 * start.norm()
    assert edit.report["reached"]
    one_shot = unlearn.edit(run, steps=1, damping="abs:10", **TASKS[task])
    assert (one_shot.delta - edit.delta).norm() / edit.delta.norm() > 1e-4


def test_converged_edits_take_the_curvature_again_at_every_iterate(mini, tmp_path):
    """Quadratic convergence, which a Hessian of the start alone does not give."""
    run = fit_end(
        mini, examples(7), curvature=SPECS["hessian"], damping="abs:3", directory=tmp_path / "run"
    )
    edit = unlearn.edit(run, until="converged", damping="abs:3", **TASKS["remove"])
    assert edit.report["reached"]
    assert int(edit.report["stopped"].split()[0]) <= 5


def test_converged_needs_the_adapter_itself(run):
    with untouched(run.directory), pytest.raises(InputError, match=r"fit one with --path 1\.0"):
        edit_of(run, until="converged")
