"""What goes together on the line of `analysis clean`."""

from __future__ import annotations

from pathlib import Path

import pytest

from analysis.cleaning.options import Clean
from influence.errors import InputError

LIST = {"run": Path("run"), "out": Path("out")}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "give either --run RUN --out DIR .* or --apply DIR"),
        (LIST | {"apply": Path("d")}, "give either --run"),
        ({"run": Path("run")}, "--run needs --out DIR"),
        (LIST | {"holdout": Path("h"), "take_suggested": True}, "--holdout, --take-suggested goes"),
        (LIST | {"recipe": Path("r")}, "--recipe goes with --apply only: leave it out"),
        (LIST | {"adapter_out": Path("a")}, "--adapter-out goes with --apply only"),
        (
            {"apply": Path("d"), "queries": Path("q")},
            "--queries goes with --run only: leave it out",
        ),
        ({"apply": Path("d"), "out": Path("o")}, "--out goes with --run only"),
        (LIST | {"seeds": 3, "resamples": 5}, "--seeds, --resamples goes with --apply only"),
        ({"apply": Path("d"), "most": 5}, "--most goes with --run only: leave it out"),
        (LIST | {"most": 0}, "--most 0 was given; expected at least 1"),
        ({"apply": Path("d"), "seeds": 0}, "--seeds 0 was given; expected at least 1"),
        ({"apply": Path("d"), "seed": -1}, "--seed -1 was given; expected at least 0"),
        ({"apply": Path("d"), "resamples": 0}, "--resamples 0 was given; expected at least 1"),
    ],
)
def test_what_is_refused(options, sentence):
    with pytest.raises(InputError, match=sentence):
        Clean(**options)


def test_what_is_taken():
    Clean(**LIST, queries=Path("q"), most=5)
    Clean(apply=Path("d"), holdout=Path("h"), recipe=Path("r"), take_suggested=True, seeds=2)
