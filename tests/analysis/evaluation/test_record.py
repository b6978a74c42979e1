"""The record of an evaluation: losses of merged models, JSON, nulls with reasons."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

import influence
from analysis.evaluation.answers import read_rows
from analysis.evaluation.evaluation import Options, evaluate
from analysis.evaluation.table import table
from tests.analysis.evaluation.helpers import losses_of, merged, read
from tests.conftest import rows as made_rows


def test_the_record_holds_the_losses_of_merged_models(evaluated):
    folder, model, record = evaluated
    for name in ("forget", "retain", "holdout"):
        data, own = read(folder, name), [row for row in record["rows"] if row["set"] == name]
        assert [row["id"] for row in own] == [row["id"] for row in data]
        for where, adapter in (("base", None), ("adapter", "adapter"), ("reference", "reference")):
            expected = losses_of(merged(folder, adapter), model.tokenizer, data)
            np.testing.assert_allclose([row[where]["loss"] for row in own], expected, rtol=1e-6)
            assert record["sets"][name][where]["loss"] == pytest.approx(np.mean(expected), rel=1e-6)
            if where != "base":
                tokens = [row["tokens"] for row in own]
                weighted = math.exp(np.dot(expected, tokens) / sum(tokens))
                assert record["sets"][name][where]["perplexity"] == pytest.approx(
                    weighted, rel=1e-6
                )
                probability = np.exp(-np.array(expected)).mean()
                assert record["sets"][name][where]["probability"] == pytest.approx(
                    probability, rel=1e-6
                )


def test_the_record_is_json_without_texts(evaluated):
    folder, _, record = evaluated
    text = json.dumps(record, allow_nan=False)
    for name in ("forget", "retain", "holdout"):
        for row in read(folder, name):
            assert not any(word in text for word in row["completion"].split() if len(word) > 4)
    assert json.loads(text) == record
    assert record["adapter"]["digest"] != record["reference"]["digest"]
    assert record["reference"]["path"] == str(folder / "reference")


def test_texts_are_in_the_record_when_asked_for(evaluated):
    folder, model, _ = evaluated
    forget = read_rows(folder / "forget.jsonl")
    record = evaluate(model, forget, options=Options(generate=1, max_new_tokens=3, texts=True))
    first, *others = record["rows"]
    assert [row["completion"] for row in record["rows"]] == [
        example.completion for example in forget.examples
    ]
    assert isinstance(first["generated"]["adapter"], str)
    assert all(row["generated"]["adapter"] is None for row in others)


def test_what_cannot_be_measured_is_null_with_a_reason(evaluated):
    _, model, _ = evaluated
    record = evaluate(
        model, influence.examples_from_rows(made_rows(3)), options=Options(generate=0)
    )
    for name in (
        "reference",
        "kl",
        "membership",
        "forget_quality",
        "generalized_exposure",
        "relative_exposure",
        "utility",
    ):
        assert record[name] is None
        assert name in record["notes"]
    for name in ("retain", "holdout"):
        assert record["sets"][name] is None
        assert f"sets.{name}" in record["notes"]
    assert record["sets"]["forget"]["reference"] is None
    assert record["sets"]["forget"]["adapter"]["rougeL"] is None
    assert record["notes"]["sets.forget.rougeL"] == "nothing was generated (generate is 0)"
    assert record["probes"] == {"relearn": None, "quantise": None}
    assert "probes.relearn" in record["notes"]
    text = table(record)
    assert "no reference adapter was given" in text
    assert "not asked for" not in text
    assert "reference " not in text.splitlines()[0]
