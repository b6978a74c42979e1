"""The options of `unlearn retrain`: once without some rows, or on many subsets."""

from __future__ import annotations

from pathlib import Path

import pytest

from influence.errors import InputError
from unlearn.retraining.options import Retrain

ONCE = {"ids": "a,b"}
SUBSETS = {"subsets": 4, "queries": Path("q.jsonl")}


@pytest.mark.parametrize(
    "options",
    [
        ONCE,
        {"ids_file": Path("ids")},
        {"all_rows": True, "keep_epochs": (1, 3), "stop_after": 3},
        {"edit": Path("edit")},
        SUBSETS,
        SUBSETS | {"fraction": 0.3, "subset_seed": 2},
    ],
)
def test_one_form_of_the_call(options):
    Retrain(run=Path("run"), out=Path("out"), **options)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "give exactly one of --ids A,B,C, .*: none of them was given"),
        (ONCE | {"all_rows": True}, ": --ids and --all-rows was given"),
        (ONCE | SUBSETS, ": --ids and --subsets was given"),
        (ONCE | {"fraction": 0.5}, "--fraction goes with --subsets N only: leave it out"),
        (
            ONCE | {"subset_seed": 0, "queries": Path("q")},
            "--subset-seed, --queries goes with --subsets N only: leave it out",
        ),
        (SUBSETS | {"keep_epochs": (1,)}, "--keep-epochs cannot go with --subsets: leave it out"),
        (SUBSETS | {"stop_after": 1}, "--stop-after cannot go with --subsets: leave it out"),
        ({"subsets": 4}, "--subsets measures the losses of queries: name their file with"),
    ],
)
def test_forms_that_do_not_go_together_are_refused(options, sentence):
    with pytest.raises(InputError, match=sentence):
        Retrain(run=Path("run"), out=Path("out"), **options)
