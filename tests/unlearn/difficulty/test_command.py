"""Which units `unlearn difficulty` forecasts."""

from __future__ import annotations

from types import SimpleNamespace

import influence
from unlearn.difficulty.command import by_group


def test_groups_are_whole_and_a_row_without_one_is_alone():
    items = [{"id": str(i), "text": "fox", "group": g} for i, g in enumerate("abba")]
    items += [{"id": "4", "text": "dog"}, {"id": "5", "text": "cat"}]
    run = SimpleNamespace(train=influence.examples_from_rows(items))
    everything = {"a": ["0", "3"], "b": ["1", "2"], "4": ["4"], "5": ["5"]}
    assert by_group(run, None) == everything
    assert by_group(run, ["3", "4"]) == {"a": ["0", "3"], "4": ["4"]}
