"""Which recipe counts for a run: its own, the adapter's, an estimate, and last the defaults."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

import unlearn
from influence.errors import InputError
from tests.unlearn.retraining.helpers import SHORT, TRAINER
from unlearn.retraining.recipe import recipe_of, recorded_recipe


def test_the_recipe_is_the_recorded_one(run, tmp_path, capsys):
    assert recipe_of(run) == unlearn.Recipe()
    assert "hardly how this adapter was trained" in capsys.readouterr().err
    folder = tmp_path / "adapter"
    folder.mkdir()
    adapter = replace(run.manifest.adapter, path=str(folder))
    run.manifest = replace(run.manifest, adapter=adapter)
    (folder / "trainer_state.json").write_text(
        '{"epoch": 3.0, "train_batch_size": 2}'
    )  # not enough: no guess
    with pytest.raises(InputError, match="not a trainer's state"):
        recipe_of(run)
    (folder / "trainer_state.json").write_text('{"global_step": 12, "log_history": []}')
    assert recipe_of(run) == unlearn.Recipe()
    (folder / "training_args.json").write_text(json.dumps(TRAINER))
    expected = unlearn.Recipe(1e-3, 0.0, (0.9, 0.98), 1e-7, 3, 8, "cosine", 0, 1.0, True, 42)
    capsys.readouterr()
    assert recipe_of(run) == expected
    assert "not in which order it saw the rows" in capsys.readouterr().err
    (folder / "retrain.json").write_text(json.dumps({"recipe": asdict(SHORT), "epoch": 4}))
    assert recipe_of(run) == SHORT
    (folder / "retrain.json").write_text(json.dumps({"recipe": asdict(SHORT), "epoch": 3}))
    with pytest.raises(InputError, match="stopped after epoch 3 of 4: give the recipe"):
        recipe_of(run)
    (folder / "recipe.json").write_text('{"epochs": 2, "lr": 0.5}')
    assert recipe_of(run) == unlearn.Recipe(epochs=2, lr=0.5)
    out = unlearn.retrain(run, out=tmp_path / "out")
    assert json.loads((out / "retrain.json").read_text())["recipe"]["lr"] == 0.5


def state(**changes) -> dict:
    """The log of 3 epochs of 8 rows in batches of 4 = 2 x 2, linear from 0.01, every step logged."""
    log = [
        {"step": k + 1, "epoch": (k + 1) / 2, "learning_rate": 0.01 * (1 - k / 6), "loss": 2.0}
        for k in range(6)
    ]
    state = {"global_step": 6, "max_steps": 6, "num_train_epochs": 3, "train_batch_size": 2}
    return {**state, "log_history": log, **changes}


def test_the_log_of_a_trainer_gives_an_estimate(run, tmp_path, capsys):
    folder = tmp_path / "out" / "adapter"
    folder.mkdir(parents=True)
    run.manifest = replace(run.manifest, adapter=replace(run.manifest.adapter, path=str(folder)))
    (folder.parent / "trainer_state.json").write_text(json.dumps(state()))
    capsys.readouterr()
    recipe = recipe_of(run)
    assert recipe == recorded_recipe(run)
    assert recorded_recipe(run, exact=True) is None
    assert recipe == unlearn.Recipe(
        lr=recipe.lr, weight_decay=0.0, epochs=3, batch_size=4, max_grad_norm=1.0, seed=42
    )
    assert recipe.lr == pytest.approx(0.01)
    said = capsys.readouterr().err
    assert "assumed, as trainers do unless told otherwise: AdamW without weight decay" in said
    assert "seed 42" in said
    (folder.parent / "trainer_state.json").write_text(json.dumps(state(global_step=4)))
    recipe_of(run)
    assert "training stopped at step 4 of 6" in capsys.readouterr().err


def test_the_recipe_of_the_run_comes_first(run, tmp_path, capsys):
    folder = tmp_path / "adapter"
    folder.mkdir()
    run.manifest = replace(run.manifest, adapter=replace(run.manifest.adapter, path=str(folder)))
    (folder / "recipe.json").write_text('{"lr": 0.25}')
    (run.directory / "recipe.json").write_text('{"lr": 0.125, "about": "from the trainer"}')
    assert recipe_of(run) == unlearn.Recipe(lr=0.125)
    assert "from the trainer" in capsys.readouterr().err


def test_a_training_of_so_many_steps_is_retrained_to_its_last(run, tmp_path):
    """It ends within an epoch, and the record of it is a recipe that can be followed."""
    recipe = unlearn.Recipe(epochs=9, batch_size=4, lr=2e-2, max_steps=3, dropout=False)
    out = unlearn.retrain(run, out=tmp_path / "out", recipe=recipe)
    record = json.loads((out / "retrain.json").read_text())
    assert (record["step"], record["epoch"]) == (3, 2)
    assert record["sum_lr"] == pytest.approx(2e-2 * (1 + 2 / 3 + 1 / 3))
    run.manifest = replace(run.manifest, adapter=replace(run.manifest.adapter, path=str(out)))
    assert recorded_recipe(run) == recorded_recipe(run, exact=True) == recipe
