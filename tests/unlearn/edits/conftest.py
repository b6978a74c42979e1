"""A run whose recipe is on record: what estimates one is tested with the retrainings."""

from __future__ import annotations

import json

import pytest

from influence.run import Run
from tests.unlearn.record.helpers import RECIPE


@pytest.fixture
def run(run) -> Run:
    """The run with a recipe on record, by which rows are lost that were not seen: edits move."""
    (run.directory / "recipe.json").write_text(json.dumps(RECIPE.as_json()))
    return run
