"""The adapters that benchmarks retrain: made once, and never taken for another recipe's."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.conftest import build_model, examples, fit_end
from unlearn.retraining.recipe import Recipe

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import edit_cases


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cases") / "run"
    return fit_end(build_model(layers=1), examples(8), directory=folder)


@pytest.mark.parametrize("most", [None, 3])
def test_a_retrained_adapter_is_taken_up_and_not_for_another_recipe(run, tmp_path, most):
    recipe = Recipe(epochs=2, batch_size=4, max_steps=most)
    bed = SimpleNamespace(work=tmp_path, run=run, recipe=recipe, model=run.model)
    case = SimpleNamespace(task="remove", ids=run.train.ids[:2], new=None)
    (made,) = edit_cases.retrained(bed, case, [3]).thetas
    (record,) = tmp_path.rglob("retrain.json")
    assert json.loads(record.read_text())["recipe"]["seed"] == 3
    written = record.stat().st_mtime_ns
    (again,) = edit_cases.retrained(bed, case, [3]).thetas
    assert torch.equal(made, again)
    assert record.stat().st_mtime_ns == written
    bed.recipe = replace(recipe, lr=1e-4)
    with pytest.raises(SystemExit, match="something else"):
        edit_cases.retrained(bed, case, [3])
