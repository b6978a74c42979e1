"""An additive world with noise, whose scores, subsets and losses the LDS is tried on."""

from __future__ import annotations

import numpy as np


def world(seed=0, queries=6, train=20, subsets=12, noise=1.0):
    """Scores [Q, n], random halves [S, n], and the losses [S, Q] an additive world with some noise
    has.
    """
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(queries, train))
    masks = rng.random((subsets, train)).argsort(axis=1) < train // 2
    losses = 5 + np.where(masks, 0, 1) @ scores.T + noise * rng.normal(size=(subsets, queries))
    return scores, masks, losses


SCORES, MASKS, LOSSES = world()
