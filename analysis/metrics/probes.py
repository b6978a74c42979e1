"""Is it forgotten or only hidden? Two cheap attempts to bring forgotten rows back.

* `relearn`: train on a few of the forgotten rows and watch the *others*. What was only hidden comes
  back with them, faster than in an adapter that never saw the rows (Lynch et al. 2024, arXiv
  2402.16835; Hu et al. 2024, arXiv 2406.13356), so the curve says most beside that of a retrained
  adapter.
* `quantise`: round the edited weights. An edit that moved them by less than the grid is rounded
  away, and the old answers with it come back (Zhang et al. 2024, arXiv 2410.16454).

Both leave the model as it was, bit for bit. Losses are mean cross-entropies per completion token,
nats; the mean of a set is that of its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from influence.adapter import AdaptedModel, Site
from influence.base_files import DTYPES
from influence.cost import Cost
from influence.errors import InputError, refuse
from influence.gradients import loss_sum_gradient, replaced_forwards
from influence.loss import mean_losses
from influence.progress import track
from influence.tokens import TokenizedExamples

#: A relearning curve has at most so many points after its start.
_POINTS = 10


# ---- relearning ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Relearned:
    """What a few steps on a few forgotten rows bring back.

    Attributes
    ----------
    steps : int array [m]
        After how many steps was measured; 0 is the adapter as it was given.
    trained, held_back : array [m]
        Mean loss of the rows that were trained on, and of the other forgotten rows.
    values : array [m, h]
        Loss of every row that was held back.
    trained_ids, held_back_ids : list of str
        Who they are; k and h of them.
    level : float or None
        The loss at which the rows held back count as back.
    value : float or None
        Steps until their mean is at that level (linear between measurements); None if it was not
        reached, or none was given.
    """

    steps: np.ndarray
    trained: np.ndarray
    held_back: np.ndarray
    values: np.ndarray = field(repr=False)
    trained_ids: list[str] = field(repr=False)
    held_back_ids: list[str] = field(repr=False)
    level: float | None
    value: float | None


def relearn(
    model: AdaptedModel,
    forget: TokenizedExamples,
    *,
    k: int | None = None,
    steps: int = 20,
    lr: float = 1e-3,
    level: float | None = None,
    seed: int = 0,
    token_budget: int = 4096,
) -> Relearned:
    """Fine-tune the adapter on `k` of the forget rows and measure the others.

    The adapter is put back afterwards.

    Each step is one of Adam (Kingma and Ba 2015; default betas, no weight decay, dropout off) down
    the gradient of the mean of the k rows' mean losses. The rows are drawn by `seed`; k is a fifth
    of them unless given. Losses are measured at the start, at the end and at up to nine evenly
    spaced steps between.

    Raises `InputError` unless at least one row is trained on and one held back, and for steps or lr
    that are not positive.
    """
    k = max(1, len(forget) // 5) if k is None else k
    if not 1 <= k < len(forget):
        raise InputError(
            f"relearning on {k} of {len(forget)} forget rows was asked for; expected at least one "
            "to train on and one to hold back"
        )
    if steps < 1 or not 0 < lr < np.inf:
        raise InputError(
            f"relearning for {steps} steps at a rate of {lr} was asked for; expected both above 0"
        )
    order = np.random.default_rng(seed).permutation(len(forget))
    chosen, rest = forget.select(np.sort(order[:k])), forget.select(np.sort(order[k:]))
    weights = 1 / (k * chosen.counts)
    measured = {int(step) for step in np.linspace(0, steps, min(steps, _POINTS) + 1).round()}
    theta = model.snapshot()
    optimiser = torch.optim.Adam([theta], lr=lr)
    at, trained, values = [], [], []
    for step in track(range(steps + 1), "learning forget rows again"):
        with model.at(theta):
            if step in measured:
                at.append(step)
                trained.append(mean_losses(model, chosen, token_budget=token_budget).mean())
                values.append(mean_losses(model, rest, token_budget=token_budget))
            if step < steps:
                theta.grad, _ = loss_sum_gradient(
                    model, chosen, weights, token_budget=token_budget, cost=Cost()
                )
        if step < steps:
            optimiser.step()
    table = np.array(values)
    back = None if level is None else crossing(at, table.mean(1), level)
    return Relearned(
        np.array(at),
        np.array(trained),
        table.mean(1),
        table,
        list(chosen.ids),
        list(rest.ids),
        level,
        back,
    )


def crossing(steps: ArrayLike, losses: ArrayLike, level: float) -> float | None:
    """The first step at which a curve is at or below `level`, linear between its points.

    None where it never is.

    `steps` [m] rise; `losses` [m]. A curve that starts there crosses at its first step.
    """
    at, curve = np.asarray(steps, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    if (
        at.shape != curve.shape
        or at.ndim != 1
        or not len(at)
        or not np.isfinite([*at, *curve, level]).all()
    ):
        raise InputError(
            f"a curve of {at.shape} steps and {curve.shape} losses with level {level} was given; "
            "expected as many steps as losses, at least one, all finite"
        )
    below = np.flatnonzero(curve <= level)
    if not len(below):
        return None
    first = int(below[0])
    if first == 0:
        return float(at[0])
    share = (curve[first - 1] - level) / (curve[first - 1] - curve[first])
    return float(at[first - 1] + share * (at[first] - at[first - 1]))


# ---- quantisation --------------------------------------------------------------------------------


@contextmanager
def quantise(
    model: AdaptedModel, *, bits: int = 4, group: int | None = None
) -> Iterator[AdaptedModel]:
    """Adapted layers compute with the effective weight `W + s B A`, `rounded`, within the block.

    As if the adapter had been merged and the layer quantised, weights only. No weight is written:
    each forward rounds anew, so the block costs no memory for a second copy, and the layers follow
    the adapter if it moves meanwhile. Layers without an adapter stay as they are, and so do biases.

    Raises `InputError` for bits outside 2 ... 8 or a group below 1; `AdapterError` where an adapted
    layer is quantised already.
    """
    _check_grid(bits, group)
    refuse(
        "the quantisation probe rounds weights that are floating point",
        [
            f"{site.name}: its weights are {site.layer.get_base_layer().weight.dtype} already; "
            "load a base that is not quantised"
            for site in model.sites
            if not site.parameter
            and site.layer.get_base_layer().weight.dtype not in DTYPES.values()
        ]
        + [
            f"{site.name}: fused experts ({site.parameter}) are not rounded here"
            for site in model.sites
            if site.parameter
        ],
    )
    forwards: dict[nn.Module, Callable[..., Any]] = {
        site.layer: partial(_rounded_forward, site, bits, group) for site in model.sites
    }
    with replaced_forwards(forwards):
        yield model


def rounded(weight: Tensor, bits: int, group: int | None = None) -> Tensor:
    """Round a weight matrix to a symmetric grid of so many bits.

    `q d`, with q the whole number nearest to `w / d` and `|q| <= 2^(bits - 1) - 1`.

    The step `d = max |w| / (2^(bits - 1) - 1)` belongs to an output channel (a row of `weight`
    [d_out, d_in]) or, with `group`, to each run of so many of its inputs; the last run may be
    shorter.
    """
    _check_grid(bits, group)
    most = 2 ** (bits - 1) - 1
    parts = []
    for part in weight.split(group or weight.shape[1], dim=1):
        step = part.abs().amax(dim=1, keepdim=True) / most
        step = torch.where(step > 0, step, 1.0)  # a row of zeros stays one
        parts.append((part / step).round() * step)
    return torch.cat(parts, dim=1)


def _check_grid(bits: int, group: int | None) -> None:
    if not 2 <= bits <= 8 or (group is not None and group < 1):
        raise InputError(
            f"quantisation to {bits} bits in groups of {group} was asked for; expected 2 to 8 "
            "bits, usually 8 or 4, and groups of at least one input (None: whole channels)"
        )


def _rounded_forward(
    site: Site, bits: int, group: int | None, x: Tensor, *_: Any, **__: Any
) -> Tensor:
    base = site.layer.get_base_layer()
    weight = (
        base.weight.T if hasattr(base, "nf") else base.weight
    )  # Conv1D holds its weight as [in, out]
    effective = weight.to(site.B.weight.dtype) + site.scaling * (site.B.weight @ site.A.weight)
    return nn.functional.linear(x, rounded(effective, bits, group).to(x.dtype), base.bias)
