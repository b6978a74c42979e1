"""Two convex problems whose edits can be refitted exactly: ridge regression and a softmax head.

They share no code with the edits. A problem has rows `x` [n, d], `y` [n], weights `w` [n], a
damping `lam` [1] and its optimum `theta` [P], all in float64.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import minimize

from tests.unlearn.edits.helpers import F64, random


class Ridge:
    """Ridge regression: `sum_i w_i/2 (x_i theta - y_i)^2 + lam/2 |theta|^2`."""

    def __init__(self, n, size):
        self.x, self.y = random(1, n, size), random(2, n)
        self.w, self.lam = 0.1 + random(3, n).abs(), torch.tensor([0.37], dtype=F64)
        self.theta = self.optimum(self.x, self.y, self.w)

    def optimum(self, x, y, w):
        """By the normal equations."""
        matrix = x.T @ (w[:, None] * x) + self.lam * torch.eye(x.shape[1], dtype=F64)
        return torch.linalg.solve(matrix, x.T @ (w * y))

    @staticmethod
    def gradient(theta, x, y, w):
        """Gradient of these rows' part of the objective."""
        return (w * (x @ theta - y)) @ x

    def refit(self, gone, come):
        """The optimum without the rows `gone`, with the rows `come` = (x, y, w)."""
        keep = np.setdiff1d(np.arange(len(self.x)), gone)
        kept = (self.x[keep], self.y[keep], self.w[keep])
        return self.optimum(*(torch.cat(pair) for pair in zip(kept, come, strict=True)))


class Head:
    """Multinomial logistic regression: its GGN is its Hessian, a Fisher of K rows an example."""

    K, lam = 3, torch.tensor([0.05], dtype=F64)

    def __init__(self, n=14, d=4):
        self.x, self.w = random(1, n, d), torch.full((n,), 1 / n, dtype=F64)
        self.y = torch.randint(self.K, (n,), generator=torch.Generator().manual_seed(2))
        self.theta = self.refit(self.w)

    def rows(self, theta, x, w):
        """`sqrt(w p_k) (p - e_k) x^T` for every example and label k, `[n K, P]`."""
        p = (x @ theta.view(-1, self.K)).softmax(-1)
        residuals = p[:, None, :] - torch.eye(self.K, dtype=F64)  # [n, label, class]
        roots = (w[:, None] * p).sqrt()[..., None, None]
        return (torch.einsum("nd,nkc->nkdc", x, residuals) * roots).flatten(2).flatten(0, 1)

    def gradient(self, theta, x, y, w):
        """Gradient of these rows' part of the objective, without the damping."""
        p = (x @ theta.view(-1, self.K)).softmax(-1)
        return (x.T @ (w[:, None] * (p - torch.nn.functional.one_hot(y, self.K)))).ravel()

    def refit(self, w):
        """The optimum with these weights, by SciPy's trust region with autograd's derivatives."""

        def value(theta):
            logits = self.x @ theta.view(-1, self.K)
            losses = torch.nn.functional.cross_entropy(logits, self.y, reduction="none")
            return w @ losses + self.lam[0] / 2 * theta @ theta

        def derivative(function):
            return lambda theta: function(value, torch.from_numpy(theta)).numpy()

        result = minimize(
            lambda theta: float(value(torch.from_numpy(theta))),
            np.zeros(self.x.shape[1] * self.K),
            jac=derivative(lambda f, at: torch.func.grad(f)(at)),
            hess=derivative(lambda f, at: torch.func.hessian(f)(at)),
            method="trust-exact",
            options={"gtol": 1e-12},
        )
        theta = torch.from_numpy(result.x)
        for _ in range(3):  # polish: SciPy stops where the value no longer changes
            step = torch.linalg.solve(
                torch.func.hessian(value)(theta), torch.func.grad(value)(theta)
            )
            theta = theta - step
        assert torch.func.grad(value)(theta).norm() < 1e-14
        return theta
