"""Rows that are measured beside the changed ones."""

from __future__ import annotations

import numpy as np

from tests.conftest import examples
from unlearn.record import sample


def test_edits_of_the_same_rows_measure_the_same_untouched_ones(monkeypatch):
    """Removing row 0 or row 3 leaves samples of 5 that differ by those rows at most."""
    monkeypatch.setattr(sample, "GUARD_ROWS", 5)
    rows, n = examples(12), 12
    samples = [
        set(sample.guard_sample(rows, np.setdiff1d(np.arange(n), gone), 0).tolist())
        for gone in ([0], [3])
    ]
    whole = set(sample.guard_sample(rows, np.arange(n), 0).tolist())
    assert all(len(drawn) == 5 for drawn in samples)
    assert samples[0] >= whole - {0}
    assert samples[1] >= whole - {3}


def test_another_seed_draws_other_rows(monkeypatch):
    monkeypatch.setattr(sample, "GUARD_ROWS", 5)
    rows = examples(12)
    draws = [sample.guard_sample(rows, np.arange(12), seed).tolist() for seed in range(4)]
    assert any(drawn != draws[0] for drawn in draws[1:])


def test_copies_of_a_changed_row_are_no_measure_of_damage(monkeypatch):
    monkeypatch.setattr(sample, "GUARD_ROWS", 5)
    rows = examples(12)
    copied = int(sample.guard_sample(rows, np.arange(12), 0)[0])
    gone = {rows[copied].content_hash}
    assert copied not in sample.guard_sample(rows, np.arange(12), 0, gone).tolist()
