"""Tables to which a new curvature or solver adds a row, and plain matrices to solve with."""

from __future__ import annotations

import torch

import influence
from influence.solvers import ASTRA, CG, SGD, Direct, LiSSA

F64 = torch.float64

#: Every curvature, to be fitted.
CURVATURES = {
    "ekfac": influence.EKFAC(),
    "kfac": influence.KFAC(),
    "fisher": influence.Fisher(samples=2),
    "ggn": influence.GGN(),
    "hessian": influence.Hessian(),
    "identity": influence.Identity(),
}


class Matrix:
    """A plain symmetric matrix as a curvature without a closed form."""

    name = "matrix"

    def __init__(self, C: torch.Tensor) -> None:
        self.C, self.size = C, len(C)
        self.blocks: tuple[slice, ...] = (slice(0, len(C)),)

    def matvec(self, v):
        return v @ self.C

    def mean_eigenvalues(self):
        return self.C.trace().reshape(1) / len(self.C)

    def top_eigenvalues(self):
        return torch.linalg.eigvalsh(self.C)[-1:]


def spectrum(values, seed=0):
    """A symmetric matrix with these eigenvalues and random eigenvectors."""
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(len(values), len(values), dtype=F64, generator=generator)).Q
    return (Q * torch.tensor(values, dtype=F64)) @ Q.T


def damped(runs, curvature):
    """One lambda for all blocks, 0.3 of the top eigenvalue; too little of it for the Hessian."""
    top = float(runs[curvature].curvature(curvature).top_eigenvalues().max())
    return runs[curvature].operator(
        curvature, "abs:0.05" if curvature == "hessian" else f"abs:{0.3 * top}"
    )


def preconditioner_of(runs, operator):
    """EK-FAC with the operator's lambda; the identity is its own, as no EK-FAC is near it."""
    if operator.curvature.name == "identity":
        return operator
    return runs["ekfac"].preconditioner(operator)


#: Every solver, tight enough for 1e-6 in the solution, made from the runs and the operator.
SOLVERS = {
    "direct": lambda runs, operator: Direct(),
    "cg": lambda runs, operator: CG(tolerance=1e-9, max_iterations=400),
    "pcg": lambda runs, operator: CG(
        tolerance=1e-9,
        max_iterations=400,
        preconditioner=preconditioner_of(runs, operator),
        name="pcg",
    ),
    "lissa": lambda runs, operator: LiSSA(tolerance=1e-8, max_iterations=300),
    "astra": lambda runs, operator: ASTRA(
        preconditioner_of(runs, operator), tolerance=1e-8, max_iterations=300
    ),
    "sgd": lambda runs, operator: SGD(tolerance=1e-8, max_iterations=300),
}


class Scaled(Matrix):
    """A matrix with a closed-form inverse: a preconditioner for another."""

    def solve(self, v, lam):
        return torch.linalg.solve(self.C + lam * torch.eye(len(self.C), dtype=F64), v.T).T


class Rows(Matrix):
    """`C = sum_i w_i G_i` over training rows, with products on some of them."""

    def __init__(self, n=12, size=10, seed=0):
        F = torch.randn(n, 3, size, dtype=F64, generator=torch.Generator().manual_seed(seed))
        self.parts = torch.einsum("nts,ntu->nsu", F, F) / n
        self.count = n
        super().__init__(self.parts.sum(0))

    def matvec_on(self, v, rows):
        return v @ self.parts[rows].sum(0) * (self.count / len(rows))
