"""Options of an evaluation."""

from __future__ import annotations

import pytest

from analysis.evaluation.evaluation import Options
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
