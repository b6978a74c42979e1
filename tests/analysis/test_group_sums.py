"""Sums over groups against loops, in blocks, and from files."""

from __future__ import annotations

import tracemalloc

import h5py
import numpy as np
import pytest

from analysis import group_sums as module
from analysis.group_sums import group_sums

Q, N, G = 7, 23, 4


@pytest.fixture
def world():
    rng = np.random.default_rng(0)
    return rng.normal(size=(Q, N)).astype(np.float32), rng.integers(-1, G - 1, size=N)


def by_hand(values, members):
    return [[sum(map(float, line[members == g])) for g in range(G)] for line in values]


def test_sums_are_those_of_a_loop(world, tmp_path, monkeypatch):
    """The last group has no rows, and some rows have no group."""
    values, members = world
    expected = by_hand(values, members)
    np.testing.assert_allclose(group_sums(values, members, G), expected, rtol=1e-12, atol=1e-15)
    with h5py.File(tmp_path / "f.h5", "w") as file:
        file["scores"] = values
        monkeypatch.setattr(module, "AT_ONCE", 2 * N)  # two queries at a time
        found = group_sums(file["scores"], members, G)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-15)
    assert group_sums(values[:0], members, G).shape == (0, G)


def test_what_is_not_known_is_so_of_its_own_group_alone(world):
    values, members = world
    row = int(np.flatnonzero(members == 1)[0])
    values[2, row] = np.nan
    assert np.argwhere(np.isnan(group_sums(values, members, G))).tolist() == [[2, 1]]


def test_many_groups_take_no_matrix_of_rows_and_groups():
    """Each row a group of its own: 20,000 x 20,000 numbers would take 3.2 GB."""
    n = 20_000
    tracemalloc.start()
    found = group_sums(np.ones((2, n), np.float32), np.arange(n), n)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (found == 1).all()
    assert peak < 50e6
