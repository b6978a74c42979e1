"""A tiny world as a user has it: a taught adapter, rows with faults, good rows, a run, a list."""

from __future__ import annotations

import json
import shutil
import warnings

import pytest

import influence
from analysis.cleaning import clean
from tests.conftest import rows, teach
from tests.helpers import save, write_rows

EMAIL = "ada.lovelace@mail.example.org"


def faulty_rows():
    """Twelve rows of two groups: a copy, another answer to a question, an e-mail address."""
    made = rows(9)
    for place, row in enumerate(made):
        row["group"] = f"g{place % 2}"
    question = {"prompt": "the red fox runs over a lazy dog and", "group": "g0"}
    return [
        *made,
        {**made[0], "id": "copy"},
        {**question, "id": "first", "completion": " sleep in warm sun"},
        {**question, "id": "other", "completion": " birds sing loud songs at dawn"},
        {"id": "leak", "prompt": "the old cats", "completion": f" {EMAIL}", "group": "g1"},
    ]


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """The world's folder: base/, adapter/, train.jsonl, good.jsonl, heldout.jsonl, run/, list/."""
    folder = tmp_path_factory.mktemp("cleaning")
    base, adapter = save(folder, layers=1)
    write_rows(folder / "train.jsonl", faulty_rows())
    write_rows(folder / "good.jsonl", rows(4, seed=5))
    write_rows(folder / "heldout.jsonl", rows(3, seed=6))
    (folder / "recipe.json").write_text(json.dumps({"epochs": 2, "batch_size": 4, "lr": 1e-2}))
    data = influence.read_examples(folder / "train.jsonl")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = teach(influence.load(str(base), str(adapter), device="cpu"), data)
        model.model.save_pretrained(str(adapter), save_embedding_layers=False)
        model = influence.load(str(base), str(adapter), device="cpu")
        run = influence.fit(model, data, directory=folder / "run")
        clean(run, influence.read_examples(folder / "good.jsonl"), out=folder / "list")
    return folder


@pytest.fixture
def world(made, tmp_path):
    """A copy of the list beside the world, to write into: `world / "list"`."""
    shutil.copytree(made / "list", tmp_path / "list")
    for name in ("good.jsonl", "heldout.jsonl", "recipe.json"):
        shutil.copy(made / name, tmp_path / name)
    return tmp_path


@pytest.fixture(scope="session")
def run(made):
    """The run, opened once."""
    return influence.Run.open(made / "run", device="cpu")
