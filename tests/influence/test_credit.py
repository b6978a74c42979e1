"""Shared credit: against dense inverses, against refitted ridge regressions, and in the files."""

from __future__ import annotations

import h5py
import numpy as np
import pytest
import torch

import influence
from influence.credit import Credit, credited
from influence.curvature.base import dense
from influence.errors import InputError
from influence.kernel import WholeKernel
from influence.path_time import PathTime
from tests.conftest import build_model, examples, fit_end, teach, tokens_of
from tests.oracles import b_times, close, plain_gradients, plain_mean

N, PATH = 9, (0.4, 0.8)
SITES = {"layers": 1, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture(scope="module")
def taught():
    return teach(build_model(**SITES), examples(N))


@pytest.fixture(scope="module")
def run(taught, tmp_path_factory):
    return influence.fit(
        taught, examples(N), path=PATH, directory=tmp_path_factory.mktemp("taught") / "run"
    )


# ---- ridge regression ----------------------------------------------------------------------------


class Ridge:
    """Least squares with a ridge, `sum_i w_i (x_i theta - y_i)^2 / 2 + lam theta^2 / 2`, with
    residuals of one size, so that the rows' own second moments are their curvature but for a
    factor: `s = 1 / size^2`. Made backwards, from the solution.
    """

    def __init__(self, n=11, d=4, seed=0, size=0.7, lam=0.3):
        rng = np.random.default_rng(seed)
        self.x, self.w, self.lam = rng.normal(size=(n, d)), rng.random(n) + 0.5, lam
        residuals = size * rng.choice([-1, 1], n)  # x theta - y
        self.theta = -(self.w * residuals) @ self.x / lam
        self.y = self.x @ self.theta - residuals
        self.query = rng.normal(size=(3, d))
        roots = np.sqrt(self.w)
        rows = roots[:, None] * residuals[:, None] * self.x
        kernel, u = rows @ rows.T / lam, self.query @ rows.T / lam
        strength = 1 / size**2
        path = PathTime(1.0, strength, np.ones(1))
        self.credit = Credit(path, self.w, [WholeKernel(kernel)])
        self.raw = (roots * u)[None]

    def refitted(self, gone):
        left = np.setdiff1d(np.arange(len(self.w)), gone)
        x, w = self.x[left], self.w[left]
        return np.linalg.solve(
            (w * x.T) @ x + self.lam * np.eye(x.shape[1]), (w * x.T) @ self.y[left]
        )


def test_ridge_the_solution_is_one():
    bed = Ridge()
    np.testing.assert_allclose(bed.refitted([]), bed.theta, rtol=1e-12)


def test_ridge_a_score_is_the_change_when_that_row_is_left_out():
    bed = Ridge()
    scores = bed.credit.singles(bed.raw)
    for row in range(len(bed.w)):
        real = bed.query @ (bed.refitted([row]) - bed.theta)
        np.testing.assert_allclose(scores[:, row], real, rtol=1e-10)


@pytest.mark.parametrize("gone", [[3], [0, 4], [1, 2, 5, 6, 9]])
def test_ridge_the_effect_of_a_set_is_the_change_when_it_is_left_out(gone):
    bed = Ridge()
    real = bed.query @ (bed.refitted(gone) - bed.theta)
    np.testing.assert_allclose(bed.credit.together(bed.raw, np.array(gone)), real, rtol=1e-10)
    assert (
        abs(bed.credit.singles(bed.raw)[:, gone].sum(1) / real - 1).max() > 0.01 or len(gone) == 1
    )


@pytest.mark.parametrize("gone", [[3], [0, 4], [1, 2, 5, 6, 9]])
def test_ridge_self_influence_is_the_slope_times_the_change(gone):
    """`l_i` changes by its gradient times the move, to first order."""
    bed, gone = Ridge(), np.array(gone)
    slopes = (bed.x[gone] @ bed.theta - bed.y[gone])[:, None] * bed.x[gone]
    real = slopes @ (bed.refitted(gone) - bed.theta)
    counts = np.arange(1, len(gone) + 1)
    found = bed.credit.on_themselves(gone, counts)
    np.testing.assert_allclose(found, real / counts, rtol=1e-10)
    if len(gone) == 1:
        every = bed.credit.self_influence(np.ones(len(bed.w)))
        np.testing.assert_allclose(every[gone], real, rtol=1e-10)


def test_rows_that_teach_the_same_share_and_stand_in_for_each_other():
    """Three copies of a row: each alone is worth less than a third of all three."""
    bed = Ridge()
    copies = [0, 1, 2]
    bed.x[1] = bed.x[2] = bed.x[0]
    rows = np.sqrt(bed.w)[:, None] * 0.7 * bed.x
    kernel, u = rows @ rows.T, bed.query @ rows.T
    path = PathTime(1.0, 2.0, np.ones(1))
    credit = Credit(path, bed.w, [WholeKernel(kernel)])
    raw = (np.sqrt(bed.w) * u)[None]
    together = credit.together(raw, np.array(copies))
    assert (np.abs(credit.singles(raw)[:, copies]).sum(1) < 0.9 * np.abs(together)).all()


# ---- a language model ----------------------------------------------------------------------------


def by_hand(run, queries, gone):
    """`t_p grad m(q)^T (C + lambda I + s sum_{j not gone} w_j g_j g_j^T)^-1 sum_{gone} w_i g_i`,
    summed over the points: dense, by plain autograd with B set in place.
    """
    _, credit = credited(run)
    total = np.zeros(len(queries))
    w = torch.from_numpy(run.weights)
    left = [row for row in range(len(w)) if row not in gone]
    for factor, scale, point in zip(credit.factors, PATH, run.points, strict=True):
        operator = point.operator()
        matrix = dense(operator.curvature) + torch.diag(operator.diagonal(torch.empty(0).double()))
        with b_times(run.model, scale):
            g, q = (
                plain_gradients(run.model, run.train),
                plain_gradients(run.model, queries, plain_mean),
            )
        kept = w[left, None].sqrt() * g[left]
        matrix = matrix + credit.path.strength * kept.T @ kept
        total += factor * (q @ torch.linalg.solve(matrix, w[gone] @ g[gone])).numpy()
    return total


def test_a_score_is_that_of_a_dense_inverse_without_the_rows_own_curvature(run, double):
    queries = examples(3, seed=1)
    scores = run.score(queries)
    assert scores.attributes["credit"] == "shared"
    for row in (0, 4, 8):
        close(scores.values[:, row], by_hand(run, queries, [row]), 1e-8)


def test_self_influence_is_that_of_a_dense_inverse(run, double):
    counts = tokens_of(run.model, run.train).counts
    values = run.self_influence().values
    for row in (0, 4, 8):
        own = by_hand(run, run.train.select([row]), [row])
        close(values[row], own[0], 1e-6)
    assert counts.min() != counts.max()


def test_a_set_is_that_of_a_dense_inverse_and_no_sum(run, double):
    queries = examples(3, seed=1)
    gone = [1, 2, 6, 7]
    effect = run.without([run.train.ids[row] for row in gone], queries)
    changes = np.array([each.change for each in effect.queries])
    expected = by_hand(run, queries, gone)
    close(changes, expected, 1e-8)
    own = by_hand(run, run.train.select(gone), gone)
    close(
        [each.change for each in effect.removed if not each.beyond],
        own[[not each.beyond for each in effect.removed]],
        1e-6,
    )
    assert np.abs(run.score(queries).values[:, gone].sum(1) / expected - 1).max() > 0.01


def test_parts_by_module_and_token_add_up_to_the_shared_score(run, double):
    scores = run.score(examples(2, seed=1), per_module=True, per_token=True)
    close(scores.modules.sum(1), scores.values)
    for query in range(2):
        sums = [scores.tokens.row(query, row)[1].sum() for row in range(N)]
        close(sums, scores.values[query], 1e-8)


def test_chunks_and_resumed_files_give_the_same(run, tmp_path, double, monkeypatch):
    queries = examples(4, seed=1)
    expected = run.score(queries).values
    monkeypatch.setattr("influence.scores.queries_at_once", lambda *_: 1)
    close(run.score(queries, out=tmp_path / "scores.h5").values, expected)
    with h5py.File(tmp_path / "scores.h5") as file:
        assert file.attrs["credit"] == "shared"
        assert file.attrs["strength"] > 0
        assert "share the credit" in file.attrs["convention"]
        np.testing.assert_allclose(file.attrs["factors"].sum(), file.attrs["path_time"], rtol=1e-12)


def test_other_queries_of_a_request_change_no_score(run, double):
    queries = examples(4, seed=1)
    close(run.score(queries[1:2]).values, run.score(queries).values[1:2])


def test_gradients_that_are_not_stored_are_computed_again(taught, run, tmp_path, double):
    queries = examples(3, seed=1)
    bare = influence.fit(taught, examples(N), path=PATH, directory=tmp_path / "run", store="never")
    close(bare.score(queries).values, run.score(queries).values, 1e-8)


# ---- where credit cannot be shared ---------------------------------------------------------------


def test_additive_credit_is_the_plain_form_and_its_size_is_measured_when_it_is_asked_for(
    taught, tmp_path, double
):
    run = influence.fit(taught, examples(N), path=PATH, directory=tmp_path / "run")
    queries = examples(2, seed=1)
    assert not run.manifest.calibration
    scores = run.score(queries, credit="additive")
    assert scores.attributes["credit"] == "additive"
    assert run.manifest.calibration
    at = run.score(queries, credit="additive", at="0.4")
    point = run.points[0]
    operator = point.operator()
    matrix = dense(operator.curvature) + torch.diag(operator.diagonal(torch.empty(0).double()))
    with b_times(taught, 0.4):
        g, q = plain_gradients(taught, run.train), plain_gradients(taught, queries, plain_mean)
    close(at.values, run.weights * (q @ torch.linalg.solve(matrix, g.T)).numpy(), 1e-8)


def test_an_adapter_no_better_than_its_base_has_additive_credit_and_is_told(tmp_path, capsys):
    model = teach(build_model(**SITES), examples(4), steps=3, rate=-0.05)
    run = fit_end(model, examples(4), directory=tmp_path / "run")
    said = capsys.readouterr().err
    assert "under the adapter and" in said
    assert "does not tell how far training went" in said
    assert run.score(examples(2, seed=1)).attributes["credit"] == "additive"
    with pytest.raises(InputError, match="how far training went: give --credit additive"):
        run.score(examples(2, seed=1), credit="shared")
    with pytest.raises(InputError, match="how far training went"):
        run.without([run.train.ids[0]])


def test_plain_products_and_matrix_free_curvatures_have_additive_credit(run, tmp_path, capsys):
    queries = examples(2, seed=1)
    plain = run.score(queries, curvature="identity")
    assert plain.attributes["credit"] == "additive"
    assert "credit" not in capsys.readouterr().err  # nobody expects it
    ggn = run.score(queries, curvature="ggn", solver="pcg")
    assert ggn.attributes["credit"] == "additive"
    assert "ggn has no closed inverse" in capsys.readouterr().err


def test_an_unknown_credit_is_refused(run):
    with pytest.raises(InputError, match="expected shared or additive"):
        run.score(examples(1, seed=1), credit="half")


def test_too_little_disk_is_said_with_numbers(run, monkeypatch, capsys):
    monkeypatch.setattr("influence.kernel.WHOLE_ROWS", 3)
    monkeypatch.setattr("influence.credit.directory_for", lambda *_: None)
    run.kept.clear()
    assert run.score(examples(1, seed=1)).attributes["credit"] == "additive"
    assert "the similarities of 9 rows at 2 points need 0.0 GB of disk" in capsys.readouterr().err
    with pytest.raises(InputError, match="of disk, which are free neither in"):
        run.score(examples(1, seed=1), credit="shared")


def test_another_solver_shares_credit_too(run, double):
    queries = examples(2, seed=1)
    exact = run.score(queries).values
    close(run.score(queries, solver="cg", tolerance=1e-12).values, exact, 1e-6)


def test_an_approximate_solver_has_additive_credit_unless_asked(run):
    queries = examples(2, seed=1)
    assert run.score(queries, solver="datainf").attributes["credit"] == "additive"
    asked = run.score(queries, solver="datainf", credit="shared")
    assert asked.attributes["credit"] == "shared"


def test_a_finished_fit_is_returned_without_the_rows_similarities(taught, run, monkeypatch):
    monkeypatch.setattr("influence.credit.row_kernel", None)
    again = influence.fit(taught, examples(N), path=PATH, directory=run.directory)
    assert again.manifest.path == run.manifest.path


@pytest.mark.parametrize(
    "numbers", [{"WHOLE_ROWS": 3}, {"EXACT_ROWS": 3, "MOST_ROWS": 3, "LANDMARKS": N}]
)
def test_more_rows_share_from_files(taught, tmp_path, double, monkeypatch, numbers):
    """Tile by tile, and by landmarks that are all rows; and a second score makes nothing again."""
    run = influence.fit(taught, examples(N), path=PATH, directory=tmp_path / "run")
    queries, gone = examples(3, seed=1), [run.train.ids[row] for row in (1, 2, 6)]

    def answers(run):
        run.kept.clear()
        effect = run.without(gone, queries)
        changes = [each.change for each in (*effect.queries, *effect.removed)]
        return run.score(queries).values, run.self_influence().values, changes

    exact = answers(run)
    for name, value in numbers.items():
        monkeypatch.setattr(f"influence.kernel.{name}", value)
    for point in run.points:
        point.file("kernel").unlink()
    for one, other in zip(answers(run), exact, strict=True):
        close(one, other, 1e-5)
    again = influence.Run.open(run.directory, model=taught, train=run.train)
    monkeypatch.setattr("influence.kernel._fill", None)
    monkeypatch.setattr("influence.kernel.invert_in_tiles", None)
    for one, other in zip(answers(again), exact, strict=True):
        close(one, other, 1e-5)
