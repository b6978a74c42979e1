"""An evaluation of tiny models on disk, for every test of this folder."""

from __future__ import annotations

import warnings

import pytest
import torch

import influence
from analysis.evaluation.answers import read_rows
from analysis.evaluation.evaluation import Options, evaluate
from tests.analysis.evaluation.helpers import with_answers
from tests.conftest import add_lora, build_base
from tests.conftest import rows as made_rows
from tests.helpers import save, write_rows


@pytest.fixture(scope="session")
def evaluated(tmp_path_factory):
    """Base, adapter and reference on disk. Three sets. A record of them."""
    folder = tmp_path_factory.mktemp("evaluated")
    save(folder, layers=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        add_lora(build_base(layers=1, dtype=torch.float32), seed=5).save_pretrained(
            folder / "reference"
        )
    write_rows(folder / "forget.jsonl", with_answers(made_rows(5, seed=1)))
    write_rows(
        folder / "retain.jsonl", [*with_answers(made_rows(1, seed=2)), *made_rows(4, seed=3)]
    )
    write_rows(folder / "holdout.jsonl", made_rows(6, seed=4))
    model = influence.load(folder / "base", folder / "adapter", dtype="float64")
    before = model.snapshot()
    sets = [read_rows(folder / f"{name}.jsonl") for name in ("forget", "retain", "holdout")]
    options = Options(generate=3, max_new_tokens=4, probes=("relearn", "quantise"), token_budget=60)
    record = evaluate(model, *sets, reference=folder / "reference", options=options)
    assert torch.equal(model.snapshot(), before)
    return folder, model, record
