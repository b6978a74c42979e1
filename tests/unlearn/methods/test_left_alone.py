"""What a training leaves as it was: weights, flags, gradients, modes, draws."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

from influence.errors import NumericalError
from tests.helpers import untouched
from tests.unlearn.methods.helpers import (
    assert_same,
    broken_term,
    everything,
    opened,
    some_slow,
    train,
)
from unlearn.methods.batches import TermBatches
from unlearn.methods.methods import METHODS, method_of


@pytest.mark.parametrize(
    "name", some_slow(list(METHODS), ["ga-kl", "ngdiff", "idk-dpo", "control"])
)
def test_the_model_is_as_before_after_a_training(disturbed, name):
    before = everything(disturbed.model)
    edit = train(disturbed, name, until="steps=2", lr=0.01)
    assert edit.delta.any()
    assert_same(before, everything(disturbed.model))


@pytest.mark.parametrize("error", [NumericalError, KeyboardInterrupt, ZeroDivisionError])
def test_the_model_is_as_before_after_an_exception_in_a_term(disturbed, error, tmp_path):
    before = everything(disturbed.model)
    with untouched(disturbed.directory), pytest.raises(error):
        train(disturbed, broken_term(error), until="steps=9", checkpoint=tmp_path / "state")
    assert_same(before, everything(disturbed.model))
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("error", [NumericalError, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["step", "combine", "look ahead", "reference", "finish", "save"])
def test_the_model_is_as_before_after_an_exception_anywhere(
    disturbed, monkeypatch, tmp_path, error, place
):
    def fail(*_a, **_k):
        raise error("on purpose")

    before, method = everything(disturbed.model), method_of("ngdiff")
    options = {"until": "steps=3", "checkpoint": tmp_path / "state", "save_every": 1}
    if place == "step":
        monkeypatch.setattr(torch.optim.SGD, "step", fail)
    elif place == "combine":
        method = replace(method, combine=fail)
    elif place == "look ahead":
        error = (
            ZeroDivisionError if error is NumericalError else error
        )  # a loss that is no number is taken as a bad rate
        monkeypatch.setattr(TermBatches, "mean_loss", fail)
    elif place == "reference":
        method = method_of("npo")
        monkeypatch.setattr(TermBatches, "_reference_losses", fail)
    elif place == "finish":
        method = replace(
            method, finish=lambda trained: (trained.forget_loss(trained.after), fail())[1]
        )
    else:
        monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(error, match="on purpose"):
        train(disturbed, method, **options)
    assert_same(before, everything(disturbed.model), but=("gradients",))


def test_no_gradient_is_left_behind_by_an_interrupt(disturbed, monkeypatch):
    def fail(*_a, **_k):
        raise KeyboardInterrupt

    before = everything(disturbed.model)
    monkeypatch.setattr(torch.optim.Adam, "step", fail)
    with pytest.raises(KeyboardInterrupt):
        train(disturbed)
    assert_same(before, everything(disturbed.model))


def test_a_gradient_of_the_users_own_is_left_alone(disturbed):
    first = disturbed.model.parameters[0]
    first.grad = torch.ones_like(first)
    before = everything(disturbed.model)
    train(disturbed)
    assert_same(before, everything(disturbed.model))


def test_nan_is_named_with_its_step(run):
    with pytest.raises(
        NumericalError,
        match=r"the term broken or its gradient is NaN or infinite in step 3: lower the rate",
    ):
        train(run, broken_term(NumericalError), until="steps=9")


def test_a_rate_that_is_far_too_high_ends_in_a_sentence(run):
    with pytest.raises(NumericalError):
        train(run, "ga", until="steps=3", lr=1e300, optimizer="SGD")


def test_dropout_is_off(fitted, tmp_path):
    """The adapter has a dropout of a quarter. Two seeds of torch give one training, bit for bit."""
    run = opened(fitted, tmp_path, "float32")
    assert run.model.sites[0].layer.lora_dropout["default"].p == 0.25
    torch.manual_seed(0)
    first = train(run, "ga-kl").delta
    torch.manual_seed(1)
    run.model.model.train()
    try:
        assert torch.equal(train(run, "ga-kl").delta, first)
    finally:
        run.model.model.eval()
