from __future__ import annotations

from dataclasses import fields
from inspect import signature
from pathlib import Path

import pytest

from analysis.explorer.data import gather
from analysis.explorer.options import ExploredOptions, Report
from analysis.explorer.page import write
from influence.errors import InputError

PAGE = {"out": Path("page.html")}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "either --edit ADAPTER"),
        ({"edit": Path("e"), "run": Path("r")}, "either --edit ADAPTER"),
        ({"run": Path("r"), "retrained": Path("x")}, "--retrained goes with --edit"),
        ({"edit": Path("e"), "holdout": Path("h")}, "--holdout goes with --retrained"),
        (
            {"edit": Path("e"), "scores": Path("s"), "lds": (Path("f"),)},
            "--scores, --lds goes with",
        ),
        ({"edit": Path("e"), "evaluations": (Path("f"),)}, "--evaluation goes with"),
        ({"run": Path("r"), "detail": -1}, "--detail -1"),
    ],
)
def test_options_that_do_not_go_together(options, says):
    with pytest.raises(InputError, match=says):
        Report(**PAGE, **options)


def test_either_page_can_be_asked_for():
    assert Report(**PAGE, edit=Path("e"), retrained=Path("x"), holdout=Path("h")).run is None
    assert Report(**PAGE, run=Path("r"), scores=Path("s"), detail=0).edit is None


def test_options_are_the_keywords_of_the_functions():
    given = {
        name: each.default
        for name, each in signature(gather).parameters.items()
        if each.default is not each.empty
    }
    assert {each.name: each.default for each in fields(ExploredOptions)} == given
    assert signature(write).parameters["detail"].default == Report(**PAGE, run=Path("r")).detail
