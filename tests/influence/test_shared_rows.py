"""Losses and gradients of rows that are shared out: those of one process."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from influence import distributed
from influence.cost import Cost
from influence.errors import NumericalError
from influence.gradients import loss_sum_gradient
from influence.loss import mean_losses
from influence.shared_rows import by_row, dealt, shared_gradient, shared_losses
from tests.conftest import build_model, examples, tokens_of
from tests.helpers import statuses


@pytest.fixture(scope="module")
def model():
    return build_model("gpt2", layers=1, target_modules=["attn.c_attn"])


@pytest.mark.parametrize(("rows", "processes"), [(7, 2), (2, 3), (5, 1)])
def test_losses_and_gradients_are_those_of_one_process(model, tmp_path, rows, processes):
    tokens = tokens_of(model, examples(rows))
    weights = np.random.default_rng(0).normal(size=rows)
    losses = mean_losses(model, tokens, token_budget=20)
    gradient, same_losses = loss_sum_gradient(model, tokens, weights, token_budget=20)

    def work(rank: int) -> None:
        cost = Cost()
        found = shared_losses(model, tokens, token_budget=20)
        moved, seen = shared_gradient(model, tokens, weights, token_budget=20, cost=cost)
        assert np.abs(found - losses).max() < 1e-12
        assert np.abs(seen - same_losses).max() < 1e-12
        assert float((moved - gradient).abs().max()) < 1e-12 * float(gradient.abs().max())
        assert cost.gradients == rows
        with distributed.alone():  # which the others know nothing of
            if rank == 0:
                assert np.abs(shared_losses(model, tokens) - losses).max() < 1e-12

    assert statuses(work, tmp_path, processes) == [0] * processes


def test_each_answer_is_made_once(tmp_path):
    def work(rank: int) -> None:
        made = []

        def answers(places: np.ndarray) -> list[str]:
            made.extend(places.tolist())
            return [f"{place}" for place in places]

        assert dealt(5, answers) == ["0", "1", "2", "3", "4"]
        assert made == [[0, 3], [1, 4], [2]][rank]
        doubled = by_row(5, lambda places: np.stack([places, 2 * places]))
        np.testing.assert_array_equal(doubled, [range(5), range(0, 10, 2)])

    assert statuses(work, tmp_path, 3) == [0] * 3


def test_what_one_process_finds_wrong_all_raise(tmp_path):
    def failing(places: np.ndarray) -> np.ndarray:
        if 1 in places:
            raise NumericalError("row 1 is NaN")
        return places

    def work(rank: int) -> None:
        with pytest.raises(NumericalError, match="row 1 is NaN"):
            by_row(4, failing)
        assert torch.distributed.get_rank() == rank  # and all are there still
        distributed.wait()

    assert statuses(work, tmp_path, 2) == [0, 0]
    with pytest.raises(NumericalError, match="row 1 is NaN"):
        by_row(4, failing)
