"""The benchmark's rivals and questions, each against a hand-computed case or a plain loop."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import build_model, examples, tokens_of

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import rivals  # pyright: ignore[reportMissingImports]
import tasks  # pyright: ignore[reportMissingImports]


def plain_gradient(model, item, mean: bool) -> list[torch.Tensor]:
    """One row's gradient, leaf by leaf, by autograd through the model's own forward."""
    ids = torch.as_tensor(np.array(item.input_ids))
    for parameter in model.parameters:
        parameter.requires_grad_(True)
    logits = model.model(input_ids=ids[None]).logits[0, :-1]
    losses = -logits.log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]]
    part = losses[-supervised(item) :]
    found = torch.autograd.grad(part.mean() if mean else part.sum(), model.parameters)
    for parameter in model.parameters:
        parameter.requires_grad_(False)
    return list(found)


def supervised(item) -> int:
    return int(item.supervised.sum())


def test_datainf_is_the_loop_of_its_formula():
    """Row by row, matrix by matrix, from one-row gradients of mean losses."""
    model = build_model("llama", layers=1, target_modules=["q_proj", "v_proj"])
    train, queries = tokens_of(model, examples(5)), tokens_of(model, examples(3, seed=1))
    found = rivals.datainf(
        rivals.loss_gradients(model, queries), rivals.loss_gradients(model, train), model.space
    )
    g = [plain_gradient(model, item, mean=True) for item in train]
    expected = np.zeros((3, 5))
    for q, item in enumerate(queries):
        for leaf, v in enumerate(plain_gradient(model, item, mean=True)):
            lam = sum(float((row[leaf] ** 2).mean()) for row in g) / 5 / 10
            hvp = torch.zeros_like(v)
            for row in g:
                hvp += (v - (v * row[leaf]).sum() / (lam + (row[leaf] ** 2).sum()) * row[leaf]) / (
                    5 * lam
                )
            expected[q] += [float((hvp * row[leaf]).sum()) for row in g]
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_gradients_are_those_of_the_mean_or_the_sum():
    model = build_model("llama", layers=1, target_modules=["q_proj"])
    tokens = tokens_of(model, examples(3))
    for mean in (True, False):
        expected = torch.stack(
            [torch.cat([p.flatten() for p in plain_gradient(model, t, mean)]) for t in tokens]
        )
        torch.testing.assert_close(rivals.loss_gradients(model, tokens, mean=mean), expected)
    assert rivals.gradient_dot(expected, expected)[0, 1] == pytest.approx(
        float(expected[0] @ expected[1])
    )
    angle = expected[0] @ expected[1] / expected[0].norm() / expected[1].norm()
    assert rivals.gradient_cosine(expected, expected)[0, 1] == pytest.approx(float(angle))


def test_repsim_is_the_cosine_of_hidden_states_row_by_row():
    """One row at a time, without padding, from the decoder's own output (the final norm
    included).
    """
    model = build_model("llama", layers=2)
    data = tokens_of(model, examples(6))
    states = []
    with torch.no_grad():
        for item in data:
            ids = torch.as_tensor(np.array(item.input_ids))
            states.append(
                model.model.get_base_model().model(input_ids=ids[None]).last_hidden_state[0]
            )
    means = [state[-supervised(item) :].mean(0) for state, item in zip(states, data, strict=True)]
    for last, chosen in ((False, means), (True, [state[-1] for state in states])):
        found = rivals.repsim(*[rivals.hidden_states(model, data, last=last)] * 2)
        expected = [[float(torch.cosine_similarity(a, b, dim=0)) for b in chosen] for a in chosen]
        np.testing.assert_allclose(found, np.array(expected), atol=1e-12)


def test_retrieval_counts_the_rows_that_rank_as_high():
    scores = np.array([[0.1, 0.9, 0.5], [0.7, 0.9, 0.2], [0.4, 0.4, 0.4]])
    found = tasks.retrieval(scores, np.array([1, 0, 2]))  # ranks 1, 2 and, all being equal, 3
    assert found["recall@1"].value == pytest.approx(1 / 3)
    assert found["mrr"].value == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)


def test_opposition_is_minus_the_mean_score_on_the_rows_own_questions():
    scores = np.array([[1.0, 2.0, 3.0], [3.0, 5.0, 7.0], [10.0, 20.0, 30.0]])
    found = tasks.opposition(scores, ["a", "b", "a"], ["a", "a", "b"])
    np.testing.assert_allclose(found, [-2, -20, -5])


def test_average_precision_and_roc_area_by_hand():
    """Wanted rows at ranks 1 and 3 of 4: precisions 1 and 2/3.

    Of four pairs (wanted, other) three are in order.
    """
    values, wanted = np.array([4.0, 3.0, 2.0, 1.0]), np.array([True, False, True, False])
    assert tasks.average_precision(values, wanted) == pytest.approx((1 + 2 / 3) / 2)
    assert tasks.roc_area(values, wanted) == pytest.approx(3 / 4)
    tied = np.array([1.0, 1.0, 0.0, 0.0])
    assert tasks.average_precision(tied, wanted) == pytest.approx((1 / 2 + 2 / 4) / 2)
    assert tasks.roc_area(tied, wanted) == pytest.approx((1 / 2 + 1 + 0 + 1 / 2) / 4)
    assert math.isnan(tasks.average_precision(np.ones(4), wanted))
    found = tasks.mislabelled(values, wanted)
    assert found["ap"].low <= found["ap"].value <= found["ap"].high


def test_leave_one_out_correlates_the_column_of_the_row_that_was_left_out():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(6, 4))
    perfect = tasks.leave_one_out(scores, {2: np.exp(scores[:, 2]), 0: np.exp(scores[:, 0])})
    assert perfect["spearman"].value == pytest.approx(1)
    linear = tasks.leave_one_out(scores, {3: -2 * scores[:, 3], 1: -2 * scores[:, 1]})
    assert linear["pearson"].value == pytest.approx(-1)


def test_an_empty_slot_of_no_row_is_the_ordinary_training_and_of_a_row_forgets_it():
    from influence.loss import mean_losses
    from unlearn.retraining.recipe import Recipe
    from unlearn.retraining.retrain import fresh_adapter, train

    base = build_model("llama", layers=1, target_modules=["q_proj", "v_proj"])
    tokens = tokens_of(base, examples(6))
    recipe = Recipe(epochs=15, batch_size=3, lr=2e-2, dropout=False)
    ordinary, same, without = (fresh_adapter(base, 0) for _ in range(3))
    train(ordinary, tokens, recipe)
    tasks.train_with_empty_slots(same, tokens, recipe, ())
    torch.testing.assert_close(same.snapshot(), ordinary.snapshot(), rtol=1e-6, atol=1e-9)
    tasks.train_with_empty_slots(without, tokens, recipe, (4,))
    assert mean_losses(without, tokens)[4] > mean_losses(same, tokens)[4]
