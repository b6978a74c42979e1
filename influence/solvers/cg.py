"""Preconditioned conjugate gradients on many right-hand sides, each stopped on its own residual.

Hestenes & Stiefel 1952; preconditioned form as in Saad 2003, algorithm 9.1. Columns share the
products (one pass over the data for all of them), not the Krylov space. A mean residual would hide
a hard column, so every column has its own alpha, beta and stopping test; a converged one is frozen
and leaves the product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from influence.curvature.base import Damped, Invertible
from influence.progress import NowAndThen, say
from influence.solvers.base import Solution


@dataclass(frozen=True)
class CG:
    """Conjugate gradients, each column stopped on its own residual.

    Every column ends at a relative residual of `tolerance`, or after `max_iterations` products.

    `preconditioner` is a damped curvature with a closed-form inverse (EK-FAC with the same damping,
    as a rule). When the recursion's residual reaches the tolerance the true one is measured; where
    rounding has let the two part, the iteration restarts from there.
    """

    tolerance: float = 1e-5
    max_iterations: int = 500
    preconditioner: Damped | None = None
    name: str = "cg"
    approximate: ClassVar[bool] = False
    # x, r, z, p, Ap, what stopped columns take out of them, and the product
    copies: ClassVar[int] = 8

    def solve(self, operator: Damped, rhs: Tensor) -> Solution:
        """Solve for every row of `rhs` [K, P].

        A direction of negative curvature ends its column, unconverged.
        """
        x = torch.zeros_like(rhs)
        r = rhs.clone()
        scale = rhs.norm(dim=1).clamp(min=torch.finfo(rhs.dtype).tiny)
        iterations = torch.zeros(len(rhs), dtype=torch.int64)
        failed = torch.zeros(len(rhs), dtype=torch.bool, device=rhs.device)
        best = torch.full((len(rhs),), torch.inf, dtype=rhs.dtype, device=rhs.device)
        active = r.norm(dim=1) > self.tolerance * scale
        while bool(active.any()):
            before = int(iterations.max())
            self._cycle(operator, x, r, scale, active, iterations, failed)
            # the true residual: restart the columns it does not satisfy, as long as restarting
            # helps
            rows = active.nonzero().squeeze(1)
            r[rows] = rhs[rows] - operator.matvec(x[rows])
            residuals = r.norm(dim=1) / scale
            stuck = active & (residuals > 0.5 * best)
            best = torch.where(active, residuals, best)
            active = active & (residuals > self.tolerance) & ~failed & ~stuck
            active &= (iterations < self.max_iterations).to(active.device)
            if int(iterations.max()) == before:
                break
        message = ""
        if bool(failed.any()):
            message = (
                f"{int(failed.sum())} of {len(rhs)} columns met a direction of negative "
                "curvature: C + lambda I is not positive definite; raise the damping or use the "
                "GGN instead of the Hessian"
            )
        return Solution.checked(operator, rhs, x, self.tolerance, iterations, message)

    def _cycle(
        self,
        operator: Damped,
        x: Tensor,
        r: Tensor,
        scale: Tensor,
        start: Tensor,
        iterations: Tensor,
        failed: Tensor,
    ) -> None:
        """Run CG on the columns in `start` until each one ends.

        A column ends at the tolerance, at the limit, or at a direction of negative curvature.
        """
        rows = start.nonzero().squeeze(1)
        z = self._precondition(r[rows])
        p, rz = z.clone(), (r[rows] * z).sum(1)
        due = NowAndThen()
        while len(rows):
            Ap = operator.matvec(p)
            pAp = (p * Ap).sum(1)
            iterations[rows.cpu()] += 1
            if due():  # a product may be a pass over the data
                worst = float((r[rows].norm(dim=1) / scale[rows]).max())
                say(
                    f"{self.name}: {int(iterations.max())} products, {len(rows)} columns left, "
                    f"worst residual {worst:.1e}"
                )
            bad = ~(pAp > 0)
            failed[rows[bad]] = True
            alpha = torch.where(bad, 0.0, rz / pAp)[:, None]
            x[rows] += alpha * p
            r[rows] -= alpha * Ap
            going = ~bad & (r[rows].norm(dim=1) > self.tolerance * scale[rows])
            going &= (iterations[rows.cpu()] < self.max_iterations).to(going.device)
            rows, p, rz = rows[going], p[going], rz[going]
            if len(rows):
                z = self._precondition(r[rows])
                rz_new = (r[rows] * z).sum(1)
                p = z + (rz_new / rz)[:, None] * p
                rz = rz_new

    def _precondition(self, r: Tensor) -> Tensor:
        if self.preconditioner is None:
            return r
        assert isinstance(self.preconditioner.curvature, Invertible)
        return self.preconditioner.curvature.solve(r, self.preconditioner.lam)
