"""Stopping rules: what is understood, what is refused."""

from __future__ import annotations

import subprocess
import sys

import pytest

from influence.errors import InputError
from tests.unlearn.edits.helpers import WRONG_RULES
from unlearn.stopping import EditRule, TrainingRule


@pytest.mark.parametrize(("text", "message"), WRONG_RULES)
def test_wrong_rules_of_edits_are_refused(text, message):
    with pytest.raises(InputError, match=message):
        EditRule.parse(text)


@pytest.mark.parametrize("text", ["converged", "norm=1", "base=2", "steps=2.5", "loss", ""])
def test_wrong_rules_of_trainings_are_refused(text):
    with pytest.raises(InputError, match="expected one of base, expected, loss=X"):
        TrainingRule.parse(text)


@pytest.mark.parametrize("text", ["expected", "converged", "loss=2.5", "steps=7", "norm=0.25"])
def test_rules_of_edits_are_written_as_they_are_read(text):
    assert str(EditRule.parse(text)) == text
    assert EditRule.parse(EditRule.parse(text)) == EditRule.parse(text)


@pytest.mark.parametrize("text", ["base", "expected", "loss=2.5", "steps=7"])
def test_rules_of_trainings_are_written_as_they_are_read(text):
    assert str(TrainingRule.parse(text)) == text
    assert TrainingRule.parse(TrainingRule.parse(text)) == TrainingRule.parse(text)


def test_a_rule_of_one_kind_is_no_rule_of_the_other():
    assert EditRule.parse("steps=3") != TrainingRule.parse("steps=3")
    assert [EditRule.parse(text).by_loss for text in ("expected", "loss=2", "steps=2")] == [
        True,
        True,
        False,
    ]


def test_rules_are_read_without_torch():
    """The command line reads them before it needs anything slow."""
    code = "import sys, unlearn.stopping; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
