"""A run to retrain, and subsets of its rows."""

from __future__ import annotations

import pytest

import influence
import unlearn
from tests.conftest import build_model, examples


@pytest.fixture
def run(tmp_path):
    """It fits next to nothing: only its rows, its adapter and its path are asked for."""
    return influence.fit(
        build_model("llama", layers=1),
        examples(8),
        curvature=influence.Identity(),
        directory=tmp_path / "run",
        store="never",
    )


@pytest.fixture
def masks():
    return unlearn.random_halves(8, 4)
