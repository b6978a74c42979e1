"""Scores by token and by module: every position by hand, and sums that are the scores."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import influence
from influence import Contrast
from influence.at_point import AtPoint
from influence.curvature import dense
from influence.errors import InputError, MismatchError
from influence.scorefile import Scores, ScoresInTheMaking
from influence.tokenwise import Tokenwise
from tests.conftest import build_model, examples, fit_end, rows, tokens_of
from tests.influence.toy_runs import Interruption
from tests.oracles import (
    close,
    differentiable,
    plain_gradients,
    plain_log_probs,
    plain_loss,
    plain_mean,
)

pytestmark = pytest.mark.usefixtures("credit_when_asked_for")

N, Q = 7, 3


def build(kind: str = "gpt2"):
    """A model whose LM head is adapted too."""
    inner = "attn.c_attn" if kind == "gpt2" else "q_proj"
    return build_model(kind, layers=1, target_modules=[inner, "lm_head"])


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    return influence.fit(
        model, examples(N), path=(0.4, 0.8), directory=tmp_path_factory.mktemp("tokens") / "run"
    )


def preconditioned(point, operator, gradients) -> torch.Tensor:
    """`T^T (C + lambda)^-1 T g` for rows `[Q, P]`, with every matrix dense."""
    T = point.geometry.features(torch.eye(gradients.shape[1], dtype=gradients.dtype)).T
    C = dense(operator.curvature) + torch.diag(operator.diagonal(gradients[0]))
    return (T.T @ torch.linalg.solve(C, T @ gradients.T)).T


def position_products(model, item, X) -> np.ndarray:
    """`<X_q, g_t x_t^T>` `[Q, T]` of one row by position, by hooks on lora_A and lora_B and plain
    autograd.
    """
    seen, handles = [], []
    for site in model.sites:
        for leaf in (site.A, site.B):
            handles.append(
                leaf.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
            )
    with differentiable(model):
        loss = plain_loss(*plain_log_probs(model, item))
        outer = torch.autograd.grad(loss, [out for _, out in seen])
    for handle in handles:
        handle.remove()
    products = np.zeros((len(X), len(item.input_ids)))
    for leaf, (x, _), g in zip(model.space.leaves, seen, outer, strict=True):
        directions = X[:, leaf.slice].reshape(len(X), *leaf.shape)
        for t in range(x.shape[1]):
            gradient = torch.outer(g[0, t], x[0, t].detach())
            products[:, t] += (directions * gradient).sum((1, 2)).numpy()
    return products


def by_hand(run, queries, factors, measure=plain_mean) -> list[np.ndarray]:
    """Scores `[Q, T]` of every training row by position."""
    scores = [np.zeros((len(queries), int(length))) for length in run.tokens.lengths]
    for point, factor in zip(run.points, np.atleast_1d(factors), strict=True):
        with run.model.at(point.place.theta):
            X = preconditioned(
                point, point.operator(), plain_gradients(run.model, queries, measure)
            )
            for row, item in enumerate(run.tokens):
                scores[row] += factor * run.weights[row] * position_products(run.model, item, X)
    return scores


def check_by_hand(run, queries, scores, tolerance=1e-9, **options):
    expected = by_hand(run, queries, scores.attributes["factors"], **options)
    largest = max(np.abs(part).max() for part in expected)
    for row, part in enumerate(expected):
        for query in range(len(queries)):
            ids, values = scores.tokens.row(query, row)
            assert list(ids) == [int(i) for i in run.tokens[row].input_ids]
            assert np.abs(values - part[query]).max() <= tolerance * largest, (row, query)


def sums(scores) -> np.ndarray:
    tokens = scores.tokens
    parts = [
        tokens.values[:, a:b].sum(1)
        for a, b in zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True)
    ]
    return np.stack(parts, 1)


# ---- tokens --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [(1.0,), (0.4, 0.8)])
@pytest.mark.parametrize("geometry", ["raw", "function", "adam"])
def test_every_position_is_the_product_by_hand(model, tmp_path, double, geometry, path):
    data, queries = examples(N), examples(Q, seed=1)
    fitted = influence.fit(
        model, data, geometry=geometry, path=path, reduction="example", directory=tmp_path / "run"
    )
    scores = fitted.score(queries, per_token=True, credit="additive")
    check_by_hand(fitted, queries, scores)
    close(sums(scores), scores.values, 1e-10)
    close(scores.values, fitted.score(queries, credit="additive").values, 1e-12)
    last = scores.tokens.offsets[1:] - 1
    assert not scores.tokens.values[:, last].any()  # the last token is never read


@pytest.mark.parametrize("kind", ["llama", "phi", "gemma"])
def test_other_architectures(tmp_path, double, kind):
    model, queries = build(kind), examples(2, seed=1)
    fitted = fit_end(model, examples(5), directory=tmp_path / "run", store="never")
    scores = fitted.score(queries, per_token=True, credit="additive")
    check_by_hand(fitted, queries, scores)
    close(sums(scores), scores.values, 1e-10)


@pytest.mark.parametrize("order", [1, -1])
def test_rows_supervised_throughout_beside_rows_with_prompts(model, tmp_path, double, order):
    """The adapted LM head sees supervised positions only; in such a batch they can be as many as
    there are positions.
    """
    texts = [
        {"id": f"t{i}", "text": "the red fox runs over a lazy dog and old cats"} for i in range(2)
    ]
    prompts = [
        {"id": f"p{i}", "prompt": "birds sing loud", "completion": " songs at dawn"}
        for i in range(2)
    ]
    data = influence.examples_from_rows((texts + prompts)[::order])
    queries = examples(2, seed=1)
    fitted = fit_end(model, data, directory=tmp_path / "run", token_budget=1000)
    scores = fitted.score(queries, per_token=True, credit="additive")
    close(sums(scores), scores.values, 1e-10)
    check_by_hand(fitted, queries, scores)


def test_measurements_and_other_settings_split_too(run, double):
    queries = examples(Q, seed=1)
    other = influence.examples_from_rows(
        [row | {"completion": " sleep"} for row in rows(Q, seed=1)]
    )
    for options in (
        {"measurement": "margin"},
        {"measurement": Contrast(other)},
        {"at": "0.8", "damping": "top:0.1"},
        {"curvature": "identity"},
        {"solver": "cg"},
    ):
        scores = run.score(queries, per_token=True, per_module=True, **options, credit="additive")
        close(sums(scores), scores.values, 1e-10)
        close(scores.modules.sum(1), scores.values, 1e-10)


def test_chunks_of_queries_and_batches_change_nothing(model, run, tmp_path, monkeypatch, double):
    queries = examples(5, seed=1)
    expected = run.score(queries, per_token=True, per_module=True)
    monkeypatch.setattr("influence.scores.queries_at_once", lambda *_: 2)
    small = influence.fit(
        model, run.train, path=(0.4, 0.8), directory=tmp_path / "run", token_budget=1, store="never"
    )
    for other in (run, small):
        scores = other.score(queries, per_token=True, per_module=True)
        close(scores.tokens.values, expected.tokens.values, 1e-9)
        close(scores.modules, expected.modules, 1e-9)
        close(sums(scores), scores.values, 1e-10)


def test_a_file_holds_tokens_and_modules(run, tmp_path, monkeypatch):
    queries = examples(Q, seed=1)
    out = tmp_path / "s.h5"
    made = run.score(queries, out=out, per_token=True, per_module=True)
    for read in (Scores.load(out), run.score(queries, out=out, per_token=True, per_module=True)):
        for name in ("values", "offsets", "token_ids"):
            one, two = getattr(read.tokens, name), getattr(made.tokens, name)
            assert one.dtype == two.dtype
            assert np.array_equal(one, two)
        assert np.array_equal(read.modules, made.modules)
        assert read.module_names == made.module_names
    close(sums(made), made.values, 1e-5)
    with pytest.raises(MismatchError, match="detail"):
        run.score(queries, out=out)
    assert run.score(queries, out=out, overwrite=True).tokens is None
    assert Scores.load(out).tokens is None
    assert Scores.load(out).modules is None


@pytest.mark.parametrize("where", ["blocks", "tokens", "seal"])
@pytest.mark.parametrize("store", ["always", "never"])
def test_a_scoring_that_was_killed_counts_nothing_twice(model, tmp_path, monkeypatch, where, store):
    fitted = influence.fit(
        model,
        examples(N),
        path=(0.4, 0.8),
        directory=tmp_path / "run",
        store=store,
        token_budget=20,
    )
    queries, out = examples(5, seed=1), tmp_path / "s.h5"
    monkeypatch.setattr("influence.scores.queries_at_once", lambda *_: 2)
    monkeypatch.setattr("influence.at_point.BLOCK_BYTES", 1)
    monkeypatch.setattr("influence.at_point.BLOCK_ROWS", 2)
    expected = fitted.score(queries, per_token=True, per_module=True)
    owner, name = {
        "blocks": (AtPoint, "gradient_blocks"),
        "tokens": (Tokenwise, "add"),
        "seal": (ScoresInTheMaking, "seal"),
    }[where]
    real = getattr(owner, name)
    for allowed in (2, 0, 3):
        left = allowed

        def few(self, *arguments, **options):
            nonlocal left
            if where == "blocks":
                return stream(real(self, *arguments, **options))
            left -= 1
            if left < 0 or where == "seal":
                raise Interruption
            return real(self, *arguments, **options)

        def stream(items):
            nonlocal left
            for item in items:
                left -= 1
                if left < 0:
                    raise Interruption
                yield item

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, few)
            with pytest.raises(Interruption):
                fitted.score(queries, out=out, per_token=True, per_module=True)
    resumed = fitted.score(queries, out=out, per_token=True, per_module=True)
    for scores in (resumed, Scores.load(out)):
        assert np.array_equal(scores.values, expected.values)
        assert np.array_equal(scores.modules, expected.modules)
        assert np.array_equal(scores.tokens.values, expected.tokens.values)
    assert not list(tmp_path.glob("*.part*"))


@pytest.mark.parametrize(("query", "row"), [(-1, 0), (Q, 0), (0, N), (0, -1)])
def test_rows_that_are_not_there(run, query, row):
    tokens = Tokenwise.empty(run, Q)
    with pytest.raises(InputError, match=f"there are {Q} queries and {N} rows"):
        tokens.row(query, row)


# ---- modules -------------------------------------------------------------------------------------


@pytest.mark.parametrize("geometry", ["raw", "function"])
def test_a_modules_share_is_the_product_over_its_parameters(model, tmp_path, double, geometry):
    data, queries = examples(N), examples(Q, seed=1)
    fitted = influence.fit(
        model, data, path=(0.4, 0.8), geometry=geometry, directory=tmp_path / "run"
    )
    scores = fitted.score(queries, per_module=True, credit="additive")
    close(scores.modules.sum(1), scores.values, 1e-10)
    assert scores.module_names == ["transformer.h.0.attn.c_attn", "lm_head"]
    w = 1 / tokens_of(model, data).counts.sum()
    expected = np.zeros(scores.modules.shape)
    for point, factor in zip(fitted.points, scores.attributes["factors"], strict=True):
        with model.at(point.place.theta):
            X = preconditioned(point, point.operator(), plain_gradients(model, queries, plain_mean))
            g = plain_gradients(model, data)
        names = [name for name, p in model.model.named_parameters() if "lora_" in name]
        sizes = [p.numel() for name, p in model.model.named_parameters() if "lora_" in name]
        start = 0
        for name, size in zip(names, sizes, strict=True):
            module = next(
                i for i, module_name in enumerate(scores.module_names) if f".{module_name}." in name
            )
            part = slice(start, start + size)
            expected[:, module] += factor * w * (X[:, part] @ g[:, part].T).numpy()
            start += size
    close(scores.modules, expected)
