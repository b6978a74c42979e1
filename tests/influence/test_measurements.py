"""Measurements, geometries, damping and solvers from end to end: `run.score` against formulas written out densely."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

import influence
from influence import CG, Contrast, Custom, Fisher
from influence.errors import DataError, InputError
from influence.gradients import label_uniforms, stream_gradients
from influence.loss import Supervised
from influence.measurements import MEASUREMENTS, TokenLoss
from influence.solvers.named import SOLVERS
from tests.conftest import build_model, examples, fit_end, rows, tokens_of
from tests.influence.test_geometry import train, trainer_groups, write
from tests.influence.test_path import (  # noqa: F401
    b_times,
    close,
    differentiable,
    double,
    plain_gradients,
    plain_log_probs,
    plain_loss,
    plain_mean,
)

N, Q = 8, 3
ONE = {"layers": 1, "target_modules": ["attn.c_attn"]}
F64 = torch.float64


@pytest.fixture(scope="module")
def model():
    return build_model("gpt2", **ONE)


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    return fit_end(
        model,
        examples(N),
        directory=tmp_path_factory.mktemp("measured") / "run",
        reduction="example",
    )


# ---- measurements ------------------------------------------------------------------------------------------------


def plain_margin(log_probs, targets):
    p = log_probs[torch.arange(len(targets)), targets].exp()
    return (p / (1 - p)).log().mean()


def entropy(log_probs, targets):
    return -(log_probs.exp() * log_probs).sum(-1).mean() + 0 * targets.sum()


BY_HAND = {
    "loss": plain_mean,
    "sum": plain_loss,
    "margin": plain_margin,
    "token:0": lambda log_probs, targets: -log_probs[0, targets[0]],
    "token:-1": lambda log_probs, targets: -log_probs[-1, targets[-1]],
    "custom": entropy,
}


def measurement_of(name: str):
    if name == "custom":
        return Custom(entropy, "entropy", "nats per token")
    return TokenLoss(int(name[6:])) if name.startswith("token:") else MEASUREMENTS[name]


@pytest.mark.parametrize("name", BY_HAND)
def test_values_and_gradients_of_every_measurement(model, run, double, name):
    queries = examples(6, seed=1)
    tokens = tokens_of(model, queries)
    expected = plain_gradients(model, queries, BY_HAND[name])
    with torch.no_grad():
        wanted = np.array([float(BY_HAND[name](*plain_log_probs(model, item))) for item in tokens])
    for budget in (1, 40, 1000):
        for indices, gradients, values in stream_gradients(
            model, tokens, measurement=measurement_of(name), token_budget=budget
        ):
            close(gradients, expected[torch.from_numpy(indices)], 1e-10)
            np.testing.assert_allclose(values, wanted[indices], rtol=1e-10)
    asked = measurement_of(name) if name == "custom" else name
    g, counts = plain_gradients(model, run.train), tokens_of(model, run.train).counts
    scores = run.score(queries, measurement=asked, curvature="identity")
    close(scores.values, (expected @ g.T).numpy() / (N * counts))
    assert scores.attributes["measurement"] == ("entropy" if name == "custom" else name)


def test_a_margin_of_a_certain_token_stays_finite():
    logits = torch.tensor([[800.0, 0.0, -3.0], [0.0, -900.0, 1.0]], dtype=F64, requires_grad=True)
    part = Supervised(logits, torch.tensor([0, 1]), [1, 1])
    values = MEASUREMENTS["margin"].values(part)
    values.sum().backward()
    assert values.tolist() == pytest.approx([800 - np.log1p(np.exp(-3)), -900 - np.log(1 + np.e)])
    assert bool(torch.isfinite(logits.grad).all())


def others(count: int = Q, *, prompts: int = 1, seed: int = 1):
    """The prompts of `examples(count, seed)` with other completions."""
    swapped = [row["completion"] for row in rows(count, seed=seed)]
    made = [
        row | {"completion": " sleep" + swapped[i - 1]}
        for i, row in enumerate(rows(count, seed=prompts))
    ]
    return influence.examples_from_rows(made)


def log_p(model, data) -> torch.Tensor:
    with torch.no_grad():
        return torch.stack(
            [-plain_loss(*plain_log_probs(model, item)) for item in tokens_of(model, data)]
        )


def test_a_contrast_is_the_difference_of_two_log_probabilities(model, run, double):
    """Gradient products by hand; and a step as by the removal of a row moves log p(B) - log p(A) as predicted."""
    queries, against = examples(Q, seed=1), others()
    g, counts = plain_gradients(model, run.train), tokens_of(model, run.train).counts
    q = plain_gradients(model, queries, plain_loss) - plain_gradients(model, against, plain_loss)
    found = run.score(queries, measurement=Contrast(against), curvature="identity")
    close(found.values, (q @ g.T).numpy() / (N * counts))
    scores = run.score(queries, measurement=Contrast(against)).values
    operator, epsilon = run.operator(), 1e-6
    C = influence.curvature.dense(operator.curvature) + torch.diag(operator.diagonal(g[0]))
    for i in (0, 3):
        step = torch.linalg.solve(C, g[i] / float(N * counts[i]))
        up, down = [], []
        for sign, into in ((1, up), (-1, down)):
            with model.moved(sign * epsilon * step):
                into.append(log_p(model, against) - log_p(model, queries))
        np.testing.assert_allclose(
            (up[0] - down[0]).numpy() / (2 * epsilon), scores[:, i], rtol=1e-5, atol=1e-8
        )


@pytest.mark.parametrize("measurement", ["token:5", "token:-7", "token:99"])
def test_a_position_that_a_query_lacks(run, measurement, tmp_path):
    queries = examples(Q, seed=1)
    with pytest.raises(
        InputError,
        match=rf"measurement {measurement} was given; query 'r1-0' has \d completion tokens",
    ):
        run.score(queries, measurement=measurement)


@pytest.mark.parametrize(
    "measurement", ["token:", "token:x", "token:--1", "token:²", "token:1.5", "tokens:1", ""]
)
def test_measurements_that_are_none(run, measurement):
    with pytest.raises(InputError, match="expected one of loss, sum, margin, token:K"):
        run.score(examples(Q, seed=1), measurement=measurement)


def test_contrasts_that_do_not_pair_up(run):
    queries = examples(Q, seed=1)
    for against, sentence in (
        (others()[:2], "3 queries and 2 rows to contrast them with were given"),
        (others(prompts=5), "has another prompt than query"),
        (others()[::-1], "has another prompt than query"),
    ):
        with pytest.raises(InputError, match=sentence):
            run.score(queries, measurement=Contrast(against))


def test_contrast_rows_that_do_not_fit_the_model_are_listed(tmp_path):
    """As queries are, before any of them is run."""
    model = build_model("gpt2", **ONE)
    short = influence.examples_from_rows([{"id": "q", "prompt": "fox", "completion": " runs"}])
    long = influence.examples_from_rows(
        [{"id": "long", "prompt": "fox", "completion": " runs" * 9}]
    )
    fitted = fit_end(model, short, directory=tmp_path / "run")
    model.model.get_base_model().config.max_position_embeddings = 5
    with pytest.raises(DataError, match="rows do not fit the model"):
        fitted.score(long)
    with pytest.raises(DataError, match="rows do not fit the model"):
        fitted.score(short, measurement=Contrast(long))


@pytest.mark.parametrize(
    "function",
    [
        lambda log_probs, targets: log_probs.mean(0),
        lambda log_probs, targets: log_probs.detach().mean(),
        lambda log_probs, targets: 1.0,
        lambda log_probs, targets: None,
        lambda log_probs, targets: log_probs[:1, 0],
    ],
)
def test_a_custom_measurement_that_is_no_scalar_of_the_log_probabilities(run, function):
    with pytest.raises(
        InputError, match=r"measurement 'mine' returned .*; expected a scalar tensor"
    ):
        run.score(examples(Q, seed=1), measurement=Custom(function, "mine"))


def test_a_refused_measurement_leaves_no_file(run, tmp_path):
    with pytest.raises(InputError, match="token:99"):
        run.score(examples(Q, seed=1), measurement="token:99", out=tmp_path / "s.h5")
    assert not list(tmp_path.iterdir())


# ---- geometries --------------------------------------------------------------------------------------------------


def sampled_gradients(model, data, collected=None) -> torch.Tensor:
    """Gradients `[n, P]` at labels drawn from the model; `collected` also gets each row's (x, d) at the site."""
    found, site = [], model.sites[0].layer
    with differentiable(model):
        for item, id in zip(tokens_of(model, data), data.ids, strict=True):
            seen = []
            hook = lambda _, args, out, seen=seen: seen.append((args[0].detach()[0], out))  # noqa: E731
            handle = site.register_forward_hook(hook)
            log_probs, targets = plain_log_probs(model, item)
            handle.remove()
            cdf = log_probs.detach().exp().cumsum(1)
            u = torch.from_numpy(label_uniforms(0, 0, id, len(targets)))
            labels = (cdf <= u[:, None] * cdf[:, -1:]).sum(1)
            wanted = [*model.parameters, seen[0][1]]
            *grads, outer = torch.autograd.grad(plain_loss(log_probs, labels), wanted)
            found.append(torch.cat([g.reshape(-1) for g in grads]))
            if collected is not None:
                collected.append((seen[0][0], outer[0]))
    return torch.stack(found)


def matrices(model):
    """s, A [r, d_in] and B [d_out, r] of the only site."""
    site = model.sites[0]
    return site.scaling, site.A.weight.detach(), site.B.weight.detach()


def function_metric(model) -> torch.Tensor:
    """A square root of `(J^T J)^+`, J = d vec(s B A) / d(A, B): any other T of function space differs by a rotation."""
    s, A, B = matrices(model)
    J = torch.cat(
        [
            s * torch.kron(B, torch.eye(A.shape[1])),
            s * torch.kron(torch.eye(B.shape[0]), A.T.contiguous()),
        ],
        1,
    )
    values, vectors = torch.linalg.eigh(J.T @ J)
    root = torch.where(values > 1e-10 * values[-1], values.clamp(min=1e-300).rsqrt(), 0)
    return vectors * root @ vectors.T


def adam_metric(model, v) -> torch.Tensor:
    """`h = (sqrt(v) + eps)^(-1/2)`, where sqrt(v) is at least a thousandth of its leaf's mean."""
    parts = []
    for leaf in model.space.leaves:
        root = v[leaf.slice].sqrt()
        parts.append((torch.maximum(root, 1e-3 * root.mean()) + 1e-8).rsqrt())
    return torch.diag(torch.cat(parts))


def estimated(g, w) -> torch.Tensor:
    return ((len(w) * torch.from_numpy(w)[:, None] * g) ** 2).mean(0)


def dense_scores(T, C, q, g, w, lam) -> np.ndarray:
    """`w_i (T q)^T (T C T^T + lambda)^-1 T g_i`."""
    inside = T @ C @ T.T
    lam = lam * float(inside.trace()) / len(inside) if isinstance(lam, float) else float(lam[0])
    return (
        q @ T.T @ torch.linalg.solve(inside + lam * torch.eye(len(inside), dtype=F64), T @ g.T)
    ).numpy() * w


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
    close(fitted.score(queries).values, dense_scores(T, C, q, g, w, 0.1), 1e-8)
    close(
        fitted.score(queries, damping="abs:0.03").values, dense_scores(T, C, q, g, w, [0.03]), 1e-8
    )
    close(fitted.score(queries, curvature="identity").values, (q @ T.T @ T @ g.T).numpy() * w, 1e-8)


def dense_ggn(model, data, w) -> torch.Tensor:
    """`sum_i w_i sum_t J_t^T (diag(p) - p p^T) J_t` by the Jacobian of every supervised logit."""
    C = torch.zeros(model.space.size, model.space.size, dtype=F64)
    with differentiable(model):
        for item, weight in zip(tokens_of(model, data), w, strict=True):
            log_probs, _ = plain_log_probs(model, item)
            eye = torch.eye(log_probs.numel(), dtype=F64).unflatten(1, log_probs.shape)
            found = torch.autograd.grad(log_probs, model.parameters, eye, is_grads_batched=True)
            J = torch.cat([f.flatten(1) for f in found], 1).unflatten(0, log_probs.shape)
            p = log_probs.detach().exp()
            # of log-probabilities, sum_v p_v J_v = 0, so the Fisher of a token is sum_v p_v J_v J_v^T
            C += float(weight) * torch.einsum("tv,tvi,tvj->ij", p, J, J)
    return C


@pytest.mark.parametrize("geometry", ["raw", "function", "adam"])
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
    """Everything from the gradients d_t of the site's output: U^T G and (I - U U^T) G V, G = sum_t d_t x_t^T."""
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
        found = []
        with differentiable(model):
            for item in tokens_of(model, rows_):
                seen = []
                hook = lambda _, args, out, seen=seen: seen.append((args[0].detach()[0], out))  # noqa: E731
                handle = model.sites[0].layer.register_forward_hook(hook)
                value = measure(*plain_log_probs(model, item))
                handle.remove()
                d = torch.autograd.grad(value, seen[0][1])[0][0]
                found.append([g.T @ x for x, g in leaves(seen[0][0], d)])
        return found

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
    close(fitted.score(queries).values, expected, 1e-8)


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
        for name, curvature, path, asked in fitted:
            options = {"path": path, "geometry": geometry, "curvature": curvature}
            with warnings.catch_warnings():
                if geometry == "raw":  # damping relative to blocks a million times apart
                    warnings.filterwarnings("ignore", message=".*curvature blocks are")
                one, two = (
                    influence.fit(m, data, directory=tmp_path / f"{geometry}-{name}-{k}", **options)
                    for k, m in enumerate((plain, other))
                )
                for number, request in enumerate(asked if geometry == "function" else asked[:2]):
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


# ---- damping -----------------------------------------------------------------------------------------------------


def test_time_is_one_over_the_total_learning_rate(tmp_path):
    model, data = build_model("gpt2", **ONE), examples(4)
    with pytest.raises(InputError, match="damping time was given"):
        fit_end(model, data, damping="time", directory=tmp_path / "none")
    optimizer = torch.optim.AdamW(trainer_groups(model), lr=1e-3)
    train(model, optimizer)
    folder = write(tmp_path / "bare", model, optimizer)
    with pytest.raises(InputError, match="damping time was given"):
        fit_end(model, data, damping="time", optimizer=folder, directory=tmp_path / "none")
    assert not (tmp_path / "none").exists()
    log = {
        "global_step": 3,
        "log_history": [{"step": s, "learning_rate": r} for s, r in ((1, 0.7), (2, 0.5), (3, 0.2))],
    }
    folder = write(tmp_path / "logged", model, optimizer, log)
    for geometry in ("raw", "adam"):
        fitted = fit_end(
            model,
            data,
            damping="time",
            optimizer=folder,
            geometry=geometry,
            directory=tmp_path / geometry,
        )
        assert fitted.operator().lam.numpy() == pytest.approx(1 / 1.4, rel=1e-12)
    queries = examples(2, seed=1)
    scores = fitted.score(queries, damping="time:4")
    assert set(np.ravel(scores.attributes["lambda"])) == {0.25}
    np.testing.assert_array_equal(scores.values, fitted.score(queries, damping="abs:0.25").values)
    with pytest.raises(InputError, match="time"):
        fitted.score(queries, damping="time")
    for wrong in ("time:0", "time:-1", "time:inf", "time:nan"):
        with pytest.raises(InputError):
            fit_end(model, data, damping=wrong, directory=tmp_path / "none")
        assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("damping", ["abs:0.123456789", "time:3.14159265"])
def test_the_damping_of_the_fit_is_kept_with_all_its_digits(model, tmp_path, damping):
    fitted = fit_end(model, examples(4), damping=damping, directory=tmp_path / "run")
    number = float(damping.partition(":")[2])
    expected = number if damping.startswith("abs") else 1 / number
    assert float(fitted.operator().lam[0]) == pytest.approx(expected, rel=1e-12)


# ---- solvers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("curvature", [None, "ggn"])
@pytest.mark.parametrize("solver", [name for name in SOLVERS if name != "datainf"])
def test_every_solver_by_name(model, tmp_path, double, solver, curvature):
    data, queries = examples(5), examples(Q, seed=1)
    path = (1.0,) if curvature else (0.5, 1.0)
    fitted = influence.fit(model, data, path=path, reduction="example", directory=tmp_path / "run")
    expected = 0.0
    of = {"curvature": curvature, "damping": "top:0.2"}
    scores = fitted.score(queries, solver=solver, **of)
    w = 1 / (5 * tokens_of(model, data).counts)
    for c, point, factor in zip(path, fitted.points, scores.attributes["factors"], strict=True):
        operator = point.operator(**of)
        with b_times(model, c):
            g, q = plain_gradients(model, data), plain_gradients(model, queries, plain_mean)
            C = (
                dense_ggn(model, data, w)
                if curvature
                else influence.curvature.dense(operator.curvature)
            )
        C = C + torch.diag(operator.diagonal(g[0]))
        expected = expected + factor * (q @ torch.linalg.solve(C, g.T)).numpy() * w
    assert scores.converged.all()
    assert scores.attributes["solver"] == solver
    close(scores.values, expected, 1e-9 if solver == "direct" else 1e-2)


@pytest.mark.parametrize("geometry", ["raw", "adam"])
@pytest.mark.parametrize("curvature", [None, "ggn"])
def test_datainf_is_its_formula_with_and_without_stored_gradients(
    model, tmp_path, double, curvature, geometry
):
    """Weights that differ from row to row, and a stream of rows that is not in their order."""
    data, queries = examples(N), examples(Q, seed=1)
    w = 1 / (N * tokens_of(model, data).counts)
    assert len(set(w)) > 2
    found = []
    for store in ("always", "never"):
        fitted = fit_end(
            model,
            data,
            reduction="example",
            store=store,
            token_budget=25,
            geometry=geometry,
            directory=tmp_path / store,
        )
        scores = fitted.score(queries, solver="datainf", curvature=curvature)
        found.append(scores.values)
        order = np.concatenate([indices for indices, _ in fitted.gradient_blocks()])
        assert (list(order) == list(range(N))) == (store == "always")
    g, q = plain_gradients(model, data), plain_gradients(model, queries, plain_mean)
    if geometry == "adam":
        T = adam_metric(model, estimated(g, w))
        g, q = g @ T, q @ T
    x = torch.zeros_like(q)
    diagonal = fitted.operator(curvature).diagonal(g[0])
    for leaf in model.space.leaves:
        part, lam = leaf.slice, float(diagonal[leaf.start])
        eye = torch.eye(leaf.stop - leaf.start, dtype=F64)
        for i in range(N):
            matrix = N * w[i] * torch.outer(g[i, part], g[i, part]) + lam * eye
            x[:, part] += torch.linalg.solve(matrix, q[:, part].T).T / N
    expected = (x @ g.T).numpy() * w
    close(found[0], expected, 1e-8)
    close(found[1], expected, 1e-8)
