"""Scores: their sign, their unit, and the same numbers whatever the batches or the store."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import influence
from influence.curvature import dense
from influence.errors import InputError
from influence.gradients import stream_gradients
from influence.loss import mean_losses
from tests.conftest import build_model, examples, fit_end, rows, tokens_of

pytestmark = pytest.mark.usefixtures("credit_when_asked_for")


@pytest.fixture(scope="module")
def model():
    return build_model("gpt2", layers=1, target_modules=["attn.c_attn", "mlp.c_proj"])


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    return fit_end(
        model, examples(12), directory=tmp_path_factory.mktemp("scores") / "run", token_budget=40
    )


def gradients(model, data, measurement=None):
    tokens = tokens_of(model, data)
    out = torch.empty(len(tokens), model.space.size, dtype=model.dtype)
    for indices, block, _ in stream_gradients(model, tokens, measurement=measurement):
        out[torch.from_numpy(indices)] = block
    return out, tokens


#: Every reduction of one curvature, and every curvature; the other combinations are slow tests.
QUICK = [("kfac", "token"), ("ggn", "batch:1"), ("identity", "example")]
CASES = [
    pytest.param(
        curvature,
        reduction,
        marks=[pytest.mark.slow] * (curvature != "ekfac" and (curvature, reduction) not in QUICK),
    )
    for curvature in ("ekfac", "kfac", "ggn", "identity")
    for reduction in ("token", "example", "batch:1")
]


@pytest.mark.parametrize(("curvature", "reduction"), CASES)
def test_scores_are_the_formula_of_the_convention(model, tmp_path, curvature, reduction):
    data, queries = examples(8), examples(3, seed=1)
    fitted = fit_end(model, data, directory=tmp_path / "run", reduction=reduction, token_budget=30)
    scores = fitted.score(queries, curvature=curvature, credit="additive")
    g, tokens = gradients(model, data)
    q, query_tokens = gradients(model, queries)
    q = (
        q / torch.from_numpy(query_tokens.counts)[:, None]
    )  # m(q): mean, not sum, over the completion
    T = tokens.counts
    w = 1 / T.sum() * np.ones(8) if reduction == "token" else 1 / (8 * T)
    operator = fitted.operator(curvature)
    C = dense(operator.curvature) + torch.diag(operator.diagonal(g[0]))
    expected = (q @ torch.linalg.solve(C, g.T)).numpy() * w
    np.testing.assert_allclose(
        scores.values, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max()
    )
    if curvature == "ggn":
        return  # its self-influence is the same solver on other right-hand sides
    self_influence = fitted.self_influence(curvature=curvature, credit="additive").values
    expected = np.einsum("ip,pi->i", g.numpy(), torch.linalg.solve(C, g.T).numpy()) * w / T
    np.testing.assert_allclose(self_influence, expected, rtol=2e-5)
    assert (self_influence > 0).all()


def test_a_step_along_the_edit_moves_the_query_as_predicted(run, model):
    """score = first-order change of m(q) when theta moves by `(C + lambda)^-1 w_i grad l_i`, as
    removal of i does.
    """
    queries = examples(2, seed=3)
    scores = run.score(queries, credit="additive")
    g, _ = gradients(model, run.train)
    operator = run.operator()
    step = operator.curvature.solve(g[:1] * run.weights[0], operator.lam)[0]
    tokens = tokens_of(model, queries)
    epsilon = 1e-5
    with model.moved(epsilon * step):
        up = mean_losses(model, tokens)
    with model.moved(-epsilon * step):
        down = mean_losses(model, tokens)
    np.testing.assert_allclose(
        (up - down) / (2 * epsilon), scores.values[:, 0], rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("curvature", ["ekfac", "fisher", "identity"])
def test_a_training_duplicate_of_the_query_is_a_proponent(model, tmp_path, curvature):
    spec = {
        "ekfac": influence.EKFAC(),
        "fisher": influence.Fisher(),
        "identity": influence.Identity(),
    }[curvature]
    data = examples(15)
    fitted = fit_end(model, data, curvature=spec, directory=tmp_path / "run")
    scores = fitted.score(data, credit="additive")
    self_influence = fitted.self_influence(credit="additive")
    assert (np.diag(scores.values) > 0).all()
    np.testing.assert_allclose(np.diag(scores.values), self_influence.values, rtol=1e-4)
    # normalised by the length of the training gradient in the curvature's inner product
    # (Cauchy-Schwarz)
    normalised = (
        scores.values
        / np.sqrt(self_influence.values * fitted.tokens.counts / fitted.weights)[None, :]
    )
    assert (normalised.argmax(1) == np.arange(15)).all()


def test_removing_the_proponents_raises_the_loss(run, model):
    """The sign checked on the model itself: one small step of the removal edit of every top
    proponent.
    """
    queries = examples(4, seed=5)
    scores = run.score(queries, credit="additive")
    g, _ = gradients(model, run.train)
    operator = run.operator()
    tokens = tokens_of(model, queries)
    before = mean_losses(model, tokens)
    for q in range(4):
        best = scores.top(q, 1)[0][0]
        step = operator.curvature.solve(
            g[best.index : best.index + 1] * run.weights[best.index], operator.lam
        )[0]
        with model.moved(1e-3 * step):
            assert mean_losses(model, tokens)[q] > before[q]


def test_batches_order_and_store_change_nothing(model, tmp_path):
    data, queries = examples(10), examples(4, seed=2)
    reference = fit_end(model, data, directory=tmp_path / "a").score(queries).values
    for number, options in enumerate(
        ({"token_budget": 1}, {"token_budget": 33}, {"store": "never"}, {"store": "always"})
    ):
        values = (
            fit_end(model, data, directory=tmp_path / f"b{number}", **options).score(queries).values
        )
        np.testing.assert_allclose(values, reference, rtol=1e-5, atol=1e-9)
    shuffled = influence.examples_from_rows(rows(10)[::-1])
    values = fit_end(model, shuffled, directory=tmp_path / "c").score(queries).values
    np.testing.assert_allclose(values[:, ::-1], reference, rtol=1e-5, atol=1e-9)


def test_float32_agrees_with_float64(tmp_path, run, model):
    single = build_model("gpt2", layers=1, target_modules=["attn.c_attn", "mlp.c_proj"])
    single.model.float()
    queries = examples(4, seed=2)
    values = fit_end(single, examples(12), directory=tmp_path / "run").score(queries).values
    expected = run.score(queries).values
    assert np.abs(values - expected).max() < 1e-4 * np.abs(expected).max()


def test_scoring_with_stored_gradients_runs_no_training_row(run, monkeypatch):
    seen = []
    original = influence.batches.collate
    monkeypatch.setattr(
        "influence.gradients.collate",
        lambda tokens, rows, **k: seen.append(len(rows)) or original(tokens, rows, **k),
    )
    run.score(examples(3, seed=9))
    assert sum(seen) == 3  # the queries, nothing else


def test_queries_in_chunks_give_the_same_scores(run, monkeypatch, tmp_path):
    queries = examples(5, seed=2)
    reference = run.score(queries).values
    monkeypatch.setattr("influence.scores.queries_at_once", lambda *_: 2)
    np.testing.assert_array_equal(
        run.score(queries, out=tmp_path / "s.h5").values, run.score(queries).values
    )
    np.testing.assert_allclose(run.score(queries).values, reference, rtol=1e-6, atol=1e-12)


def test_margin_has_the_opposite_sign_of_loss_on_the_whole(run):
    queries = examples(6, seed=2)
    loss, margin = run.score(queries).values, run.score(queries, measurement="margin").values
    assert np.corrcoef(loss.ravel(), margin.ravel())[0, 1] < -0.8


def test_top_ranks_and_names(run):
    scores = run.score(examples(3, seed=2))
    proponents, opponents = scores.top(scores.query_ids[1], k=4)
    row = scores.values[1]
    assert [e.index for e in proponents] == list(np.argsort(-row)[: len(proponents)])
    assert [e.index for e in opponents] == list(np.argsort(row)[: len(opponents)])
    assert all(e.score > 0 for e in proponents)
    assert all(e.score < 0 for e in opponents)
    assert proponents[0].id == run.train.ids[proponents[0].index]
    with pytest.raises(InputError, match=r"query 'nobody' was given; there are 3 scored queries"):
        scores.top("nobody")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"solver": "lu"}, "solver 'lu' was given; expected one of direct, cg, pcg"),
        (
            {"measurement": "bleu"},
            "measurement 'bleu' was given; expected one of loss, sum, margin, token:K",
        ),
        ({"curvature": "fisher"}, "curvature 'fisher' was asked of a run fitted with 'ekfac'"),
        ({"damping": "mean:0"}, "lambda must be positive"),
    ],
)
def test_wrong_options_say_what_is_expected(run, options, sentence):
    with pytest.raises(InputError, match=sentence):
        run.score(examples(2, seed=2), **options)


def test_no_queries_is_an_error(run):
    with pytest.raises(InputError, match="no queries were given"):
        run.score(examples(2)[:0])


def test_training_mode_does_not_leak_into_exact_curvatures_or_losses(tmp_path):
    """A live model left in training mode: dropout must be off in every product and loss."""
    lively = build_model("gpt2", layers=1, target_modules=["attn.c_attn", "mlp.c_proj"])
    fitted = fit_end(lively, examples(4), curvature=influence.GGN(), directory=tmp_path / "run")
    v = torch.ones(1, lively.space.size, dtype=torch.float64)
    before = (
        [fitted.curvature(name).matvec(v) for name in ("ggn", "hessian")],
        mean_losses(lively, fitted.tokens),
    )
    lively.model.train()
    after = (
        [fitted.curvature(name).matvec(v) for name in ("ggn", "hessian")],
        mean_losses(lively, fitted.tokens),
    )
    assert all(torch.equal(one, two) for one, two in zip(before[0], after[0], strict=True))
    assert np.array_equal(before[1], after[1])
    assert lively.model.training


def test_impossible_options_are_refused_before_the_pass(tmp_path, model):
    for wrong in (
        lambda: influence.EKFAC(samples=0),
        lambda: influence.EKFAC(rank=0),
        lambda: influence.Fisher(samples=-1),
    ):
        with pytest.raises(InputError, match="must be at least"):
            wrong()
    with pytest.raises(InputError, match="no training rows were given"):
        fit_end(model, examples(2)[:0], directory=tmp_path / "run")


def test_proponents_of_a_margin_are_the_rows_that_raise_it(run):
    """A margin falls when the model gets worse, so its proponents are the most negative scores."""
    queries = examples(3, seed=9)
    loss, margin = run.score(queries), run.score(queries, measurement="margin")
    for scores, sign in ((loss, 1), (margin, -1)):
        proponents, opponents = scores.top(0, 3)
        order = np.argsort(-sign * scores.values[0], kind="stable")
        assert [entry.index for entry in proponents] == order[:3].tolist()
        assert [entry.index for entry in opponents] == [
            i for i in order[::-1][:3] if sign * scores.values[0, i] < 0
        ]
        assert all(sign * entry.score > 0 for entry in proponents)
