"""The exact generalised Gauss-Newton matrix, matrix-free and positive semi-definite.

    C v = sum_i w_i sum_t J_t^T (diag(p_t) - p_t p_t^T) J_t v        (Schraudolph 2002)

J_t is the Jacobian of the logits at token t by the LoRA parameters, p_t their softmax.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse.linalg as sla
import torch
from torch import Tensor

from influence.curvature.base import Arrays, Curvature, as_linear_operator
from influence.curvature.objective import MatrixFree, SecondDerivative, objective_at
from influence.loss import Supervised, probability_chunks

if TYPE_CHECKING:
    from influence.at_point import AtPoint


@dataclass(frozen=True)
class GGN(MatrixFree):
    """The exact GGN.

    Sampled labels estimate its trace, the scale of its damping.
    """

    name: str = field(default="ggn", init=False)

    def load(self, arrays: Arrays, point: AtPoint) -> Curvature:
        """The operator, from `trace` [leaves]."""
        return GGNOperator(objective_at(point, arrays["trace"]))

    def held(self, arrays: Arrays, point: AtPoint) -> dict[str, Callable[[], Curvature]]:
        """Itself and the Hessian, whose damping is of the same scale."""
        from influence.curvature.hessian import Hessian  # which is made of this file's operator

        return super().held(arrays, point) | {"hessian": lambda: Hessian().load(arrays, point)}


def ggn_products(
    part: Supervised, weights: Tensor, parameters: list[Tensor], v: list[Tensor]
) -> list[Tensor]:
    """GGN of `sum_i w_i l_i` of one batch times each row of `v` (leaves `[K, ...]`).

    `u -> J^T u` is linear in u, so its derivative along v is `J v` (Pearlmutter's trick,
    transposed): no forward-mode rule is needed from any layer. Then the softmax's `diag(p) - p
    p^T`, then `J^T`.
    """
    counts = torch.tensor(part.counts, device=weights.device)
    token_weights = torch.repeat_interleave(weights, counts)[:, None]
    dummy = torch.zeros_like(part.logits, requires_grad=True)
    transposed = torch.autograd.grad(
        part.logits, parameters, dummy, create_graph=True, materialize_grads=True
    )
    out = [torch.zeros_like(column) for column in v]
    for k in range(len(v[0])):
        (Jv,) = torch.autograd.grad(
            transposed, dummy, [column[k] for column in v], retain_graph=True
        )
        for at, probs in probability_chunks(part.logits):  # HJv, in the place of Jv
            rises = Jv[at].to(probs)
            centred = rises - (probs * rises).sum(-1, keepdim=True)
            Jv[at] = token_weights[at].to(probs) * probs * centred
        back = torch.autograd.grad(
            part.logits, parameters, Jv, retain_graph=True, materialize_grads=True
        )
        for total, term in zip(out, back, strict=True):
            total[k] = term
    return out


@dataclass(frozen=True)
class GGNOperator(SecondDerivative):
    """The generalised Gauss-Newton matrix of J as an operator (a fitted curvature).

    One damping block per leaf.
    """

    name: str = "ggn"

    def matvec(self, v: Tensor) -> Tensor:
        """`C v` for every row of `v` [K, P].

        One forward per batch, two backwards per batch and column.
        """
        return self.objective.product(v, ggn_products)

    def matvec_on(self, v: Tensor, rows: np.ndarray) -> Tensor:
        """An unbiased estimate of `C v` from these training rows alone: their weights times n
        over their number.
        """
        return self.objective.product(v, ggn_products, rows)

    def top_eigenvalues(self) -> Tensor:
        """The largest eigenvalue of the whole matrix (Lanczos, to 1 %), the same for every leaf,
        `[leaves]`.
        """
        return torch.full((len(self.blocks),), self._top, dtype=torch.float64)

    @cached_property
    def _top(self) -> float:
        operator = as_linear_operator(self, self.objective.model.device)
        start = np.random.default_rng(0).standard_normal(self.size)
        options = {"k": 1, "which": "LA", "v0": start, "tol": 1e-2}
        return float(sla.eigsh(operator, return_eigenvectors=False, **options)[0])
