"""The training objective, differentiable twice: what the exact curvatures multiply with, batch by batch.

Products with second derivatives differentiate a backward pass, so attention runs on its unfused (math) kernel
here, and only here. One forward per batch serves every column.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from influence.adapter import AdaptedModel
from influence.batches import Batch, collate, plan_batches
from influence.errors import AdapterError, NumericalError
from influence.geometry import Geometry, Raw
from influence.loss import Supervised, supervised_logits
from influence.tokens import TokenizedExamples

#: (batch, weights [b], parameters, v as leaves [K, rows, cols]) -> products as leaves [K, rows, cols]
Products = Callable[[Supervised, Tensor, list[Tensor], list[Tensor]], list[Tensor]]


@dataclass(frozen=True)
class Objective:
    """The training objective J at the adapter, differentiable twice: model, rows, weights `w` [n].

    `trace` [leaves] is the trace of the GGN on each leaf, estimated from sampled labels in `fit`'s pass. Products run
    with the LoRA parameters at `theta` [P] (None: where the model is), in the coordinates of `geometry`.
    """

    model: AdaptedModel
    tokens: TokenizedExamples
    weights: np.ndarray
    trace: Tensor
    token_budget: int = 2048
    theta: Tensor | None = None
    geometry: Geometry = field(default_factory=Raw)

    @property
    def size(self) -> int:
        """P."""
        return self.model.space.size

    @property
    def blocks(self) -> tuple[slice, ...]:
        """The leaves."""
        return tuple(leaf.slice for leaf in self.model.space.leaves)

    @property
    def count(self) -> int:
        """The training rows, n."""
        return len(self.tokens)

    def batches(self, only: np.ndarray | None = None) -> Iterator[tuple[Batch, Tensor]]:
        """Batches of all rows with their weights `[b]`; of the rows `only`, with weights times n over their number."""
        tokens, weights = self.tokens, self.weights
        if only is not None:
            tokens, weights = tokens.select(only), weights[only] * (len(tokens) / len(only))
        for rows in plan_batches(tokens, self.token_budget):
            batch = collate(tokens, rows, pad_id=self.model.pad_id, device=self.model.device)
            yield batch, torch.from_numpy(weights[rows]).to(self.model.device)

    def mean_eigenvalues(self) -> Tensor:
        """The GGN's trace over size of each leaf, `[leaves]`."""
        return self.trace / torch.tensor(
            [leaf.stop - leaf.start for leaf in self.model.space.leaves]
        )

    def product(self, v: Tensor, products: Products, only: np.ndarray | None = None) -> Tensor:
        """Sum over the batches (of the rows `only`) of a second-derivative product with every row of `v` [K, P]."""
        out = torch.zeros_like(v)
        space = self.model.space
        columns = space.split(self.geometry.adjoint(v.to(self.model.dtype)))
        here = nullcontext() if self.theta is None else self.model.at(self.theta)
        with here, _twice_differentiable(self.model) as parameters:
            for batch, weights in self.batches(only):
                part = supervised_logits(self.model, batch)
                out += space.flatten(products(part, weights, parameters, columns)).to(v)
        if not bool(torch.isfinite(out).all()):
            raise NumericalError(
                "a curvature product is NaN or infinite: load the model in float32 or float64"
            )
        return self.geometry.features(out)


@dataclass(frozen=True)
class SecondDerivative:
    """What the matrix-free curvatures of one objective share; one damping block per leaf."""

    objective: Objective

    @property
    def size(self) -> int:
        """P."""
        return self.objective.size

    @property
    def blocks(self) -> tuple[slice, ...]:
        """The leaves."""
        return self.objective.blocks

    @property
    def count(self) -> int:
        """The training rows, n."""
        return self.objective.count

    def mean_eigenvalues(self) -> Tensor:
        """The GGN's trace over size of each leaf, `[leaves]` (a Hessian's may be negative)."""
        return self.objective.mean_eigenvalues()


@contextmanager
def _twice_differentiable(model: AdaptedModel) -> Iterator[list[Tensor]]:
    """LoRA parameters require gradients, nothing else does, attention has a double backward; all restored."""
    implementation = getattr(model.model.get_base_model().config, "_attn_implementation", "sdpa")
    if implementation not in ("sdpa", "eager"):
        raise AdapterError(
            f"attention {implementation!r} has no second derivative; load the base with attn_implementation='sdpa' "
            "for Hessian and GGN products"
        )
    with model.evaluating(model.parameters), sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        yield model.parameters
