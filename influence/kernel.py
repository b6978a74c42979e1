"""How alike the training rows are under a damped inverse, `K = F M F^T`.

`M = (C + lambda I)^-1` at one point of the path, `f_i = sqrt(w_i) grad l_i`. Up to `EXACT_ROWS`
rows K is held whole, `[n, n]` in float64. Beyond, it is stood in for by `LANDMARKS` of its columns
and its own diagonal (Nystroem with an exact diagonal: Quinonero-Candela & Rasmussen 2005, "FITC"),

    K ~ U U^T + diag(K - U U^T),       U = K_nm L^-T,   K_mm = L L^T

which is exact where the rows span no more directions than there are landmarks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import scipy.linalg as sl
import torch

from influence import distributed
from influence.at_point import AtPoint, evenly_spaced, queries_at_once
from influence.curvature.base import Damped, Invertible, Whitening, inverse_products
from influence.errors import NumericalError, StoreError
from influence.store import open_file, read, write_file

#: Rows up to which K is held whole: 3.2 GB in float64, and as much again while it is inverted.
EXACT_ROWS = 20_000
#: Columns that stand for K beyond that.
LANDMARKS = 4_096
#: Added to the diagonal of K_mm, relative to its mean, by the type of the gradients: landmarks may
#: be copies of each other, and rounding must not make K_mm indefinite.
JITTER = {np.float64: 1e-12, np.float32: 1e-6}
#: Copies of some rows' gradients that are counted beside them: what solving holds, and as much again
#: left to K itself.
COPIES = 5
#: Rows of a matrix that are mirrored at a time, and of the landmarks' columns that are solved for.
MIRRORED, ROWS_AT_ONCE = 1_024, 4_096
INDEFINITE = (
    "the similarities of the training rows are not finite or not positive: fit with --dtype float32 "
    "or float64, raise the damping, or use --credit additive"
)


class RowInverse(Protocol):
    """`P = (I + s K)^-1` of one point, s the strength."""

    @property
    def diagonal(self) -> np.ndarray:
        """P's diagonal, `[n]`, in (0, 1]."""
        ...

    def apply(self, values: np.ndarray) -> np.ndarray:
        """`values @ P`, for `values` [K, n]."""
        ...

    def block(self, rows: np.ndarray) -> np.ndarray:
        """P between some rows, `[k, k]`."""
        ...


@dataclass(frozen=True, eq=False)
class WholeKernel:
    """K held whole, `[n, n]` float64."""

    values: np.ndarray = field(repr=False)

    def slope(self, weights: np.ndarray) -> float:
        """`v^T K v` for `v = sqrt(weights)`."""
        roots = np.sqrt(weights)
        return float(roots @ self.values @ roots)

    def inverse(self, strength: float) -> WholeInverse:
        """`(I + s K)^-1`, by Cholesky, in the place of K."""
        system = self.values
        system *= strength
        system[np.diag_indices_from(system)] += 1
        factorise, invert = sl.get_lapack_funcs(("potrf", "potri"), (system,))
        # symmetric, so that its transpose is the same matrix in the order that LAPACK works in
        _, failed = factorise(system.T, lower=1, clean=0, overwrite_a=1)
        if not failed:
            _, failed = invert(system.T, lower=1, overwrite_c=1)
        if failed or not np.isfinite(np.diagonal(system)).all():
            raise NumericalError(INDEFINITE)
        for start in range(0, len(system), MIRRORED):  # LAPACK filled one half
            part = slice(start, start + MIRRORED)
            system[part.stop :, part] = system[part, part.stop :].T
            block = np.triu(system[part, part])
            system[part, part] = block + np.triu(block, 1).T
        return WholeInverse(system)


@dataclass(frozen=True, eq=False)
class WholeInverse:
    """P held whole, `[n, n]`."""

    values: np.ndarray = field(repr=False)

    @property
    def diagonal(self) -> np.ndarray:
        """P's diagonal, `[n]`."""
        return np.diagonal(self.values)

    def apply(self, values: np.ndarray) -> np.ndarray:
        """`values @ P`."""
        return values @ self.values

    def block(self, rows: np.ndarray) -> np.ndarray:
        """P between some rows, `[k, k]`."""
        return self.values[np.ix_(rows, rows)]


@dataclass(frozen=True, eq=False)
class LandmarkKernel:
    """`U U^T + diag(rest)`: `root` U [n, m], `diagonal` of K [n]."""

    root: np.ndarray = field(repr=False)
    diagonal: np.ndarray = field(repr=False)

    @property
    def rest(self) -> np.ndarray:
        """What the landmarks do not say of each row's own entry, `[n]`, 0 or more."""
        return np.maximum(self.diagonal - np.einsum("im,im->i", self.root, self.root), 0)

    def slope(self, weights: np.ndarray) -> float:
        """`v^T K v` for `v = sqrt(weights)`."""
        return float(((np.sqrt(weights) @ self.root) ** 2).sum() + self.rest @ weights)

    def inverse(self, strength: float) -> LandmarkInverse:
        """`(I + s K)^-1` by Woodbury, `A^-1 - A^-1 U S U^T A^-1` with `A = I + s diag(rest)`."""
        scale = 1 / (1 + strength * self.rest)
        parts = row_parts(len(self.root))
        inner = np.eye(self.root.shape[1])
        for part in parts:
            inner += strength * self.root[part].T @ (self.root[part] * scale[part, None])
        lower = np.linalg.cholesky(inner)
        # half[i] = sqrt(s) A^-1 U L^-T: P = A^-1 - half half^T
        half = np.empty(self.root.shape)
        for part in parts:
            scaled = (self.root[part] * scale[part, None]).T
            half[part] = np.sqrt(strength) * sl.solve_triangular(lower, scaled, lower=True).T
        return LandmarkInverse(scale, half)


@dataclass(frozen=True, eq=False)
class LandmarkInverse:
    """`diag(scale) - half half^T`: `scale` [n], `half` [n, m]."""

    scale: np.ndarray = field(repr=False)
    half: np.ndarray = field(repr=False)

    @property
    def diagonal(self) -> np.ndarray:
        """P's diagonal, `[n]`."""
        return self.scale - np.einsum("im,im->i", self.half, self.half)

    def apply(self, values: np.ndarray) -> np.ndarray:
        """`values @ P`."""
        return values * self.scale - (values @ self.half) @ self.half.T

    def block(self, rows: np.ndarray) -> np.ndarray:
        """P between some rows, `[k, k]`."""
        half = self.half[rows]
        return np.diag(self.scale[rows]) - half @ half.T


def row_kernel(
    point: AtPoint, operator: Damped, *, exact_rows: int = EXACT_ROWS, landmarks: int = LANDMARKS
) -> WholeKernel | LandmarkKernel:
    """K at a point. That of the fit's own setting is kept in the run (`kernel.h5`).

    Every row's gradient is read once for each part of the rows (or landmarks) that fits in memory.
    """
    n = len(point.run.tokens)
    if n <= exact_rows:
        found = None
        if distributed.at_first(lambda: _is_kept(point, operator)):
            found = _kept(point)
        if found is None:
            every = np.arange(n)
            found = _columns(point, operator, every)
            # symmetric but for rounding, and the same now as when it is read again
            found = ((found + found.T) / 2).astype(_dtype(point)).astype(np.float64)
            if _own(point, operator):
                distributed.at_first(lambda: _keep(point, operator, found))
        return WholeKernel(found)
    chosen = evenly_spaced(n, landmarks)
    between, diagonal = _columns(point, operator, chosen), np.zeros(n)
    weights = point.run.weights
    if (features := point.features(operator)) is not None:
        diagonal = features.squares * weights
    else:
        for indices, gradients in point.gradient_blocks(label=None, shared=True):
            products = inverse_products(operator, gradients).cpu().numpy()
            diagonal[indices] = products * weights[indices]
        diagonal = distributed.add_up(torch.from_numpy(diagonal)).numpy()
    small = between[:, chosen]
    small = (small + small.T) / 2
    small[np.diag_indices_from(small)] += JITTER[_dtype(point)] * np.diagonal(small).mean()
    try:
        lower = np.linalg.cholesky(small)
    except np.linalg.LinAlgError:
        raise NumericalError(INDEFINITE) from None
    for part in row_parts(n):  # in its place: a second one would take as much memory
        between[:, part] = sl.solve_triangular(lower, between[:, part], lower=True)
    return LandmarkKernel(between.T, diagonal)


def row_parts(n: int) -> list[slice]:
    """Rows 0 ... n - 1, `ROWS_AT_ONCE` at a time."""
    return [slice(start, start + ROWS_AT_ONCE) for start in range(0, n, ROWS_AT_ONCE)]


def _columns(point: AtPoint, operator: Damped, rows: np.ndarray) -> np.ndarray:
    """K between some rows and all, `[k, n]` float64.

    Stored rows are multiplied leaf by leaf where the inverse's root is known so. Else, of several
    processes each makes some of its rows; where gradients are not stored, and each of them costs a
    backward, each makes the products with its share of all rows instead.
    """
    assert isinstance(operator.curvature, Invertible)
    run, roots = point.run, np.sqrt(point.run.weights)
    whitens = isinstance(operator.curvature, Whitening) and point.by_leaf(len(roots))
    if point.gradients_stored and whitens:
        return _whitened_products(point, operator, rows) * roots[rows, None] * roots
    found, features = np.zeros((len(rows), len(run.tokens))), point.features(operator)
    split = point.gradients_stored or features is not None
    at_once = queries_at_once(run, COPIES) if features is None else features.rows_at_once
    first, end = distributed.span(len(rows)) if split else (0, len(rows))
    places = np.arange(first, end)
    # each part reads all rows' gradients once, so that parts are as large as memory allows
    for part in np.array_split(places, max(1, -(-len(places) // at_once))):
        if not len(part):
            continue
        if features is not None:
            found[part] = features.products(features.of_rows(rows[part]))
        else:
            solved = operator.curvature.solve(point.gradients_of(rows[part]), operator.lam)
            found[part] = point.row_products(solved, shared=not split)
    if split:
        found = distributed.add_up(torch.from_numpy(found)).numpy()
    return found * roots[rows, None] * roots


def _whitened_products(point: AtPoint, operator: Damped, rows: np.ndarray) -> np.ndarray:
    """Products under the inverse of some rows' gradients with all rows', `[k, n]` float64: those of
    `W g` with `W^T W` the inverse, leaf after leaf of the stored rows, each process some leaves.
    """
    curvature, found = operator.curvature, np.zeros((len(rows), len(point.run.tokens)))
    assert isinstance(curvature, Whitening)
    leaves = range(*distributed.span(len(point.model.space.leaves)))
    for number, gradients in point.leaf_blocks(leaves):
        white = curvature.whiten(number, gradients, operator.lam)
        left = white if len(rows) == len(white) else white[torch.from_numpy(rows)]
        found += (left @ white.T).double().cpu().numpy()
    return distributed.add_up(torch.from_numpy(found)).numpy()


# ---- the kept one ---------------------------------------------------------------------------------


def _dtype(point: AtPoint) -> type[np.floating]:
    """The type that K is kept in: the model's, at least float32."""
    return np.float64 if point.model.dtype == torch.float64 else np.float32


def _own(point: AtPoint, operator: Damped) -> bool:
    """Whether an operator is that of the fit."""
    return point.number is not None and point.operator().label == operator.label


def _is_kept(point: AtPoint, operator: Damped) -> bool:
    """Whether the run keeps K of this operator."""
    if point.number is None or not point.file("kernel").exists():
        return False
    with open_file(point.file("kernel"), run_digest=point.digest) as file:
        return file.attrs.get("setting") == operator.label


def _kept(point: AtPoint) -> np.ndarray:
    """K as the run keeps it, float64."""
    with open_file(point.file("kernel"), run_digest=point.digest) as file:
        return read(file, "kernel").astype(np.float64)


def _keep(point: AtPoint, operator: Damped, values: np.ndarray) -> None:
    """Keep K of the fit's own setting, in the type of the model.

    A disk that is full or only read costs the time of making it again, no more.
    """
    attrs = {
        "run_digest": point.digest,
        "setting": operator.label,
        "about": "sqrt(w_i w_j) grad l_i^T (C + lambda I)^-1 grad l_j",
    }
    try:
        write_file(point.file("kernel"), {"kernel": values.astype(_dtype(point))}, attrs=attrs)
    except (OSError, StoreError):
        return
