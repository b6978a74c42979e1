"""How much of a row can be drawn out of the model: extraction strength and exact memorization.

Both are read off the logits of the right text: `right[i]` [T_i] is True where the most likely next
token is the row's own, all tokens before it being the row's own too.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from analysis.metrics.likelihood import accuracy, checked_tokens


def extraction_strength(right: Sequence[ArrayLike]) -> NDArray[np.float64]:
    """`1 - k / T` of every row [n], with k completion tokens to be given before the rest follows.

    The fewest after which greedy decoding says the rest word for word.

    1: the prompt alone is enough (k = 0); 0: even the last token is wrong (k = T), so nothing can
    be drawn out (Carlini et al. 2021, arXiv 2012.07805, as a share). Versions that search k below T
    only never reach 0. The formula is that of the record of edits,
    `unlearn.record.losses.strength`.
    """
    from unlearn.record.losses import (
        strength,
    )  # here: the metrics that need arrays alone do not wait for torch

    return np.array([strength(row) for row in checked_tokens(right, "right", bool)])


def exact_memorization(right: Sequence[ArrayLike]) -> NDArray[np.float64]:
    """Share of a row's completion tokens that are greedily right, [n].

    Tirumala et al. 2022, arXiv 2205.10770.
    """
    return accuracy(right).values
