"""EK-FAC where it is exact, and nearer to the block Fisher than K-FAC."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import influence
from influence.curvature import Damped, dense
from influence.curvature.ekfac import Eigenvalues
from tests.conftest import build_model, examples, fit_end, rows
from tests.influence.curvature.helpers import moments_of, random_rows, replace_unit
from tests.oracles import sampled_rows

F64 = torch.float64


def refitted(moments, rows, weights):
    """EK-FAC of moments, its eigenvalues refitted on rows in two blocks."""
    second = Eigenvalues(moments)
    half = len(rows) // 2
    second.add_rows(rows[:half], weights[:half])
    second.add_rows(rows[half:], weights[half:])
    return second.refitted()


@pytest.fixture
def small():
    """GPT-2 (no float32 inside), one layer, LoRA on its attention input and MLP output."""
    return build_model("gpt2", layers=1, target_modules=["attn.c_attn", "mlp.c_proj"])


def fitted(tmp_path, model, data, curvature, **options):
    return fit_end(model, data, curvature=curvature, directory=tmp_path / "run", **options)


def test_ekfac_is_exact_where_the_fisher_is_kronecker_and_transposition_would_show():
    """Gradients g x^T with independent g, x of different spectra: the exact block is S (x) A."""
    n = 60_000
    g = (
        random_rows(1, n, 3)
        * torch.tensor([5.0, 1.0, 0.1], dtype=F64)
        @ torch.linalg.qr(random_rows(2, 3, 3)).Q
    )
    x = (
        random_rows(3, n, 6)
        * torch.tensor([9.0, 3.0, 1.0, 0.3, 0.1, 0.03], dtype=F64)
        @ torch.linalg.qr(random_rows(4, 6, 6)).Q
    )
    for side, (d_out, d_in) in (("A", (3, 6)), ("B", (6, 3))):
        a, b = (x, g) if side == "A" else (g, x)
        one, other = (
            moments_of([(f"s.lora_{side}", (d_out, d_in))], [a[:, None]], [b[:, None]], unit=1 / n)
            for _ in range(2)
        )
        kfac = one[1].kronecker()
        rows = torch.einsum("no,ni->noi", b, a).flatten(1)
        exact = rows.T @ rows / n
        ekfac = refitted(other[1], rows, torch.full((n,), 1 / n, dtype=F64))
        for fitted_ in (kfac, ekfac):
            assert (dense(fitted_) - exact).norm() / exact.norm() < 0.05
            # and it inverts like it, with a damping far below the spectrum, where a wrong basis is
            # off by orders
            v = rows[:3]
            lam = torch.tensor([1e-3 * float(torch.linalg.eigvalsh(exact)[0])], dtype=F64)
            expected = torch.linalg.solve(exact + lam * torch.eye(18, dtype=F64), v.T).T
            assert (fitted_.solve(v, lam) - expected).norm() / expected.norm() < 0.1


@pytest.mark.parametrize("reduction", ["token", "example"])
def test_ekfac_is_nearer_to_the_block_fisher_of_the_same_labels_than_kfac(
    tmp_path, small, reduction
):
    data = examples(12)
    run = fitted(
        tmp_path, small, data, influence.EKFAC(samples=2), reduction=reduction, token_budget=40
    )
    rows = sampled_rows(small, run.tokens, samples=2)
    F = torch.stack(rows) * torch.from_numpy(np.sqrt(np.repeat(run.weights, 2) / 2))[:, None]
    exact = F.T @ F
    for leaf in small.space.leaves:
        block = exact[leaf.slice, leaf.slice]
        distance = {
            k: (dense(run.curvature(k))[leaf.slice, leaf.slice] - block).norm()
            for k in ("kfac", "ekfac")
        }
        assert distance["ekfac"] < distance["kfac"]
    # EK-FAC's diagonal in its basis is exact for these labels, so the traces agree leaf by leaf
    expected = torch.stack(
        [
            exact[leaf.slice, leaf.slice].trace() / (leaf.stop - leaf.start)
            for leaf in small.space.leaves
        ]
    )
    torch.testing.assert_close(
        run.curvature("ekfac").mean_eigenvalues(), expected, rtol=1e-9, atol=0
    )


def test_second_pass_gives_the_factors_of_stored_rows(tmp_path, small):
    data = examples(9)
    stored = fit_end(small, data, directory=tmp_path / "a", store="always", token_budget=30)
    again = fit_end(small, data, directory=tmp_path / "b", store="never", token_budget=50)
    for one, two in zip(stored.curvature().leaf_blocks, again.curvature().leaf_blocks, strict=True):
        torch.testing.assert_close(one.eigenvalues, two.eigenvalues, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("store", ["full", "features", "none"])
@pytest.mark.parametrize("reduction", ["token", "example"])
def test_rows_drawn_at_random_stand_for_all(tmp_path, small, store, reduction):
    """Four of nine rows: the curvature of these rows alone, times what they stand for."""
    data = examples(9)
    curvature = influence.EKFAC(rows=4)
    run = fit_end(
        small,
        data,
        directory=tmp_path / "drawn",
        curvature=curvature,
        store=store,
        reduction=reduction,
        token_budget=30,
    )
    drawn = curvature.sample(9, 0)
    assert len(set(drawn.tolist())) == 4
    own = fit_end(
        small,
        influence.examples_from_rows([rows(9)[i] for i in drawn]),
        directory=tmp_path / "own",
        reduction=reduction,
        store="none",
    )
    # the rows alone have larger weights: by how many tokens, or rows, all have over theirs
    weights = run.weights[drawn] / own.weights
    factor = 9 / 4 * weights[0]
    np.testing.assert_allclose(weights, weights[0])
    for name in ("kfac", "ekfac"):
        torch.testing.assert_close(
            dense(run.curvature(name)), factor * dense(own.curvature(name)), rtol=1e-8, atol=1e-12
        )
    assert run.gradients_stored == (store == "full")
    if store == "full":  # those of all rows, not of the drawn alone
        whole = fit_end(small, data, directory=tmp_path / "whole", reduction=reduction)
        every = np.arange(9)
        torch.testing.assert_close(
            run.points[0].gradients_of(every), whole.points[0].gradients_of(every)
        )


def test_as_many_rows_as_there_are_is_all_of_them(tmp_path, small):
    one = fit_end(small, examples(5), directory=tmp_path / "a", curvature=influence.EKFAC(rows=7))
    two = fit_end(small, examples(5), directory=tmp_path / "b")
    torch.testing.assert_close(dense(one.curvature()), dense(two.curvature()), rtol=0, atol=0)


@pytest.mark.parametrize("side", ["A", "B"])
def test_sketched_ekfac_solves_like_the_dense_one_where_the_data_has_low_rank(side):
    """Wide data of rank 5 and a sketch of 8: same curvature, same inverse, complement seen by the
    damping only.
    """
    n, r, d = 60, 3, 40
    wide = (random_rows(1, n, 5) @ random_rows(2, 5, d))[:, None]
    narrow = random_rows(3, n, r)[:, None]
    shape, x, g = ((r, d), wide, narrow) if side == "A" else ((d, r), narrow, wide)
    rows = torch.einsum("no,ni->noi", g[:, 0], x[:, 0]).flatten(1)
    w = torch.full((n,), 1 / n, dtype=F64)
    results = []
    for options in ({}, {"max_width": 16, "rank": 8, "memory_share": 0}):
        _, moments = moments_of([(f"s.lora_{side}", shape)], [x], [g], **options)
        ekfac = refitted(replace_unit(moments, 1 / n), rows, w)
        results.append(
            (dense(ekfac), ekfac.solve(rows[:4], torch.tensor([0.01], dtype=F64)), ekfac)
        )
    (C, x0, _), (C1, x1, sketched) = results
    assert sketched.leaf_blocks[0].wide.shape == (40, 8)
    assert (C1 - C).norm() / C.norm() < 1e-6
    assert (x1 - x0).norm() / x0.norm() < 1e-6
    operator = Damped(sketched, torch.tensor([0.01], dtype=F64))
    v = random_rows(9, 4, r * d)  # not in the span of the data
    assert (operator.matvec(sketched.solve(v, operator.lam)) - v).norm() / v.norm() < 1e-9


def test_a_sketch_after_an_edit_is_the_refit_on_the_rows_that_stay(tmp_path, small):
    """The eigenvalues inside and the mean of those outside, in the same bases."""
    data = examples(9)
    options = influence.EKFAC(max_width=8, rank=4, memory_share=0)
    run = fitted(tmp_path, small, data, options)
    before = run.curvature()
    gone = np.array([1, 4])
    rows = torch.stack(sampled_rows(small, run.tokens, samples=1))
    weights = torch.from_numpy(run.weights)

    def changed(positions):
        tokens, some = run.tokens.select(positions), run.weights[positions]
        sampled = lambda draws: iter([(np.arange(len(positions)), rows[positions])])  # noqa: E731
        return SimpleNamespace(positions=positions, tokens=tokens, weights=some, sampled=sampled)

    after = before.updated(changed(gone), changed(gone[:0]))
    stay = np.setdiff1d(np.arange(9), gone)
    for block, now in zip(before.leaf_blocks, after.leaf_blocks, strict=True):
        matrices = rows[stay][:, block.leaf.slice].unflatten(1, block.leaf.shape)
        matrices = block.narrow.T @ (matrices if block.leaf.is_A else matrices.mT)
        inside = ((matrices @ block.wide).square() * weights[stay, None, None]).sum(0)
        torch.testing.assert_close(now.eigenvalues, inside, rtol=1e-7, atol=1e-12)
        total = (matrices.square() * weights[stay, None, None]).sum((0, 2))
        rest = (total - inside.sum(1)) / (matrices.shape[2] - 4)
        torch.testing.assert_close(now.rest, rest, rtol=1e-7, atol=1e-12)
