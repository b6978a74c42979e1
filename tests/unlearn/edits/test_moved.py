"""The curvature after an edit, against refits of convex problems and dense matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import influence
from influence.cost import Cost
from influence.curvature import Damped
from influence.curvature.fisher import SampleSpaceFisher, UpdatedFisher
from influence.errors import NumericalError
from influence.row_files import read_examples
from influence.solvers import Direct
from influence.tokens import tokenize
from tests.unlearn.edits.convex import Head, Ridge
from tests.unlearn.edits.helpers import (
    ANSWERS,
    F64,
    TASKS,
    edit_of,
    ekfac_after,
    near,
    random,
    rows_after,
)
from unlearn.edits.moved import after
from unlearn.record.change import plan
from unlearn.record.version import version

# ---- ridge regression: the edit is the refit -----------------------------------------------------


def fisher_of(x, w):
    return SampleSpaceFisher.fit(x.shape[1], lambda: iter(x.split(3)), w.sqrt())


def ridge_delta(problem, theta, gone, come, counted=None):
    """The closed form, by a curvature that counts the rows `counted` (default: the edit's)."""
    counted_gone, counted_come = (gone, come) if counted is None else counted
    rows = torch.cat(
        [
            problem.x[counted_gone] * problem.w[counted_gone, None].sqrt(),
            counted_come[0] * counted_come[2][:, None].sqrt(),
        ]
    )
    signs = torch.tensor([-1.0] * len(counted_gone) + [1.0] * len(counted_come[0]), dtype=F64)
    removed = problem.gradient(theta, problem.x[gone], problem.y[gone], problem.w[gone])
    rhs = removed - problem.gradient(theta, *come)
    updated = UpdatedFisher(fisher_of(problem.x, problem.w), rows, signs)
    return updated.solve(rhs[None], problem.lam)[0]


def nothing(size):
    return torch.zeros(0, size, dtype=F64), torch.zeros(0, dtype=F64), torch.zeros(0, dtype=F64)


@pytest.mark.parametrize("shape", [(12, 5), (6, 15)])
@pytest.mark.parametrize("task", ["remove one", "remove", "relabel", "correct", "mixed"])
def test_ridge_regression_edits_equal_refitting(shape, task):
    n, size = shape
    problem = Ridge(n, size)
    gone = np.array([2] if task == "remove one" else [0, 3, 4])
    come = {
        "remove one": nothing(size),
        "remove": nothing(size),
        "relabel": (problem.x[gone], random(7, 3), problem.w[gone]),
        "correct": (random(8, 3, size), problem.y[gone], problem.w[gone]),
        "mixed": (  # row 0 goes, row 3 gets another y, row 4 another x, y and weight
            torch.stack([problem.x[3], random(9, size)]),
            random(10, 2),
            torch.stack([problem.w[3], 2 * problem.w[4]]),
        ),
    }[task]
    theta = problem.theta + ridge_delta(problem, problem.theta, gone, come)
    near(theta, problem.refit(gone, come), 1e-10)
    assert (theta - problem.theta).norm() / problem.theta.norm() > 1e-2


def test_a_ridge_sequence_of_edits_equals_the_joint_edit():
    problem = Ridge(11, 6)
    first, second = np.array([1, 5]), np.array([0, 7])
    come_first = (problem.x[[5]], random(4, 1), problem.w[[5]])
    come_second = (random(5, 1, 6), random(6, 1), problem.w[[7]])
    come = tuple(torch.cat(pair) for pair in zip(come_first, come_second, strict=True))
    both = np.concatenate([first, second])
    theta = problem.theta + ridge_delta(problem, problem.theta, first, come_first)
    # The curvature of the second edit knows both.
    theta = theta + ridge_delta(problem, theta, second, come_second, (both, come))
    near(theta, problem.theta + ridge_delta(problem, problem.theta, both, come), 1e-10)
    near(theta, problem.refit(both, come), 1e-10)


def test_the_curvature_before_the_edit_misses_the_leave_one_out_factor():
    problem = Ridge(12, 5)
    fisher = fisher_of(problem.x, problem.w)
    leverages = fisher.leverage(float(problem.lam))
    for row in range(3):
        gone = np.array([row])
        right = ridge_delta(problem, problem.theta, gone, nothing(5))
        rhs = problem.gradient(problem.theta, problem.x[gone], problem.y[gone], problem.w[gone])
        before = fisher.solve(rhs[None], problem.lam)[0]
        near(before / (1 - leverages[row]), right, 1e-10)
        assert (before - right).norm() / right.norm() > 0.05


def test_products_and_solves_after_an_edit_are_those_of_the_dense_matrix():
    problem = Ridge(6, 9)
    rows = torch.cat([problem.x[:2] * problem.w[:2, None].sqrt(), random(4, 3, 9)])
    signs = torch.tensor([-1.0, -1, 1, 1, 1], dtype=F64)
    updated = UpdatedFisher(fisher_of(problem.x, problem.w), rows, signs)
    weights = torch.cat([problem.w[2:], torch.ones(3, dtype=F64)])
    x = torch.cat([problem.x[2:], rows[2:]])
    dense = x.T @ (weights[:, None] * x)
    v = random(5, 3, 9)
    near(updated.matvec(v), v @ dense, 1e-12)
    solved = torch.linalg.solve(dense + problem.lam * torch.eye(9, dtype=F64), v.T).T
    near(updated.solve(v, problem.lam), solved, 1e-11)
    near(updated.mean_eigenvalues(), dense.trace().reshape(1) / 9, 1e-12)


def alone(q):
    """The curvature without a row of leverage 1 - q, updated and dense, and lambda."""
    x = torch.diag(torch.tensor([1e3, 1.0, 1.0], dtype=F64))
    updated = UpdatedFisher(
        fisher_of(x, torch.ones(3, dtype=F64)), x[:1], -torch.ones(1, dtype=F64)
    )
    without = torch.diag(torch.tensor([0.0, 1.0, 1.0], dtype=F64))
    return updated, without, torch.tensor([q * 1e6], dtype=F64)


@pytest.mark.parametrize("q", [10.0**-k for k in range(2, 15, 2)])
def test_a_row_that_alone_determines_a_direction_gives_no_wrong_answer(q):
    """Right, or refused, or flagged by its residual."""
    updated, without, lam = alone(q)
    v = random(0, 1, 3)
    try:
        solution = Direct().solve(Damped(updated, lam), v)
    except NumericalError:
        return
    if bool(solution.converged.all()):
        right = torch.linalg.solve(without + lam * torch.eye(3, dtype=F64), v.T).T
        near(solution.values, right, 1e-2)
    else:
        assert q < 1e-4


# ---- a softmax head: convex, not quadratic -------------------------------------------------------


def test_one_shot_error_falls_with_the_square_of_the_edited_weight():
    head, row = Head(), [3]
    all_rows = head.rows(head.theta, head.x, head.w)
    fisher = SampleSpaceFisher.fit(
        head.theta.numel(), lambda: iter([all_rows]), torch.ones(42, dtype=F64)
    )
    shares, errors = 0.25 ** np.arange(1, 5), []
    for share in shares:
        taken = share * head.w[row]
        rows = head.rows(head.theta, head.x[row], taken)
        gradient = head.gradient(head.theta, head.x[row], head.y[row], taken)
        updated = UpdatedFisher(fisher, rows, -torch.ones(head.K, dtype=F64))
        delta = updated.solve(gradient[None], head.lam)[0]
        w = head.w.clone()
        w[row] -= taken
        errors.append(float((head.theta + delta - head.refit(w)).norm()))
    order = np.polyfit(np.log(shares), np.log(errors), 1)[0]
    assert order == pytest.approx(2, abs=0.1)


def test_the_curvature_without_some_rows_of_a_head_is_that_of_the_others():
    head, gone = Head(), [0, 5, 6, 9]
    w = head.w.clone()
    w[gone] = 0
    all_rows = head.rows(head.theta, head.x, head.w)
    fisher = SampleSpaceFisher.fit(
        head.theta.numel(), lambda: iter([all_rows]), torch.ones(42, dtype=F64)
    )
    rows = head.rows(head.theta, head.x[gone], head.w[gone])
    v = random(3, 1, head.theta.numel())
    rest = head.rows(head.theta, head.x, w)
    right = torch.linalg.solve(rest.T @ rest + head.lam * torch.eye(v.shape[1], dtype=F64), v.T).T
    near(
        UpdatedFisher(fisher, rows, -torch.ones(len(rows), dtype=F64)).solve(v, head.lam),
        right,
        1e-10,
    )


# ---- runs of a LoRA model ------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("reduction", ["token", "example"])
def test_ekfac_after_an_edit_has_the_eigenvalues_of_the_rows_after_it(runs, task, reduction):
    run = runs("ekfac", reduction)
    point = run.points[0]
    change = plan(version(run), **TASKS[task])
    operator = after(point, point.operator(), change, Cost())
    (tokens, w), _, _ = rows_after(run, task)
    expected, _ = ekfac_after(run, tokens, w)
    before = run.curvature("ekfac").leaf_blocks
    for block, old, values in zip(operator.curvature.leaf_blocks, before, expected, strict=True):
        near(block.eigenvalues, values, 1e-10)
        assert (old.eigenvalues - values).norm() / values.norm() > 1e-3
    assert torch.equal(operator.lam, point.operator().lam)


def test_the_rows_and_weights_after_an_edit_are_those_made_by_hand(runs):
    for reduction in ("token", "example", "batch:1"):
        run = runs("fisher", reduction)
        for task in TASKS:
            change = plan(version(run), **TASKS[task])
            (tokens, w), _, _ = rows_after(run, task)
            np.testing.assert_allclose(change.weights_after, w, rtol=1e-14)
            assert change.tokens_after.ids == tokens.ids == change.after.ids
            for row, by_hand in zip(change.tokens_after, tokens, strict=True):
                np.testing.assert_array_equal(row.input_ids, by_hand.input_ids)
                np.testing.assert_array_equal(row.supervised, by_hand.supervised)


def test_one_shot_fisher_edits_know_the_curvature_of_all_edits_so_far(fitted_folder, tmp_path):
    """The second edit's solve against a fit on the rows that are left.

    Both are at the same parameters and labels.
    """
    model = fitted_folder.model
    train = read_examples(fitted_folder.path / "train.jsonl")
    spec = {"curvature": influence.Fisher(samples=0), "path": (1.0,), "damping": "abs:0.05"}
    run = influence.fit(model, train, directory=tmp_path / "run", **spec)
    first = edit_of(run, remove=["r0-1"], relabel={"r0-2": ANSWERS["r0-2"]}, steps=1)
    first.save(tmp_path / "one")
    edit = edit_of(run, remove=["r0-4"], steps=1)
    start, n_tok = version(run), run.manifest.objective.N_tok
    left = influence.Examples(row for row in start.rows if row.id != "r0-4")
    tokens = tokenize(left, model.tokenizer)
    rows = run.points[0].query_gradients(tokens, influence.measurements.SumLoss()).double()
    rows = rows / np.sqrt(n_tok)
    with model.at(start.theta):
        gradients = next(influence.stream_gradients(model, run.tokens.select([4])))[1]
    matrix = rows.T @ rows + 0.05 * torch.eye(rows.shape[1], dtype=F64)
    expected = torch.linalg.solve(matrix, gradients[0].double() / n_tok)
    assert (edit.delta.double() - expected).norm() / expected.norm() < 1e-3
