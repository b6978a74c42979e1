"""The training objective, differentiable twice, batch by batch.

Products with second derivatives differentiate a backward pass, so attention runs on its unfused
(math) kernel here, and only here. One forward per batch serves every column.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from influence import distributed
from influence.adapter import AdaptedModel
from influence.batches import Batch, collate, padded_tokens, plan_batches
from influence.curvature.base import (
    Accumulator,
    AfterPass,
    Arrays,
    ChangedRows,
    Curvature,
    SampledRows,
    Specification,
)
from influence.errors import AdapterError, NumericalError
from influence.experts import plain_products
from influence.geometry import Geometry, Raw
from influence.halving import Steps, in_parts
from influence.loss import Supervised, supervised_logits
from influence.precision import HALF, compute_type, type_name
from influence.tokens import TokenizedExamples

if TYPE_CHECKING:
    from influence.at_point import AtPoint

#: (batch, weights [b], parameters, v as leaves [K, rows, cols]) -> products as leaves [K, rows,
#: cols]
Products = Callable[[Supervised, Tensor, list[Tensor], list[Tensor]], list[Tensor]]


@dataclass(frozen=True)
class Objective:
    """The training objective J at the adapter, differentiable twice: model, rows, weights `w` [n].

    `trace` [leaves] is the trace of the GGN on each leaf, estimated from sampled labels in `fit`'s
    pass. Products run with the LoRA parameters at `theta` [P] (None: where the model is), in the
    coordinates of `geometry`. `ran` is told how many rows every product runs. Where products are
    `shared`, several processes form each together: each runs some of the rows.
    """

    model: AdaptedModel
    tokens: TokenizedExamples
    weights: np.ndarray
    trace: Tensor
    token_budget: int = 2048
    theta: Tensor | None = None
    geometry: Geometry = field(default_factory=Raw)
    ran: Callable[[int], None] | None = None
    shared: bool = False

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

    def weighted(self, only: np.ndarray | None = None) -> tuple[TokenizedExamples, np.ndarray]:
        """All rows with their weights `[n]`, or those of `only`, with weights times n over their
        number.
        """
        if only is None:
            return self.tokens, self.weights
        scale = len(self.tokens) / len(only)
        return self.tokens.select(only), self.weights[only] * scale

    def batch(
        self, tokens: TokenizedExamples, weights: np.ndarray, rows: np.ndarray
    ) -> tuple[Batch, Tensor]:
        """Rows as the model takes them, and their weights `[b]`."""
        batch = collate(tokens, rows, pad_id=self.model.pad_id, device=self.model.device)
        return batch, torch.from_numpy(weights[rows]).to(self.model.device)

    def plan(self, tokens: TokenizedExamples) -> list[np.ndarray]:
        """The batches of some rows that this process runs: where products are shared, some."""
        plan = plan_batches(tokens, self.token_budget)
        return distributed.share(plan, padded_tokens(tokens, plan)) if self.shared else plan

    def batches(self, only: np.ndarray | None = None) -> Iterator[tuple[Batch, Tensor]]:
        """Batches of all rows with their weights `[b]`, or of `only` as in `weighted`."""
        tokens, weights = self.weighted(only)
        for rows in self.plan(tokens):
            yield self.batch(tokens, weights, rows)

    def mean_eigenvalues(self) -> Tensor:
        """The GGN's trace over size of each leaf, `[leaves]`."""
        return self.trace / torch.tensor(
            [leaf.stop - leaf.start for leaf in self.model.space.leaves]
        )

    def product(self, v: Tensor, products: Products, only: np.ndarray | None = None) -> Tensor:
        """Sum over the batches (of the rows `only`) of a second-derivative product with every
        row of `v` [K, P].
        """
        if self.ran is not None:
            self.ran(self.count if only is None else len(only))
        out = torch.zeros_like(v)
        space = self.model.space
        columns = space.split(self.geometry.adjoint(v.to(self.model.dtype)))
        here = nullcontext() if self.theta is None else self.model.at(self.theta)
        with here, _twice_differentiable(self.model) as parameters:
            tokens, every = self.weighted(only)

            def run(rows: np.ndarray, _: Steps) -> Tensor:
                batch, weights = self.batch(tokens, every, rows)
                part = supervised_logits(self.model, batch)
                return space.flatten(products(part, weights, parameters, columns)).to(v)

            for rows in self.plan(tokens):
                for _, found in in_parts(self.model, tokens, rows, run):
                    out += found
        if self.shared:
            distributed.add_up(out)
        if not bool(torch.isfinite(out).all()):
            raise NumericalError(
                "a curvature product is NaN or infinite: load the model in float32 or float64"
            )
        return self.geometry.features(out)


@dataclass(frozen=True)
class SecondDerivative(Curvature):
    """What the matrix-free curvatures of one objective share: one damping block per leaf,
    products over all rows.
    """

    objective: Objective

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

    def updated(self, gone: ChangedRows, come: ChangedRows) -> Self:
        """Products over the rows after the change: exact. Every product is counted by
        `come.ran`, and formed by all processes together.
        """
        objective = self.objective
        stay = np.setdiff1d(np.arange(objective.count), gone.positions)
        after = replace(
            objective,
            tokens=TokenizedExamples.joined([objective.tokens.select(stay), come.tokens]),
            weights=np.concatenate([objective.weights[stay], come.weights]),
            ran=come.ran,
            shared=True,
        )
        return replace(self, objective=after)

    def moved_to(self, theta: Tensor) -> Self:
        """The derivatives at other parameters `[P]`."""
        return replace(self, objective=replace(self.objective, theta=theta))


class Traces(Accumulator):
    """The GGN's trace on each leaf, from gradients at labels sampled from the model: `sum_i w_i
    |G_i|^2`.

    The Fisher at sampled labels is the GGN in expectation, so a trace costs one backward, where a
    product of the GGN with every coordinate would cost P of them.
    """

    per_row = True

    def __init__(self, point: AtPoint) -> None:
        self.leaves = point.model.space.leaves
        self.squares = torch.zeros(len(self.leaves), dtype=torch.float64)

    def add_rows(self, features: Tensor, weights: Tensor) -> None:
        """Add the squares of every leaf's part."""
        found = torch.zeros_like(self.squares)
        for number, leaf in enumerate(self.leaves):
            squares = features[:, leaf.slice].double().square().sum(1)
            found[number] = float((squares * weights).sum())
        self.squares += found  # at once, or not at all

    def sums(self) -> dict[str, Tensor]:
        """`squares` [leaves]."""
        return {"squares": self.squares}

    def restore(self, arrays: Arrays, factor: float) -> None:
        """Add a fitted `trace`."""
        self.squares += factor * arrays["trace"].to(self.squares)

    def after_pass(self, rows: int) -> AfterPass:
        """A number a leaf is kept."""
        return AfterPass(kept_bytes=8 * len(self.leaves))

    def finish(self, rows: SampledRows) -> dict[str, Tensor]:
        """`trace` [leaves]."""
        return {"trace": self.squares.clamp(min=0)}


class MatrixFree(Specification):
    """What the specifications of matrix-free curvatures share: only a trace is fitted, the scale
    of the damping.
    """

    matrix_free: ClassVar[bool] = True

    @property
    def draws(self) -> int:
        """One draw of labels a row, for the trace."""
        return 1

    def caution(self, model: AdaptedModel) -> str | None:
        """Products of a 16-bit base carry its rounding twice."""
        computed = compute_type(model)
        if computed not in HALF:
            return None
        return (
            f"note: Hessian and GGN products computed in {type_name(computed)} carry its rounding; "
            "prefer --compute float32"
        )

    def begin(self, point: AtPoint) -> Accumulator:
        """The traces."""
        return Traces(point)


def objective_at(point: AtPoint, trace: Tensor) -> Objective:
    """The training objective of a run at one of its points.

    `trace` [leaves] is the GGN's.
    """
    return Objective(
        point.model,
        point.run.tokens,
        point.run.weights,
        trace.cpu(),
        point.run.token_budget,
        point.place.theta,
        point.geometry,
    )


@contextmanager
def _twice_differentiable(model: AdaptedModel) -> Iterator[list[Tensor]]:
    """LoRA parameters require gradients, nothing else does, attention has a double backward.

    All restored.
    """
    implementation = getattr(model.model.get_base_model().config, "_attn_implementation", "sdpa")
    if implementation not in ("sdpa", "eager"):
        raise AdapterError(
            f"attention {implementation!r} has no second derivative; load the base with "
            "attn_implementation='sdpa' "
            "for Hessian and GGN products"
        )
    with (
        model.evaluating(model.parameters),
        sdpa_kernel(SDPBackend.MATH),
        plain_products(model.model),
        torch.enable_grad(),
    ):
        yield model.parameters
