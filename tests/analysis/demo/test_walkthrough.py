"""The demo: counted by hand, and run from end to end."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from rich.console import Console

import influence
from analysis.demo.corpus import FACTS, N_COPIES, N_PEOPLE, N_WRONG
from analysis.demo.walkthrough import demo, hits, opposition, verdict
from influence.errors import InputError


def test_opposition_by_hand():
    """Row 0 (group a, self 4): mean of 1 and -3 over queries 0, 1 is -1; / 2.

    Row 1 (b, self 1): 5.
    """
    scores = np.array([[-1.0, 9.0, 1.0], [3.0, 9.0, 1.0], [9.0, -5.0, 1.0]])
    found = opposition(scores, np.array([4.0, 1.0, 1.0]), ["a", "b", None], ["a", "a", "b"])
    assert found[:2] == pytest.approx([-0.5, 5.0])
    assert math.isnan(found[2])


def test_hits_by_hand():
    """Of 4 ranked rows the two highest are 3 and 0. Wanted 0 and 2: one found. Chance 2 * 2 / 4."""
    assert hits(np.array([3.0, 1.0, 2.0, 4.0, np.nan]), {0, 2}) == (1, 1.0)


@pytest.mark.parametrize(
    ("predicted", "measured", "words"),
    [
        (4.0, 0.2, "20.0 times too large"),
        (0.1, 0.2, "2.0 times too small"),
        (0.1, -0.2, "direction is wrong"),
        (0.1, 0.0, "changed nothing"),
    ],
)
def test_verdict_says_how_far_apart(predicted, measured, words):
    assert words in verdict(
        {"predicted": predicted, "measured": measured, "place": 1, "questions": 60}
    )


def test_refuses_a_directory_that_is_in_use(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(InputError, match="is not empty: give a new directory, or --overwrite"):
        demo(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "keep"
    with pytest.raises(InputError, match="is a file"):
        demo(tmp_path / "mine.txt")


@pytest.mark.slow
def test_demo_end_to_end(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with open(tmp_path / "printed.txt", "w", encoding="utf-8") as file:
        result = demo(tmp_path, overwrite=True, console=Console(file=file, width=100))
    assert (tmp_path / "mine.txt").read_text() == "keep"
    losses = result["losses"]
    assert losses["training rows, right"]["adapter"] < 0.6 * losses["training rows, right"]["base"]
    assert (
        losses["questions (new phrasing)"]["adapter"]
        < 0.7 * losses["questions (new phrasing)"]["base"]
    )
    wrong = result["wrong_rows"]
    assert wrong["chance"] == pytest.approx(N_WRONG**2 / (N_PEOPLE * len(FACTS) * 3 + N_COPIES))
    assert wrong["found"]["opposition to own questions"] >= 4  # 0.44 by chance
    assert result["check"]["predicted"] * result["check"]["measured"] > 0
    printed = (tmp_path / "printed.txt").read_text(encoding="utf-8")
    assert "planted wrong rows among the first 9" in printed
    assert result["check"]["row"] in printed
    run = influence.Run.open(tmp_path / "run")
    again = run.score(influence.read_examples(tmp_path / "queries.jsonl"))
    shown = result["shown"][0]["proponents"][0]
    assert again.top(result["shown"][0]["query"], 1)[0][0].id == shown["id"]
    json.dumps(result)
