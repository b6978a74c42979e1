"""Planted faults: each row is what it is said to be, and no row has two."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from analysis.cleaning.personal import matches
from analysis.demo.corpus import make_corpus
from influence.rows import Example, Examples, examples_from_rows

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import faults as module  # noqa: E402  # pyright: ignore[reportMissingImports]

CORPUS = make_corpus(0)
ROWS, STRANGERS = examples_from_rows(CORPUS.train), examples_from_rows(CORPUS.heldout)
CHATS = Examples(
    Example(
        row.id,
        group=row.group,
        messages=(
            {"role": "user", "content": row.prompt},
            {"role": "assistant", "content": row.completion},
        ),
    )
    for row in ROWS
)


@pytest.mark.parametrize("rows", [ROWS, CHATS], ids=["prompts", "chats"])
def test_every_fault_is_what_it_is_said_to_be(rows):
    asked = range(0, len(rows), 4)
    planted, faults = module.plant(rows, STRANGERS, asked=asked, seed=1)
    before = {row.id: row for row in rows}
    after = {row.id: row for row in planted}
    for id in faults.wrong:
        assert id in {rows.ids[place] for place in asked}
        assert after[id].answer != before[id].answer == faults.right[id]
        assert module.question_of(after[id]) == module.question_of(before[id])
    exact = [copy for copy, of in faults.duplicates if after[copy].answer == after[of].answer]
    assert len(exact) == len(faults.duplicates) / 2
    for other, first in faults.contradictions:
        assert module.question_of(after[other]) == module.question_of(after[first])
        assert after[other].answer != after[first].answer
    assert all(matches(after[id].answer or "") for id in faults.personal)
    assert not any(matches(after[id].answer or "") for id in faults.decoys)
    changed = [*faults.wrong, *faults.personal, *faults.decoys]
    changed += [of for _, of in (*faults.duplicates, *faults.contradictions)]
    assert len(changed) == len(set(changed))
    same = set(before) - set(faults.wrong) - set(faults.personal) - set(faults.decoys)
    assert all(after[id] == before[id] for id in same)
    assert len(planted) == len(rows) + 8 + 6 + 6


def test_one_seed_plants_the_same():
    first, second, third = (module.plant(ROWS, STRANGERS, seed=seed) for seed in (0, 0, 1))
    assert first == second
    assert first != third
