"""What is measured of one set under one adapter."""

from __future__ import annotations

import pytest

import influence
from analysis.evaluation.evaluation import Options, evaluate
from tests.conftest import WORDS


def said(new: list[int]) -> str:
    """The words of tokens. Special ones (0 to 2) say nothing."""
    return "".join(WORDS[token - 3] for token in new if token > 2)


def test_generations_are_compared_row_by_row(evaluated, monkeypatch):
    """6 rows, 3 continued: 0, 2 and 5 (evenly spaced).

    Made to say the right answer, half of it, and nothing: recalls 1, 1/2, 0.

    Half of it backwards: of "red fox runs over" the text "over runs" has 2 of 4 words, and in order
    1 of 4.
    """
    _, model, _ = evaluated
    said = {"r0": "runs and runs", "r2": "over runs", "r5": "birds"}
    data = [
        {"id": f"r{i}", "prompt": f"the {WORDS[i]}", "completion": " red fox runs over"}
        for i in range(6)
    ]
    data[0]["completion"] = " runs and runs"
    lengths = []

    def generate(model, examples, *, max_new_tokens, token_budget):
        lengths.append(max_new_tokens)
        return [said[example.id] for example in examples]

    monkeypatch.setattr("analysis.evaluation.measured.generate", generate)
    record = evaluate(
        model, influence.examples_from_rows(data), options=Options(generate=3, texts=True)
    )
    found = [(row["adapter"]["rouge1"], row["adapter"]["rougeL"]) for row in record["rows"]]
    none = (None, None)
    assert found == [(1, 1), none, (0.5, 0.25), none, none, (0, 0)]
    assert record["sets"]["forget"]["adapter"]["rouge1"] == pytest.approx(1.5 / 3)
    assert record["sets"]["forget"]["adapter"]["rougeL"] == pytest.approx(1.25 / 3)
    assert record["sets"]["forget"]["generated"] == 3
    assert [row["generated"]["adapter"] for row in record["rows"]][:3] == [
        "runs and runs",
        None,
        "over runs",
    ]
    assert lengths == [128]
