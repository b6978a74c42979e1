"""A run on disk, and the command on it."""

from __future__ import annotations

import shutil

import pytest

import influence
from tests.conftest import rows
from tests.helpers import save, write_rows
from tests.unlearn.methods.commands.helpers import FORGET, ROWS
from unlearn.cli import main


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """base, adapter, train.jsonl and a run on disk."""
    at = tmp_path_factory.mktemp("train")
    save(at, layers=1, target_modules=["q_proj", "v_proj"])
    write_rows(at / "train.jsonl", rows(ROWS))
    write_rows(at / "other.jsonl", rows(3, seed=7))
    model = influence.load(at / "base", at / "adapter", device="cpu")
    influence.fit(
        model, influence.read_examples(at / "train.jsonl"), directory=at / "run", path=(0.6,)
    )
    return at


@pytest.fixture
def run(made, tmp_path):
    shutil.copytree(made / "run", tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def train(run, run_main, tmp_path):
    """The command on this run, with `out` as its --out unless another is given."""

    def call(*arguments, ids=FORGET):
        given = list(arguments)
        if "--out" not in given:
            given += ["--out", tmp_path / "out"]
        if ids is not None:
            given += ["--ids", ids]
        if "--method" not in given:
            given += ["--method", "ga"]
        return run_main(main, "unlearn", "train", "--run", run, "--device", "cpu", *given)

    return call
