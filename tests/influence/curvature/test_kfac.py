"""Kronecker factors where they are exact, against their definition, and sketched."""

from __future__ import annotations

import pytest
import torch

from influence.curvature import EKFAC, KFAC, Damped, dense
from influence.curvature.base import Diagonal, Whitening, inverse_products
from tests.conftest import build_model, examples, fit_end
from tests.influence.curvature.helpers import moments_of, random_rows, replace_unit
from tests.oracles import plain_kfac

F64 = torch.float64


@pytest.fixture
def small():
    """GPT-2 (no float32 inside), one layer, LoRA on its attention input and MLP output."""
    return build_model("gpt2", layers=1, target_modules=["attn.c_attn", "mlp.c_proj"])


def fitted(tmp_path, model, data, curvature, **options):
    return fit_end(model, data, curvature=curvature, directory=tmp_path / "run", **options)


@pytest.mark.parametrize("side", ["A", "B"])
def test_kfac_is_the_exact_block_for_one_token_of_one_example(side):
    """One input, all labels: `E[vec(g x^T) vec(g x^T)^T] = E[g g^T] (x) x x^T` exactly, rank one in
    x.
    """
    shape = (3, 7) if side == "A" else (7, 3)
    x = random_rows(1, 1, 1, shape[1]).expand(5, 1, shape[1])  # the same token, five labels
    g = random_rows(2, 5, 1, shape[0])
    _, moments = moments_of([(f"s.lora_{side}", shape)], [x], [g])
    kfac = replace_unit(moments, 0.2).kronecker()
    rows = torch.stack([torch.outer(g[i, 0], x[i, 0]).ravel() for i in range(5)])
    expected = 0.2 * rows.T @ rows
    assert (dense(kfac) - expected).norm() / expected.norm() < 1e-12


def test_kfac_is_exact_for_a_deep_linear_network():
    """y = W2 W1 x with squared loss: the output gradients (labels of the model's own) do not depend
    on x.
    """
    n, widths = 40_000, (4, 3, 2)
    W1, W2 = random_rows(1, 3, 4), random_rows(2, 2, 3)
    x, e = (
        random_rows(3, n, 4) @ random_rows(4, 4, 4),
        random_rows(5, n, 2),
    )  # y - label = unit noise
    g1 = e @ W2
    space, moments = moments_of([("one.lora_A", (3, 4))], [x[:, None]], [g1[:, None]])
    kfac = replace_unit(moments, 1 / n).kronecker()
    expected = torch.kron(W2.T @ W2, x.T @ x / n)  # the GGN block of W1, expectation over labels
    assert space.size == widths[0] * widths[1]
    assert (
        dense(kfac) - expected
    ).norm() / expected.norm() < 0.02  # sampling error of S, 1/sqrt(n)
    assert W1.shape == (3, 4)


def test_kfac_factors_are_those_of_the_definition(tmp_path, small):
    """S and A recomputed by hooks on the leaves in a one-example loop, for both reductions."""
    data = examples(6)
    run = fitted(tmp_path, small, data, KFAC(), reduction="example", token_budget=25)
    expected = plain_kfac(small, run.tokens, run.weights)
    matrix = dense(run.curvature("kfac"))
    for leaf, block in zip(small.space.leaves, expected, strict=True):
        assert (matrix[leaf.slice, leaf.slice] - block).norm() / block.norm() < 1e-9


def test_shared_inputs_are_found_and_change_nothing(tmp_path):
    model = build_model("llama", layers=1)
    run = fitted(tmp_path, model, examples(6), KFAC())
    names = [leaf.name for leaf in model.space.leaves]
    from influence.curvature.wide_sides import shared_inputs

    wide = shared_inputs(model, run.tokens)
    shared = {
        names[i].rsplit(".", 2)[1]: names[j].rsplit(".", 2)[1] for i, j in enumerate(wide) if i != j
    }
    assert shared == {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
    matrix = dense(run.curvature("kfac"))
    for leaf, block in zip(
        model.space.leaves, plain_kfac(model, run.tokens, run.weights), strict=True
    ):
        assert (
            matrix[leaf.slice, leaf.slice] - block
        ).norm() / block.norm() < 1e-6  # float32 norms inside Llama


@pytest.mark.parametrize(
    "options", [{}, {"max_width": 4, "rank": 3, "memory_share": 0}], ids=["whole", "sketched"]
)
def test_inverse_products_are_those_of_the_dense_inverse(options):
    """Of an A and a B leaf; sketched, their wide sides keep 3 directions of 9 and of 7."""
    leaves = [("s.lora_A", (3, 9)), ("s.lora_B", (7, 2))]
    x = [random_rows(1, 6, 4, 9), random_rows(2, 6, 4, 2)]
    g = [random_rows(3, 6, 4, 3), random_rows(4, 6, 4, 7)]
    space, moments = moments_of(leaves, x, g, **options)
    kfac = replace_unit(moments, 0.1).kronecker()
    operator = Damped(kfac, torch.tensor([0.3, 2.0], dtype=F64))
    v = random_rows(5, 4, space.size)
    matrix = dense(kfac) + torch.diag(operator.diagonal(v))
    expected = (v * torch.linalg.solve(matrix, v.T).T).sum(1)
    assert isinstance(kfac, Diagonal)
    torch.testing.assert_close(inverse_products(operator, v), expected, rtol=1e-10, atol=0)
    assert isinstance(kfac, Whitening)  # and the same leaf by leaf, of all pairs of rows
    roots = [kfac.whiten(number, part, operator.lam) for number, part in enumerate(space.split(v))]
    found = sum(root @ root.T for root in roots)
    torch.testing.assert_close(found, v @ torch.linalg.solve(matrix, v.T), rtol=1e-9, atol=1e-12)
    for number, root in enumerate(roots):
        squares = kfac.expected_squares(number, operator.lam)
        assert squares.shape == root.shape[1:]
        damped = torch.linalg.solve(matrix, dense(kfac))[space.leaves[number].slice].T
        own = damped[space.leaves[number].slice].diagonal().sum()
        torch.testing.assert_close(squares.sum(), own, rtol=1e-9, atol=0)


def sketched_leaves(**options):
    """K-FAC of an A and a B leaf of widths 9 and 7, by hand-fed moments of 6 rows of 4 tokens."""
    leaves = [("s.lora_A", (3, 9)), ("s.lora_B", (7, 2))]
    x = [random_rows(1, 6, 4, 9), random_rows(2, 6, 4, 2)]
    g = [random_rows(3, 6, 4, 3), random_rows(4, 6, 4, 7)]
    return moments_of(leaves, x, g, memory_share=0, **options)[1].kronecker()


def test_a_sketch_solves_what_it_multiplies_and_has_the_trace_of_the_whole():
    whole, sketch = sketched_leaves(), sketched_leaves(max_width=4, rank=3)
    assert [block.wide.shape for block in sketch.leaf_blocks] == [(9, 3), (7, 3)]
    torch.testing.assert_close(
        sketch.mean_eigenvalues(), whole.mean_eigenvalues(), rtol=1e-9, atol=0
    )
    operator = Damped(sketch, torch.tensor([0.3, 2.0], dtype=F64))
    v = random_rows(5, 4, sketch.size)
    matrix = dense(sketch)
    for leaf, mean in zip(sketch.space.leaves, sketch.mean_eigenvalues(), strict=True):
        trace = matrix[leaf.slice, leaf.slice].trace() / (leaf.stop - leaf.start)
        torch.testing.assert_close(trace, mean, rtol=1e-12, atol=0)
    expected = torch.linalg.solve(matrix + torch.diag(operator.diagonal(v)), v.T).T
    torch.testing.assert_close(sketch.solve(v, operator.lam), expected, rtol=1e-8, atol=0)


def test_the_share_outside_is_what_the_wide_basis_misses_of_the_trace():
    whole, sketch = sketched_leaves(), sketched_leaves(max_width=4, rank=3)
    assert whole.outside().tolist() == [0, 0]
    assert whole.sketched() is None
    matrix = dense(sketch)
    for leaf, block, share in zip(
        sketch.space.leaves, sketch.leaf_blocks, sketch.outside(), strict=True
    ):
        outside = torch.eye(len(block.wide), dtype=F64) - block.wide @ block.wide.T
        eye = torch.eye(len(block.narrow), dtype=F64)
        project = torch.kron(eye, outside) if leaf.is_A else torch.kron(outside, eye)
        part = matrix[leaf.slice, leaf.slice]
        torch.testing.assert_close(share, (project @ part).trace() / part.trace())
    words = sketch.sketched()
    assert words is not None
    assert "2 of 2 LoRA matrices is sketched (3 directions of width 7, 3 directions of" in words


def test_a_sketch_of_all_directions_is_the_whole_bit_for_bit():
    for options in ({"rank": 9}, {"max_width": 9}):
        sketch, whole = sketched_leaves(**({"max_width": 4} | options)), sketched_leaves()
        for one, other in zip(sketch.leaf_blocks, whole.leaf_blocks, strict=True):
            assert torch.equal(one.wide, other.wide)
            assert torch.equal(one.eigenvalues, other.eigenvalues)


def test_memory_decides_what_is_sketched(tmp_path, small, monkeypatch, capsys):
    """Widths 32 and more above a `max_width` of 8: whole with a machine's memory, sketched and
    said without, and the same run where nothing was said of a share.
    """
    import influence.curvature.kfac as module

    data = examples(6)
    options = {"max_width": 8, "rank": 4}
    whole = fitted(tmp_path / "a", small, data, EKFAC(**options))
    assert "sketched" not in capsys.readouterr().err
    assert all(block.complete for block in whole.curvature().leaf_blocks)
    sketch = fitted(tmp_path / "b", small, data, EKFAC(**options, memory_share=0))
    assert "4 directions of width" in capsys.readouterr().err
    assert all(block.wide.shape[1] == 4 for block in sketch.curvature().leaf_blocks)
    torch.testing.assert_close(
        sketch.curvature().mean_eigenvalues(), whole.curvature().mean_eigenvalues()
    )
    monkeypatch.setattr(module, "device_memory", lambda device: 1)
    none = fitted(tmp_path / "c", small, data, EKFAC(**options))
    assert all(block.wide.shape[1] == 4 for block in none.curvature().leaf_blocks)
    assert "memory_share" not in none.manifest.curvature
    assert sketch.manifest.curvature["memory_share"] == 0
    assert none.digest != sketch.digest
