"""An evaluation as a whole: an adapter, a reference, the testbed."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

import influence
from analysis.evaluation.evaluation import Options, evaluate
from influence.errors import AdapterError
from tests.analysis.evaluation.helpers import greedy
from tests.conftest import add_lora, build_base, examples


def test_a_reference_of_another_rank_is_refused(evaluated, tmp_path):
    _, model, _ = evaluated
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        add_lora(build_base(layers=1, dtype=torch.float32), r=3).save_pretrained(tmp_path / "other")
    with pytest.raises(
        AdapterError, match=r"same rank and layers(.|\n)*r is 3 there and 2 in the adapter"
    ):
        evaluate(model, examples(2), reference=tmp_path / "other")


def test_on_the_testbed(testbed):
    """The adapter's known losses, and a greedy answer that another implementation gives as well."""
    model = influence.load(testbed / "base", testbed / "adapter")
    train = influence.read_examples(testbed / "train.jsonl")
    forget, heldout = train[:5], influence.read_examples(testbed / "heldout.jsonl")[:10]
    record = evaluate(
        model, forget, holdout=heldout, options=Options(generate=2, max_new_tokens=12, texts=True)
    )
    known = np.load(testbed / "truth.npz")
    found = [row["adapter"]["loss"] for row in record["rows"] if row["set"] == "forget"]
    np.testing.assert_allclose(found, known["full_train_loss"][:5], rtol=1e-3)
    np.testing.assert_allclose(
        [row["base"]["loss"] for row in record["rows"] if row["set"] == "forget"],
        known["base_train_loss"][:5],
        rtol=1e-3,
    )
    assert record["membership"]["attacks"]["loss"]["adapter"]["auc"] == 1
    ids = model.tokenizer(forget[0].prompt)["input_ids"]
    assert record["rows"][0]["generated"]["adapter"] == model.tokenizer.decode(
        greedy(model.model, ids, 12)
    )
