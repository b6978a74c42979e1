"""Edits against slow oracles that share no code: refits of convex models, dense matrices, a hand-written M."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.stats import spearmanr

import influence
import unlearn
import unlearn.unseen as unseen
from influence.cost import Cost
from influence.curvature import Damped
from influence.curvature.fisher import SampleSpaceFisher
from influence.errors import NumericalError
from influence.gradients import loss_sum_gradient
from influence.setting import Setting
from influence.solvers import CG, Direct, LiSSA
from tests.conftest import build_model, examples, fit_end, tokens_of
from tests.influence.test_curvature import logits_fn, oracle, sampled_rows, summed_loss
from unlearn.edits.goals import Goals
from unlearn.edits.moved import Updated, after
from unlearn.edits.newton import optimum
from unlearn.record.change import plan
from unlearn.record.losses import measure
from unlearn.record.version import version
from unlearn.unseen import Reference, expected_losses, scaled_to

F64 = torch.float64


def random(seed, *shape):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def near(found, expected, tolerance):
    """Relative distance in the Euclidean norm."""
    assert float(expected.norm()) > 0
    assert float((found - expected).norm() / expected.norm()) < tolerance


# ---- ridge regression: the edit is the refit -----------------------------------------------------------------


def ridge(x, y, w, lam):
    """The optimum of `sum_i w_i/2 (x_i theta - y_i)^2 + lam/2 |theta|^2`, by its normal equations."""
    return torch.linalg.solve(
        x.T @ (w[:, None] * x) + lam * torch.eye(x.shape[1], dtype=F64), x.T @ (w * y)
    )


def fisher_of(x, w):
    return SampleSpaceFisher.fit(x.shape[1], lambda: iter(x.split(3)), w.sqrt())


class Ridge:
    """A problem, its edits by the closed form, and the rows they lead to."""

    def __init__(self, n, size):
        self.x, self.y = random(1, n, size), random(2, n)
        self.w, self.lam = 0.1 + random(3, n).abs(), torch.tensor([0.37], dtype=F64)
        self.theta = ridge(self.x, self.y, self.w, self.lam)
        self.fisher = fisher_of(self.x, self.w)

    def delta(self, theta, gone, come, curvature_gone=None, curvature_come=None):
        """The closed form; the curvature counts these rows (the edit's own unless others are given)."""
        cg = gone if curvature_gone is None else curvature_gone
        cc = come if curvature_come is None else curvature_come
        rows = torch.cat([self.x[cg] * self.w[cg, None].sqrt(), cc[0] * cc[2][:, None].sqrt()])
        signs = torch.tensor([-1.0] * len(cg) + [1.0] * len(cc[0]), dtype=F64)
        rhs = self.gradient(theta, self.x[gone], self.y[gone], self.w[gone]) - self.gradient(
            theta, *come
        )
        return Updated(self.fisher, rows, signs).solve(rhs[None], self.lam)[0]

    @staticmethod
    def gradient(theta, x, y, w):
        return (w * (x @ theta - y)) @ x

    def refit(self, gone, come):
        keep = np.setdiff1d(np.arange(len(self.x)), gone)
        parts = [
            torch.cat([own[keep], new])
            for own, new in zip((self.x, self.y, self.w), come, strict=True)
        ]
        return ridge(*parts, self.lam)


def nothing(size):
    return torch.zeros(0, size, dtype=F64), torch.zeros(0, dtype=F64), torch.zeros(0, dtype=F64)


@pytest.mark.parametrize("shape", [(12, 5), (6, 15)])
@pytest.mark.parametrize("task", ["remove one", "remove", "relabel", "correct", "mixed"])
def test_ridge_regression_edits_equal_refitting(shape, task):
    n, size = shape
    problem = Ridge(n, size)
    gone = np.array([2] if task == "remove one" else [0, 3, 4])
    new = {
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
    found = problem.theta + problem.delta(problem.theta, gone, new)
    near(found, problem.refit(gone, new), 1e-10)
    assert (found - problem.theta).norm() / problem.theta.norm() > 1e-2


def test_a_ridge_sequence_of_edits_equals_the_joint_edit():
    problem = Ridge(11, 6)
    first, second = np.array([1, 5]), np.array([0, 7])
    one = (problem.x[[5]], random(4, 1), problem.w[[5]])
    two = (random(5, 1, 6), random(6, 1), problem.w[[7]])
    joint = tuple(torch.cat(pair) for pair in zip(one, two, strict=True))
    both = np.concatenate([first, second])
    theta = problem.theta + problem.delta(problem.theta, first, one)
    theta = theta + problem.delta(theta, second, two, both, joint)  # the curvature knows both edits
    near(theta, problem.theta + problem.delta(problem.theta, both, joint), 1e-10)
    near(theta, problem.refit(both, joint), 1e-10)


def test_the_curvature_before_the_edit_misses_the_leave_one_out_factor():
    problem = Ridge(12, 5)
    leverages = problem.fisher.leverage(float(problem.lam))
    for row in range(3):
        gone = np.array([row])
        right = problem.delta(problem.theta, gone, nothing(5))
        rhs = problem.gradient(problem.theta, problem.x[gone], problem.y[gone], problem.w[gone])
        before = problem.fisher.solve(rhs[None], problem.lam)[0]
        near(before / (1 - leverages[row]), right, 1e-10)
        assert (before - right).norm() / right.norm() > 0.05


def test_products_and_solves_after_an_edit_are_those_of_the_dense_matrix():
    problem = Ridge(6, 9)
    rows, signs = (
        torch.cat([problem.x[:2] * problem.w[:2, None].sqrt(), random(4, 3, 9)]),
        [-1.0, -1, 1, 1, 1],
    )
    updated = Updated(problem.fisher, rows, torch.tensor(signs, dtype=F64))
    weights = torch.cat([problem.w[2:], torch.ones(3, dtype=F64)])
    x = torch.cat([problem.x[2:], rows[2:]])
    dense = x.T @ (weights[:, None] * x)
    v = random(5, 3, 9)
    near(updated.matvec(v), v @ dense, 1e-12)
    near(
        updated.solve(v, problem.lam),
        torch.linalg.solve(dense + problem.lam * torch.eye(9, dtype=F64), v.T).T,
        1e-11,
    )
    near(updated.mean_eigenvalues(), dense.trace().reshape(1) / 9, 1e-12)


def alone(q):
    """A row of leverage 1 - q, taken out; its dense curvature without it, and lambda."""
    x = torch.diag(torch.tensor([1e3, 1.0, 1.0], dtype=F64))
    updated = Updated(fisher_of(x, torch.ones(3, dtype=F64)), x[:1], -torch.ones(1, dtype=F64))
    return (
        updated,
        torch.diag(torch.tensor([0.0, 1.0, 1.0], dtype=F64)),
        torch.tensor([q * 1e6], dtype=F64),
    )


@pytest.mark.parametrize("q", [10.0**-k for k in range(2, 15, 2)])
def test_a_row_that_alone_determines_a_direction_gives_no_wrong_answer(q):
    """Right, or refused, or flagged by its residual."""
    updated, dense, lam = alone(q)
    v = random(0, 1, 3)
    try:
        found = Direct().solve(Damped(updated, lam), v)
    except NumericalError:
        return
    if bool(found.converged.all()):
        near(found.values, torch.linalg.solve(dense + lam * torch.eye(3, dtype=F64), v.T).T, 1e-2)
    else:
        assert q < 1e-4


# ---- a softmax head: convex, not quadratic -------------------------------------------------------------------


class Head:
    """Multinomial logistic regression; its GGN, which is its Hessian, is a Fisher of K rows an example."""

    K, lam = 3, torch.tensor([0.05], dtype=F64)

    def __init__(self, n=14, d=4):
        self.x, self.w = random(1, n, d), torch.full((n,), 1 / n, dtype=F64)
        self.y = torch.randint(self.K, (n,), generator=torch.Generator().manual_seed(2))
        self.theta = self.refit(self.w)

    def rows(self, theta, x, w):
        """`sqrt(w p_k) (p - e_k) x^T` for every example and label k."""
        p = (x @ theta.view(-1, self.K)).softmax(-1)
        out = p[:, None, :] - torch.eye(self.K, dtype=F64)  # [n, label, class]
        own = torch.einsum("nd,nkc->nkdc", x, out) * (w[:, None] * p).sqrt()[..., None, None]
        return own.flatten(2).flatten(0, 1)

    def gradient(self, theta, x, y, w):
        p = (x @ theta.view(-1, self.K)).softmax(-1)
        return (x.T @ (w[:, None] * (p - torch.nn.functional.one_hot(y, self.K)))).ravel()

    def refit(self, w):
        """By SciPy's trust region with the exact derivatives of autograd, which the edit's code never uses."""

        def value(theta):
            logits = self.x @ theta.view(-1, self.K)
            losses = torch.nn.functional.cross_entropy(logits, self.y, reduction="none")
            return w @ losses + self.lam[0] / 2 * theta @ theta

        def derivative(function):
            return lambda theta: function(value, torch.from_numpy(theta)).numpy()

        start = np.zeros(self.x.shape[1] * self.K)
        found = minimize(
            lambda theta: float(value(torch.from_numpy(theta))),
            start,
            jac=derivative(lambda f, at: torch.func.grad(f)(at)),
            hess=derivative(lambda f, at: torch.func.hessian(f)(at)),
            method="trust-exact",
            options={"gtol": 1e-12},
        )
        theta = torch.from_numpy(found.x)
        for _ in range(3):  # polish: SciPy stops where the value no longer changes
            step = torch.linalg.solve(
                torch.func.hessian(value)(theta), torch.func.grad(value)(theta)
            )
            theta = theta - step
        assert torch.func.grad(value)(theta).norm() < 1e-14
        return theta


def test_one_shot_error_falls_with_the_square_of_the_edited_weight():
    head, row = Head(), [3]
    fisher = SampleSpaceFisher.fit(
        head.theta.numel(),
        lambda: iter([head.rows(head.theta, head.x, head.w)]),
        torch.ones(42, dtype=F64),
    )
    shares, errors = 0.25 ** np.arange(1, 5), []
    for share in shares:
        taken = share * head.w[row]
        own = head.rows(head.theta, head.x[row], taken)
        gradient = head.gradient(head.theta, head.x[row], head.y[row], taken)
        delta = Updated(fisher, own, -torch.ones(head.K, dtype=F64)).solve(
            gradient[None], head.lam
        )[0]
        w = head.w.clone()
        w[row] -= taken
        errors.append(float((head.theta + delta - head.refit(w)).norm()))
    order = np.polyfit(np.log(shares), np.log(errors), 1)[0]
    assert order == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize("gone", [[3], [0, 5, 6, 9]])
def test_newton_with_the_curvature_taken_again_converges_to_the_refit(gone):
    head = Head()
    w = head.w.clone()
    w[gone] = 0
    held = head.gradient(head.theta, head.x, head.y, head.w)

    def residual(theta):
        return head.gradient(theta, head.x, head.y, w) - held + head.lam * (theta - head.theta)

    def solve(theta, v):
        rows = head.rows(theta, head.x, head.w)
        fisher = SampleSpaceFisher.fit(
            len(v), lambda: iter([rows]), torch.ones(len(rows), dtype=F64)
        )
        out = head.rows(theta, head.x[gone], head.w[gone])
        return Updated(fisher, out, -torch.ones(len(out), dtype=F64)).solve(v[None], head.lam)[0]

    found = optimum(residual, solve, head.theta)
    assert found.converged
    assert 2 < len(found.norms) < 12  # Newton's own speed
    refit = head.refit(w)
    near(found.theta - head.theta, refit - head.theta, 1e-8)
    one_shot = head.theta - solve(head.theta, residual(head.theta))
    assert (one_shot - refit).norm() > 1e-4 * (refit - head.theta).norm()


def test_newton_says_where_it_stopped_short():
    found = optimum(lambda x: x**2 + 1, lambda x, v: v / (2 * x + 1e-3), torch.ones(1, dtype=F64))
    assert not found.converged
    assert found.norms == sorted(found.norms, reverse=True)
    with pytest.raises(NumericalError, match="NaN or infinite"):
        optimum(lambda x: x * torch.nan, lambda x, v: v, torch.ones(1, dtype=F64))


# ---- a LoRA model: the one-shot edit against dense matrices --------------------------------------------------

SPECS = {
    "ekfac": influence.EKFAC(samples=2),
    "fisher": influence.Fisher(samples=2),
    "empirical": influence.Fisher(samples=0),
    "ggn": influence.GGN(),
    "hessian": influence.Hessian(),
    "identity": influence.Identity(),
}
DAMPING = {"hessian": "abs:2.0"}
TASKS = {
    "remove": {"remove": ["r0-1", "r0-4"]},
    "relabel": {"relabel": {"r0-2": " warm songs at dawn"}},
    "correct": {
        "correct": {
            "r0-0": {"prompt": "the old fox"},
            "r0-5": {"prompt": "a", "completion": " dog"},
        }
    },
    "mixed": {
        "remove": ["r0-3"],
        "relabel": {"r0-5": " birds sing loud"},
        "correct": {"r0-1": {"prompt": "cats sleep in"}},
    },
}


@pytest.fixture(scope="module")
def small():
    """GPT-2 (no float32 inside), one layer, LoRA on its attention input and MLP output."""
    return build_model("gpt2", layers=1, target_modules=["attn.c_attn", "mlp.c_proj"])


@pytest.fixture(scope="module")
def mini():
    """Less than a hundred parameters, for what forms a dense matrix many times."""
    return build_model("gpt2", layers=1, r=1, target_modules=["mlp.c_proj"])


@pytest.fixture(scope="module")
def runs(small, tmp_path_factory):
    """Runs at the adapter itself, by curvature and reduction, made when asked for."""
    folder, made = tmp_path_factory.mktemp("runs"), {}

    def get(name, reduction="token"):
        if (name, reduction) not in made:
            made[name, reduction] = fit_end(
                small,
                examples(6),
                curvature=SPECS[name],
                damping=DAMPING.get(name, "mean:0.5"),
                reduction=reduction,
                token_budget=30,
                directory=folder / f"{name}-{reduction}",
            )
        return made[name, reduction]

    return get


def rows_after(run, task):
    """The rows after an edit with their weights, made by hand: `(tokens, w)` and those that go and come."""
    asked = {"remove": [], "relabel": {}, "correct": {}} | TASKS[task]
    changes = {id: {"completion": text} for id, text in asked["relabel"].items()} | asked["correct"]
    old = [{"id": row.id, "prompt": row.prompt, "completion": row.completion} for row in run.train]
    new = [row | changes.get(row["id"], {}) for row in old if row["id"] not in asked["remove"]]
    touched = {*asked["remove"], *changes}

    def pack(rows):
        if not rows:
            return [], []
        tokens = tokens_of(run.model, influence.examples_from_rows(rows))
        return tokens, [weight(len(item.supervised.nonzero()[0])) for item in tokens]

    counts = [
        int(item.supervised.sum())
        for item in tokens_of(run.model, influence.examples_from_rows(old))
    ]
    per_token = run.manifest["objective"]["reduction"] == "token"
    weight = (lambda T: 1 / sum(counts)) if per_token else (lambda T: 1 / (len(old) * T))
    return (
        pack(new),
        pack([row for row in old if row["id"] in touched]),
        pack([r for r in new if r["id"] in touched]),
    )


def plain_gradient(model, tokens, w, theta=None):
    """`sum_i w_i grad l_i` by autograd, one row at a time, with the full logits."""
    total = torch.zeros(model.space.size, dtype=F64)
    for item, weight in zip(tokens, w, strict=True):
        f, targets = logits_fn(model, item)
        at = (model.snapshot() if theta is None else theta).clone().requires_grad_(True)
        total += weight * torch.autograd.grad(summed_loss(f, targets)(at), at)[0]
    return total


def ekfac_after(run, tokens, w):
    """Eigenvalues in the kept bases, leaf by leaf, from every row after the edit; and the dense matrix."""
    samples = run.manifest["curvature"]["samples"]
    rows = torch.stack(sampled_rows(run.model, tokens, samples)).view(len(tokens), samples, -1)
    matrix, found = torch.zeros(run.model.space.size, run.model.space.size, dtype=F64), []
    for block in run.curvature("ekfac").leaf_blocks:
        values = torch.zeros_like(block.eigenvalues)
        basis = torch.kron(block.narrow, block.wide)  # columns: narrow-major, as the values
        for own, weight in zip(rows, w, strict=True):
            for row in own:
                G = row[block.leaf.slice].view(block.leaf.shape)
                G = G if block.leaf.is_A else G.T
                values += weight / samples * (block.narrow.T @ G @ block.wide) ** 2
        own = (basis * values.ravel()) @ basis.T
        if not block.leaf.is_A:
            r, d = values.shape
            own = own.view(r, d, r, d).permute(1, 0, 3, 2).reshape(r * d, r * d)
        matrix[block.leaf.slice, block.leaf.slice] = own
        found.append(values)
    return found, matrix


def dense_after(run, name, tokens, w):
    """C after the edit, from every row that there is then."""
    if name in ("ggn", "hessian"):
        return oracle(run.model, tokens, w, name)
    if name == "ekfac":
        return ekfac_after(run, tokens, w)[1]
    if name == "identity":
        return torch.zeros(run.model.space.size, run.model.space.size, dtype=F64)
    draws = max(1, run.manifest["curvature"]["samples"])
    if name == "fisher":
        rows = torch.stack(sampled_rows(run.model, tokens, draws))
    else:
        rows = torch.stack([plain_gradient(run.model, [item], [1.0]) for item in tokens])
    return rows.T @ (torch.tensor(np.repeat(w, draws) / draws)[:, None] * rows)


def lambda_of(operator):
    """The fit's lambda over the coordinates, block by block."""
    out = torch.zeros(operator.curvature.size, dtype=F64)
    for block, value in zip(operator.curvature.blocks, operator.lam.tolist(), strict=True):
        out[block] = value
    return out


def expected_delta(run, name, task):
    (tokens, w), gone, come = rows_after(run, task)
    rhs = plain_gradient(run.model, *gone) - plain_gradient(run.model, *come)
    C = dense_after(run, name, tokens, w)
    return torch.linalg.solve(C + torch.diag(lambda_of(run.operator())), rhs)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", SPECS)
def test_the_one_shot_edit_is_the_dense_one(runs, name, task):
    run = runs(name, "token" if task in ("remove", "relabel") else "example")
    found = unlearn.edit(run, steps=1, **TASKS[task])
    near(found.delta, expected_delta(run, name, task), 1e-8)
    assert found.report["residual"]["solver"] < 1e-8
    assert found.report["kind"] == task


@pytest.mark.parametrize("name", ["fisher", "ggn", "ekfac"])
@pytest.mark.parametrize("task", ["remove", "correct"])
def test_the_other_reduction_keeps_the_weights_of_the_fit_too(runs, name, task):
    run = runs(name, "example" if task == "remove" else "token")
    near(unlearn.edit(run, steps=1, **TASKS[task]).delta, expected_delta(run, name, task), 1e-8)


def test_three_names_are_one_edit(runs):
    run = runs("fisher")
    for name in ("remove", "relabel", "correct"):
        found = getattr(unlearn, name)(run, TASKS[name][name], steps=1)
        assert torch.equal(found.delta, unlearn.edit(run, steps=1, **TASKS[name]).delta)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("reduction", ["token", "example"])
def test_ekfac_after_an_edit_has_the_eigenvalues_of_the_rows_after_it(runs, task, reduction):
    run = runs("ekfac", reduction)
    point = run.points[0]
    change = plan(version(run), **TASKS[task])
    found = after(point, point.operator(), change, Cost())
    (tokens, w), _, _ = rows_after(run, task)
    expected, _ = ekfac_after(run, tokens, w)
    before = run.curvature("ekfac").leaf_blocks
    for block, old, values in zip(found.curvature.leaf_blocks, before, expected, strict=True):
        near(block.eigenvalues, values, 1e-10)
        assert (old.eigenvalues - values).norm() / values.norm() > 1e-3
    assert torch.equal(found.lam, point.operator().lam)


def test_the_rows_and_weights_after_an_edit_are_those_made_by_hand(runs):
    for reduction in ("token", "example"):
        run = runs("fisher", reduction)
        for task in TASKS:
            change = plan(version(run), **TASKS[task])
            (tokens, w), _, _ = rows_after(run, task)
            np.testing.assert_allclose(change.weights_after, w, rtol=1e-14)
            assert change.tokens_after.ids == tokens.ids == change.after.ids
            for own, other in zip(change.tokens_after, tokens, strict=True):
                np.testing.assert_array_equal(own.input_ids, other.input_ids)
                np.testing.assert_array_equal(own.supervised, other.supervised)


@pytest.mark.parametrize("solver", ["cg", "pcg", "lissa"])
def test_iterative_solvers_give_the_direct_edit(mini, tmp_path, solver):
    run = fit_end(mini, examples(7), curvature=SPECS["ekfac"], directory=tmp_path / "run")
    options = {"steps": 1, "curvature": "ggn", "damping": "abs:0.3", **TASKS["mixed"]}
    direct = unlearn.edit(run, **options)
    near(unlearn.edit(run, solver=solver, **options).delta, direct.delta, 1e-2)
    tight = {"cg": CG(tolerance=1e-9), "lissa": LiSSA(tolerance=1e-9, max_iterations=2000)}
    if solver in tight:
        found = unlearn.edit(run, solver=tight[solver], **options)
        near(found.delta, direct.delta, 1e-7)
        assert found.report["residual"]["tolerance"] == 1e-9
        assert found.report["residual"]["solver"] <= 1e-9


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
                C = oracle(mini, tokens, w, "ggn")
            else:
                held = run.curvature
                run.curvature = point.curvature
                C = ekfac_after(run, tokens, w)[1]
                run.curvature = held
        expected += factor * torch.linalg.solve(C + torch.diag(lambda_of(point.operator())), rhs)
    near(unlearn.edit(run, steps=1, **TASKS["mixed"]).delta, expected, 1e-8)
    one = unlearn.edit(run, steps=1, at="0.8", **TASKS["mixed"])
    assert one.report["method"]["points"] == ["0.8"]
    assert (one.delta - expected).norm() / expected.norm() > 1e-3


@pytest.mark.parametrize(("name", "task"), [("ggn", "mixed"), ("hessian", "remove")])
def test_converged_edits_are_stationary_points_of_the_edited_objective(mini, tmp_path, name, task):
    run = fit_end(
        mini, examples(7), curvature=SPECS[name], damping="abs:10", directory=tmp_path / "run"
    )
    damping = "abs:10"
    found = unlearn.edit(run, until="converged", damping=damping, **TASKS[task])
    (tokens, w), gone, come = rows_after(run, task)
    all_w = np.full(len(run.tokens), 1 / run.manifest["objective"]["N_tok"])
    held = plain_gradient(run.model, run.tokens, all_w)
    lam = lambda_of(run.operator(damping=damping))
    value = plain_gradient(run.model, tokens, w, found.theta) - held + lam * found.delta
    start = plain_gradient(run.model, *come) - plain_gradient(run.model, *gone)
    assert value.norm() < 1e-7 * start.norm()
    assert found.report["reached"]
    one_shot = unlearn.edit(run, steps=1, damping=damping, **TASKS[task])
    assert (one_shot.delta - found.delta).norm() / found.delta.norm() > 1e-4


# ---- M, its gradient, and the reference ----------------------------------------------------------------------


def hinge(x, s):
    return torch.where(x <= 0, torch.zeros_like(x), torch.where(x < s, x**2 / (2 * s), x - s / 2))


def mixture(model, item, theta, base, a):
    """`log q` [T, V] of one row, from both models' full logits."""
    f, targets = logits_fn(model, item)
    with torch.no_grad():
        z0, z1 = f(base), f(theta)
        return (z0 + a * (z1 - z0)).log_softmax(-1), targets


def share_of(model, item, theta, base, target):
    """The a at which the row's mean loss is `target`, from a fine bisection of Brent's."""
    from scipy.optimize import brentq

    def excess(a):
        log_q, targets = mixture(model, item, theta, base, a)
        return float(torch.nn.functional.nll_loss(log_q, targets)) - target

    if excess(-1.0) <= 0:
        return -1.0
    return brentq(excess, -1.0, 1.0, xtol=1e-14)


@pytest.fixture(scope="module", params=["float64", "float32"])
def pulling(request, tmp_path_factory):
    """Goals with removed, replaced and new rows: some above, some below, some far beyond the hinge's bend."""
    dtype = torch.float64 if request.param == "float64" else torch.float32
    model = build_model("gpt2", layers=1, dtype=dtype)
    run = fit_end(
        model,
        examples(7),
        curvature=influence.EKFAC(),
        directory=tmp_path_factory.mktemp("pull") / "run",
    )
    start = version(run)
    tokens = start.tokens.select([0, 1, 2, 3, 4, 5, 6])
    now = measure(model, tokens).loss
    targets = now * np.array([1.05, 1.9, 0.7, 1.3, 1.4, 0.8, 1.2])
    rises = np.array([True, True, True, True, True, False, False])
    removed = np.array([True, True, True, False, False, False, False])
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    return start, tokens, targets, rises, removed, tolerance


def goals_of(pulling):
    start, tokens, targets, rises, removed, _ = pulling
    return Goals(tokens, targets, rises, removed, Reference(start, tokens, targets, Cost()))


def hand_made_merit(pulling, log_qs):
    """M as a function of the flat parameters, row by row."""
    start, tokens, targets, rises, removed, _ = pulling
    counts = [int(item.supervised.sum()) for item in tokens]

    def M(theta):
        total = torch.zeros((), dtype=theta.dtype)
        for i, item in enumerate(tokens):
            f, labels = logits_fn(start.model, item)
            log_p = f(theta).log_softmax(-1)
            loss = torch.nn.functional.nll_loss(log_p, labels)
            sign = 1 if rises[i] else -1
            own = hinge(sign * (targets[i] - loss), 0.5 * targets[i])
            if removed[i]:
                own = own + (log_qs[i].exp() * (log_qs[i] - log_p)).sum(-1).mean()
            total = total + counts[i] / sum(counts) * own
        return total

    return M


def test_the_pull_is_the_gradient_of_a_hand_written_objective(pulling):
    start, tokens, targets, _, removed, tolerance = pulling
    model, base = start.model, scaled_to(start, 0.0)
    goals = goals_of(pulling)
    log_qs = {int(i): goals.reference.of(np.array([i])) for i in np.flatnonzero(removed)}
    theta = (start.theta + 0.05 * random(3, model.space.size).to(start.theta)).requires_grad_(True)
    M = hand_made_merit(pulling, log_qs)(theta)
    expected = torch.autograd.grad(M, theta)[0]
    cost = Cost()
    with model.at(theta.detach()):
        found = goals.pull(model, token_budget=25, cost=cost)
        other = goals.pull(model, token_budget=10_000, cost=Cost())
    near(found.gradient, expected, tolerance)
    assert found.merit == pytest.approx(float(M.detach()), rel=tolerance)
    near(other.gradient, expected, tolerance)
    assert other.merit == pytest.approx(float(M.detach()), rel=tolerance)
    with model.at(theta.detach()):
        np.testing.assert_allclose(found.losses, measure(model, tokens).loss, rtol=10 * tolerance)
    assert cost.gradients == 7
    assert base.shape == start.theta.shape
    assert targets.shape == (7,)


def test_the_reference_is_the_mixture_that_has_the_asked_loss(pulling):
    start, tokens, targets, _, removed, tolerance = pulling
    reference = goals_of(pulling).reference
    base, inside = scaled_to(start, 0.0), 0
    for i in np.flatnonzero(removed):
        f, labels = logits_fn(start.model, tokens[int(i)])
        log_q = reference.of(np.array([i]))
        loss = float(torch.nn.functional.nll_loss(log_q, labels))
        with torch.no_grad():
            now = float(torch.nn.functional.cross_entropy(f(start.theta), labels))
        if targets[i] <= now:
            continue  # no goal to rise to: such a row does not enter
        a = share_of(start.model, tokens[int(i)], start.theta, base, targets[i])
        expected, _ = mixture(start.model, tokens[int(i)], start.theta, base, a)
        torch.testing.assert_close(log_q, expected, rtol=0, atol=1e-4)
        if a > -1:
            inside += 1
            assert loss == pytest.approx(targets[i], abs=1e-4)
    assert inside
    assert tolerance <= 1e-5


def test_references_are_the_same_with_and_without_a_cache(pulling, monkeypatch):
    start = pulling[0]
    kept = goals_of(pulling)
    with start.model.at(start.theta):
        first = kept.pull(start.model, token_budget=25, cost=Cost())
        again = kept.pull(start.model, token_budget=25, cost=Cost())
    assert kept.reference.cache
    monkeypatch.setattr(unseen, "CACHE_BYTES", 0)
    bare = goals_of(pulling)
    with start.model.at(start.theta):
        found = bare.pull(start.model, token_budget=25, cost=Cost())
        bare.pull(start.model, token_budget=25, cost=Cost())
    assert not bare.reference.cache
    for other in (again, found):
        assert torch.equal(first.gradient, other.gradient)
        assert first.merit == other.merit
    assert bare.reference.cost.forwards == 2 * kept.reference.cost.forwards == 2 * 2 * 3


def test_the_sum_of_losses_has_the_gradient_of_the_plain_loop(runs):
    run = runs("ekfac")
    w = np.linspace(-1, 2, len(run.tokens))
    for budget in (20, 4000):
        found, losses = loss_sum_gradient(
            run.model, run.tokens, w, token_budget=budget, cost=Cost()
        )
        near(found, plain_gradient(run.model, run.tokens, w), 1e-10)
        np.testing.assert_allclose(losses, measure(run.model, run.tokens).loss, rtol=1e-12)


# ---- what is measured ----------------------------------------------------------------------------------------


def test_extraction_strength_is_that_of_greedy_decoding(runs):
    """Decoded one token after the other from the prompt and the first k completion tokens."""
    model, tokens = runs("ekfac").model, runs("ekfac").tokens
    found = measure(model, tokens, token_budget=20)
    for i, item in enumerate(tokens):
        ids = torch.from_numpy(item.input_ids)
        first, length = int(item.supervised.argmax()), len(item.input_ids)
        for k in range(length - first + 1):
            text = ids[: first + k]
            while len(text) < length:
                logits = model.model(input_ids=text[None]).logits[0, -1]
                text = torch.cat([text, logits.argmax().reshape(1)])
            if torch.equal(text, ids):
                break
        assert found.extraction[i] == pytest.approx(1 - k / (length - first))
        f, targets = logits_fn(model, item)
        expected = torch.nn.functional.cross_entropy(f(model.snapshot()), targets)
        assert found.loss[i] == pytest.approx(float(expected), rel=1e-12)


# ---- expected losses -----------------------------------------------------------------------------------------


def fitted(small, folder, rows, **options):
    data = influence.examples_from_rows(rows)
    return fit_end(small, data, curvature=influence.EKFAC(), directory=folder / "run", **options)


@pytest.fixture(scope="module")
def kin(small, tmp_path_factory):
    """Six rows of the same kind as each other, and three copies of one more."""
    own = [
        {"id": row.id, "prompt": row.prompt, "completion": row.completion} for row in examples(6)
    ]
    copies = [
        {"id": f"copy-{i}", "prompt": "the red fox", "completion": " runs over a lazy dog"}
        for i in range(3)
    ]
    return fitted(small, tmp_path_factory.mktemp("kin"), own + copies)


def shares_of(run, ids):
    change = plan(version(run), remove=ids)
    now = measure(run.model, change.old).loss
    return expected_losses(change, now, None, None, Cost())


def test_shares_are_in_zero_to_one_and_fall_where_a_copy_stays(kin):
    all_rows = [shares_of(kin, [id]) for id in kin.train.ids]
    values = np.concatenate([found.shares for found in all_rows])
    assert ((values >= 0) & (values <= 1)).all()
    one, two = shares_of(kin, ["copy-0"]), shares_of(kin, ["copy-0", "copy-1"])
    three = shares_of(kin, ["copy-0", "copy-1", "copy-2"])
    assert one.shares[0] < 0.45
    assert one.shares[0] < two.shares[0] < three.shares[0]
    assert three.shares.min() > 0.8
    np.testing.assert_allclose(three.shares, three.shares[0], rtol=1e-8)
    assert (three.expected >= three.now - 1e-12).all()


def test_nothing_else_teaching_a_row_means_a_share_of_one(small, tmp_path):
    """All rows but two go: what the others teach them cannot be told from what is usual."""
    run = fitted(
        small,
        tmp_path,
        [{"id": str(i), "prompt": "the", "completion": " " + w} for i, w in enumerate("ab")],
    )
    found = shares_of(run, ["0"])
    assert found.shares[0] == 1
    np.testing.assert_allclose(
        found.expected, np.maximum(found.now, unseen.UNSEEN * found.base), rtol=1e-12
    )


def test_shares_do_not_depend_on_the_order_of_the_rows_or_requests(kin, small, tmp_path):
    rows = [{"id": row.id, "prompt": row.prompt, "completion": row.completion} for row in kin.train]
    turned = fitted(small, tmp_path, rows[::-1])
    ids = ["copy-1", "r0-2", "r0-5"]
    first = dict(zip(ids, shares_of(kin, ids).expected, strict=True))
    second = dict(zip(ids[::-1], shares_of(turned, ids[::-1]).expected, strict=True))
    for id in ids:
        assert first[id] == pytest.approx(second[id], rel=1e-8)


def test_the_base_losses_of_an_estimate_are_those_without_the_adapter(kin):
    found = shares_of(kin, ["r0-1", "copy-2"])
    change = plan(version(kin), remove=["r0-1", "copy-2"])
    with kin.model.model.disable_adapter():
        np.testing.assert_allclose(found.base, measure(kin.model, change.old).loss, rtol=1e-12)


def test_held_out_rows_tell_how_much_worse_than_the_base_an_unseen_row_is(kin):
    heldout = tokens_of(kin.model, examples(9, seed=8))
    change = plan(version(kin), remove=["r0-1"])
    now, own = measure(kin.model, change.old).loss, measure(kin.model, heldout).loss
    found = expected_losses(change, now, heldout, own, Cost())
    with kin.model.model.disable_adapter():
        base = measure(kin.model, heldout).loss.mean()
    assert found.rho == pytest.approx(np.clip(own.mean() / base, 1, unseen.LARGEST))
    few = expected_losses(change, now, heldout[:5], own[:5], Cost())  # too few to tell
    assert few.rho == unseen.UNSEEN


@pytest.mark.slow
def test_expected_losses_forecast_retraining(testbed, tmp_path):
    """Against adapters retrained without random halves of the rows, and without one author."""
    model = influence.load(testbed / "base", testbed / "adapter")
    train = influence.read_examples(testbed / "train.jsonl")
    run = influence.fit(model, train, directory=tmp_path / "run")
    truth = np.load(testbed / "truth.npz", allow_pickle=False)
    masks, measured, start = truth["masks"][:16], truth["train_loss"][:16], version(run)
    now = measure(model, start.tokens).loss
    total, count, exact = np.zeros(len(train)), np.zeros(len(train)), np.zeros(len(train))
    for mask, losses in zip(masks, measured, strict=True):
        out = np.flatnonzero(~mask)
        change = plan(start, remove=[train.ids[i] for i in out])
        found = expected_losses(change, now[out], None, None, Cost())
        total[out] += found.expected
        exact[out] += losses[out]
        count[out] += 1
    forecast, truth_of_row = total / count, exact / count
    assert spearmanr(forecast, truth_of_row).statistic >= 0.6
    assert forecast.mean() == pytest.approx(truth_of_row.mean(), rel=0.25)
    author = [row.id for row in train if row.group == train[0].group]
    assert len(author) == 20
    change = plan(start, remove=author)
    found = expected_losses(change, now[change.rows], None, None, Cost())
    assert found.expected.mean() == pytest.approx(4.82, rel=0.1)
