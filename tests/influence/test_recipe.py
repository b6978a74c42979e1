"""Recipes: checked, read where they are recorded, translated from a trainer's arguments."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

import unlearn
from influence.errors import InputError
from tests.unlearn.retraining.helpers import (
    SHORT,
    TRAINER,
)
from unlearn.retraining.recipe import recipe_of


def test_recipes_are_checked(tmp_path):
    with pytest.raises(InputError, match="schedule 'step' was given; expected one of linear"):
        unlearn.Recipe(schedule="step")
    for text, sentence in (
        ('{"learning_rate": 1}', "unknown keys: learning_rate"),
        ("[1]", "holds no JSON object"),
        ("{", "cannot be read"),
        ('{"lr": "high"}', "recipe .*recipe.json: a recipe needs whole epochs"),
        ('{"lr": NaN}', "finite"),
        ('{"epochs": 2.5}', "whole epochs"),
        ('{"dropout": 1}', "dropout true or false"),
        ('{"betas": 0.9}', "betas 0.9; expected two numbers"),
        ('{"lr": 0}', "lr and eps above 0"),
        ('{"betas": [0.9, 1.5]}', r"betas in \[0, 1\)"),
        ('{"weight_decay": -1}', "weight_decay of at least 0"),
    ):
        (tmp_path / "recipe.json").write_text(text)
        with pytest.raises(InputError, match=sentence):
            unlearn.Recipe.read(tmp_path / "recipe.json")


def test_the_recipe_is_the_recorded_one(run, tmp_path, capsys):
    assert recipe_of(run) == unlearn.Recipe()
    assert "may not be how this adapter was trained" in capsys.readouterr().err
    folder = tmp_path / "adapter"
    folder.mkdir()
    adapter = replace(run.manifest.adapter, path=str(folder))
    run.manifest = replace(run.manifest, adapter=adapter)
    (folder / "trainer_state.json").write_text(
        '{"epoch": 3.0, "train_batch_size": 2}'
    )  # not enough: no guess
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


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"optim": "adafactor"}, "a recipe cannot express optim='adafactor'"),
        ({"max_steps": 100}, "cannot express max_steps=100"),
        ({"packing": True}, "cannot express packing=True"),
        ({"dataloader_drop_last": True}, "cannot express dataloader_drop_last=True"),
        ({"warmup_ratio": 0.1}, "cannot express warmup_ratio=0.1"),
        ({"lr_scheduler_type": "polynomial"}, "schedule 'polynomial' was given"),
        ({"num_train_epochs": 2.5}, "whole epochs"),
        ({"per_device_train_batch_size": "4"}, "it lacks per_device_train_batch_size"),
        ({"seed": ...}, "it lacks seed"),
    ],
)
def test_training_arguments_that_a_recipe_cannot_follow(change, sentence):
    changed = {key: value for key, value in {**TRAINER, **change}.items() if value is not ...}
    with pytest.raises(InputError, match=sentence):
        unlearn.Recipe.of_training_arguments(changed, "training_args.json")
