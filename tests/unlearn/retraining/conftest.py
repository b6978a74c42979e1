"""A run to retrain, and subsets of its rows."""

from __future__ import annotations

import pytest

import influence
import unlearn
from tests.conftest import build_model, examples


@pytest.fixture
def run(tmp_path):
    return influence.fit(
        build_model("llama", layers=1), examples(8), directory=tmp_path / "run", store="never"
    )


@pytest.fixture
def masks():
    return unlearn.random_halves(8, 4)
