"""A local retraining by plain loops: near rows, trainings row by row, what is then expected."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import torch

from unlearn.retraining.recipe import Recipe


def nearest(
    rows: Sequence[Sequence[int]], wanted: Sequence[int], among: Sequence[int], count: int
) -> list[int]:
    """Positions `among`, ascending, of the rows of tokens nearest to any of those at `wanted`.

    TF-IDF by its formulas and the cosine: first the nearest of each, then the second of each.
    """
    holding = Counter(token for row in rows for token in set(row))

    def weights(row: Sequence[int]) -> dict[int, float]:
        """The row's weights, of length 1."""
        found = {
            token: (1 + math.log(times)) * (1 + math.log((1 + len(rows)) / (1 + holding[token])))
            for token, times in Counter(row).items()
        }
        length = math.sqrt(sum(value**2 for value in found.values()))
        return {token: value / length for token, value in found.items()}

    mine, best = [weights(row) for row in rows], {}
    for row in wanted:
        cosines = {
            k: round(sum(mine[k].get(t, 0) * x for t, x in mine[row].items()), 11) for k in among
        }
        for rank, k in enumerate(sorted(among, key=lambda k: (-cosines[k], k))):
            best[k] = min(best.get(k, (rank, 0.0)), (rank, -cosines[k]))
    return sorted(best, key=lambda k: (best[k], k))[:count]


def train_afresh(
    leaves: Sequence[torch.Tensor],
    loss_sum: Callable[[int], torch.Tensor],
    counts: Sequence[int],
    rows: Sequence[int],
    whole: int,
    recipe: Recipe,
    repeat: int = 0,
) -> None:
    """Draw an adapter anew and train it on `rows`, by the recipe of a training on `whole` rows.

    `leaves` are its matrices A and B, layer by layer, `loss_sum` a row's loss summed over its
    `counts` tokens. Of the linear schedule, without warm-up, clipping and dropout.
    """
    seed = recipe.seed + repeat
    drawn, order = (torch.Generator().manual_seed(seed) for _ in range(2))
    with torch.no_grad():
        for a, b in zip(leaves[0::2], leaves[1::2], strict=True):
            a.uniform_(-1 / math.sqrt(a.shape[1]), 1 / math.sqrt(a.shape[1]), generator=drawn)
            b.zero_()
    size = max(1, round(recipe.batch_size * math.sqrt(min(1, len(rows) / whole))))
    steps = recipe.epochs * math.ceil(len(rows) / size)
    optimizer = torch.optim.AdamW(
        leaves, betas=recipe.betas, eps=recipe.eps, weight_decay=recipe.weight_decay
    )
    batches = [
        [rows[i] for i in part]
        for _ in range(recipe.epochs)
        for part in torch.randperm(len(rows), generator=order).split(size)
    ]
    for step, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = recipe.lr * (1 - step / steps)
        optimizer.zero_grad()
        loss = sum(loss_sum(row) for row in batch) / sum(counts[row] for row in batch)
        loss.backward()
        optimizer.step()


def expected(now: np.ndarray, before: np.ndarray, after: Sequence[np.ndarray]) -> np.ndarray:
    """What rows would lose unseen, one after the other."""
    found = []
    for i, (l_now, l_before) in enumerate(zip(now, before, strict=True)):
        l_after = sum(losses[i] for losses in after) / len(after)
        found.append(max(0.0, l_after + (l_now - l_before) * min(1.0, l_before / l_after)))
    return np.array(found)
