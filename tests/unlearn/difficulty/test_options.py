"""The options of `unlearn difficulty`: what is refused before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from influence.errors import InputError
from unlearn.difficulty.options import Difficulty

HELD_OUT = {"holdout": Path("h.jsonl")}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"measure": True} | HELD_OUT,
        {"calibrate": 20} | HELD_OUT,
        {"target": "unseen"},
        {"target": "unseen", "recipe": Path("recipe.json")},
        {"target": "unseen", "measure": True} | HELD_OUT,
        {"looks": 1, "seed": 0, "max_damage": 0.0},
        {"screen": 30, "memory": 0.5, "checkpointing": True},
        {"screen": 30, "calibrate": 20},
        {"screen": 0, "measure": True},
    ],
)
def test_what_goes_together_is_taken(options):
    Difficulty(run=Path("run"), out=Path("out.csv"), **options)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"calibrate": 20, "measure": True}, "--calibrate and --measure were given together"),
        ({"looks": 0}, "--looks 0 was given; expected at least 1"),
        ({"seed": -1}, "--seed -1 was given; expected at least 0"),
        ({"max_damage": -0.5}, "--max-damage -0.5 was given; expected at least 0"),
        ({"max_damage": float("nan")}, "--max-damage nan was given; expected at least 0"),
        ({"screen": 30, "measure": True}, "--screen and --measure were given together"),
        ({"memory": 0.0}, "--memory 0.0 was given; expected GB above 0"),
        ({"memory": float("nan")}, "--memory nan was given; expected GB above 0"),
        (HELD_OUT, "--holdout was given: it is for --measure or --calibrate"),
        ({"target": "unseen"} | HELD_OUT, "--holdout was given: it is for --measure or --calib"),
        ({"recipe": Path("r.json")}, "--recipe was given: it is for --target unseen; leave it out"),
    ],
)
def test_what_does_not_is_refused(options, sentence):
    with pytest.raises(InputError, match=sentence):
        Difficulty(run=Path("run"), out=Path("out.csv"), **options)


@pytest.mark.parametrize(
    ("options", "number"),
    [({}, 400), ({"screen": 25}, 25), ({"screen": 0}, 0), ({"measure": True}, 0)],
)
def test_how_many_are_looked_at_closely(options, number):
    """Measured rows are all looked at closely, and 400 where nobody says otherwise."""
    assert Difficulty(run=Path("run"), out=Path("out.csv"), **options).close_looks == number
