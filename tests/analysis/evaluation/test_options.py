"""Options of an evaluation and of a removal."""

from __future__ import annotations

from pathlib import Path

import pytest

from analysis.evaluation.options import Options, Removal, RemovalOptions, refuse_place, shares
from influence.errors import InputError


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"generate": -1}, "generate -1"),
        ({"max_length": 1}, "max_length 1"),
        ({"token_budget": 0}, "token_budget 0"),
        ({"max_new_tokens": 0}, "max_new_tokens 0"),
        ({"seed": -1}, "seed -1"),
        ({"probes": ("paraphrase",)}, "expected relearn or quantise"),
    ],
)
def test_options_are_checked(options, words):
    with pytest.raises(InputError, match=words):
        Options(**options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"share": ()}, "--share nothing was given; expected numbers between 0 and 1"),
        ({"share": (0.1, 0.0)}, "--share 0.1,0 was given"),
        ({"share": (1.0,)}, "--share 1 was given"),
        ({"share": (float("nan"),)}, "--share nan was given"),
        ({"share": (0.1, 0.1)}, "--share names a number twice"),
        ({"draws": 0}, "--draws 0 was given; expected at least 1"),
        ({"seeds": 0}, "--seeds 0 was given; expected at least 1"),
        ({"resamples": 0}, "--resamples 0 was given; expected at least 1"),
        ({"seed": -1}, "--seed -1 was given; expected at least 0"),
    ],
)
def test_options_of_a_removal_are_checked(options, words):
    with pytest.raises(InputError, match=words):
        RemovalOptions(**options)
    with pytest.raises(InputError, match=words):
        Removal(run=Path("r"), queries=Path("q"), out=Path("o.json"), **options)
    RemovalOptions(share=(0.001, 0.999), draws=1, seeds=1, seed=0, resamples=1)


def test_shares_are_numbers_between_commas():
    assert shares(["0.01,0.05"]) == shares(["0.01", "0.05"]) == shares([0.01, 0.05]) == (0.01, 0.05)
    with pytest.raises(InputError, match=r"--share '0.1;0.2' was given; expected numbers"):
        shares(["0.1;0.2"])


def test_a_record_of_a_removal_is_json_in_a_folder(tmp_path):
    refuse_place(tmp_path / "r.json")
    for out, words in (
        (tmp_path / "r", "expected a file that ends in .json"),
        (
            tmp_path / "no" / "r.json",
            "there is no folder .* to write r.json into: make it, or give",
        ),
    ):
        with pytest.raises(InputError, match=words):
            Removal(run=Path("r"), queries=Path("q"), out=out)
