"""What scores are made with: the average over points, at one point, with other damping."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import influence
from influence.calibration import calibrate_once
from influence.errors import InputError
from influence.run import Run
from influence.setting import CREDITS, Setting
from tests.conftest import build_model, examples, fit_end, teach, tokens_of
from tests.oracles import averaged, b_times, close, kappa, plain_gradients, plain_mean, singles

pytestmark = pytest.mark.usefixtures("credit_when_asked_for")

N, PATH = 9, (0.4, 0.8)


SITES = {"layers": 1, "target_modules": ["attn.c_attn"]}


@pytest.fixture(scope="module")
def model():
    return build_model("gpt2", **SITES)


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    return influence.fit(
        model, examples(N), path=PATH, directory=tmp_path_factory.mktemp("path") / "run"
    )


@pytest.mark.parametrize(
    ("curvature", "reduction"),
    [
        ("ekfac", "token"),
        ("ekfac", "example"),
        ("kfac", "token"),
        ("fisher", "example"),
        ("identity", "token"),
    ],
)
def test_scores_of_several_points_are_the_documented_average(
    model, tmp_path, double, curvature, reduction
):
    spec = {"ekfac": influence.EKFAC, "kfac": influence.KFAC, "fisher": influence.Fisher}
    options = {"curvature": spec.get(curvature, influence.Identity)(), "reduction": reduction}
    data, queries = examples(N), examples(4, seed=1)
    fitted = influence.fit(model, data, path=PATH, directory=tmp_path / "run", **options)
    pairs = singles(model, data, queries, tmp_path, PATH, **options)
    scores, self_influence = averaged(pairs, [0.5, 0.5])
    at = {"at": "all", "credit": "additive"}
    found = fitted.score(queries, **at).values, fitted.self_influence(**at).values
    factor = kappa(fitted)
    assert (factor == 1) == (curvature == "identity")
    assert abs(pairs[0][1].mean() / pairs[1][1].mean() - 1) > 0.01  # the weights are not equal
    close(found[0], factor * scores)
    close(found[1], factor * self_influence)
    for label, (score, self_) in zip(("0.4", "0.8"), pairs, strict=True):
        close(fitted.score(queries, at=label, credit="additive").values, score)
        close(fitted.self_influence(at=label, credit="additive").values, self_)


def test_another_damping_and_another_curvature_of_several_points(model, run, tmp_path, double):
    queries = examples(3, seed=1)
    for number, of in enumerate(
        ({"damping": "mean:0.5"}, {"curvature": "kfac"}, {"damping": "top:0.3"})
    ):
        of = of | {"credit": "additive"}
        pairs = singles(model, run.train, queries, tmp_path / str(number), PATH, of=of)
        scores, self_influence = averaged(pairs, [0.5, 0.5])
        close(
            run.score(queries, **of).values, scores
        )  # the calibration is of the default setting only
        close(run.self_influence(**of).values, self_influence)


def test_identity_looks_at_the_end_unless_told_otherwise(model, run, double):
    """Plain gradient products, by autograd with the weights set in place."""
    queries = examples(3, seed=1)
    counts = tokens_of(model, run.train).counts

    def products(c):
        with b_times(model, c):
            g, q = plain_gradients(model, run.train), plain_gradients(model, queries, plain_mean)
        w = 1 / counts.sum()
        return (w * q @ g.T).numpy(), (w * (g * g).sum(1)).numpy() / counts

    scores, self_influence = products(1.0)
    for at in (None, "end"):
        close(run.score(queries, curvature="identity", at=at).values, scores)
        close(run.self_influence(curvature="identity", at=at).values, self_influence)
    scores, self_influence = averaged([products(c) for c in PATH], [0.5, 0.5])
    close(run.score(queries, curvature="identity", at="all").values, scores)
    close(run.self_influence(curvature="identity", at="all").values, self_influence)


def test_a_run_fitted_with_identity_also_looks_at_the_end(model, run, tmp_path, double):
    """`identity` means the same whether the run was fitted with it or holds it besides another."""
    queries = examples(3, seed=1)
    fitted = influence.fit(
        model, run.train, path=PATH, curvature=influence.Identity(), directory=tmp_path / "run"
    )
    expected = run.score(queries, curvature="identity").values
    close(fitted.score(queries, curvature="identity").values, expected)
    close(fitted.score(queries).values, expected)


def test_the_end_needs_factors_there(run, model, tmp_path, double):
    queries = examples(2, seed=1)
    with pytest.raises(
        InputError, match=r"--at end was given, and this run has factors at 0.4, 0.8 only"
    ):
        run.score(queries, at="end")
    with pytest.raises(
        InputError, match=r"expected all, end, or one of the run's points: 0.4, 0.8"
    ):
        run.score(queries, at="0.5")
    whole = influence.fit(model, run.train, path=(0.4, 1.0), directory=tmp_path / "whole")
    expected = fit_end(model, run.train, directory=tmp_path / "end").score(queries).values
    for at in ("end", "1"):
        close(whole.score(queries, at=at).values, expected)


def test_other_queries_of_a_request_change_no_score(run, monkeypatch):
    queries, additive = examples(7, seed=1), {"credit": "additive"}
    together = run.score(queries, **additive).values
    for chunk in (1, 3, 100):
        monkeypatch.setattr("influence.scores.queries_at_once", lambda *_, chunk=chunk: chunk)
        for number in range(7):
            one = run.score(queries[number : number + 1], **additive).values[0]
            close(one, together[number], 2e-7)
        close(run.score(queries[2:5], **additive).values, together[2:5], 2e-7)
    for k in (1, 7):
        factors = run.score(queries[:k], **additive).attributes["factors"]
        assert tuple(factors) == tuple(Setting.of(run).factors)


def test_the_scale_is_of_some_training_rows(run, monkeypatch, double, model, tmp_path):
    """Of at most SCALE_ROWS rows, evenly spaced: here 3 of 9."""
    calibrate_once(run)
    assert kappa(run) != 1
    queries = examples(3, seed=1)
    pairs = singles(model, run.train, queries, tmp_path, PATH)
    Z = [self_influence[[0, 4, 8]].mean() for _, self_influence in pairs]
    expected = sum(0.5 * np.mean(Z) / z * score for z, (score, _) in zip(Z, pairs, strict=True))
    monkeypatch.setattr("influence.at_point.SCALE_ROWS", 3)
    opened = Run.open(run.directory, model=model, train=run.train)
    without = {  # as in runs made before the scales were kept
        name: replace(record, scales=()) for name, record in run.manifest.calibration.items()
    }
    opened.manifest = replace(opened.manifest, calibration=without)
    close(opened.score(queries, credit="additive").values, kappa(run) * expected)


@pytest.mark.parametrize("credit", CREDITS)
def test_a_finished_run_that_takes_another_damping_scores_as_a_new_one(tmp_path, credit):
    """The damping is no part of the factors; what a fit returns must not depend on what lay there
    before.
    """
    data, queries = examples(6), examples(3, seed=1)
    model = teach(build_model("gpt2", **SITES), data)
    influence.fit(model, data, path=PATH, directory=tmp_path / "one")
    again = influence.fit(model, data, path=PATH, damping="mean:0.5", directory=tmp_path / "one")
    new = influence.fit(model, data, path=PATH, damping="mean:0.5", directory=tmp_path / "two")
    close(
        again.score(queries, credit=credit).values, new.score(queries, credit=credit).values, 1e-6
    )
