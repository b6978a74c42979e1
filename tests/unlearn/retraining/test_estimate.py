"""A recipe from the losses that rows have: found again, else the nearest, a known one first."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import influence
import unlearn
from influence.cost import Cost
from influence.errors import InputError, NumericalError
from influence.loss import mean_losses
from tests.conftest import build_model, examples, tokens_of
from unlearn.record.version import version
from unlearn.retraining import estimate
from unlearn.retraining.estimate import (
    BATCH,
    EPOCHS,
    RATES,
    estimated_recipe,
    known_or_estimated,
)
from unlearn.retraining.local import fresh
from unlearn.retraining.recipe import recipe_at


def trained(folder, n=10, **recipe):
    """A version of an adapter that was trained in this way on some rows."""
    model = build_model("llama", layers=1)
    data = examples(n)
    recipe = unlearn.Recipe(**{"batch_size": 8, "schedule": "constant"} | recipe)
    model.restore(fresh(model, tokens_of(model, data), recipe))
    return version(
        influence.fit(
            model, data, curvature=influence.Identity(), directory=folder / "run", store="never"
        )
    )


def loss_at(start, theta):
    with start.model.at(theta):
        return mean_losses(start.model, start.tokens).mean()


def test_the_rate_and_epochs_of_the_training_are_found_again(tmp_path, capsys):
    start = trained(tmp_path, lr=1e-3, epochs=5)
    cost, state = Cost(), torch.get_rng_state()
    capsys.readouterr()
    found = estimated_recipe(start, cost)
    assert found == unlearn.Recipe(lr=1e-3, epochs=5, batch_size=8, schedule="constant")
    assert torch.equal(start.model.snapshot(), start.theta)
    assert torch.equal(torch.get_rng_state(), state)
    # all epochs of the lower rate and five of this one, each looked at, and the adapter once
    assert (cost.gradients, cost.forwards) == ((EPOCHS + 5) * 10, (1 + EPOCHS + 5) * 10)
    said = " ".join(capsys.readouterr().err.split())
    assert "warning: no recipe was given and none is recorded beside the adapter" in said
    assert "estimated lr 0.001, 5 epochs, batches of 8 from the loss of 10 training rows" in said
    loss = loss_at(start, start.theta)
    assert f"({loss:.2f}; reached after these epochs)" in said
    assert "--recipe FILE.json" in said


def test_an_adapter_of_another_seed_and_rate_is_reached_by_the_lowest_that_can(tmp_path):
    start = trained(tmp_path, lr=3e-3, epochs=6, seed=9, schedule="linear", batch_size=4)
    found = estimated_recipe(start, Cost())
    wanted = loss_at(start, start.theta)
    assert found.lr in RATES
    losses = {}
    for rate in RATES[: RATES.index(found.lr) + 1]:
        recipe = unlearn.Recipe(lr=rate, epochs=EPOCHS, batch_size=BATCH, schedule="constant")
        losses[rate] = []
        fresh(
            start.model,
            start.tokens,
            recipe,
            after_epoch=lambda _, rate=rate: losses[rate].append(
                loss_at(start, start.model.snapshot())
            ),
        )
    # with dropout the training's own losses are others; these are without
    reached = [loss <= wanted for loss in losses[found.lr]]
    assert reached.index(True) + 1 == found.epochs
    assert all(min(losses[rate]) > wanted for rate in losses if rate < found.lr)


def test_where_no_rate_reaches_the_losses_the_nearest_is_taken_and_said(tmp_path, capsys):
    start = trained(tmp_path, lr=3e-2, epochs=40)
    cost = Cost()
    capsys.readouterr()
    found = estimated_recipe(start, cost)
    assert found == unlearn.Recipe(
        lr=RATES[-1], epochs=EPOCHS, batch_size=BATCH, schedule="constant"
    )
    trainings = len(RATES) * EPOCHS
    assert (cost.gradients, cost.forwards) == (trainings * 10, (1 + trainings) * 10)
    said = " ".join(capsys.readouterr().err.split())
    lowest = loss_at(start, fresh(start.model, start.tokens, found))
    assert f"estimated lr {RATES[-1]:g}, 12 epochs" in said
    assert f"the lowest was {lowest:.2f}" in said


@pytest.fixture
def scripted(monkeypatch, tmp_path):
    """A version, and trainings that only call what is called after an epoch."""
    start = trained(tmp_path, lr=1e-3, epochs=1)

    def script(wanted, **losses):
        """Losses by rate, epoch by epoch; what is no number is raised there."""
        shown = iter([wanted])
        monkeypatch.setattr(estimate, "mean_losses", lambda *_, **__: np.array([next(shown)]))
        tried = []

        def training(model, tokens, recipe, label, after_epoch):
            nonlocal shown
            tried.append((recipe.lr, len(tokens)))
            for epoch, loss in enumerate(losses[f"r{len(tried)}"], start=1):
                if isinstance(loss, Exception):
                    raise loss
                shown = iter([loss])
                state = estimate.TrainingState(epoch, epoch, recipe.lr, 0.0, loss)
                after_epoch(state)

        monkeypatch.setattr(estimate, "fresh", training)
        return start, tried

    return script


def test_the_nearest_is_the_rate_of_the_lowest_loss_of_any_epoch(scripted, capsys):
    start, tried = scripted(1.0, r1=[4.0, 3.0], r2=[1.5, 2.5], r3=[2.0, 9.0])
    assert estimated_recipe(start, Cost()).lr == RATES[1]
    assert tried == [(rate, 10) for rate in RATES]
    assert "the lowest was 1.50" in capsys.readouterr().err


def test_a_rate_that_diverges_is_passed_over(scripted, capsys):
    """And is no reason to give up: nobody asked for it."""
    diverged = NumericalError("the training loss is nan at step 3 of 9: lower the recipe's lr")
    start, _ = scripted(1.0, r1=[3.0], r2=[2.0, diverged], r3=[diverged])
    assert estimated_recipe(start, Cost()).lr == RATES[1]
    assert "the lowest was 2.00" in capsys.readouterr().err
    start, _ = scripted(1.0, r1=[3.0], r2=[diverged], r3=[2.0, 1.0])
    assert estimated_recipe(start, Cost()).lr == RATES[2]


def test_no_more_rows_are_tried_than_its_limit(scripted, monkeypatch):
    monkeypatch.setattr(estimate, "ROWS", 4)
    start, tried = scripted(1.0, r1=[1.0])
    cost = Cost()
    assert estimated_recipe(start, cost).epochs == 1
    assert tried == [(RATES[0], 4)]
    assert (cost.gradients, cost.forwards) == (4, 8)


def test_a_given_or_recorded_recipe_is_taken_instead(scripted, tmp_path, capsys):
    start, tried = scripted(1.0, r1=[1.0])
    capsys.readouterr()
    given, cost = unlearn.Recipe(lr=0.25, epochs=2), Cost()
    assert known_or_estimated(start, given, cost) is given
    path = tmp_path / "given.json"
    path.write_text(json.dumps({"lr": 0.5}))
    for name in (path, str(path)):
        assert known_or_estimated(start, name, cost) == recipe_at(name) == unlearn.Recipe(lr=0.5)
    with pytest.raises(InputError, match="cannot be read"):
        known_or_estimated(start, tmp_path / "none.json", cost)
    (start.run.directory / "recipe.json").write_text('{"lr": 0.125}')
    assert known_or_estimated(start, None, cost) == unlearn.Recipe(lr=0.125)
    assert known_or_estimated(start, given, cost) is given  # before the recorded one
    assert (tried, cost, capsys.readouterr().err) == ([], Cost(), "")
    (start.run.directory / "recipe.json").unlink()
    assert known_or_estimated(start, None, cost).lr == RATES[0]
    assert tried == [(RATES[0], 10)]


def test_batches_are_as_large_as_makes_a_local_training_take_those_that_were_tried(tmp_path):
    start = trained(tmp_path, n=192, lr=1e-3, epochs=1)
    found = estimated_recipe(start, Cost())
    assert found.batch_size == BATCH * 2  # 48 rows of 192 were tried
    assert found.for_rows(192, 48).batch_size == BATCH
