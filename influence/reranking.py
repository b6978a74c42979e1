"""The first rows of every ranking again, with whole gradients.

Scores that came from rows in few bytes order the strongest rows nearly rightly. Here the raw scores
of those rows are computed again, of gradients that are whole, and take the place of the others
before credit is shared: for K rows a query at most 2 K Q rows are run once more, not all n.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from influence import distributed
from influence.asked import Asked
from influence.at_point import memory_chunks, queries_at_once
from influence.curvature.base import Invertible
from influence.progress import say
from influence.scorefile import COMBINED
from influence.setting import Setting


def first_rows(
    parts: np.ndarray, combine: Callable[[np.ndarray], np.ndarray], count: int
) -> np.ndarray:
    """Rows among the `count` highest or lowest of any query, in order, of the points' own scores
    `[points, Q, n]`.
    """
    found: set[int] = set()
    for start in range(0, parts.shape[1], COMBINED):
        scores = combine(parts[:, start : start + COMBINED].astype(np.float64))
        last = min(count, scores.shape[1]) - 1
        for part in (
            np.argpartition(scores, last, 1)[:, : last + 1],
            np.argpartition(-scores, last, 1)[:, : last + 1],
        ):
            found.update(part.ravel().tolist())
    return np.array(sorted(found), dtype=np.int64)


def exact_parts(setting: Setting, asked: Asked, rows: np.ndarray) -> np.ndarray:
    """`w_i grad m(q)^T M grad l_i` at each point, `[points, Q, k]` float64, of some `rows` [k] and
    their whole gradients. Each process does some of the rows.
    """
    run, own = setting.run, distributed.shard(np.arange(len(rows)))
    found = np.zeros((len(setting.points), len(asked), len(rows)))
    at_once, every = queries_at_once(run, 4), np.arange(len(asked))
    say(f"reranking: {len(rows)} rows are run again at each point")
    for number, (point, operator) in enumerate(setting.each()):
        assert isinstance(operator.curvature, Invertible)
        for queries in np.array_split(every, -(-len(asked) // at_once)):
            solved = operator.curvature.solve(asked.gradients(point, queries), operator.lam)
            for some in memory_chunks(run, len(own)) if len(own) else []:
                part = own[some]
                products = solved @ point.gradients_of(rows[part]).T
                weights = run.weights[rows[part]]
                found[number][np.ix_(queries, part)] = products.double().cpu().numpy() * weights
    return distributed.add_up(torch.from_numpy(found)).numpy()
