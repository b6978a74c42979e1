"""Training again: deterministic, without the rows asked for, loadable anywhere, nothing half-written."""

from __future__ import annotations

import json

import pytest
import torch

import influence
import unlearn
from influence.errors import DataError, InputError
from influence.loss import mean_losses
from tests.conftest import build_base, build_model, examples

QUICK = {"epochs": 30, "batch_size": 4, "lr": 2e-2, "dropout": False}


@pytest.fixture
def run(tmp_path):
    return influence.fit(build_model("llama", layers=1), examples(8), directory=tmp_path / "run", store="never")


def load_back(folder):
    from peft import PeftModel

    model = PeftModel.from_pretrained(build_base("llama", layers=1), str(folder))
    model.double()
    return model


def test_a_removed_row_is_not_learnt_and_the_result_loads(run, tmp_path):
    recipe = unlearn.Recipe(**QUICK)
    before = run.model.snapshot()
    removed = run.train.ids[3]
    full = unlearn.retrain(run, out=tmp_path / "full", recipe=recipe)
    again = unlearn.retrain(run, out=tmp_path / "again", recipe=recipe)
    without = unlearn.retrain(run, [removed], out=tmp_path / "without", recipe=recipe)
    assert (full / "adapter_model.safetensors").read_bytes() == (again / "adapter_model.safetensors").read_bytes()
    losses = {}
    for folder in (full, without):
        losses[folder.name] = mean_losses(influence.from_peft(load_back(folder), run.model.tokenizer), run.tokens)
    assert losses["without"][3] > losses["full"][3]  # the row that was left out
    assert json.loads((without / "retrain.json").read_text())["removed"] == [removed]
    assert torch.equal(run.model.snapshot(), before)
    assert not list(tmp_path.glob("*.partial"))


def test_wrong_requests_write_nothing(run, tmp_path):
    ids = run.train.ids
    for remove, error, sentence in (
        (["nobody"], DataError, "no example has the id 'nobody'"),
        ([ids[0], ids[0]], InputError, "given more than once"),
        (ids, InputError, "nothing is left to train on"),
    ):
        with pytest.raises(error, match=sentence):
            unlearn.retrain(run, remove, out=tmp_path / "out", recipe=unlearn.Recipe(**QUICK))
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="schedule 'step' was given; expected one of linear"):
        unlearn.Recipe(schedule="step")
    (tmp_path / "recipe.json").write_text('{"learning_rate": 1}')
    with pytest.raises(InputError, match="unknown keys: learning_rate"):
        unlearn.Recipe.read(tmp_path / "recipe.json")
