"""What a protocol may be, and how a file keeps it."""

from __future__ import annotations

import json

import pytest

from influence.errors import InputError
from unlearn.difficulty.optimizers import SGD, Adam
from unlearn.difficulty.protocol import Protocol
from unlearn.retraining.recipe import Recipe


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"optimizer": "adamw"}, "optimizer 'adamw' was given; expected adam or sgd"),
        ({"optimizer": Adam}, "was given; expected adam or sgd"),
        ({"lr": 0.0}, "lr 0.0 was given; expected a number above 0"),
        ({"lr": float("nan")}, "lr nan was given"),
        ({"lr": float("inf")}, "lr inf was given"),
        ({"stride": 0.0}, "stride 0.0 was given; expected a number above 0"),
        ({"stride": float("nan")}, "stride nan was given"),
        ({"lr": 1e-4, "stride": 1e-3}, "lr and stride were given together"),
        ({"target": "zero"}, "target 'zero' was given; expected base or unseen"),
        ({"steps": 0}, "steps 0 was given; expected a whole number of at least 1"),
        ({"steps": True}, "steps True was given"),
        ({"steps": 2.0}, "steps 2.0 was given"),
    ],
)
def test_wrong_protocols_are_refused(given, sentence):
    with pytest.raises(InputError, match=sentence.replace(".", r"\.")):
        Protocol(**given)


def test_the_record_says_the_rate_that_is_used():
    assert Protocol("sgd", 0.5, "unseen", 7).record() == {
        "optimizer": "sgd",
        "lr": 0.5,
        "target": "unseen",
        "steps": 7,
    }


def test_a_rate_by_the_stride_needs_an_adapter():
    for protocol in (Protocol(), Protocol(stride=0.01)):
        with pytest.raises(ValueError, match="follows from its stride and an adapter"):
            protocol.record()


def test_the_record_has_the_recipe_that_targets_follow():
    """As JSON gives it back. The target `base` follows none."""
    recipe = Recipe(lr=1e-2, epochs=2, batch_size=4)
    record = Protocol(lr=1e-4, target="unseen", recipe=recipe).record()
    assert json.loads(json.dumps(record)) == record
    assert Recipe.of(record["recipe"], "the record") == recipe
    plain = Protocol(lr=1e-4).record()
    assert record | {"target": "base"} == plain | {"recipe": record["recipe"]}
    assert Protocol(lr=1e-4, recipe=recipe).record() == plain


def test_an_optimizer_is_given_by_name_or_as_a_value():
    assert Protocol("sgd", 1.0, steps=3).record() == Protocol(SGD(), 1.0, steps=3).record()
    assert Protocol(Adam()).rule == Protocol("adam").rule == Adam()


def test_the_record_tells_optimizers_of_one_name_apart():
    """Measurements are resumed by what the record says."""
    other = Protocol(Adam(betas=(0.5, 0.9), eps=1e-6), 1.0).record()
    assert other["optimizer"] == "adam(betas=(0.5, 0.9), eps=1e-06)"
    assert Protocol(Adam(eps=1e-8), 1.0).record()["optimizer"] == "adam"
