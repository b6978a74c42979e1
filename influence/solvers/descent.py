"""The one iteration behind LiSSA, ASTRA and SGD: a fixed linear step, with or without mini-batches.

    u <- beta u + P^-1 ( (C_B + lambda I) x - v ),        x <- x - a u

C_B is the curvature on b rows drawn afresh for every step (all rows: C itself), P a preconditioner,
beta the momentum. The fixed point is the solution of `(C + lambda I) x = v`, whatever a, P and beta
are. Columns share the products and nothing else: each has its own step and its own stopping test.

With all rows the bracket is the residual of x, so the best iterate of every column is known and
returned. With mini-batches x keeps wandering around the solution; what is measured, now and then by
a full product, and returned is the average of the iterates, late ones weighted more (polynomial
decay: Shamir & Zhang 2013, arXiv 1212.1824, section 4).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from influence.curvature.base import Damped, Subsampled
from influence.errors import InputError
from influence.progress import NowAndThen, say

#: `P^-1 r` for every row of r [k, P].
Precondition = Callable[[Tensor], Tensor]

#: A residual so many times the larger of the first iterate's and 1 (that of x = 0) is divergence:
#: neither momentum nor a preconditioner, under which residuals may rise before they fall, gets
#: there while it converges.
GROWTH = 10.0
#: A mini-batch gradient so many times |v| calls for a check at once: overflow is a few steps away.
ALARM = 1e4
#: An estimated step that diverged is halved so many times before the column is given up.
HALVINGS = 4
#: Power iteration: products at most, their relative change at which it stops, and mini-batches it
#: is tried on.
POWER_PRODUCTS, POWER_CHANGE, POWER_BATCHES = 12, 0.01, 4
#: Power iteration approaches the top eigenvalue from below: the estimate times this is taken.
#: Without momentum, steps converge up to twice the inverse top eigenvalue, so an estimate of half
#: the truth would still do.
MARGIN = 1.1
#: A full product (a check) per so many passes' worth of mini-batches.
CHECK_EVERY = 4
#: The exponent of the averaging: the weight of iterate s of t falls as (s / t)^DECAY.
DECAY = 3.0


@dataclass(frozen=True)
class Batches:
    """Products of `C + lambda I` on all rows or on mini-batches.

    A mini-batch is `size` rows drawn without replacement, independently every time.
    """

    operator: Damped
    size: int | None
    generator: np.random.Generator

    @classmethod
    def of(cls, operator: Damped, size: int | None, seed: int, solver: str) -> Batches:
        """Check that the curvature can be multiplied on some rows, where it must be.

        A batch of all rows is no mini-batch.
        """
        if size is not None:
            if not isinstance(operator.curvature, Subsampled):
                raise InputError(
                    f"{solver} was given batch_size {size}, and the curvature "
                    f"{operator.curvature.name!r} has no products on a subset of its rows (ggn "
                    "and hessian have): leave batch_size out"
                )
            count = operator.curvature.count
            if not 1 <= size <= count:
                raise InputError(
                    f"{solver} was given batch_size {size}; expected 1 to {count}, the training "
                    "rows"
                )
            size = None if size == count else size
        return cls(operator, size, np.random.default_rng(seed))

    @property
    def check_every(self) -> int:
        """Steps from one full product to the next."""
        if self.size is None:
            return 1
        assert isinstance(self.operator.curvature, Subsampled)
        return -(-CHECK_EVERY * self.operator.curvature.count // self.size)

    def draw(self) -> np.ndarray | None:
        """The rows of the next mini-batch, or None for all."""
        if self.size is None:
            return None
        assert isinstance(self.operator.curvature, Subsampled)
        return self.generator.choice(self.operator.curvature.count, self.size, replace=False)

    def matvec(self, v: Tensor, rows: np.ndarray | None) -> Tensor:
        """`(C_B + lambda I) v` for every row of `v` [k, P]."""
        if rows is None:
            return self.operator.matvec(v)
        assert isinstance(self.operator.curvature, Subsampled)
        return self.operator.curvature.matvec_on(v, rows) + v * self.operator.diagonal(v)


def top_eigenvalue(
    batches: Batches, like: Tensor, precondition: Precondition | None = None
) -> tuple[float, int]:
    """The largest eigenvalue (in size) of `P^-1 (C + lambda I)`, and the products it took.

    The eigenvalue comes times `MARGIN`.

    Power iteration in the norm of P, where the matrix is symmetric, on one random vector of the
    shape of `like` [P]. With mini-batches the largest over several of them: a step that contracts
    on every batch is stable however they follow each other.
    """
    generator = torch.Generator().manual_seed(0)
    top, products = 0.0, 0
    for _ in range(1 if batches.size is None else POWER_BATCHES):
        rows, estimate = batches.draw(), 0.0
        Pu = torch.randn(1, len(like), generator=generator, dtype=torch.float64).to(like)
        u = Pu if precondition is None else precondition(Pu)
        for _ in range(POWER_PRODUCTS):
            w = batches.matvec(u, rows)
            products += 1
            Pw = w if precondition is None else precondition(w)
            before = estimate
            estimate = float(((w * Pw).sum() / (u * Pu).sum()).clamp(min=0).sqrt())
            if not estimate > 0 or abs(estimate - before) < POWER_CHANGE * estimate:
                break
            Pu, u = w / w.norm(), Pw / w.norm()
        top = max(top, estimate)
    return MARGIN * top, products


@dataclass
class Descent:
    """The state of one descent over K columns.

    `best` [K, P] is the best iterate of each column, with relative residuals `residuals` [K];
    `iterations` [K] counts products, mini-batch ones where batches are mini; `step` [K], the last
    a; `diverged`, `indefinite` [K]: given up for too long a step, or for a direction of negative
    curvature.
    """

    rhs: Tensor
    step: Tensor
    best: Tensor = field(init=False)
    residuals: Tensor = field(init=False)
    scale: Tensor = field(init=False)
    limit: Tensor = field(init=False)
    previous: Tensor = field(init=False)
    iterations: Tensor = field(init=False)
    halvings: Tensor = field(init=False)
    diverged: Tensor = field(init=False)
    indefinite: Tensor = field(init=False)

    def __post_init__(self) -> None:
        count, device = len(self.rhs), self.rhs.device
        self.best = torch.zeros_like(self.rhs)
        self.scale = self.rhs.norm(dim=1).clamp(min=torch.finfo(self.rhs.dtype).tiny)
        # those of x = 0: one, or zero where v = 0
        self.residuals = self.rhs.norm(dim=1) / self.scale
        self.limit = torch.zeros_like(self.residuals)
        self.previous = -self.rhs
        self.iterations = torch.zeros(count, dtype=torch.int64, device=device)
        self.halvings = torch.zeros(count, dtype=torch.int64, device=device)
        self.diverged = torch.zeros(count, dtype=torch.bool, device=device)
        self.indefinite = torch.zeros(count, dtype=torch.bool, device=device)

    def judge(
        self, rows: Tensor, x: Tensor, g: Tensor, adapt: bool, signed: bool
    ) -> tuple[Tensor, Tensor]:
        """Keep the iterates that are better and give up the columns that have grown.

        Returns the relative residuals [k] and which columns start again [k].

        `x`, `g` [k, P]: iterates of the columns `rows` and `(C + lambda I) x - v` there. Where
        `signed`, growth without overshooting (g keeps its direction) tells a negative eigenvalue
        from a step that is too long.
        """
        residuals = torch.nan_to_num(g.norm(dim=1) / self.scale[rows], nan=torch.inf)
        better = residuals < self.residuals[rows]
        self.best[rows[better]], self.residuals[rows[better]] = x[better], residuals[better]
        fresh = self.limit[rows] == 0
        first = torch.where(torch.isfinite(residuals), residuals, 1.0).clamp(min=1)
        self.limit[rows[fresh]] = GROWTH * first[fresh]
        grown = residuals > self.limit[rows]
        negative = grown & ((g * self.previous[rows]).sum(1) > 0) & signed
        again = grown & ~negative & adapt & (self.halvings[rows] < HALVINGS)
        self.previous[rows] = g
        self.indefinite[rows[negative]] = True
        self.diverged[rows[grown & ~negative & ~again]] = True
        self.halvings[rows[again]] += 1
        self.step[rows[again]] *= 0.5
        return residuals, again

    def report(self, name: str, rows: Tensor) -> None:
        """Say how far the columns `rows` [k] are that have not ended."""
        worst = float(self.residuals[rows].max())
        say(
            f"{name}: {int(self.iterations.max())} products, {len(rows)} columns left, "
            f"worst residual {worst:.1e}"
        )

    def message(self, cause: str) -> str:
        """Why columns were given up, or empty.

        `cause` is the solver's sentence for a step that is too long.
        """
        parts = []
        if bool(self.diverged.any()):
            parts.append(f"{int(self.diverged.sum())} of {len(self.rhs)} columns diverged: {cause}")
        if bool(self.indefinite.any()):
            parts.append(
                f"{int(self.indefinite.sum())} of {len(self.rhs)} columns met a direction of "
                "negative curvature: C + lambda I is not positive definite; raise the damping or "
                "use the GGN instead of the Hessian"
            )
        zero = int((~self.best.any(dim=1) & self.rhs.any(dim=1)).sum())
        tail = "the best iterates are returned" + (
            f" (for {zero} columns no step improved on x = 0)" if zero else ""
        )
        return "; ".join([*parts, tail]) if parts else ""


def descend(
    batches: Batches,
    rhs: Tensor,
    first: Tensor,
    *,
    step: float,
    adapt: bool,
    tolerance: float,
    max_iterations: int,
    name: str,
    precondition: Precondition | None = None,
    momentum: float = 0.0,
    spent: int = 0,
) -> Descent:
    """Iterate until every column of `rhs` [K, P] has ended.

    It begins at x = `first`, what the first step from x = 0 gives.

    `adapt` says that the step is an estimate: a column that diverges starts again from its best
    iterate with half of it. `spent` products were used for that estimate, and count.
    """
    state = Descent(rhs, torch.full((len(rhs), 1), step, dtype=rhs.dtype, device=rhs.device))
    state.iterations += spent
    full = batches.size is None
    x, average = first.clone(), first.clone()
    u = -rhs if precondition is None else -precondition(rhs)
    rows, g = (state.residuals > tolerance).nonzero().squeeze(1), -rhs
    due, taken, alarm = NowAndThen(), 1, False
    while len(rows):
        last = int(state.iterations[rows].max()) >= max_iterations
        if full or last or alarm or taken % batches.check_every == 0:
            shown = (x if full else average)[rows]
            g = batches.operator.matvec(shown) - rhs[rows]
            state.iterations[rows] += int(full)
            residuals, again = state.judge(rows, shown, g, adapt, full)
            ended = state.diverged | state.indefinite
            # no step this time: the next product measures the best iterate again
            if bool(again.any()):
                x[rows[again]] = average[rows[again]] = state.best[rows[again]]
                u[rows[again]], g[again] = 0, 0
            going = (
                (residuals > tolerance) & ~ended[rows] & (state.iterations[rows] < max_iterations)
            )
            rows, g = rows[going], g[going]
            if len(rows) and due():  # a product may be a pass over the data
                state.report(name, rows)
        if not len(rows):
            break
        if not full:
            g = batches.matvec(x[rows], batches.draw()) - rhs[rows]
            state.iterations[rows] += 1
            alarm = not bool((g.norm(dim=1) < ALARM * state.scale[rows]).all())
        u[rows] = momentum * u[rows] + (g if precondition is None else precondition(g))
        x[rows] -= state.step[rows] * u[rows]
        taken += 1
        if not full:
            average[rows] += (1 + DECAY) / (taken + DECAY) * (x[rows] - average[rows])
    return state
