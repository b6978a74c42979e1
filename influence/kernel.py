"""How alike the training rows are under a damped inverse, `K = F M F^T`.

`M = (C + lambda I)^-1` at one point of the path, `f_i = sqrt(w_i) grad l_i`. Up to `WHOLE_ROWS` rows
K and its inverse are held in memory, `[n, n]` in float64. Up to `EXACT_ROWS` they are as exact, but
lie in files that are made and read tile by tile (`influence.matrix_file`). Beyond, K is stood in for
by `LANDMARKS` of its columns and its own diagonal (Nystroem with an exact diagonal:
Quinonero-Candela & Rasmussen 2005, "FITC"), which lie in files too:

    K ~ U U^T + diag(rest),     U = K_nm L^-T,   K_mm = L L^T,   rest = diag(K - U U^T)

It is exact where the rows span no more directions than there are landmarks. All three numbers are
fixed: what is answered does not hang on the memory of a machine.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import scipy.linalg as sl
import torch

from influence import distributed
from influence.at_point import AtPoint, evenly_spaced, queries_at_once
from influence.curvature.base import Damped, Invertible, Whitening, inverse_products
from influence.errors import NumericalError, StoreError
from influence.matrix_file import (
    LowerInverse,
    MatrixFile,
    delete_with,
    invert_in_tiles,
    lay_out,
    tiles,
)
from influence.progress import track
from influence.store import RowFile, open_file, read, write_file

#: Rows up to which K is held in memory: 34 MB in float64, and as much again while it is inverted.
WHOLE_ROWS = 2_048
#: Rows up to which no row's similarity to another is left out: 1.6 GB of disk in float32, and as
#: much again for the inverse.
EXACT_ROWS = 20_000
#: Columns that stand for K beyond that.
LANDMARKS = 4_096
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
class TiledKernel:
    """K in a file, `[n, n]`, of which the lower triangle counts."""

    values: MatrixFile = field(repr=False)
    files: Files = field(repr=False)

    def slope(self, weights: np.ndarray) -> float:
        """`v^T K v` for `v = sqrt(weights)`."""
        roots, found = np.sqrt(weights), 0.0
        for rows, part in self.values.panels():
            for row, values in zip(range(rows.start, rows.stop), part, strict=True):
                found += 2 * float(roots[row] * (values[:row].astype(np.float64) @ roots[:row]))
                found += float(values[row] * weights[row])
        return found

    def inverse(self, strength: float) -> TiledInverse:
        """`(I + s K)^-1`, by a Cholesky decomposition in tiles.

        All processes call it together.
        """

        def invert(path: Path) -> None:
            with MatrixFile(path, "factor", write=True) as factor:
                found = invert_in_tiles(
                    self.values, factor, factor=strength, ridge=1.0, refusal=INDEFINITE
                )
                _put(path, "diagonal", found)
                factor.flush()

        n = self.values.shape[0]
        layout = {"factor": ((n, n), self.values.dtype), "diagonal": ((n,), np.float64)}
        path = self.files.made(
            "inverse", layout, lambda path: distributed.at_first(lambda: invert(path)), strength
        )
        found = TiledInverse(LowerInverse(MatrixFile(path, "factor")), _read(path, "diagonal"))
        self.files.used_by(found, "inverse", path)
        return found


@dataclass(frozen=True, eq=False)
class TiledInverse:
    """P by the lower triangle X in a file, `P = X^T X`, and its `diagonal` [n]."""

    root: LowerInverse = field(repr=False)
    diagonal: np.ndarray = field(repr=False)

    def apply(self, values: np.ndarray) -> np.ndarray:
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
            with MatrixFile(path, "factor", write=True) as factor:
                self._sum(factor, scale)
                distributed.at_first(
                    lambda: invert_in_tiles(
                        factor, factor, factor=strength, ridge=1.0, refusal=INDEFINITE
                    )
                )
                inner, own = LowerInverse(factor), np.zeros(n)
                for rows, part in self.root.panels(*distributed.span(n)):
                    own[rows] = np.square(inner.halves(part)).sum(1, dtype=np.float64)
                own = distributed.add_up(torch.from_numpy(own)).numpy()
                if distributed.rank() == 0:
                    _put(path, "diagonal", scale - strength * scale**2 * own)
                factor.flush()

        n, m = self.root.shape
        layout = {"factor": ((m, m), np.float64), "diagonal": ((n,), np.float64)}
        path = self.files.made("inverse", layout, invert, strength)
        inner = LowerInverse(MatrixFile(path, "factor"))
        found = LandmarkInverse(self.root, inner, scale, _read(path, "diagonal"), strength, self)
        self.files.used_by(found, "inverse", path)
        return found

    def _sum(self, target: MatrixFile, scale: np.ndarray) -> None:
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

    def apply(self, values: np.ndarray) -> np.ndarray:
        """`values @ P`."""
        found = values * self.scale
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


def row_kernel(
    point: AtPoint,
    operator: Damped,
    *,
    whole_rows: int | None = None,
    exact_rows: int | None = None,
    landmarks: int | None = None,
) -> Kernel:
    """K at a point. That of the fit's own setting is kept in the run (`kernel.h5`, with its inverse
    in `inverse.h5` where it is in files); that of another one lies in files until it is no more used.

    Every row's gradient is read once for each part of the rows (or landmarks) that are multiplied at
    a time. By default up to `WHOLE_ROWS` rows are held in memory, up to `EXACT_ROWS` K is whole, and
    beyond `LANDMARKS` stand for it. All processes call it together. Raises `StoreError` where files
    have no room.
    """
    n, files = len(point.run.tokens), Files(point, operator)
    exact = n <= (EXACT_ROWS if exact_rows is None else exact_rows)
    if exact and n <= (WHOLE_ROWS if whole_rows is None else whole_rows):
        return _whole(point, operator)
    kind = _dtype(point)
    if exact:

        def fill(path: Path) -> None:
            with MatrixFile(path, "kernel", write=True) as file:
                _fill(point, operator, file, np.arange(n), lower=True)
                file.flush()

        path = files.made("kernel", {"kernel": ((n, n), kind)}, fill)
        found = TiledKernel(MatrixFile(path, "kernel"), files)
    else:
        chosen = evenly_spaced(n, LANDMARKS if landmarks is None else landmarks)
        layout = {"root": ((n, len(chosen)), kind), "rest": ((n,), np.float64)}
        path = files.made("kernel", layout, lambda path: _fill_root(point, operator, path, chosen))
        found = LandmarkKernel(MatrixFile(path, "root"), _read(path, "rest"), files)
    files.used_by(found, "kernel", path)
    return found


def bytes_of_files(n: int, itemsize: int) -> int:
    """Bytes of the files that K of n rows and its inverse lie in, at one point; 0 in memory.

    `itemsize` is that of the model's numbers.
    """
    size = max(4, itemsize)
    if n <= WHOLE_ROWS:
        return 0
    if n <= EXACT_ROWS:
        return 2 * n * n * size + 8 * n
    return n * LANDMARKS * size + 8 * LANDMARKS**2 + 16 * n


def missing_bytes(point: AtPoint, operator: Damped) -> int:
    """Bytes of the files of K and of its inverse that a point does not keep yet."""
    n, files = len(point.run.tokens), Files(point, operator)
    needed = bytes_of_files(n, point.model.dtype.itemsize)
    if files.kept("kernel"):
        needed = 0 if files.kept("inverse") else needed // 2
    return needed


def _whole(point: AtPoint, operator: Damped) -> WholeKernel:
    """K in memory."""
    files, found = Files(point, operator), None
    if distributed.at_first(lambda: files.kept("kernel")):
        with open_file(point.file("kernel"), run_digest=point.digest) as file:
            found = read(file, "kernel").astype(np.float64)
    if found is None:
        found = _products(point, operator)
        # symmetric but for rounding, and the same now as when it is read again
        found = ((found + found.T) / 2).astype(_dtype(point)).astype(np.float64)
        if files.own:
            distributed.at_first(lambda: files.keep(found))
    return WholeKernel(found)


def _fill(
    point: AtPoint, operator: Damped, file: MatrixFile, columns: np.ndarray, *, lower: bool = False
) -> None:
    """K between all rows and some, `[n, k]`, into a file; if `lower`, no more than the lower
    triangle.

    Of several processes each makes some of the columns; where gradients are not stored, and each of
    them costs a backward, each makes some of the rows instead.
    """
    assert isinstance(operator.curvature, Invertible)
    run, roots, features = point.run, np.sqrt(point.run.weights), point.features(operator)
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
    n, m, kind = len(point.run.tokens), len(chosen), _dtype(point)
    with MatrixFile(path, "root", write=True) as root:
        _fill(point, operator, root, chosen)

        def inverted() -> Path:
            """L^-1 in a file of its own."""
            place = lay_out(path.parent, {"factor": ((m, m), np.float64)}, {})
            with MatrixFile(place, "factor", write=True) as small:
                mean = 0.0
                for number, row in enumerate(chosen.tolist()):
                    values = root.read(row, row + 1)
                    mean += float(values[0, number]) / m
                    small.write(np.array([number]), values)
                jitter = JITTER[kind] * mean
                try:
                    invert_in_tiles(small, small, factor=1.0, ridge=jitter, refusal=INDEFINITE)
                except NumericalError:
                    place.unlink()
                    raise
            return place

        place = distributed.at_first(inverted)
        squares = np.zeros(n)
        with MatrixFile(place, "factor") as small:
            lower = LowerInverse(small)
            for rows, part in root.panels(*distributed.span(n)):
                part = lower.halves(part)
                squares[rows] = np.square(part).sum(1, dtype=np.float64)
                root.write(np.arange(rows.start, rows.stop), part)
        squares = distributed.add_up(torch.from_numpy(squares)).numpy()
        rest = np.maximum(_diagonal(point, operator) - squares, 0)
        if distributed.rank() == 0:
            place.unlink()
            _put(path, "rest", rest)
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


# ---- the kept ones --------------------------------------------------------------------------------


def _dtype(point: AtPoint) -> type[np.floating]:
    """The type that K is kept in: the model's, at least float32."""
    return np.float64 if point.model.dtype == torch.float64 else np.float32


def _put(path: Path, name: str, values: np.ndarray) -> None:
    """Write a dataset that was laid out."""
    with RowFile(path, name, write=True) as file:
        file.write(np.arange(len(values)), values)


def _read(path: Path, name: str) -> np.ndarray:
    """Read one."""
    with open_file(path) as file:
        return read(file, name)


@dataclass(frozen=True, eq=False)
class Files:
    """The files of K at a point under an operator, and of its inverse.

    Those of the fit's own operator are kept in the run.
    """

    point: AtPoint
    operator: Damped

    @property
    def own(self) -> bool:
        """Whether the operator is that of the fit."""
        point = self.point
        return point.number is not None and point.operator().label == self.operator.label

    def kept(
        self, name: str, datasets: Mapping[str, Any] | None = None, strength: float | None = None
    ) -> bool:
        """Whether the run keeps such a file of this operator, with these datasets; an inverse of
        another `strength` does not count.
        """
        point = self.point
        if point.number is None or not point.file(name).exists():
            return False
        with open_file(point.file(name), run_digest=point.digest) as file:
            there = file.attrs
            same = strength is None or np.isclose(np.asarray(there["strength"]), strength, 1e-9, 0)
            return (
                there.get("setting") == self.operator.label
                and all(
                    each in file and file[each].shape == shape  # pyright: ignore
                    for each, (shape, _) in (datasets or {}).items()
                )
                and bool(same)
            )

    def attrs(self, strength: float | None = None) -> dict[str, Any]:
        """What a file says of itself."""
        said = {"run_digest": self.point.digest, "setting": self.operator.label}
        about = "K = sqrt(w_i w_j) grad l_i^T (C + lambda I)^-1 grad l_j"
        if strength is None:
            return {**said, "about": f"{about}: its lower triangle, or U of K ~ U U^T + rest"}
        return {**said, "about": f"the inverse of I + strength K, {about}", "strength": strength}

    def made(
        self,
        name: str,
        layout: Mapping[str, tuple[tuple[int, ...], Any]],
        fill: Callable[[Path], None],
        strength: float | None = None,
    ) -> Path:
        """The kept file, or one that all processes `fill` together."""
        if distributed.at_first(lambda: self.kept(name, layout, strength)):
            return self.point.file(name)
        attrs, wanted = self.attrs(strength), self.point.run.directory
        path = distributed.at_first(lambda: lay_out(wanted, layout, attrs))
        try:
            fill(path)
            distributed.wait()  # all have written what is theirs
            return distributed.at_first(lambda: self._sealed(name, path, layout))
        except BaseException:
            if distributed.rank() == 0:
                path.unlink(missing_ok=True)
            raise

    def _sealed(self, name: str, path: Path, layout: Mapping[str, Any]) -> Path:
        """Where a filled file lies for good.

        The inverse that a run keeps is that of its first strength, the fit's: of all its points.
        """
        kept = self.point.file(name)
        if self.own and path.parent == kept.parent and not self.kept(name, layout):
            os.replace(path, kept)
            return kept
        return path

    def used_by(self, owner: object, name: str, path: Path) -> None:
        """Delete a file that is not kept, once its owner is no more used.

        All processes have opened it by then.
        """
        distributed.wait()
        if path != self.point.file(name) and distributed.rank() == 0:
            delete_with(owner, path)

    def keep(self, values: np.ndarray) -> None:
        """Keep a K that is held in memory, in the type of the model.

        A disk that is full or only read costs the time of making it again, no more.
        """
        arrays = {"kernel": values.astype(_dtype(self.point))}
        try:
            write_file(self.point.file("kernel"), arrays, attrs=self.attrs())
        except (OSError, StoreError):
            return
