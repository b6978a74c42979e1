"""Curvatures against dense oracles built from `torch.func`, which share no code with them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.func import functional_call, hessian, jacrev

import influence
from influence.adapter import ParamSpace
from influence.curvature import KFAC, Damped, Fisher, as_linear_operator, dense
from influence.curvature.ekfac import refit_eigenvalues
from influence.curvature.fisher import SampleSpaceFisher
from influence.curvature.kfac import DenseMoment, Moments, SketchedMoment
from influence.damping import Damping
from influence.errors import InputError
from influence.gradients import label_uniforms
from tests.conftest import build_model, examples, fit_end, tokens_of

F64 = torch.float64


@pytest.fixture
def small():
    """GPT-2 (no float32 inside), one layer, LoRA on its attention input and MLP output."""
    return build_model("gpt2", layers=1, target_modules=["attn.c_attn", "mlp.c_proj"])


def logits_fn(model, item):
    """A pure function of the flat LoRA parameters: supervised logits [T, V] of one example; and its targets."""
    ids = torch.from_numpy(item.input_ids)[None]
    where = [t for t in range(1, ids.shape[1]) if item.supervised[t]]
    names = [n for n, _ in model.model.named_parameters() if ".lora_" in n]
    ours = [n for site in model.sites for n in names if site.name + ".lora_" in n]  # A before B

    def f(theta):
        parts = dict(zip(ours, model.space.split(theta), strict=True))
        out = functional_call(model.model, parts, (), {"input_ids": ids, "use_cache": False})
        return out.logits[0, [t - 1 for t in where]]

    return f, ids[0, where]


def summed_loss(f, targets):
    return lambda theta: torch.nn.functional.cross_entropy(f(theta), targets, reduction="sum")


def oracle(model, tokens, weights, kind):
    """Dense Hessian or GGN of `sum_i w_i l_i` from torch.func's nested transforms, example by example."""
    theta = model.snapshot()
    total = torch.zeros(model.space.size, model.space.size, dtype=F64)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        for item, w in zip(tokens, weights, strict=True):
            f, targets = logits_fn(model, item)
            if kind == "hessian":
                total += w * hessian(summed_loss(f, targets))(theta)
            else:
                J, p = jacrev(f)(theta), f(theta).detach().softmax(-1)
                for t in range(len(targets)):
                    total += w * J[t].T @ (torch.diag(p[t]) - torch.outer(p[t], p[t])) @ J[t]
    return total.detach()


def fitted(tmp_path, model, data, curvature, **options):
    return fit_end(model, data, curvature=curvature, directory=tmp_path / "run", **options)


@pytest.mark.parametrize("reduction", ["token", "example"])
@pytest.mark.parametrize("kind", ["ggn", "hessian"])
def test_matrix_free_products_equal_the_dense_oracle(tmp_path, small, kind, reduction):
    data = examples(5)
    spec = {"ggn": influence.GGN(), "hessian": influence.Hessian()}[kind]
    run = fitted(tmp_path, small, data, spec, reduction=reduction, token_budget=30)
    expected = oracle(small, run.tokens, run.weights, kind)
    found = run.curvature(kind)
    assert expected.abs().max() > 1e-3
    assert (dense(found) - expected).norm() / expected.norm() < 1e-10
    vector = np.random.default_rng(0).standard_normal(small.space.size)
    np.testing.assert_allclose(
        as_linear_operator(found) @ vector, expected.numpy() @ vector, rtol=0, atol=1e-9
    )


def test_llama_products_equal_the_dense_oracle_up_to_its_float32_norms(tmp_path, tiny):
    run = fitted(tmp_path, tiny, examples(4), influence.GGN())
    for kind in ("ggn", "hessian"):
        expected = oracle(tiny, run.tokens, run.weights, kind)
        assert (dense(run.curvature(kind)) - expected).norm() / expected.norm() < 1e-5


def test_the_ggn_is_the_fisher_of_the_models_own_labels(tmp_path, small):
    """Expectation over labels written out: one token per example, every label with its probability."""
    data = influence.examples_from_rows([{"prompt": "the red fox", "completion": " runs"}])
    tokens = tokens_of(small, data)
    tokens[0].supervised[-1] = False  # supervise the one completion token, not the EOS
    run = fitted(tmp_path, small, data, influence.GGN())
    run.tokens[0].supervised[-1] = False
    f, _ = logits_fn(small, tokens[0])
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        J, p = jacrev(f)(small.snapshot())[0].detach(), f(small.snapshot()).detach()[0].softmax(-1)
    scores = (torch.eye(len(p), dtype=F64) - p) @ J  # row y: d log p_y / d theta
    expected = run.weights[0] * (scores.T * p) @ scores
    assert (dense(run.curvature("ggn")) - expected).norm() / expected.norm() < 1e-10


def test_hessian_and_ggn_agree_where_the_logits_are_linear(tmp_path):
    """LoRA on the head with A frozen by symmetry would be linear; B alone is: compare that diagonal block."""
    model = build_model("gpt2", layers=1, target_modules=["lm_head"], tie=False)
    run = fitted(tmp_path, model, examples(4), influence.GGN())
    b = model.space.leaves[1].slice
    H, G = dense(run.curvature("hessian")), dense(run.curvature("ggn"))
    assert (H[b, b] - G[b, b]).norm() / G[b, b].norm() < 1e-10
    assert (H - G).norm() / G.norm() > 1e-3


# ---- Kronecker factors ---------------------------------------------------------------------------------------


def moments_of(leaves, inputs, grads, weights=None, **options):
    """Moments of leaves named (name, shape) fed one batch each of x [b, T, d_in] and g [b, T, d_out]."""
    space = ParamSpace.of(leaves)
    moments = Moments(space, list(range(len(leaves))), KFAC(**options), 0, F64, torch.device("cpu"))
    for i, (x, g) in enumerate(zip(inputs, grads, strict=True)):
        moments.add(i, x, g, torch.ones(x.shape[:2], dtype=torch.bool), weights)
    return space, moments


def random_rows(seed, *shape):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("side", ["A", "B"])
def test_kfac_is_the_exact_block_for_one_token_of_one_example(side):
    """One input, all labels: `E[vec(g x^T) vec(g x^T)^T] = E[g g^T] (x) x x^T` exactly, rank one in x."""
    shape = (3, 7) if side == "A" else (7, 3)
    x = random_rows(1, 1, 1, shape[1]).expand(5, 1, shape[1])  # the same token, five labels
    g = random_rows(2, 5, 1, shape[0])
    _, moments = moments_of([(f"s.lora_{side}", shape)], [x], [g])
    kfac = moments.kronecker(weight=0.2, samples=1)
    rows = torch.stack([torch.outer(g[i, 0], x[i, 0]).ravel() for i in range(5)])
    expected = 0.2 * rows.T @ rows
    assert (dense(kfac) - expected).norm() / expected.norm() < 1e-12


def test_kfac_is_exact_for_a_deep_linear_network():
    """y = W2 W1 x with squared loss: the output gradients (labels of the model's own) do not depend on x."""
    n, widths = 40_000, (4, 3, 2)
    W1, W2 = random_rows(1, 3, 4), random_rows(2, 2, 3)
    x, e = (
        random_rows(3, n, 4) @ random_rows(4, 4, 4),
        random_rows(5, n, 2),
    )  # y - label = unit noise
    g1 = e @ W2
    space, moments = moments_of([("one.lora_A", (3, 4))], [x[:, None]], [g1[:, None]])
    kfac = moments.kronecker(weight=1 / n, samples=1)
    expected = torch.kron(W2.T @ W2, x.T @ x / n)  # the GGN block of W1, expectation over labels
    assert space.size == widths[0] * widths[1]
    assert (
        dense(kfac) - expected
    ).norm() / expected.norm() < 0.02  # sampling error of S, 1/sqrt(n)
    assert W1.shape == (3, 4)


def test_ekfac_is_exact_where_the_fisher_is_kronecker_and_transposition_would_show():
    """Gradients g x^T with independent g, x of very different spectra: the exact block is S (x) A."""
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
        _, moments = moments_of([(f"s.lora_{side}", (d_out, d_in))], [a[:, None]], [b[:, None]])
        kfac = moments.kronecker(weight=1 / n, samples=1)
        rows = torch.einsum("no,ni->noi", b, a).flatten(1)
        exact = rows.T @ rows / n
        ekfac = refit_eigenvalues(kfac, [(rows, torch.full((n,), 1 / n, dtype=F64))])
        for fitted_ in (kfac, ekfac):
            assert (dense(fitted_) - exact).norm() / exact.norm() < 0.05
            # and it inverts like it, with a damping far below the spectrum, where a wrong basis is off by orders
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


def sampled_rows(model, tokens, samples, seed=0):
    """Gradients at sampled labels by plain autograd, one example and draw at a time."""
    out = []
    for item, id in zip(tokens, tokens.ids, strict=True):
        f, targets = logits_fn(model, item)
        p = f(model.snapshot()).detach().softmax(-1)
        for draw in range(samples):
            u = label_uniforms(seed, draw, id, len(targets))
            labels = torch.tensor(
                [int((p[t].cumsum(0) <= u[t] * p[t].sum()).sum()) for t in range(len(targets))]
            )
            theta = model.snapshot().requires_grad_(True)
            loss = torch.nn.functional.cross_entropy(f(theta), labels, reduction="sum")
            out.append(torch.autograd.grad(loss, theta)[0])
    return out


def test_second_pass_gives_the_factors_of_stored_rows(tmp_path, small):
    data = examples(9)
    stored = fit_end(small, data, directory=tmp_path / "a", store="always", token_budget=30)
    again = fit_end(small, data, directory=tmp_path / "b", store="never", token_budget=50)
    for one, two in zip(stored.curvature().leaf_blocks, again.curvature().leaf_blocks, strict=True):
        torch.testing.assert_close(one.eigenvalues, two.eigenvalues, rtol=1e-8, atol=1e-12)


def test_kfac_factors_are_those_of_the_definition(tmp_path, small):
    """S and A recomputed by hooks on the leaves in a one-example loop, for both reductions."""
    data = examples(6)
    run = fitted(tmp_path, small, data, KFAC(), reduction="example", token_budget=25)
    expected = plain_kfac(small, run.tokens, run.weights)
    found = dense(run.curvature("kfac"))
    for leaf, block in zip(small.space.leaves, expected, strict=True):
        assert (found[leaf.slice, leaf.slice] - block).norm() / block.norm() < 1e-9


def plain_kfac(model, tokens, weights):
    leaves = [m for s in model.sites for m in (s.A, s.B)]
    S = [torch.zeros(m.weight.shape[0], m.weight.shape[0], dtype=F64) for m in leaves]
    A = [torch.zeros(m.weight.shape[1], m.weight.shape[1], dtype=F64) for m in leaves]
    mass = 0.0
    for item, id, w in zip(tokens, tokens.ids, weights, strict=True):
        seen = {}
        handles = [
            m.register_forward_hook(
                lambda _m, a, out, i=i, seen=seen: seen.update({i: (a[0], out)})
            )
            for i, m in enumerate(leaves)
        ]
        for m in leaves:
            m.weight.requires_grad_(True)
        ids = torch.from_numpy(item.input_ids)[None, :-1]
        where = [t - 1 for t in range(1, len(item.input_ids)) if item.supervised[t]]
        logits = model.model(input_ids=ids).logits[0, where]
        p = logits.detach().softmax(-1)
        u = label_uniforms(0, 0, id, len(where))
        labels = torch.tensor(
            [int((p[t].cumsum(0) <= u[t] * p[t].sum()).sum()) for t in range(len(where))]
        )
        grads = torch.autograd.grad(
            torch.nn.functional.cross_entropy(logits, labels, reduction="sum"),
            [seen[i][1] for i in range(len(leaves))],
        )
        for i, g in enumerate(grads):
            x, g = seen[i][0].detach()[0], g[0]
            S[i] += w * g.T @ g
            A[i] += w * x.T @ x
        mass += w * ids.shape[1]
        for h in handles:
            h.remove()
        for m in leaves:
            m.weight.requires_grad_(False)
    return [torch.kron(s, a / mass) for s, a in zip(S, A, strict=True)]


def test_shared_inputs_are_found_and_change_nothing(tmp_path):
    model = build_model("llama", layers=1)
    run = fitted(tmp_path, model, examples(6), KFAC())
    names = [leaf.name for leaf in model.space.leaves]
    from influence.fitting import shared_inputs

    wide = shared_inputs(model, run.tokens)
    shared = {
        names[i].rsplit(".", 2)[1]: names[j].rsplit(".", 2)[1] for i, j in enumerate(wide) if i != j
    }
    assert shared == {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
    found = dense(run.curvature("kfac"))
    for leaf, block in zip(
        model.space.leaves, plain_kfac(model, run.tokens, run.weights), strict=True
    ):
        assert (
            found[leaf.slice, leaf.slice] - block
        ).norm() / block.norm() < 1e-6  # float32 norms inside Llama


# ---- wide factors, sketched ----------------------------------------------------------------------------------


def test_sketch_is_exact_up_to_its_rank_and_keeps_the_trace():
    x = random_rows(0, 200, 5) @ random_rows(1, 5, 40)
    full, sketch = (
        DenseMoment(40, F64, torch.device("cpu")),
        SketchedMoment(40, 8, 0, F64, torch.device("cpu")),
    )
    for part in x.split(60):
        full.add(part)
        sketch.add(part)
    vectors, values, rest = sketch.eigen()
    assert vectors.shape == (40, 8)
    q, e, _ = full.eigen()
    torch.testing.assert_close((q * e) @ q.T, x.T @ x, rtol=0, atol=1e-9 * float(e[-1]))
    torch.testing.assert_close(
        (vectors * values) @ vectors.T, x.T @ x, rtol=0, atol=1e-8 * float(e[-1])
    )
    assert rest < 1e-9
    noisy = SketchedMoment(40, 8, 0, F64, torch.device("cpu"))
    data = x + 0.1 * random_rows(2, 200, 40)
    noisy.add(data)
    vectors, values, rest = noisy.eigen()
    assert float(values.sum() + 32 * rest) == pytest.approx(float(data.square().sum()), rel=1e-9)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(8, dtype=F64), rtol=0, atol=1e-8)


@pytest.mark.parametrize("side", ["A", "B"])
def test_sketched_ekfac_solves_like_the_dense_one_where_the_data_has_low_rank(side):
    """Wide data of rank 5 and a sketch of 8: same curvature, same inverse, complement seen by the damping only."""
    n, r, d = 60, 3, 40
    wide = (random_rows(1, n, 5) @ random_rows(2, 5, d))[:, None]
    narrow = random_rows(3, n, r)[:, None]
    shape, x, g = ((r, d), wide, narrow) if side == "A" else ((d, r), narrow, wide)
    rows = torch.einsum("no,ni->noi", g[:, 0], x[:, 0]).flatten(1)
    w = torch.full((n,), 1 / n, dtype=F64)
    results = []
    for options in ({}, {"max_width": 16, "rank": 8}):
        _, moments = moments_of([(f"s.lora_{side}", shape)], [x], [g], **options)
        ekfac = refit_eigenvalues(moments.kronecker(1 / n, 1), [(rows, w)])
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


# ---- sample-space Fisher -------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [0, 1, 3])
def test_sample_space_solve_equals_the_dense_solve(tmp_path, small, samples):
    run = fitted(tmp_path, small, examples(10), Fisher(samples=samples), token_budget=40)
    fisher = run.curvature()
    if samples:
        rows = torch.stack(sampled_rows(small, run.tokens, samples))
    else:
        rows = torch.cat([g for _, g in run.gradient_blocks()])
    F = (
        rows
        * torch.from_numpy(np.sqrt(np.repeat(run.weights, max(1, samples)) / max(1, samples)))[
            :, None
        ]
    )
    C = F.T @ F
    assert (dense(fisher) - C).norm() / C.norm() < 1e-10
    assert float(fisher.mean_eigenvalues()) == pytest.approx(float(C.trace()) / small.space.size)
    assert float(fisher.top_eigenvalues()) == pytest.approx(float(torch.linalg.eigvalsh(C)[-1]))
    v = random_rows(3, 4, small.space.size)
    for damping in ("mean:0.1", "top:0.01", "abs:0.001"):
        operator = run.operator(damping=damping)
        expected = torch.linalg.solve(C + operator.lam * torch.eye(len(C), dtype=F64), v.T).T
        assert (fisher.solve(v, operator.lam) - expected).norm() / expected.norm() < 1e-8
    h = torch.einsum(
        "ip,pi->i", F, torch.linalg.solve(C + 0.01 * torch.eye(len(C), dtype=F64), F.T)
    )
    torch.testing.assert_close(fisher.leverage(0.01), h, rtol=1e-8, atol=1e-12)


def test_gram_is_right_when_rows_come_in_uneven_blocks():
    F = random_rows(0, 11, 30)
    rows = lambda: iter(F.split([4, 1, 5, 1]))  # noqa: E731
    fisher = SampleSpaceFisher.fit(30, rows, torch.full((11,), 0.5, dtype=F64))
    torch.testing.assert_close(dense(fisher), 0.25 * F.T @ F, rtol=0, atol=1e-10)


# ---- damping -------------------------------------------------------------------------------------------------


def test_damping_rules_scale_with_each_block(tmp_path, small):
    run = fitted(tmp_path, small, examples(6), influence.EKFAC())
    ekfac = run.curvature()
    matrix = dense(ekfac)
    for leaf, mean, top in zip(
        small.space.leaves,
        run.operator(damping="mean:0.5").lam,
        run.operator(damping="top:0.5").lam,
        strict=True,
    ):
        eigenvalues = torch.linalg.eigvalsh(matrix[leaf.slice, leaf.slice])
        assert float(mean) == pytest.approx(0.5 * float(eigenvalues.mean()))
        assert float(top) == pytest.approx(0.5 * float(eigenvalues[-1]))
    assert run.operator(damping="abs:0.25").lam.tolist() == [0.25] * len(ekfac.blocks)


@pytest.mark.parametrize("text", ["mean:0", "abs:-1", "top:nan", "mean:inf"])
def test_zero_negative_or_infinite_damping_is_refused_with_the_reason(text):
    with pytest.raises(InputError, match="at least r\\^2 exact null directions per site"):
        Damping.parse(text)


@pytest.mark.parametrize("text", ["mean", "0.1", "median:1", "mean:x", ""])
def test_unreadable_damping_says_what_is_expected(text):
    with pytest.raises(InputError, match="expected mean:X, top:X, abs:X or time:T"):
        Damping.parse(text)


def test_a_fresh_adapter_gets_a_floor_and_a_warning(tmp_path, small):
    for site in small.sites:
        site.B.weight.data.zero_()
    run = fitted(tmp_path, small, examples(4), influence.EKFAC())
    with pytest.warns(UserWarning, match="curvature blocks are \\(nearly\\) zero"):
        lam = run.operator().lam
    assert (lam > 0).all()
    with pytest.warns(UserWarning, match="nearly"):
        assert np.isfinite(run.score(examples(2, seed=1)).values).all()


def test_blocks_have_null_directions_from_the_gauge(small, tmp_path):
    """(A, B) -> (R A, B R^-1) leaves the model unchanged: r^2 null directions per site, so lambda = 0 has no answer."""
    run = fitted(tmp_path, small, examples(40), influence.GGN())
    G = dense(run.curvature("ggn"))
    for site, i in zip(small.sites, range(0, 4, 2), strict=True):
        A, B = site.A.weight.data, site.B.weight.data
        E = random_rows(i, 2, 2)
        direction = torch.zeros(small.space.size, dtype=F64)
        direction[small.space.leaves[i].slice] = (E @ A).ravel()
        direction[small.space.leaves[i + 1].slice] = (-B @ E).ravel()
        assert (G @ direction).norm() < 1e-8 * G.norm() * direction.norm()
