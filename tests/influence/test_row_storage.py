"""Which rows' gradients are on disk, by curvature and option."""

from __future__ import annotations

import pytest

from influence import EKFAC, GGN, KFAC, Fisher
from influence.row_storage import Storage, keeps_for_good, keeps_sampled


@pytest.mark.parametrize(
    ("curvature", "storage", "meanwhile", "for_good"),
    [
        (EKFAC(), Storage(True, "full", 0), True, False),
        (EKFAC(), Storage(True, "auto", 19), False, False),  # gradients and as much again: 20
        (EKFAC(), Storage(True, "auto", 20), True, False),
        (EKFAC(), Storage(True, "auto", 0, growable=True), True, True),
        (EKFAC(), Storage(False, "none", 100, growable=True), False, False),
        (KFAC(), Storage(True, "full", 0, growable=True), False, False),
        (GGN(), Storage(True, "full", 0, growable=True), False, False),
        (Fisher(), Storage(False, "none", 0), True, True),
    ],
)
def test_sampled_rows_are_kept_for_a_second_look_or_for_good(
    curvature, storage, meanwhile, for_good
):
    assert keeps_sampled(curvature, storage, 10) is meanwhile
    assert (meanwhile and keeps_for_good(curvature, storage)) is for_good
