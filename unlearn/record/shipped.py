"""What an edit is worth once it is merged into the base and rounded to bfloat16, as models ship.

An edit moves the adapter by a small share of its length, and a merged weight keeps eight bits: of a
small change some is rounded away. So the losses are measured on the merged weights too, and it is
said how much of the change is left in them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from influence.adapter import AdaptedModel, Site
from influence.cost import Cost
from influence.shared_rows import shared_losses
from influence.tokens import TokenizedExamples

#: What merged weights are rounded to.
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Shipped:
    """Mean losses with merged and rounded weights, nats per token, and what rounding left.

    Attributes
    ----------
    edited, retained : (float, float) or None
        Before and after the edit; None where there are no such rows.
    kept : float
        Length of the change of the rounded weights along the change that was meant, over the
        latter's length: 1 is all of it, 0 none.
    """

    edited: tuple[float, float] | None
    retained: tuple[float, float] | None
    kept: float


def as_shipped(
    model: AdaptedModel,
    before: Tensor,
    after: Tensor,
    edited: TokenizedExamples,
    retained: TokenizedExamples,
    *,
    token_budget: int,
    cost: Cost,
) -> Shipped | None:
    """Measure an edit from `before` to `after` [P] on merged weights rounded to bfloat16.

    None for bases whose weights cannot be replaced: quantized ones, and fused experts. The model is
    afterwards what it was, bit for bit. The adapted layers' weights are held twice meanwhile, one
    layer's at a time on the device.
    """
    if not all(_replaceable(site) for site in model.sites):
        return None
    dots = lengths = 0.0
    for number in range(len(model.sites)):
        first, last = (_merged(model, number, theta) for theta in (before, after))
        meant = last - first
        got = last.to(DTYPE).to(meant) - first.to(DTYPE).to(meant)
        dots += float((meant * got).sum(dtype=torch.float64))
        lengths += float(meant.square().sum(dtype=torch.float64))
    losses: dict[str, list[float]] = {"edited": [], "retained": []}
    for theta in (before, after):
        with merged(model, theta):
            for name, tokens in (("edited", edited), ("retained", retained)):
                if len(tokens):
                    cost.forwards += len(tokens)
                    found = shared_losses(model, tokens, token_budget=token_budget)
                    losses[name].append(float(found.mean()))
    pairs = {name: (pair[0], pair[1]) if pair else None for name, pair in losses.items()}
    return Shipped(**pairs, kept=dots / lengths if lengths else 1.0)


def _replaceable(site: Site) -> bool:
    """Whether the layer has a plain floating-point weight, which a merge would replace."""
    if site.parameter:
        return False
    weight = getattr(site.layer.get_base_layer(), "weight", None)
    return isinstance(weight, Tensor) and type(weight.data) is Tensor and weight.is_floating_point()


def _merged(model: AdaptedModel, number: int, theta: Tensor) -> Tensor:
    """The weight of a layer with the adapter at `theta` [P] merged into it, float32 at least."""
    site = model.sites[number]
    leaves = model.space.leaves[2 * number : 2 * number + 2]
    a, b = (theta[leaf.slice].view(leaf.shape) for leaf in leaves)
    weight: Any = site.layer.get_base_layer().weight
    dtype = torch.promote_types(weight.dtype, torch.float32)
    change = (site.scaling * (b.to(dtype) @ a.to(dtype))).to(weight.device)
    # GPT-2's Conv1D keeps its weight turned
    turned = getattr(site.layer, "fan_in_fan_out", False)
    return weight.detach().to(dtype) + (change.T if turned else change)


@contextmanager
def merged(model: AdaptedModel, theta: Tensor) -> Iterator[None]:
    """Put the merged, rounded weights in the base's place within the block, and B at zero."""
    without = theta.clone()
    for leaf in model.space.leaves:
        if not leaf.is_A:
            without[leaf.slice] = 0
    with ExitStack() as stack, torch.no_grad():
        for number, site in enumerate(model.sites):
            weight: Any = site.layer.get_base_layer().weight
            kept = weight.detach().cpu().clone()
            stack.callback(_put_back, weight, kept)
            weight.copy_(_merged(model, number, theta).to(DTYPE))
        stack.enter_context(model.at(without))
        yield


@torch.no_grad()
def _put_back(weight: Tensor, kept: Tensor) -> None:
    weight.copy_(kept)
