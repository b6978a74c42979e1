"""How alike the training rows are under a damped inverse, `K = F M F^T`.

`M = (C + lambda I)^-1` at one point of the path, `f_i = sqrt(w_i) grad l_i`. Up to `WHOLE_ROWS` rows
K and its inverse are held in memory, `[n, n]` in float64. Of more rows they are as exact, but lie in
files that are made and read tile by tile (`influence.matrix_file`): up to `EXACT_ROWS` rows always,
and up to `MOST_ROWS` where the inverse takes no more operations than a pass over the rows, and the
files no more disk than the run's budget. Else K is stood in for by `LANDMARKS` of its columns and its
own diagonal (Nystroem with an exact diagonal: Quinonero-Candela & Rasmussen 2005, "FITC"):

    K ~ U U^T + diag(rest),     U = K_nm L^-T,   K_mm = L L^T,   rest = diag(K - U U^T)

It is exact where the rows span no more directions than there are landmarks. All numbers are fixed:
what is answered does not hang on the memory of a machine.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import scipy.linalg as sl
import torch

from influence import distributed
from influence.adapter import AdaptedModel
from influence.at_point import AtPoint, evenly_spaced, queries_at_once
from influence.curvature.base import Damped, Invertible, Whitening, inverse_products
from influence.errors import NumericalError
from influence.kernel_files import Files, bytes_of, dtype_of, get, layouts, put
from influence.matrix_file import (
    LowerFile,
    LowerInverse,
    MatrixFile,
    invert_in_tiles,
    lay_out,
    tiles,
)
from influence.progress import track
from influence.run import Run
from influence.store import open_file, read

#: Rows up to which K is held in memory: 34 MB in float64, and as much again while it is inverted.
WHOLE_ROWS = 2_048
#: Rows up to which no row's similarity to another is left out, whatever it costs: 0.8 GB of disk in
#: float32, and as much again for the inverse; and up to which none is where it costs little: 8.7 GB.
EXACT_ROWS, MOST_ROWS = 20_000, 65_536
#: Columns that stand for K beyond that.
LANDMARKS = 4_096
#: Operations of a forward and of a backward by the inputs, for each weight and token.
OF_A_PASS = 4
#: Rows that are multiplied with all others at a time, at most.
ROWS_AT_ONCE = 512
#: Added to the diagonal of K_mm, relative to its mean, by the type of the gradients: landmarks may
#: be copies of each other, and rounding must not make K_mm indefinite.
JITTER = {np.float64: 1e-12, np.float32: 1e-6}
#: Copies of some rows' gradients that are counted beside them: what solving holds, and as much again
#: left to K itself.
COPIES = 5
#: Rows of a matrix that are mirrored at a time.
MIRRORED = 1_024
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

    def apply(self, values: np.ndarray, *, overwrite: bool = False) -> np.ndarray:
        """`values @ P`, for `values` [K, n], which may be used up if `overwrite`."""
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

    def apply(self, values: np.ndarray, *, overwrite: bool = False) -> np.ndarray:
        """`values @ P`."""
        return values @ self.values

    def block(self, rows: np.ndarray) -> np.ndarray:
        """P between some rows, `[k, k]`."""
        return self.values[np.ix_(rows, rows)]


@dataclass(frozen=True, eq=False)
class TiledKernel:
    """The lower triangle of K in a file."""

    values: LowerFile = field(repr=False)
    files: Files = field(repr=False)

    def slope(self, weights: np.ndarray) -> float:
        """`v^T K v` for `v = sqrt(weights)`."""
        roots, found = np.sqrt(weights), 0.0
        for rows, part in self.values.panels():
            products = np.tril(part, rows.start - 1).astype(np.float64) @ roots[: rows.stop]
            found += 2 * float(roots[rows] @ products)
            found += float(np.diagonal(part, rows.start) @ weights[rows])
        return found

    def inverse(self, strength: float) -> TiledInverse:
        """`(I + s K)^-1`, by a Cholesky decomposition in tiles.

        All processes call it together.
        """
        n = len(self.values)

        def invert(path: Path) -> None:
            with LowerFile(path, "factor", n, write=True) as factor:
                found = invert_in_tiles(
                    self.values,
                    factor,
                    factor=strength,
                    ridge=1.0,
                    refusal=INDEFINITE,
                    device=self.files.device,
                )
                put(path, "diagonal", found)
                factor.flush()

        layout = layouts(n, 0, self.values.dtype)["inverse"]
        path = self.files.made(
            "inverse", layout, lambda path: distributed.at_first(lambda: invert(path)), strength
        )
        found = TiledInverse(LowerInverse(LowerFile(path, "factor", n)), get(path, "diagonal"))
        self.files.used_by(found, "inverse", path)
        return found


@dataclass(frozen=True, eq=False)
class TiledInverse:
    """P by the lower triangle X in a file, `P = X^T X`, and its `diagonal` [n]."""

    root: LowerInverse = field(repr=False)
    diagonal: np.ndarray = field(repr=False)

    def apply(self, values: np.ndarray, *, overwrite: bool = False) -> np.ndarray:
        """`values @ P`."""
        return self.root.apply(values)

    def block(self, rows: np.ndarray) -> np.ndarray:
        """P between some rows, `[k, k]`."""
        return self.root.block(rows)


@dataclass(frozen=True, eq=False)
class LandmarkKernel:
    """`U U^T + diag(rest)`: `root` U [n, m] in a file, and `rest` [n], 0 or more, what the landmarks
    do not say of each row's own entry.
    """

    root: MatrixFile = field(repr=False)
    rest: np.ndarray = field(repr=False)
    files: Files = field(repr=False)

    def slope(self, weights: np.ndarray) -> float:
        """`v^T K v` for `v = sqrt(weights)`."""
        roots, total = np.sqrt(weights), np.zeros(self.root.shape[1])
        for rows, part in self.root.panels():
            total += roots[rows] @ part
        return float((total**2).sum() + self.rest @ weights)

    def inverse(self, strength: float) -> LandmarkInverse:
        """`(I + s K)^-1` [n, n] by Woodbury (Hager 1989), `A - s A U S U^T A` with the diagonal
        `A = (I + s diag(rest))^-1` [n, n] and `S = (I + s U^T A U)^-1` [m, m].

        All processes call it together.
        """
        scale = 1 / (1 + strength * self.rest)

        def invert(path: Path) -> None:
            with LowerFile(path, "factor", m, write=True) as factor:
                self._sum(factor, scale)
                distributed.at_first(
                    lambda: invert_in_tiles(
                        factor,
                        factor,
                        factor=strength,
                        ridge=1.0,
                        refusal=INDEFINITE,
                        device=self.files.device,
                    )
                )
                inner, own = LowerInverse(factor), np.zeros(n)
                for rows, part in self.root.panels(*distributed.span(n)):
                    own[rows] = np.square(inner.halves(part)).sum(1, dtype=np.float64)
                own = distributed.add_up(torch.from_numpy(own)).numpy()
                if distributed.rank() == 0:
                    put(path, "diagonal", scale - strength * scale**2 * own)
                factor.flush()

        n, m = self.root.shape
        layout = layouts(n, m, self.root.dtype)["inverse"]
        path = self.files.made("inverse", layout, invert, strength)
        inner = LowerInverse(LowerFile(path, "factor", m))
        found = LandmarkInverse(self.root, inner, scale, get(path, "diagonal"), strength, self)
        self.files.used_by(found, "inverse", path)
        return found

    def _sum(self, target: LowerFile, scale: np.ndarray) -> None:
        """The lower triangle of `U^T A U` [m, m] into a file, some of its rows at a time."""
        first, end = distributed.span(self.root.shape[0])
        roots = np.sqrt(scale).astype(self.root.dtype)
        for rows in tiles(self.root.shape[1]):
            total = np.zeros((rows.stop - rows.start, rows.stop))
            for part in tiles(end - first):
                place = slice(first + part.start, first + part.stop)
                values = self.root.block(place, slice(0, rows.stop)) * roots[place, None]
                total += values[:, rows].T @ values
            total = distributed.add_up(torch.from_numpy(total)).numpy()
            if distributed.rank() == 0:
                target.write(np.arange(rows.start, rows.stop), total)


@dataclass(frozen=True, eq=False)
class LandmarkInverse:
    """`A - s A U S U^T A`: `root` U [n, m] and `inner` S in files, `scale` the diagonal of A [n],
    `strength` s, and the `diagonal` of the whole [n].
    """

    root: MatrixFile = field(repr=False)
    inner: LowerInverse = field(repr=False)
    scale: np.ndarray = field(repr=False)
    diagonal: np.ndarray = field(repr=False)
    strength: float
    kernel: LandmarkKernel = field(repr=False)  # whose file is deleted with it

    def apply(self, values: np.ndarray, *, overwrite: bool = False) -> np.ndarray:
        """`values @ P`, in their place if `overwrite`."""
        found = np.multiply(values, self.scale, out=values if overwrite else None)
        inside = np.zeros((len(values), self.root.shape[1]))
        for rows, part in self.root.panels():
            inside += found[:, rows] @ part
        inside = self.strength * self.inner.apply(inside)
        for rows, part in self.root.panels():
            found[:, rows] -= inside @ part.T * self.scale[rows]
        return found

    def block(self, rows: np.ndarray) -> np.ndarray:
        """P between some rows, `[k, k]`."""
        half = self.inner.halves(self.root.rows(rows).astype(np.float64))
        half *= np.sqrt(self.strength) * self.scale[rows, None]
        return np.diag(self.scale[rows]) - half @ half.T


Kernel = WholeKernel | TiledKernel | LandmarkKernel


def row_kernel(point: AtPoint, operator: Damped) -> Kernel:
    """K at a point. That of the fit's own setting is kept in the run (`kernel.h5`, with its inverse
    in `inverse.h5` where it is in files); that of another one lies in files until it is no more used.

    Every row's gradient is read once for each part of the rows (or landmarks) that are multiplied at
    a time. All processes call it together. Raises `StoreError` where files have no room.
    """
    n, files, landmarks = len(point.run.tokens), Files(point, operator), landmarks_of(point.run)
    if not landmarks and n <= WHOLE_ROWS:
        return _whole(point, operator)
    layout = layouts(n, landmarks, dtype_of(point))["kernel"]
    if not landmarks:

        def fill(path: Path) -> None:
            with LowerFile(path, "lower", n, write=True) as file:
                _fill(point, operator, file, np.arange(n))
                file.flush()

        path = files.made("kernel", layout, fill)
        found = TiledKernel(LowerFile(path, "lower", n), files)
    else:
        chosen = evenly_spaced(n, landmarks)
        path = files.made("kernel", layout, lambda path: _fill_root(point, operator, path, chosen))
        found = LandmarkKernel(MatrixFile(path, "root"), get(path, "rest"), files)
    files.used_by(found, "kernel", path)
    return found


def landmarks_for(
    model: AdaptedModel, *, rows: int, tokens: int, points: int, disk_budget: float
) -> int:
    """How many rows stand for all of them, which hold so many tokens; 0 where none need to.

    `disk_budget` is in bytes, of all points together.
    """
    if rows <= EXACT_ROWS:
        return 0
    weights = sum(parameter.numel() for parameter in model.model.parameters())
    files = points * bytes_of_files(rows, 0, model.dtype.itemsize)
    cheap = rows**3 <= OF_A_PASS * weights * tokens and files <= disk_budget
    return 0 if rows <= MOST_ROWS and cheap else LANDMARKS


def landmarks_of(run: Run) -> int:
    """The same of a run."""
    return landmarks_for(
        run.model,
        rows=len(run.tokens),
        tokens=run.manifest.data.tokens,
        points=len(run.manifest.points),
        disk_budget=run.manifest.disk_budget,
    )


def bytes_of_files(n: int, landmarks: int, itemsize: int) -> int:
    """Bytes of the files that K of n rows and its inverse lie in, at one point; 0 in memory.

    `itemsize` is that of the model's numbers.
    """
    if not landmarks and n <= WHOLE_ROWS:
        return 0
    kind = np.float64 if itemsize > 4 else np.float32
    return sum(bytes_of(layout) for layout in layouts(n, landmarks, kind).values())


def missing_bytes(point: AtPoint, operator: Damped) -> int:
    """Bytes of the files of K and of its inverse that a point does not keep yet."""
    n, files, landmarks = len(point.run.tokens), Files(point, operator), landmarks_of(point.run)
    if not landmarks and n <= WHOLE_ROWS:
        return 0
    every = layouts(n, landmarks, dtype_of(point)).items()
    return sum(bytes_of(layout) for name, layout in every if not files.kept(name, layout))


def _whole(point: AtPoint, operator: Damped) -> WholeKernel:
    """K in memory."""
    files, found = Files(point, operator), None
    if distributed.at_first(lambda: files.kept("kernel")):
        with open_file(point.file("kernel"), run_digest=point.digest) as file:
            found = read(file, "kernel").astype(np.float64)
    if found is None:
        found = _products(point, operator)
        # symmetric but for rounding, and the same now as when it is read again
        found = ((found + found.T) / 2).astype(dtype_of(point)).astype(np.float64)
        if files.own:
            distributed.at_first(lambda: files.keep(found))
    return WholeKernel(found)


def _fill(
    point: AtPoint, operator: Damped, file: MatrixFile | LowerFile, columns: np.ndarray
) -> None:
    """K between all rows and some, `[n, k]`, into a file; or of K its lower triangle.

    Of several processes each makes some of the columns; where gradients are not stored, and each of
    them costs a backward, each makes some of the rows instead.
    """
    assert isinstance(operator.curvature, Invertible)
    run, roots, features = point.run, np.sqrt(point.run.weights), point.features(operator)
    lower = isinstance(file, LowerFile)
    split = point.gradients_stored or features is not None
    at_once = queries_at_once(run, COPIES) if features is None else features.rows_at_once
    count = -(-len(columns) // min(at_once, ROWS_AT_ONCE))
    world = distributed.world() if split else 1
    parts = np.array_split(np.arange(len(columns)), -(-count // world) * world)
    parts = parts[distributed.rank() :: world] if split else parts
    counts = [len(part) for part in parts]
    for part in track(parts, "similarities of the rows", counts=counts):
        if not len(part):
            continue
        rows = columns[part]
        skip = np.arange(len(roots)) < (rows[0] if lower else 0)
        if features is not None:
            left, blocks = features.of_rows(rows), features.blocks(skip)
        else:
            left = operator.curvature.solve(point.gradients_of(rows), operator.lam)
            blocks = point.gradient_blocks(skip, None, shared=not split)
        for indices, block in blocks:
            exact = torch.float64 if file.dtype == np.float64 else torch.float32
            products = (block @ left.T).to(exact).cpu().numpy()
            products *= roots[indices, None]
            products *= roots[rows]
            file.write(indices, products, part[0])
    distributed.wait()


def _fill_root(point: AtPoint, operator: Damped, path: Path, chosen: np.ndarray) -> None:
    """U and the rest of the diagonal into a file, of the landmarks `chosen` [m]."""
    n, m, kind = len(point.run.tokens), len(chosen), dtype_of(point)
    with MatrixFile(path, "root", write=True) as root:
        _fill(point, operator, root, chosen)

        def inverted() -> Path:
            """L^-1 in a file of its own."""
            place = lay_out(path.parent, {"factor": (LowerFile.layout(m), np.float64)}, {})
            with LowerFile(place, "factor", m, write=True) as small:
                mean = 0.0
                for number, row in enumerate(chosen.tolist()):
                    values = root.read(row, row + 1)
                    mean += float(values[0, number]) / m
                    small.write(np.array([number]), values)
                jitter = JITTER[kind] * mean
                try:
                    invert_in_tiles(
                        small,
                        small,
                        factor=1.0,
                        ridge=jitter,
                        refusal=INDEFINITE,
                        device=point.model.device,
                    )
                except NumericalError:
                    place.unlink()
                    raise
            return place

        place = distributed.at_first(inverted)
        squares = np.zeros(n)
        with LowerFile(place, "factor", m) as small:
            lower = LowerInverse(small)
            for rows, part in root.panels(*distributed.span(n)):
                part = lower.halves(part)
                squares[rows] = np.square(part).sum(1, dtype=np.float64)
                root.write(np.arange(rows.start, rows.stop), part)
        squares = distributed.add_up(torch.from_numpy(squares)).numpy()
        rest = np.maximum(_diagonal(point, operator) - squares, 0)
        if distributed.rank() == 0:
            place.unlink()
            put(path, "rest", rest)
        root.flush()


def _diagonal(point: AtPoint, operator: Damped) -> np.ndarray:
    """K's diagonal, `[n]`."""
    weights = point.run.weights
    if (features := point.features(operator)) is not None:
        return features.squares * weights
    found = np.zeros(len(weights))
    for indices, gradients in point.gradient_blocks(label=None, shared=True):
        products = inverse_products(operator, gradients).cpu().numpy()
        found[indices] = products * weights[indices]
    return distributed.add_up(torch.from_numpy(found)).numpy()


def _products(point: AtPoint, operator: Damped) -> np.ndarray:
    """K `[n, n]`, float64.

    Stored rows are multiplied leaf by leaf where the inverse's root is known so. Else, of several
    processes each makes some of its rows; where gradients are not stored, and each of them costs a
    backward, each makes the products with its share of all rows instead.
    """
    assert isinstance(operator.curvature, Invertible)
    run, roots = point.run, np.sqrt(point.run.weights)
    whitens = isinstance(operator.curvature, Whitening) and point.by_leaf(len(roots))
    if point.gradients_stored and whitens:
        return point.whitened_products(operator) * roots[:, None] * roots
    n, features = len(run.tokens), point.features(operator)
    found = np.zeros((n, n))
    split = point.gradients_stored or features is not None
    at_once = queries_at_once(run, COPIES) if features is None else features.rows_at_once
    first, end = distributed.span(n) if split else (0, n)
    places = np.arange(first, end)
    # each part reads all rows' gradients once, so that parts are as large as memory allows
    for part in np.array_split(places, max(1, -(-len(places) // at_once))):
        if not len(part):
            continue
        if features is not None:
            found[part] = features.products(features.of_rows(part))
        else:
            solved = operator.curvature.solve(point.gradients_of(part), operator.lam)
            found[part] = point.row_products(solved, shared=not split)
    if split:
        found = distributed.add_up(torch.from_numpy(found)).numpy()
    return found * roots[:, None] * roots
