"""Which wide sides the LoRA leaves have, and how many directions are kept of each.

The whole second moment of a side of width d takes `d^2` numbers. A sketch of k directions takes
`2 d k` while it is summed up and `d k` afterwards, and of what lies outside them it knows the mean
eigenvalue alone. That costs accuracy where spectra are flat (benchmarks/README.md, "Sketched
factors"), so that sides are sketched where memory ends, not from a fixed width on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from influence.adapter import AdaptedModel
from influence.batches import collate
from influence.loss import supervised_logits
from influence.tokens import TokenizedExamples

#: Wider sides are sketched whatever the memory: the eigendecomposition of one takes d^3.
WIDEST_WHOLE = 8192
#: No sketch is raised beyond this share of its width, where it takes half the memory of the whole
#: second moment, nor beyond so many directions: a token costs `4 d k` operations.
LARGEST_SHARE, MOST_DIRECTIONS = 0.25, 2048


def directions(
    widths: Mapping[int, int], max_width: int, rank: int, itemsize: int, budget: float
) -> dict[int, int]:
    """Directions that are kept of each side, by its number: its width where it is whole.

    Sides of at most `max_width` are whole, and no sketch has fewer than `rank` directions, whatever
    the `budget` [bytes]. What it leaves makes other sides whole, the narrowest first and all of one
    width or none, and then raises the ranks of the others in proportion to their widths.
    """
    kept = {i: d if d <= max_width or d <= rank else rank for i, d in widths.items()}
    left = budget - sum(_bytes(widths[i], k, itemsize) for i, k in kept.items())
    alike: dict[int, list[int]] = defaultdict(list)
    for number, k in kept.items():
        if k < widths[number] <= WIDEST_WHOLE:
            alike[widths[number]].append(number)
    for width in sorted(alike):
        cost = len(alike[width]) * (_bytes(width, width, itemsize) - _bytes(width, rank, itemsize))
        if cost > left:
            break
        left -= cost
        kept |= dict.fromkeys(alike[width], width)
    sketched = [i for i, k in kept.items() if k < widths[i]]
    share = max(0.0, left) / max(1, sum(2 * itemsize * widths[i] ** 2 for i in sketched))
    for number in sketched:
        width = widths[number]
        most = min(int(LARGEST_SHARE * width), MOST_DIRECTIONS)
        kept[number] = max(rank, min(rank + int(share * width), most))
    return kept


def _bytes(width: int, k: int, itemsize: int) -> int:
    """What a second moment takes while it is summed up: a sketch, and its test matrix."""
    return itemsize * (width**2 if k == width else 2 * width * k)


def note(sides: Sequence[tuple[int, int]], outside: Sequence[float]) -> str | None:
    """What a user should know of sketched sides, None where there are none.

    `sides` are (width, directions) of every leaf, `outside` the share of its trace that lies
    outside the directions.
    """
    shares = [share for (d, k), share in zip(sides, outside, strict=True) if k < d]
    if not shares:
        return None
    kinds = sorted({side for side in sides if side[1] < side[0]})
    names = ", ".join(f"{k:,} directions of width {d:,}" for d, k in kinds)
    return (
        f"note: the curvature of {len(shares)} of {len(sides)} LoRA matrices is sketched ({names}):"
        f" {sum(shares) / len(shares):.0%} of its trace, {max(shares):.0%} at most, lies outside, "
        "where directions share one eigenvalue. A larger memory_share of the curvature keeps more"
    )


def shared_inputs(model: AdaptedModel, tokens: TokenizedExamples) -> list[int]:
    """For each leaf, the first leaf whose wide side sees the very same tensor.

    The query, key and value projections do, and the gate and up projections.

    Found by running the shortest row once and comparing the layers' inputs; only A leaves can
    share.
    """
    seen: list[tuple[int, Tensor]] = []
    wide_of = list(range(len(model.space.leaves)))

    def note(number: int) -> Callable[..., None]:
        def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            for first, tensor in seen:
                place = (tensor.data_ptr(), tensor.shape, tensor.stride())
                if tensor is x or place == (x.data_ptr(), x.shape, x.stride()):
                    wide_of[number] = first
                    return
            seen.append((number, x))  # kept alive, so that no address is used twice

        return hook

    handles = [
        site.layer.register_forward_pre_hook(note(2 * i), with_kwargs=True)
        for i, site in enumerate(model.sites)
        if not site.parameter  # nested around one module, each with an input of its own
    ]
    try:
        with model.evaluating(), torch.no_grad():
            shortest = np.array([int(np.argmin(tokens.lengths))])
            batch = collate(tokens, shortest, pad_id=model.pad_id, device=model.device)
            supervised_logits(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return wide_of
