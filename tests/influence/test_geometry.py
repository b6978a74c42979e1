"""Geometries against dense formulas: features, metrics, and scores in each of them."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

import influence
from influence import CG, Fisher
from influence.adapter import ParamSpace
from influence.batches import collate
from influence.errors import InputError, NumericalError, StoreError
from influence.geometry import Adam, Raw, function_space, load_geometry
from influence.gradients import (
    output_gradient,
    per_example_gradient,
    stream_gradients,
    tape,
)
from influence.loading import from_peft
from influence.optimizer_state import second_moments
from tests.conftest import build_model, examples, fit_end, tokens_of
from tests.influence.toy_training import train, trainer_groups, write
from tests.oracles import (
    adam_metric,
    b_times,
    close,
    dense_ggn,
    dense_scores,
    differentiable,
    estimated,
    function_metric,
    matrices,
    plain_gradients,
    plain_log_probs,
    plain_loss,
    plain_mean,
    sampled_gradients,
)

pytestmark = pytest.mark.usefixtures("credit_when_asked_for")

N, Q = 8, 3
ONE = {"layers": 1, "target_modules": ["attn.c_attn"]}
F64 = torch.float64

F64 = torch.float64


FEW = {"layers": 1, "target_modules": ["q_proj", "down_proj"]}


def gradients(model, tokens) -> torch.Tensor:
    out = torch.empty(len(tokens), model.space.size, dtype=model.dtype)
    for rows, stack, _ in stream_gradients(model, tokens):
        out[torch.from_numpy(rows)] = stack
    return out


def dense_gradients(model, tokens) -> list[torch.Tensor]:
    """G [n, d_out, d_in] of every site by autograd: a dense matrix D = 0 is added beside the
    adapter.
    """
    deltas = [
        torch.zeros(s.B.weight.shape[0], s.A.weight.shape[1], dtype=F64, requires_grad=True)
        for s in model.sites
    ]
    hooks = [
        site.layer.register_forward_hook(lambda _, given, out, D=D: out + given[0] @ D.T)
        for site, D in zip(model.sites, deltas, strict=True)
    ]
    rows = []
    for item in tokens:
        ids = torch.from_numpy(item.input_ids)[None]
        logp = model.model(input_ids=ids).logits[0].log_softmax(-1)
        loss = sum(-logp[t - 1, ids[0, t]] for t in range(1, ids.shape[1]) if item.supervised[t])
        rows.append(torch.autograd.grad(loss, deltas))
    for hook in hooks:
        hook.remove()
    return [torch.stack(parts) for parts in zip(*rows, strict=True)]


def jacobian(site) -> torch.Tensor:
    """J = d vec(s B A) / d (A, B), [d_out d_in, r d_in + d_out r], column by column."""
    A, B = site.A.weight.detach(), site.B.weight.detach()
    function = lambda a, b: site.scaling * (b @ a)  # noqa: E731
    parts = torch.autograd.functional.jacobian(function, (A, B))
    return torch.cat([part.reshape(B.shape[0] * A.shape[1], -1) for part in parts], dim=1)


def projection(site, G: torch.Tensor) -> torch.Tensor:
    """G's projection on the range of J, from J's dense SVD."""
    left, values, _ = torch.linalg.svd(jacobian(site), full_matrices=False)
    basis = left[:, values > 1e-10 * values[0]]
    return (G.flatten(1) @ basis @ basis.T).view_as(G)


def reparametrise(model, cond: float = 1e3) -> None:
    """(A, B) -> (R A, B R^-1), R random with the given condition number, new for every site."""
    generator = torch.Generator().manual_seed(3)
    for site in model.sites:
        r = site.A.weight.shape[0]
        u, _, w = torch.linalg.svd(torch.randn(r, r, generator=generator, dtype=F64))
        R = u @ torch.diag(torch.logspace(0, -float(np.log10(cond)), r, dtype=F64)) @ w
        site.A.weight.data.copy_(R @ site.A.weight.data)
        site.B.weight.data.copy_(torch.linalg.solve(R.T, site.B.weight.data.T).T)


def scores(rows: torch.Tensor, lam: float = 10.0) -> torch.Tensor:
    """Dense `f_q^T (C + lambda I)^-1 f_i`, C = mean f f^T, lambda of its mean eigenvalue."""
    C = rows.T @ rows / len(rows)
    return rows @ torch.linalg.solve(
        C + lam * C.trace() / len(C) * torch.eye(len(C), dtype=F64), rows.T
    )


def make(kind: str, model):
    if kind == "raw":
        return Raw()
    if kind == "function":
        return function_space(model)
    generator = torch.Generator().manual_seed(1)
    return Adam.of(model.space, torch.rand(model.space.size, generator=generator, dtype=F64) ** 4)


@pytest.mark.parametrize("kind", ["raw", "function", "adam"])
def test_adjoint_and_state(kind):
    model = build_model("llama", r=3, **FEW)
    geometry = make(kind, model)
    g, v = torch.randn(2, 5, model.space.size, dtype=F64)
    left, right = geometry.features(g) @ v.T, g @ geometry.adjoint(v).T
    assert (left - right).abs().max() < 1e-12 * left.abs().max()
    again = load_geometry(geometry.name, model.space, geometry.state())
    assert torch.equal(again.features(g), geometry.features(g))
    assert again.shares_inputs == geometry.shares_inputs
    assert geometry.features(g.float()).dtype == torch.float32
    torch.testing.assert_close(
        geometry.features(g.float()).double(), geometry.features(g), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("kind", ["raw", "function", "separable adam"])
def test_factors_multiply_to_the_features(kind):
    model = build_model("llama", r=3, **FEW)
    if kind == "separable adam":
        h = [
            torch.outer(torch.rand(a, dtype=F64) + 0.5, torch.rand(b, dtype=F64) + 0.5)
            for a, b in shapes(model)
        ]
        geometry = Adam(model.space, model.space.flatten(h))
    else:
        geometry = make(kind, model)
    tokens = tokens_of(model, examples(4))
    parts, kept = {}, {}

    def sink(leaf, x, g, valid):
        changed = geometry.factor(leaf, x, g)
        parts[leaf] = per_example_gradient(*changed)
        kept[leaf] = model.space.leaves[leaf].is_A and torch.equal(changed[0], x)

    with tape(model) as recorder:
        part = recorder.forward(collate(tokens, np.arange(4), pad_id=model.pad_id))
        recorder.backward(part.logits, output_gradient(part, None)[1], sink)
    product = model.space.flatten([parts[i] for i in range(len(model.space.leaves))])
    expected = geometry.features(gradients(model, tokens))
    assert (product - expected).norm() / expected.norm() < 1e-12
    assert geometry.shares_inputs == all(
        kept[i] for i, leaf in enumerate(model.space.leaves) if leaf.is_A
    )


def shapes(model):
    return [leaf.shape for leaf in model.space.leaves]


def test_stored_geometries_are_checked():
    model = build_model("llama", **FEW)
    state = function_space(model).state()
    with pytest.raises(
        InputError, match="geometry 'flat' was given; expected one of raw, function, adam"
    ):
        load_geometry("flat", model.space, {})
    with pytest.raises(StoreError, match=r"U/1 of shape \[16, 2\].*no such tensor"):
        load_geometry("function", model.space, {k: t for k, t in state.items() if k != "U/1"})
    with pytest.raises(StoreError, match=r"scale of shape .* found \[3\]"):
        load_geometry("adam", model.space, {"scale": torch.ones(3)})
    with pytest.raises(StoreError, match="all finite"):
        load_geometry("function", model.space, state | {"left/0": torch.full((2, 2), torch.nan)})


def test_function_features_are_the_dense_gradient_in_canonical_coordinates():
    model = build_model("llama", r=3, use_rslora=True, **FEW)
    tokens = tokens_of(model, examples(5))
    features = model.space.split(function_space(model).features(gradients(model, tokens)))
    for number, (site, G) in enumerate(
        zip(model.sites, dense_gradients(model, tokens), strict=True)
    ):
        # an oracle of its own: the SVD of the dense product B A; signs are free, so inner products
        # are compared
        u, _, w = torch.linalg.svd(site.B.weight.detach() @ site.A.weight.detach())
        U, V = u[:, :3], w[:3].T
        for part, expected in [
            (features[2 * number], U.T @ G),
            (features[2 * number + 1], G @ V - U @ (U.T @ G @ V)),
        ]:
            # row by row of the narrow side, up to its sign
            narrow = 1 if part.shape[1] == 3 else 2
            for k in range(3):
                a, b = part.select(narrow, k).flatten(), expected.select(narrow, k).flatten()
                assert min((a - b).norm(), (a + b).norm()) / b.norm() < 1e-10


@pytest.mark.parametrize("case", ["full rank", "B = 0", "rank 1 of 3", "A of rank 2", "scaling 0"])
def test_features_have_the_length_of_the_projection_on_the_tangent_space(case):
    model = build_model("llama", r=3, **FEW)
    site = model.sites[1]
    A, B = site.A.weight.data, site.B.weight.data
    if case == "B = 0":
        B.zero_()
    if case == "rank 1 of 3":
        B.copy_(torch.outer(B[:, 0], torch.tensor([1.0, -2.0, 0.5], dtype=F64)))
    if case == "A of rank 2":
        A[2] = A[0] - 3 * A[1]
    if case == "scaling 0":
        site.layer.scaling["default"] = 0.0
        model = from_peft(model.model, model.tokenizer)
        site = model.sites[1]
    if case == "full rank":
        geometry = function_space(model)
    else:
        with pytest.warns(UserWarning, match="1 of 2 sites have an A or B of rank below r"):
            geometry = function_space(model)
    tokens = tokens_of(model, examples(5))
    features = geometry.features(gradients(model, tokens))
    assert bool(torch.isfinite(features).all())
    site_features = features[:, slice(model.space.leaves[2].start, model.space.leaves[3].stop)]
    projected = projection(site, dense_gradients(model, tokens)[1]).flatten(1)
    gram, expected = site_features @ site_features.T, projected @ projected.T
    if case == "scaling 0":
        assert gram.abs().max() == 0
    else:
        assert (gram - expected).norm() / expected.norm() < 1e-9


def test_the_metric_is_the_identity_on_the_features():
    """T J^T has orthonormal rows on the tangent space: (T J^T)(T J^T)^T is a projector of rank r
    (d_in + d_out - r).
    """
    model = build_model("llama", r=3, **FEW)
    geometry = function_space(model)
    J = jacobian(model.sites[0])
    rows = torch.zeros(J.shape[0], model.space.size, dtype=F64)
    rows[:, : J.shape[1]] = J
    T = geometry.features(rows)[:, : J.shape[1]]
    values = torch.linalg.eigvalsh(T.T @ T)
    d_out, d_in = model.sites[0].B.weight.shape[0], model.sites[0].A.weight.shape[1]
    assert int((values > 0.5).sum()) == 3 * (d_in + d_out - 3)
    assert torch.minimum(values.abs(), (values - 1).abs()).max() < 1e-10


@pytest.mark.parametrize("how", ["cond 1e3", "A * 3, B / 3"])
def test_scores_do_not_depend_on_how_the_adapter_is_factored(how):
    model = build_model("llama", r=3, **FEW)
    tokens = tokens_of(model, examples(8))
    raw = gradients(model, tokens)
    features = function_space(model).features(raw)
    before = model.sites[0].B.weight.data @ model.sites[0].A.weight.data
    if how == "cond 1e3":
        reparametrise(model)
    else:
        for site in model.sites:
            site.A.weight.data.mul_(3)
            site.B.weight.data.div_(3)
    torch.testing.assert_close(model.sites[0].B.weight.data @ model.sites[0].A.weight.data, before)
    raw_after = gradients(model, tokens)
    after = function_space(model).features(raw_after)
    assert (
        after.abs() - features.abs()
    ).norm() / features.norm() < 1e-8  # up to the signs of singular vectors
    error = (scores(after) - scores(features)).norm() / scores(features).norm()
    changed = (scores(raw_after) - scores(raw)).norm() / scores(raw).norm()
    print(
        f"{how}: scores change by {error:.1e} in function space, by {changed:.1e} in raw "
        "coordinates"
    )
    assert error < 1e-8
    assert changed > 0.1


def test_adam_is_the_inverse_root_of_the_second_moments():
    space = ParamSpace.of([("a.lora_A", (2, 3)), ("a.lora_B", (4, 2))])
    v = torch.rand(space.size, dtype=F64) + 0.1
    g = torch.randn(2, space.size, dtype=F64)
    f = Adam.of(space, v).features(g)
    expected = sum(
        float(a * b) / (float(c) ** 0.5 + 1e-8) for a, b, c in zip(g[0], g[1], v, strict=True)
    )
    assert float(f[0] @ f[1]) == pytest.approx(expected, rel=1e-12)


def test_a_dead_coordinate_does_not_explode_and_a_dead_leaf_stays_finite():
    space = ParamSpace.of([("a.lora_A", (2, 3)), ("a.lora_B", (4, 2))])
    v = torch.ones(space.size, dtype=F64)
    v[0], v[6:] = 0, 0
    geometry = Adam.of(space, v)
    assert float(geometry.scale[0]) == pytest.approx((1e-3 * 5 / 6 + 1e-8) ** -0.5)
    torch.testing.assert_close(geometry.scale[1:6], torch.ones(5, dtype=F64))
    torch.testing.assert_close(geometry.scale[6:], torch.full((8,), 1e4, dtype=F64))
    assert v[0] == 0  # the caller's tensor is left alone
    with pytest.raises(InputError, match=r"shape \(3,\) were given; expected \[14\]"):
        Adam.of(space, v[:3])
    with pytest.raises(NumericalError, match="NaN, infinity or negative"):
        Adam.of(space, -v)


def test_separable_fit_is_the_least_squares_one():
    space = ParamSpace.of([("a.lora_A", (3, 5)), ("a.lora_B", (4, 3))])
    h = torch.rand(space.size, dtype=F64) + 0.1
    for (a, b), leaf in zip(Adam(space, h).separable, space.split(h), strict=True):
        m, n = leaf.shape
        rows, columns = torch.arange(m).repeat_interleave(n), torch.arange(n).repeat(m)
        design = torch.zeros(m * n, m + n, dtype=F64)
        design[torch.arange(m * n), rows] = 1
        design[torch.arange(m * n), m + columns] = 1
        best = design @ torch.linalg.pinv(design) @ leaf.log().flatten()
        torch.testing.assert_close(torch.outer(a, b).log().flatten(), best, rtol=1e-10, atol=1e-10)


def test_second_moments_from_gradients():
    space = ParamSpace.of([("a.lora_A", (2, 3)), ("a.lora_B", (4, 2))])
    g, w = torch.randn(5, space.size, dtype=F64), torch.rand(5, dtype=F64)
    v = torch.zeros(space.size, dtype=F64)
    for i in range(5):
        v += (5 * w[i] * g[i]) ** 2 / 5
    adam = Adam.from_rms(space, iter([g[:2], g[2:]]), w)
    torch.testing.assert_close(adam.scale, Adam.of(space, v).scale, rtol=1e-12, atol=0)
    for rows in ([g[:4]], [g, g[:1]], []):
        with pytest.raises(InputError, match="expected one weight for each row"):
            Adam.from_rms(space, rows, w)


def test_it_all_goes_together(tmp_path):
    """From a checkpoint to features: `f_q . f_i = g_q^T diag(1 / (sqrt(v) + eps)) g_i`."""
    model = build_model("llama", **FEW)
    optimizer = torch.optim.AdamW(trainer_groups(model), lr=1e-3)
    train(model, optimizer)
    state = second_moments(write(tmp_path / "c", model, optimizer), model)
    g = torch.randn(2, model.space.size, dtype=F64)
    f = Adam.of(model.space, state.v).features(g)
    assert float(f[0] @ f[1]) == pytest.approx(
        float((g[0] * g[1] / (state.v.sqrt() + 1e-8)).sum()), rel=1e-2
    )


@pytest.fixture(scope="module")
def model():
    return build_model("gpt2", **ONE)


@pytest.mark.parametrize("source", ["function", "estimated", "optimizer.pt"])
@pytest.mark.parametrize("samples", [0, 1])
def test_fisher_in_every_geometry_is_the_dense_formula(tmp_path, double, source, samples):
    model = build_model("gpt2", **ONE)
    data, queries, options = examples(N), examples(Q, seed=1), {"geometry": source}
    w = 1 / (N * tokens_of(model, data).counts)
    if source != "function":
        options = {"geometry": "adam"}
    if source == "optimizer.pt":
        optimizer = torch.optim.AdamW(trainer_groups(model), lr=1e-3, betas=(0.8, 0.9))
        train(model, optimizer)
        options["optimizer"] = write(tmp_path / "c", model, optimizer)
        state = {id(p): s["exp_avg_sq"] for p, s in optimizer.state.items()}
        v = torch.cat([state[id(p)].reshape(-1) for p in model.parameters]) / (1 - 0.9**3)
    g, q = plain_gradients(model, data), plain_gradients(model, queries, plain_mean)
    if source == "estimated":
        v = estimated(g, w)
    T = function_metric(model) if source == "function" else adam_metric(model, v)
    options |= {
        "reduction": "example",
        "curvature": Fisher(samples=samples),
        "directory": tmp_path / "run",
    }
    fitted = fit_end(model, data, **options)
    rows_ = sampled_gradients(model, data) if samples else g
    C = (rows_ * torch.from_numpy(w)[:, None]).T @ rows_
    additive = {"credit": "additive"}
    close(fitted.score(queries, **additive).values, dense_scores(T, C, q, g, w, 0.1), 1e-8)
    close(
        fitted.score(queries, damping="abs:0.03", **additive).values,
        dense_scores(T, C, q, g, w, [0.03]),
        1e-8,
    )
    close(fitted.score(queries, curvature="identity").values, (q @ T.T @ T @ g.T).numpy() * w, 1e-8)


@pytest.mark.slow
@pytest.mark.parametrize(
    "geometry",  # test_scores.py has the GGN without one
    [pytest.param("raw", marks=pytest.mark.slow), "function", "adam"],
)
def test_ggn_in_every_geometry_is_the_dense_formula(model, tmp_path, double, geometry):
    """And so it is at another point of the path, where T is another."""
    data, queries = examples(3), examples(2, seed=1)
    w = 1 / (3 * tokens_of(model, data).counts)
    fitted = influence.fit(
        model,
        data,
        path=(0.5, 1.0),
        geometry=geometry,
        reduction="example",
        directory=tmp_path / "run",
        damping="abs:0.02",
    )
    for c, at in ((0.5, "0.5"), (1.0, "end")):
        with b_times(model, c):
            g, q = plain_gradients(model, data), plain_gradients(model, queries, plain_mean)
            T = torch.eye(model.space.size, dtype=F64)
            if geometry != "raw":
                T = (
                    function_metric(model)
                    if geometry == "function"
                    else adam_metric(model, estimated(g, w))
                )
            expected = dense_scores(T, dense_ggn(model, data, w), q, g, w, [0.02])
        for solver, tolerance in (
            (("direct", 1e-8), ("pcg", 1e-3)) if at == "end" else ((CG(tolerance=1e-11), 1e-8),)
        ):
            close(
                fitted.score(queries, curvature="ggn", solver=solver, at=at).values,
                expected,
                tolerance,
            )


def test_ekfac_of_function_space_is_the_formula(model, tmp_path, double):
    """Everything from the gradients d_t of the site's output: U^T G and (I - U U^T) G V, G = sum_t
    d_t x_t^T.
    """
    data, queries = examples(N), examples(Q, seed=1)
    fitted = fit_end(
        model, data, geometry="function", reduction="example", directory=tmp_path / "run"
    )
    counts = tokens_of(model, data).counts
    w = torch.from_numpy(1 / (N * counts))
    s, A, B = matrices(model)
    U, _, Vh = torch.linalg.svd(s * B @ A, full_matrices=False)
    U, V = U[:, :2], Vh[:2].T
    off = torch.eye(len(U)) - U @ U.T

    def leaves(x, d):
        """Input and output gradient of what the features of each leaf are made of."""
        return [(x, d @ U), (x @ V, d @ off)]

    def at_data_labels(rows_, measure):
        gradients = []
        with differentiable(model):
            for item in tokens_of(model, rows_):
                seen = []
                hook = lambda _, args, out, seen=seen: seen.append((args[0].detach()[0], out))  # noqa: E731
                handle = model.sites[0].layer.register_forward_hook(hook)
                value = measure(*plain_log_probs(model, item))
                handle.remove()
                d = torch.autograd.grad(value, seen[0][1])[0][0]
                gradients.append([g.T @ x for x, g in leaves(seen[0][0], d)])
        return gradients

    collected: list = []
    sampled_gradients(model, data, collected)
    q, g = at_data_labels(queries, plain_mean), at_data_labels(data, plain_loss)
    expected = np.zeros((Q, N))
    for number in range(2):
        pairs = [leaves(x, d)[number] for x, d in collected]
        inputs = sum(weight * x.T @ x for weight, (x, _) in zip(w, pairs, strict=True))
        outputs = sum(weight * d.T @ d for weight, (_, d) in zip(w, pairs, strict=True))
        QA, QS = torch.linalg.eigh(inputs)[1], torch.linalg.eigh(outputs)[1]
        rotate = lambda F, QS=QS, QA=QA: QS.T @ F @ QA  # noqa: E731
        values = sum(weight * rotate(d.T @ x) ** 2 for weight, (x, d) in zip(w, pairs, strict=True))
        values = values + 0.1 * values.mean()
        for a in range(Q):
            for i in range(N):
                product = rotate(q[a][number]) * rotate(g[i][number]) / values
                expected[a, i] += float(w[i] * product.sum())
    close(fitted.score(queries, credit="additive").values, expected, 1e-8)


def gauge(model, condition: float):
    """(A, B) -> (R A, B R^-1) at every site, in place."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for site in model.sites:
            r = len(site.A.weight)
            one, two = (
                torch.linalg.qr(torch.randn(r, r, dtype=F64, generator=generator))[0]
                for _ in range(2)
            )
            R = one * torch.logspace(0, np.log10(condition), r, dtype=F64) @ two
            site.A.weight.copy_(R @ site.A.weight)
            site.B.weight.copy_(site.B.weight @ torch.linalg.inv(R))


@pytest.mark.slow
def test_function_space_does_not_see_how_the_adapter_is_factored(tmp_path, double):
    sites = {"layers": 1, "target_modules": ["attn.c_attn", "mlp.c_proj"]}
    plain, other = build_model("gpt2", **sites), build_model("gpt2", **sites)
    gauge(other, 1e3)
    data, queries = examples(5), examples(2, seed=1)
    exact = {"curvature": "ggn", "solver": CG(tolerance=1e-11), "damping": "top:0.1", "at": "end"}
    requests = [
        {},
        {"curvature": "kfac"},
        {"curvature": "ggn", "at": "0.5"},
        exact,
        {"curvature": "identity"},
    ]
    requests += [{"at": "0.5"}, {"per_token": True}]
    changes = {}
    fitted = [
        ("ekfac", influence.EKFAC(), (0.5, 1.0), requests),
        ("fisher", Fisher(), (1.0,), [{}]),
    ]
    for geometry in ("function", "raw"):
        for name, curvature, path, all_requests in fitted:
            options = {"path": path, "geometry": geometry, "curvature": curvature}
            with warnings.catch_warnings():
                if geometry == "raw":  # damping relative to blocks a million times apart
                    warnings.filterwarnings("ignore", message=".*curvature blocks are")
                one, two = (
                    influence.fit(m, data, directory=tmp_path / f"{geometry}-{name}-{k}", **options)
                    for k, m in enumerate((plain, other))
                )
                for number, request in enumerate(
                    all_requests if geometry == "function" else all_requests[:2]
                ):
                    first, second = (
                        one.score(queries, **request).values,
                        two.score(queries, **request).values,
                    )
                    changes[geometry, name, number] = (
                        np.abs(first - second).max() / np.abs(first).max()
                    )
    print({" ".join(map(str, key)): f"{value:.1e}" for key, value in changes.items()})
    assert max(value for key, value in changes.items() if key[0] == "function") < 1e-8
    assert min(value for key, value in changes.items() if key[0] == "raw") > 1e-2
