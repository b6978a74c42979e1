"""The benchmark of unseen rows: which rows each world's sets hold, and what its last line counts."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from analysis.demo.corpus import fact_of, make_corpus
from influence.rows import examples_from_rows
from tests.conftest import rows
from tests.helpers import write_rows

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import unseen  # noqa: E402  # pyright: ignore[reportMissingImports]


@pytest.fixture(scope="module")
def demo():
    """Ids of the sets of the demo's world, and its corpus."""
    corpus = make_corpus(unseen.DEMO_SEED)
    train = examples_from_rows(corpus.train)
    sets = unseen.sets_of("demo", train)
    return {name: [train.ids[row] for row in rows] for name, rows in sets.items()}, corpus


def test_the_demo_s_sets_are_of_people(demo):
    sets, corpus = demo
    person = {row["id"]: row.get("group") for row in corpus.train}
    whole = sets["a person"]
    assert {person[id] for id in whole} == {person[whole[0]]}
    assert set(whole) == {id for id in person if person[id] == person[whole[0]]}
    half = set(sets["half of a person, every second"])
    assert half < set(whole)
    # no fact of the half goes whole: another wording of it stays
    assert all({id for id in whole if fact_of(id) == fact_of(gone)} - half for gone in half)
    assert len({person[id] for id in sets["one of each of ten people"]}) == 10
    assert len({fact_of(id) for id in sets["two of a person"]}) == 2


def test_copies_of_the_demo_s_set_stay(demo):
    sets, corpus = demo
    content = {row["id"]: (row["prompt"], row["completion"]) for row in corpus.train}
    gone = sets["five whose copies stay"]
    stays = {content[id] for id in content if id not in gone}
    assert len(gone) == 5
    assert {content[id] for id in gone} <= stays


def test_the_large_world_s_rows_come_in_the_testbed_s_form(tmp_path, monkeypatch):
    monkeypatch.setattr(unseen, "MORE_ROWS", 2)
    for name, seed in (("train", 0), ("heldout", 1)):
        there = [{**row, "id": f"{name}-{row['id']}"} for row in rows(3, seed=seed)]
        write_rows(tmp_path / f"{name}.jsonl", there)
    lines = [json.dumps({"question": f"Why {k}?", "answer": f"So {k}."}) for k in range(3)]
    (tmp_path / "full.json").write_text("\n".join(lines))
    found = unseen.large_rows(tmp_path, tmp_path)
    assert [id.split("-")[0] for id in found.ids] == [
        *["train"] * 3,
        *["heldout"] * 3,
        *["tofu"] * 2,
    ]
    assert (found[-1].prompt, found[-1].completion) == ("Q: Why 1?\nA:", " So 1.")


def test_the_last_line_counts_intervals_and_edits_that_are_nearer():
    def entry(expected, retrained, edited):
        return {
            "expected": expected,
            "forget": {"retrained": retrained},
            "KL": {"before": 0.5, "edited": edited},
        }

    found = unseen.summary(
        [
            entry([1.1, 1.0, 1.2], 1.0, 0.4),  # 10 % too high, at the interval's end
            entry([1.7, 1.5, 1.9], 2.0, 0.6),  # 15 % too low, outside
            entry([2.04, 1.9, 2.2], 2.0, 0.1),  # 2 %
        ]
    )
    assert found == (
        "3 sets: error 10.0% (median), 15.0% (largest); 2 intervals hold the truth; 2 edits are "
        "nearer to it than before"
    )
    assert np.isclose(unseen.error_of(entry([1.7, 1.5, 1.9], 2.0, 0.6)), -0.15)
