"""Recipes: checked, and translated from a trainer's arguments."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from influence.errors import InputError
from influence.recipe import Recipe, recorded_in
from tests.unlearn.retraining.helpers import TRAINER


def test_recipes_are_checked(tmp_path):
    with pytest.raises(InputError, match="schedule 'step' was given; expected one of linear"):
        Recipe(schedule="step")
    for text, sentence in (
        ('{"learning_rate": 1}', "unknown keys: learning_rate"),
        ("[1]", "holds no JSON object"),
        ("{", "cannot be read"),
        ('{"lr": "high"}', "recipe .*recipe.json: a recipe needs whole epochs"),
        ('{"lr": NaN}', "finite"),
        ('{"epochs": 2.5}', "whole epochs"),
        ('{"dropout": 1}', "dropout true or false"),
        ('{"betas": 0.9}', "betas 0.9; expected two numbers"),
        ('{"max_steps": 0}', "max_steps of at least 1"),
        ('{"max_steps": 1.5}', "whole epochs"),
        ('{"lr": 0}', "lr and eps above 0"),
        ('{"betas": [0.9, 1.5]}', r"betas in \[0, 1\)"),
        ('{"weight_decay": -1}', "weight_decay of at least 0"),
    ):
        (tmp_path / "recipe.json").write_text(text)
        with pytest.raises(InputError, match=sentence):
            Recipe.read(tmp_path / "recipe.json")


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
        ({"lr_scheduler_kwargs": {"num_cycles": 3}}, "express lr_scheduler_kwargs="),
        ({"train_sampling_strategy": "group_by_length"}, "express train_sampling_strategy="),
        ({"optim_target_modules": "all-linear"}, "express optim_target_modules="),
        ({"max_steps": "5"}, "max_steps='5' is no finite number"),
        ({"warmup_steps": "0.1"}, "warmup_steps='0.1' is no finite number"),
        ({"warmup_ratio": [1]}, r"warmup_ratio=\[1\] is no finite number"),
        ({"num_train_epochs": float("inf")}, "num_train_epochs=inf is no finite number"),
        ({"num_train_epochs": True}, "num_train_epochs=True is no finite number"),
        ({"learning_rate": 10**400}, "finite numbers"),
    ],
)
def test_training_arguments_that_a_recipe_cannot_follow(change, sentence):
    changed = {key: value for key, value in {**TRAINER, **change}.items() if value is not ...}
    with pytest.raises(InputError, match=sentence):
        Recipe.of_training_arguments(changed, "training_args.json")
    if "finite number" in sentence:
        with pytest.raises(InputError, match=sentence):
            Recipe.of_training_arguments(changed, "training_args.json", steps=25)


def test_the_number_of_steps_makes_more_of_the_arguments_expressible():
    """A number of steps, parts of an epoch and a share of warm-up become whole steps."""
    steps = {"steps": 25}
    for change, expected in (
        ({"max_steps": 25}, {"max_steps": 25}),
        ({"num_train_epochs": 2.5}, {"max_steps": 25, "epochs": 3}),
        ({"warmup_ratio": 0.1}, {"warmup": 3}),
        ({"warmup_steps": 0.1}, {"warmup": 3}),
        ({"warmup_steps": 4}, {"warmup": 4}),
        ({"warmup_steps": 4, "lr_scheduler_type": "constant"}, {"schedule": "constant"}),
        (
            {"warmup_steps": 4, "lr_scheduler_type": "constant_with_warmup"},
            {"warmup": 4, "schedule": "constant"},
        ),
    ):
        recipe = Recipe.of_training_arguments({**TRAINER, **change}, "a.json", **steps)
        whole = {"max_steps": None, "epochs": 3, "warmup": 0, "schedule": "cosine"} | expected
        assert {name: getattr(recipe, name) for name in whole} == whole
    with pytest.raises(InputError, match="cannot express packing=True"):
        Recipe.of_training_arguments({**TRAINER, "packing": True}, "a.json", **steps)
    idle = {"lr_scheduler_kwargs": None, "train_sampling_strategy": "random"}
    idle |= {"optim_target_modules": None, "group_by_length": False}
    same = Recipe.of_training_arguments({**TRAINER, **idle}, "a.json", **steps)
    assert same == Recipe.of_training_arguments(TRAINER, "a.json", **steps)


def test_steps_and_epochs_of_a_recipe():
    recipe = Recipe(epochs=3, batch_size=4)
    assert (recipe.steps(10), recipe.last_epoch(10)) == (9, 3)
    short = Recipe(epochs=3, batch_size=4, max_steps=7)
    assert (short.steps(10), short.last_epoch(10)) == (7, 3)
    assert (short.steps(4), short.last_epoch(4)) == (7, 7)  # as a trainer with fewer rows
    assert "max_steps" not in recipe.as_json()
    assert Recipe.of(short.as_json(), "it") == short


@pytest.mark.parametrize("max_steps", [None, 1, 2, 3, 5, 6, 7, 23])
@pytest.mark.parametrize("batch_size", [1, 3, 4, 5, 10, 16])
def test_rows_read_are_those_of_the_batches_one_by_one(batch_size, max_steps):
    """Of 10 rows, the last batch of an epoch being what is left."""
    recipe = Recipe(epochs=3, batch_size=batch_size, max_steps=max_steps)
    sizes = [min(batch_size, 10 - first) for first in range(0, 10, batch_size)]
    taken = (sizes * 30)[: 3 * len(sizes) if max_steps is None else max_steps]
    assert recipe.rows_read(10) == sum(taken)
    assert recipe.steps(10) == len(taken)


@pytest.mark.parametrize(
    ("batch_size", "rows", "fewer", "smaller"),
    [
        (16, 400, 100, 8),  # a fourth of the rows: half the batch
        (16, 400, 4, 2),
        (16, 400, 1, 1),
        (2, 10**6, 3, 1),  # never below 1
        (1, 100, 10, 1),
        (10, 100, 50, 7),  # 7.07
        (10, 100, 57, 8),  # 7.55
    ],
)
def test_batches_for_fewer_rows_are_smaller_by_the_root_of_the_ratio(
    batch_size, rows, fewer, smaller
):
    recipe = Recipe(batch_size=batch_size, lr=0.5, epochs=3, schedule="cosine", seed=4)
    found = recipe.for_rows(rows, fewer)
    assert found == replace(recipe, batch_size=smaller)
    assert found.rows_read(fewer) == 3 * fewer  # each row as often


def test_steps_and_warmup_for_fewer_rows_are_the_same_share_of_the_training():
    recipe = Recipe(batch_size=16, epochs=8, warmup=20)  # of 25 steps an epoch, 200 in all
    found = recipe.for_rows(400, 100)  # batches of 8: 13 steps an epoch, 104 in all
    assert found == replace(recipe, batch_size=8, warmup=10)
    short = replace(recipe, max_steps=60)  # 2.4 epochs
    found = short.for_rows(400, 100)
    assert (found.batch_size, found.max_steps) == (8, 31)  # 2.4 x 13 = 31.2
    assert found.warmup == 10  # a third of 31, as 20 of 60
    assert found.rows_read(100) == pytest.approx(2.4 * 100, rel=0.02)
    assert replace(recipe, max_steps=1).for_rows(400, 1).max_steps == 1  # 0.04 of a step


def test_a_recipe_for_as_many_rows_or_more_is_itself():
    for recipe in (
        Recipe(warmup=7),
        Recipe(max_steps=61, warmup=7, batch_size=7),
        Recipe(max_steps=1),
        Recipe(batch_size=500, warmup=3),
    ):
        assert recipe.for_rows(100, 100) == recipe
    recipe = Recipe(batch_size=7, epochs=4)
    assert recipe.for_rows(100, 300) == recipe


def test_a_recipe_in_a_folder_says_what_it_is_about(tmp_path):
    """The sentence for people is one line without control characters, whoever wrote it."""
    assert recorded_in(tmp_path) is None
    about = "guessed\x1b[2J\nfrom the log"
    (tmp_path / "recipe.json").write_text(json.dumps({"lr": 0.5, "about": about}))
    found = recorded_in(tmp_path)
    assert found is not None
    assert found.recipe == Recipe(lr=0.5)
    assert found.about == "guessed [2J from the log"
    (tmp_path / "recipe.json").unlink()
    arguments = {**TRAINER, "max_steps": 12}
    (tmp_path / "training_args.json").write_text(json.dumps(arguments))
    with pytest.raises(InputError, match="cannot express max_steps=12"):
        recorded_in(tmp_path)
    (tmp_path / "trainer_state.json").write_text('{"max_steps": 12}')
    found = recorded_in(tmp_path)
    assert found is not None
    assert found.recipe.max_steps == 12


@pytest.mark.parametrize(
    ("share", "epochs", "batch_size"),
    [
        (1.0, 10, 4),  # 25 rows: 7 batches a pass, 70 steps
        (0.5, 5, 4),
        (0.36, 4, 4),
        (0.05, 1, 8),  # half a pass of 7 steps: one of batches twice as large
        (1e-300, 1, 28),  # one step of all rows
    ],
)
def test_a_shortened_recipe_takes_its_share_of_the_steps_in_whole_passes(share, epochs, batch_size):
    recipe = Recipe(epochs=10, batch_size=4, warmup=20)
    short = recipe.shortened(share, 25)
    assert (short.epochs, short.batch_size) == (epochs, batch_size)
    assert short.warmup == round(20 * share)
    assert short.steps(25) == pytest.approx(max(1, 70 * share), rel=0.2)
    assert replace(short, epochs=10, batch_size=4, warmup=20) == recipe


def test_a_recipe_of_so_many_steps_is_shortened_by_its_passes():
    short = Recipe(epochs=3, batch_size=4, max_steps=70).shortened(0.5, 25)
    assert (short.epochs, short.batch_size, short.max_steps) == (5, 4, None)
