"""Runs of tiny models, fitted once for all tests of the methods."""

from __future__ import annotations

import pytest

import influence
from influence.row_files import read_examples
from tests.conftest import build_model, rows
from tests.helpers import save, write_rows
from tests.unlearn.methods.helpers import ROWS, opened


@pytest.fixture(scope="session")
def fitted(tmp_path_factory):
    """A folder with base, adapter and train.jsonl, and for each type the model and a run of it."""
    folder = tmp_path_factory.mktemp("methods")
    base, adapter = save(folder, layers=1, target_modules=["q_proj", "v_proj"])
    train = read_examples(write_rows(folder / "train.jsonl", rows(ROWS)))
    models = {}
    for dtype in ("float64", "float32"):
        models[dtype] = influence.load(base, adapter, dtype=dtype, device="cpu")
        influence.fit(models[dtype], train, directory=folder / dtype, path=(0.6,))
    return folder, models


@pytest.fixture
def run(fitted, tmp_path):
    """A float64 run of its own."""
    return opened(fitted, tmp_path, "float64")


@pytest.fixture
def single(fitted, tmp_path):
    """A float32 run of its own."""
    return opened(fitted, tmp_path, "float32")


@pytest.fixture
def disturbed(run):
    """The model in training mode, some flags set and some not, as a user's loop may leave it."""
    run.points  # noqa: B018
    run.model.model.train()
    next(iter(run.model.parameters)).requires_grad_(True)
    yield run
    run.model.model.eval()
    for parameter in run.model.parameters:
        parameter.requires_grad_(False)
        parameter.grad = None


@pytest.fixture(scope="module")
def small():
    return build_model("gpt2", layers=1)
