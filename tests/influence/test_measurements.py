"""Every measurement against its formula, and what is none."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import influence
from influence import Contrast, Custom
from influence.errors import DataError, InputError
from influence.gradients import stream_gradients
from influence.loss import Supervised
from influence.measurements import MEASUREMENTS, TokenLoss
from tests.conftest import build_model, examples, fit_end, rows, tokens_of
from tests.oracles import (
    close,
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
    measurement = measurement_of(name) if name == "custom" else name
    g, counts = plain_gradients(model, run.train), tokens_of(model, run.train).counts
    scores = run.score(queries, measurement=measurement, curvature="identity")
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
    """Gradient products by hand; and a step as by the removal of a row moves log p(B) - log p(A) as
    predicted.
    """
    queries, against = examples(Q, seed=1), others()
    g, counts = plain_gradients(model, run.train), tokens_of(model, run.train).counts
    q = plain_gradients(model, queries, plain_loss) - plain_gradients(model, against, plain_loss)
    contrast = run.score(queries, measurement=Contrast(against), curvature="identity")
    close(contrast.values, (q @ g.T).numpy() / (N * counts))
    scores = run.score(queries, measurement=Contrast(against), credit="additive").values
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


ASKED = [{"role": "user", "content": "fox"}, {"role": "assistant", "content": "runs"}]
OTHER = [ASKED[0], {"role": "assistant", "content": "sleeps"}]
LONGER = [*ASKED, {"role": "user", "content": "sun"}, OTHER[1]]


@pytest.mark.parametrize(
    ("query", "same", "another"),
    [
        ({"messages": ASKED}, {"messages": OTHER}, {"messages": LONGER}),
        ({"messages": ASKED}, {"messages": OTHER}, {"messages": OTHER, "tools": [{"n": 1}]}),
        ({"messages": ASKED}, {"messages": OTHER}, {"prompt": "fox", "completion": "sleeps"}),
        (
            {"prompt": LONGER[:1], "completion": LONGER[1:]},
            {"prompt": ASKED[:1], "completion": OTHER[1:]},
            {"messages": LONGER},
        ),
        (
            {"input_ids": [4, 5, 6], "labels": [-100, -100, 6]},
            {"input_ids": [4, 5, 7], "labels": [-100, -100, 7]},
            {"input_ids": [4, 8, 6], "labels": [-100, -100, 6]},
        ),
        ({"text": "fox runs"}, {"text": "dog runs"}, {"prompt": "fox", "completion": " runs"}),
    ],
)
def test_contrasts_pair_up_by_what_precedes_the_answer(query, same, another):
    query, same, another = (influence.examples_from_rows([row]) for row in (query, same, another))
    Contrast(same).check(query)
    with pytest.raises(
        InputError, match=r"has another (prompt|conversation before its answer) than"
    ):
        Contrast(another).check(query)


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
