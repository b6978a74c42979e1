"""The options of the studies: what is refused before a model is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from analysis.studies.options import Memorization, Ood
from influence.errors import InputError


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"k": 0}, "-k 0 was given; expected at least 1"),
        ({"seed": -1}, "--seed -1 and --resamples 1000 were given; expected at least 0 and 1"),
        ({"resamples": 0}, "--seed 0 and --resamples 0 were given; expected at least 0 and 1"),
    ],
)
def test_memorization_refuses_numbers_out_of_range(options, sentence):
    with pytest.raises(InputError, match=sentence):
        Memorization(run=Path("run"), **options)
    Memorization(run=Path("run"), k=1, seed=0, resamples=1)


def test_ood_refuses_a_negative_seed():
    rows = {"holdout": Path("h.jsonl"), "other": Path("o.jsonl")}
    with pytest.raises(InputError, match="--seed -1 was given; expected at least 0"):
        Ood(run=Path("run"), out=Path("out"), seed=-1, **rows)
    Ood(run=Path("run"), out=Path("out"), seed=0, **rows)
