"""Options of an edit: what is refused before any work."""

from __future__ import annotations

import pytest

import unlearn
from influence.errors import InputError
from tests.helpers import untouched
from tests.unlearn.edits.helpers import WRONG_RULES
from unlearn.edits.options import Options
from unlearn.stopping import EditRule


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps 0 was given; expected 1"),
        ({"steps": -3}, "steps -3 was given"),
        (
            {"steps": 1, "until": "loss=2"},
            "steps 1, the linear answer, has no stopping rule, and loss=2 was given",
        ),
        ({"steps": 1, "until": "converged"}, "has no stopping rule, and converged was given"),
        ({"steps": 5, "until": "steps=6"}, "until steps=6 was given, and at most 5 steps"),
        ({"max_damage": -0.1}, "max_damage -0.1 was given; expected 0 or more"),
        ({"max_damage": float("nan")}, "max_damage nan was given"),
        ({"max_damage": float("inf")}, "max_damage inf was given"),
        ({"rest": -1}, "rest -1 and seed 0 were given; expected 0 or more"),
        ({"seed": -1}, "rest 24 and seed -1 were given"),
        ({"solver": "datainf"}, "solver datainf inverts the empirical Fisher of all rows"),
        *(({"until": text}, message) for text, message in WRONG_RULES),
    ],
)
def test_wrong_options_are_refused_before_any_work(runs, options, message):
    with pytest.raises(InputError, match=message):
        Options(**options)
    run = runs("identity")
    with untouched(run.directory), pytest.raises(InputError, match=message):
        unlearn.remove(run, ["r0-1"], **options)


@pytest.mark.parametrize("solver", ["newton", "pcg"])
def test_wrong_solvers_are_refused(runs, solver):
    run = runs("identity")
    with untouched(run.directory), pytest.raises(InputError, match=r"solver|EK-FAC"):
        unlearn.remove(run, ["r0-1"], solver=solver)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"curvature": "kfac"}, "was asked of a run fitted with 'identity'"),
        ({"at": "0.3"}, r"--at '0.3' was given"),
        ({"curvature": "identity", "damping": "mean:0.1"}, "has none: leave it out"),
        ({"start": "nowhere"}, "nowhere is no adapter of the run .*: give 'original'"),
    ],
)
def test_options_that_the_run_cannot_follow_are_refused(runs, options, message):
    run = runs("identity")
    with untouched(run.directory), pytest.raises(InputError, match=message):
        unlearn.remove(run, ["r0-1"], **options)


def test_the_stopping_rule_is_read_once():
    options = Options(until="loss=2.5")
    assert options.until == options.rule == EditRule("loss", 2.5)
    assert Options(until=EditRule("steps", 3)).rule == EditRule("steps", 3)
    assert (Options().rule, Options().one_shot) == (EditRule("expected"), False)
    assert Options(steps=1).one_shot
