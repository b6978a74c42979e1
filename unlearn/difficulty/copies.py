"""Many copies of one adapter at once: row i of a batch runs with LoRA parameters of its own.

A site's branch `s B A x` becomes `s B_i A_i x_i`, two batched products. So one forward and backward
of b rows gives the losses and gradients of b different adapters, while the base's weights are read
once. Dropout is off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from influence.adapter import AdaptedModel
from influence.batches import collate, plan_batches
from influence.errors import AdapterError
from influence.gradients import replaced_forwards
from influence.loss import supervised_logits, token_losses
from influence.tokens import TokenizedExamples


@contextmanager
def copies(model: AdaptedModel, thetas: Tensor, counts: Sequence[int]) -> Iterator[None]:
    """Run row i of a batch of b rows with the LoRA parameters `thetas[i]`, within the block.

    `thetas` [b, P], or [1, P] for all rows alike. `counts` [b]: supervised tokens of each row, for
    an adapted LM head, which sees them all as one sequence.
    """
    if model.routed:
        raise AdapterError(
            f"{model.routed[0].name} is an expert among several, which sees tokens of many rows at "
            "once: copies of such an adapter cannot run side by side. Measure its difficulty by "
            "editing (unlearn edit) or retraining"
        )
    modules = [module for site in model.sites for module in (site.A, site.B)]
    leaves = model.space.split(thetas)
    with replaced_forwards(
        {m: _branch(leaf, counts) for m, leaf in zip(modules, leaves, strict=True)}
    ):
        yield


def _branch(weight: Tensor, counts: Sequence[int]) -> Callable[[Tensor], Tensor]:
    """Product of row i of the input `[b, ..., d_in]` with `weight[i]` `[d_out, d_in]` transposed.

    A single weight is every row's.
    """

    def forward(x: Tensor) -> Tensor:
        if len(weight) == 1:
            return x @ weight[0].to(x.dtype).T
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
        Tokens (padding included) and rows that run at a time. Rows of a single copy share its
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
    alone = len(thetas) == 1
    owner = np.repeat(np.arange(len(members)), [len(rows) for rows in members])
    chosen = tokens.select(np.concatenate(list(members)))
    shares = np.concatenate([np.full(len(rows), 1 / len(rows)) for rows in members])
    losses = np.zeros(len(members))
    with model.evaluating(), torch.set_grad_enabled(gradient is not None):
        for rows in plan_batches(chosen, token_budget, max_rows=None if alone else max_rows):
            owners = np.zeros(1, dtype=int) if alone else owner[rows]
            places = torch.from_numpy(owners).to(thetas.device)
            # A leaf of its own for every row: autograd then gives each row's gradient, unsummed.
            leaf = thetas[places].detach().requires_grad_(gradient is not None)
            batch = collate(chosen, rows, pad_id=model.pad_id, device=model.device)
            with copies(model, leaf, chosen.counts[rows].tolist()):
                part = supervised_logits(model, batch)
            sums = part.per_example(token_losses(part.logits, part.targets))
            means = sums / torch.tensor(part.counts).to(sums)
            value = means * torch.from_numpy(shares[rows]).to(sums)
            np.add.at(losses, owner[rows], value.detach().double().cpu().numpy())
            if gradient is not None:
                gradient.index_add_(0, places, torch.autograd.grad(value.sum(), leaf)[0])
    return losses
