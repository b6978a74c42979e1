"""The factor of measured edits: measured over predicted rise, through the origin."""

from __future__ import annotations

import numpy as np
import pytest

from influence.calibration import Edits


def test_the_factor_and_the_selectivity_of_edits_by_hand():
    """Two edited rows among three probes: predicted rises 1 and 2, measured 3 and 4.

    factor = (1 * 3 + 2 * 4) / (1 + 4) = 2.2; the other changes are 1, 1, 2, 0, their mean is 1,
    and the mean rise of the edited rows 3.5.
    """
    predicted = np.array([[1.0, 0.0], [0.0, 2.0], [0.5, 0.5]])
    measured = np.array([[3.0, -1.0], [1.0, 4.0], [-2.0, 0.0]])
    edits = Edits(np.array([4, 7]), np.array([4, 7, 9]), np.ones(2), predicted, measured)
    assert edits.factor == pytest.approx(2.2)
    assert edits.selectivity == pytest.approx(3.5)
