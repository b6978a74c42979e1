"""One fitted run for all tests of difficulty, one measurement and one forecast of its rows."""

from __future__ import annotations

import pytest

import influence
from tests.unlearn.difficulty.helpers import ADAM, SHORT_ADAM, SMALL, data, trained
from unlearn.difficulty import measure, predict


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A run of ten rows at three points of the path; tests leave it as it is."""
    train = influence.examples_from_rows(data())
    return influence.fit(
        trained(train), train, directory=tmp_path_factory.mktemp("difficulty") / "run"
    )


@pytest.fixture(scope="session")
def measured(run):
    return measure(run, protocol=SHORT_ADAM, **SMALL)


@pytest.fixture(scope="session")
def forecast(run):
    return predict(run, protocol=ADAM, sample_rows=6)
