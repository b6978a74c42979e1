"""Losses on merged and rounded weights, against PEFT's own merge."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from influence.cost import Cost
from influence.loss import mean_losses
from tests.conftest import build_model, examples, tokens_of
from unlearn.record.shipped import as_shipped

CASES = [("gpt2", ["attn.c_attn", "mlp.c_proj"]), ("llama", ["q_proj", "down_proj"])]


@pytest.fixture(params=CASES, ids=[case[0] for case in CASES])
def shipped_case(request):
    """A model with weights that rounding changes, two adapters, edited and retained rows."""
    name, targets = request.param
    model = build_model(name, layers=1, target_modules=targets)
    before = model.snapshot()
    noise = torch.randn(before.shape, generator=torch.Generator().manual_seed(0)).to(before)
    rows = tokens_of(model, examples(7))
    return model, before, before + 0.3 * noise, rows.select([0, 1, 2]), rows.select([3, 4, 5, 6])


def rounded_by_peft(model, theta):
    """PEFT's merged base, with the merged weights rounded to bfloat16."""
    with model.at(theta):
        whole = copy.deepcopy(model.model)
    names = {site.name for site in model.sites}
    merged = whole.merge_and_unload()
    for name, module in merged.named_modules():
        if name in names:
            module.weight.data = module.weight.data.to(torch.bfloat16).to(module.weight.dtype)
    return merged


def loss_of(merged, item):
    """Mean loss of one row by the model's own loss."""
    ids = torch.as_tensor(np.asarray(item.input_ids))[None]
    labels = torch.where(torch.as_tensor(np.asarray(item.supervised))[None], ids, -100)
    with torch.no_grad():
        return float(merged(input_ids=ids, labels=labels).loss)


def test_losses_are_those_of_peft_s_merge_rounded(shipped_case):
    model, before, after, edited, retained = shipped_case
    cost = Cost()
    found = as_shipped(model, before, after, edited, retained, token_budget=200, cost=cost)
    for rows, pair in ((edited, found.edited), (retained, found.retained)):
        for theta, loss in zip((before, after), pair, strict=True):
            merged = rounded_by_peft(model, theta)
            expected = np.mean([loss_of(merged, item) for item in rows])
            assert loss == pytest.approx(expected, rel=1e-5)
    assert found.edited[0] != found.edited[1]
    assert cost.forwards == 2 * 7


def test_the_model_is_afterwards_what_it_was(shipped_case):
    model, before, after, edited, retained = shipped_case
    state = {name: value.clone() for name, value in model.model.state_dict().items()}
    losses = mean_losses(model, edited)
    as_shipped(model, before, after, edited, retained, token_budget=200, cost=Cost())
    for name, value in model.model.state_dict().items():
        assert torch.equal(value, state[name]), name
    np.testing.assert_array_equal(mean_losses(model, edited), losses)


def test_what_rounding_leaves_of_a_change(shipped_case):
    model, before, after, edited, retained = shipped_case
    rows = {"token_budget": 200, "cost": Cost()}
    large = as_shipped(model, before, before + 30 * (after - before), edited, retained, **rows)
    assert large.kept == pytest.approx(1, abs=0.02)
    none = as_shipped(model, before, before, edited, retained, **rows)
    assert none.kept == 1
    # a change far below half a unit in the last place of nearly every weight
    tiny = as_shipped(model, before, before + 1e-7 * (after - before), edited, retained, **rows)
    assert tiny.kept != pytest.approx(1, abs=1e-3)


def test_rows_that_are_not_there_have_no_loss(shipped_case):
    model, before, after, edited, _ = shipped_case
    nothing = edited.select([])
    found = as_shipped(model, before, after, edited, nothing, token_budget=200, cost=Cost())
    assert found.retained is None
    assert found.edited is not None


def test_a_base_that_cannot_be_replaced_is_not_measured(shipped_case):
    model, before, after, edited, retained = shipped_case
    fused = replace(model.sites[0], parameter="gate_up_proj")
    other = replace(model, sites=(fused, *model.sites[1:]))
    rows = {"token_budget": 200, "cost": Cost()}
    assert as_shipped(other, before, after, edited, retained, **rows) is None
