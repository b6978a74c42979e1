"""Groups of rows of one difficulty, and random groups of the same sizes to compare them with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from influence.errors import InputError

#: Random partitions that groups of one difficulty are compared with: a choice.
MIXTURES = 3


def by_difficulty(names: Sequence[str], steps: ArrayLike, parts: int = 3) -> dict[str, list[str]]:
    """Groups `part 1` (fewest steps) to `part K` of nearly equal size.

    By measured or forecast steps [n]; infinite ones are last.
    """
    steps = np.asarray(steps, dtype=np.float64)
    if steps.shape != (len(names),) or np.isnan(steps).any():
        raise InputError(
            f"steps of shape {steps.shape} were given for {len(names)} rows; expected one number "
            "each"
        )
    if not 2 <= parts <= len(names):
        raise InputError(
            f"{parts} parts of {len(names)} rows were asked for; expected 2 to {len(names)}"
        )
    split = np.array_split(np.argsort(steps, kind="stable"), parts)
    return {f"part {k + 1}": [str(names[i]) for i in rows] for k, rows in enumerate(split)}


def mixtures(
    groups: Mapping[str, Sequence[str]], count: int = MIXTURES, seed: int = 0
) -> dict[str, list[str]]:
    """The same rows in random groups of the same sizes, `count` times: `mixture M, part K`."""
    names: list[str] = [name for group in groups.values() for name in group]
    ends = np.cumsum([len(group) for group in groups.values()])[:-1]
    mixed: dict[str, list[str]] = {}
    for m in range(count):
        order = np.random.default_rng([seed, m]).permutation(len(names))
        for k, rows in enumerate(np.split(order, ends)):
            mixed[f"mixture {m + 1}, part {k + 1}"] = [names[i] for i in rows.tolist()]
    return mixed
