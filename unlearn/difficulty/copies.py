"""Many copies of one adapter at once: row i of a batch runs with LoRA parameters of its own.

A site's branch `s B A x` becomes `s B_i A_i x_i`, two batched products. So one forward and backward
of b rows gives the losses and gradients of b different adapters, while the base's weights are read
once. Dropout is off.

One copy alone needs none of that: the model's own adapter is moved to it, and its gradient is
summed over its rows leaf by leaf (`influence.gradients.Tape`). So one copy holds nothing per row,
and experts work too, which see the tokens of all rows at once.

Where the model has gradient checkpointing, layers are recomputed in the backward in both ways.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from influence.adapter import AdaptedModel
from influence.batches import collate, plan_batches
from influence.errors import AdapterError, NumericalError
from influence.gradients import (
    checkpointed_layers,
    repeated_over_tokens,
    replaced_forwards,
    tape,
)
from influence.halving import Steps, in_parts
from influence.loss import (
    loss_gradient,
    supervised_logits,
    token_losses,
)
from influence.tokens import TokenizedExamples


@contextmanager
def copies(model: AdaptedModel, thetas: Tensor, counts: Sequence[int]) -> Iterator[None]:
    """Run row i of a batch of b rows with the LoRA parameters `thetas[i]`, within the block.

    `thetas` [b, P]. `counts` [b]: supervised tokens of each row, for
    an adapted LM head, which sees them all as one sequence.
    """
    if model.routed:
        raise AdapterError(
            f"{model.routed[0].name} is an expert among several, which sees tokens of many rows at "
            "once: copies of such an adapter cannot run side by side, only one at a time"
        )
    modules = [module for site in model.sites for module in (site.A, site.B)]
    leaves = model.space.split(thetas)
    forwards: dict[torch.nn.Module, Callable[..., Tensor]] = {
        layer: partial(checkpoint, layer.forward, use_reentrant=False)
        for layer in checkpointed_layers(model)
    }
    forwards |= {m: _branch(leaf, counts) for m, leaf in zip(modules, leaves, strict=True)}
    with replaced_forwards(forwards):
        yield


def _branch(weight: Tensor, counts: Sequence[int]) -> Callable[[Tensor], Tensor]:
    """Product of row i of the input `[b, ..., d_in]` with `weight[i]` `[d_out, d_in]` transposed."""

    def forward(x: Tensor) -> Tensor:
        if x.dim() == 2:  # some decoders (OPT) flatten rows and tokens
            return forward(x.unflatten(0, (len(weight), -1))).flatten(0, 1)
        if x.shape[0] == len(weight):
            products = torch.bmm(x.flatten(1, -2), weight.to(x.dtype).transpose(1, 2))
            return products.unflatten(1, x.shape[1:-1])
        parts = x[0].split(list(counts))  # the LM head's [1, N, d]
        products = [part @ row.to(x.dtype).T for part, row in zip(parts, weight, strict=True)]
        return torch.cat(products)[None]

    return forward


def copy_losses(
    model: AdaptedModel,
    thetas: Tensor,
    tokens: TokenizedExamples,
    members: Sequence[np.ndarray],
    *,
    token_budget: int,
    max_rows: int,
) -> np.ndarray:
    """Loss of every copy on its own rows, the mean of their mean losses: [c], nats per token.

    Parameters
    ----------
    thetas : Tensor [c, P]
        The copies' LoRA parameters; they are not changed.
    members : c int arrays
        Positions in `tokens` of each copy's rows, at least one each.
    token_budget, max_rows
        Tokens (padding included) and rows that run at a time. Rows of one copy alone share its
        parameters, and their number is not bounded.
    """
    return _losses(model, thetas, tokens, members, token_budget, max_rows, None)


def copy_gradients(
    model: AdaptedModel,
    thetas: Tensor,
    tokens: TokenizedExamples,
    members: Sequence[np.ndarray],
    *,
    token_budget: int,
    max_rows: int,
) -> tuple[np.ndarray, Tensor]:
    """The losses of `copy_losses` and the gradient of each in its own parameters, [c, P]."""
    gradient = torch.zeros_like(thetas)
    return _losses(model, thetas, tokens, members, token_budget, max_rows, gradient), gradient


def _losses(
    model: AdaptedModel,
    thetas: Tensor,
    tokens: TokenizedExamples,
    members: Sequence[np.ndarray],
    token_budget: int,
    max_rows: int,
    gradient: Tensor | None,
) -> np.ndarray:
    """Losses [c] of the copies, their gradients added to `gradient` [c, P] where it is given."""
    if len(thetas) == 1:
        rows = tokens.select(members[0])
        with model.at(thetas[0]):
            if gradient is None:
                return np.array([_loss_here(model, rows, token_budget)])
            return np.array([_gradient_here(model, rows, token_budget, gradient[0])])
    owner = np.repeat(np.arange(len(members)), [len(rows) for rows in members])
    chosen = tokens.select(np.concatenate(list(members)))
    shares = np.concatenate([np.full(len(rows), 1 / len(rows)) for rows in members])
    losses = np.zeros(len(members))

    def run(rows: np.ndarray, _: Steps) -> tuple[np.ndarray, Tensor, Tensor]:
        places = torch.from_numpy(owner[rows]).to(thetas.device)
        # A leaf of its own for every row: autograd then gives each row's gradient, unsummed.
        leaf = thetas[places].detach().requires_grad_(gradient is not None)
        batch = collate(chosen, rows, pad_id=model.pad_id, device=model.device)
        with copies(model, leaf, chosen.counts[rows].tolist()):
            part = supervised_logits(model, batch)
            sums = part.per_example(token_losses(part.logits, part.targets))
            means = sums / torch.tensor(part.counts).to(sums)
            value = means * torch.from_numpy(shares[rows]).to(sums)
            slopes = leaf
            if gradient is not None:  # in the block: checkpointed layers run again here
                slopes = torch.autograd.grad(value.sum(), leaf)[0]
        return value.detach().double().cpu().numpy(), places, slopes

    with model.evaluating(), torch.set_grad_enabled(gradient is not None):
        for batch in plan_batches(chosen, token_budget, max_rows=max_rows):
            for rows, (values, places, slopes) in in_parts(model, chosen, batch, run):
                np.add.at(losses, owner[rows], values)
                if gradient is not None:
                    gradient.index_add_(0, places, slopes)
    return losses


def _loss_here(model: AdaptedModel, rows: TokenizedExamples, token_budget: int) -> float:
    """Mean of the rows' mean losses where the model is."""
    total = 0.0

    def run(some: np.ndarray, _: Steps) -> float:
        batch = collate(rows, some, pad_id=model.pad_id, device=model.device)
        part = supervised_logits(model, batch)
        sums = part.per_example(token_losses(part.logits, part.targets)).double()
        return float((sums.cpu().numpy() / rows.counts[some]).sum())

    with model.evaluating(), torch.no_grad():
        for batch in plan_batches(rows, token_budget):
            total += sum(mean for _, mean in in_parts(model, rows, batch, run))
    return total / len(rows)


def _gradient_here(
    model: AdaptedModel, rows: TokenizedExamples, token_budget: int, out: Tensor
) -> float:
    """`_loss_here`, its gradient added to `out` [P]; NaN, and `out` of no use, where it diverged."""
    total, leaves = 0.0, model.space.leaves

    def add(steps: Steps, number: int, x: Tensor, g: Tensor, valid: Tensor) -> None:
        place = out[leaves[number].slice].unflatten(0, leaves[number].shape)
        steps.once(number, lambda: place.add_((g.flatten(0, 1).T @ x.flatten(0, 1)).to(place)))

    def run(some: np.ndarray, steps: Steps) -> float:
        part = recorder.forward(collate(rows, some, pad_id=model.pad_id, device=model.device))
        with torch.no_grad():
            logits = part.logits.detach()
            sums = part.per_example(token_losses(logits, part.targets)).double()
            weights = 1 / rows.counts[some] / len(rows)
            factors = repeated_over_tokens(weights, part)
            slope = loss_gradient(logits, part.targets, factors)
        recorder.backward(part.logits, slope, partial(add, steps))
        return float((sums.cpu().numpy() / rows.counts[some]).sum())

    with tape(model) as recorder:
        try:
            for batch in plan_batches(rows, token_budget):
                total += sum(mean for _, mean in in_parts(model, rows, batch, run))
        except NumericalError:
            return float("nan")
    return total / len(rows)
