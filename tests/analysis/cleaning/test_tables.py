"""What a person reads: the first rows of each reason, and a row's text that moves no cursor."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

import influence
from analysis.cleaning import clean
from analysis.cleaning.tables import (
    FORECAST,
    SHOWN,
    applied_lines,
    applied_table,
    lines,
    predicted,
    table,
)


def text_of(part, width=120):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(part)
    return console.export_text()


def test_the_first_rows_of_each_reason(run):
    result = clean(run)
    text = text_of(table(result))
    for found in result.found.values():
        assert text.count(found.reason + " ") >= min(SHOWN, len(found.findings))
    said = lines(result, Path("out"))
    assert "harms is left out: no good rows were given (--queries FILE)" in said
    assert any(line.startswith("out/rows.csv: write remove") for line in said)
    assert not any(FORECAST in line for line in said)


def test_a_prediction_is_never_shown_without_its_warning(run, world):
    result = clean(run, influence.read_examples(world / "good.jsonl"))
    said = lines(result, Path("out"))
    places = [at for at, line in enumerate(said) if "mean loss is predicted to" in line]
    assert places
    assert FORECAST in said[places[-1] + 1]


def test_a_predicted_harm_is_called_a_rise():
    part = {"rows": 3, "before": 0.5, "gain": -0.2, "low": -1.1, "high": -0.1}
    assert predicted("all suggested rows", part) == (
        "without all suggested rows (3) the good rows' mean loss is predicted to rise by 0.2000 "
        "[0.1000, 1.1000] from 0.5000 nats per token: look at each row before it goes"
    )
    fall = predicted("the rows that harm", {**part, "gain": 0.2, "low": -0.1, "high": 0.3})
    assert "to fall by 0.2000 [-0.1000, 0.3000] from 0.5000 nats per token" in fall
    assert "look at" not in fall


def test_a_gain_without_interval_or_prediction():
    part = {"rows": 1, "before": 1.0, "after": 0.75, "gain": 0.25, "low": None, "high": None}
    record = {
        "level": 0.95,
        "sets": {"good": {**part, "predicted": None}},
        "removed": ["a", "b"],
        "relabelled": {"c": "0"},
        "rows": 7,
        "seeds": 2,
        "adapter": "place",
    }
    text = text_of(applied_table(record))
    assert "good rows (1)" in text
    assert "+0.2500" in text
    assert "None" not in text
    assert applied_lines(record) == [
        "2 rows removed, 1 relabelled, 7 trained on; 2 seeds, each a training on all rows and one on "
        "these",
        "the good rows made the list: what they gain says less than held-out rows do",
        "predicted is what influence says if the relabelled rows went too",
        "place: the cleaned adapter",
    ]
    record["sets"]["good"]["predicted"] = {"gain": 0.01}
    warned = f"predicted is {FORECAST}; gain is what was measured"
    assert applied_lines(record)[2] == warned
    record["sets"]["heldout"] = {**part, "predicted": None, "low": -0.1, "high": 0.0}
    said = "held-out rows: the interval holds 0, so that no difference is shown"
    assert applied_lines(record)[1] == said
    record["sets"]["heldout"]["low"] = record["sets"]["heldout"]["high"] = 0.1
    assert said not in applied_lines(record)
