"""Matrices in files, read and written block by block, so that none of them is ever held whole.

A matrix is a dataset that `influence.store.write_file(rows=...)` laid out. What is read of it does
not stay in the memory of the process, as a mapped file's pages would.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import scipy.linalg as sl

from influence.errors import NumericalError, StoreError
from influence.store import RowFile, write_file

#: How the names of files begin that are not whole yet; then the machine and the process.
MAKING = "kernel-making-"
#: Rows and columns of a tile, of which a few are held at a time: 2 MB each in float64.
TILE = 512
#: Bytes of whole rows that are held at a time.
PANEL_BYTES = 8 << 20


class MatrixFile(RowFile):
    """A matrix [n, m] in a file."""

    def panels(self, first: int = 0, end: int | None = None) -> Iterator[tuple[slice, np.ndarray]]:
        """`(rows, values [b, m])` of the rows from `first` to `end`, `PANEL_BYTES` at a time."""
        end = self.shape[0] if end is None else end
        step = max(1, PANEL_BYTES // self._width)
        for start in range(first, end, step):
            rows = slice(start, min(start + step, end))
            yield rows, self.read(rows.start, rows.stop)


def tiles(n: int) -> list[slice]:
    """Positions 0 ... n - 1 in tiles."""
    return [slice(start, min(start + TILE, n)) for start in range(0, n, TILE)]


def invert_in_tiles(
    source: MatrixFile, target: MatrixFile, *, factor: float, ridge: float, refusal: str
) -> np.ndarray:
    """X = L^-1 of `L L^T = factor A + ridge I`, tile by tile, and the diagonal of the inverse
    `X^T X`, `[n]`.

    Only the lower triangles count: that of A in `source`, that of X in `target`, which may be the
    same file. Raises `NumericalError` with the words of `refusal` where the matrix is not positive.
    """
    every = tiles(source.shape[0])
    for i, rows in enumerate(every):
        for j, columns in enumerate(every[: i + 1]):
            part = factor * source.block(rows, columns).astype(np.float64)
            if i == j:
                part[np.diag_indices_from(part)] += ridge
            for before in every[:j]:
                left, right = target.block(rows, before), target.block(columns, before)
                part -= left.astype(np.float64) @ right.T.astype(np.float64)
            if i == j:
                try:
                    part = np.linalg.cholesky(part)
                except np.linalg.LinAlgError:
                    raise NumericalError(refusal) from None
            else:
                corner = target.block(columns, columns).astype(np.float64)
                part = sl.solve_triangular(corner, part.T, lower=True, check_finite=False).T
            if not np.isfinite(part).all():
                raise NumericalError(refusal)
            target.write(np.arange(rows.start, rows.stop), part, columns.start)
    diagonal = np.zeros(source.shape[0])
    for i, rows in enumerate(every):
        corner = np.tril(target.block(rows, rows).astype(np.float64))
        corner = sl.solve_triangular(corner, np.eye(len(corner)), lower=True, check_finite=False)
        for j, columns in enumerate(every[: i + 1]):
            part = corner
            if j < i:  # of L's row those from j on are still there, and of X all rows above
                part = np.zeros((len(corner), columns.stop - columns.start))
                for between in every[j:i]:
                    left, right = target.block(rows, between), target.block(between, columns)
                    part -= left.astype(np.float64) @ right.astype(np.float64)
                part = corner @ part
            target.write(np.arange(rows.start, rows.stop), part, columns.start)
            diagonal[columns] += np.einsum("ij,ij->j", part, part)
    return diagonal


class LowerInverse:
    """`P = X^T X`, of the lower triangle X [n, n] in a file."""

    def __init__(self, factor: MatrixFile) -> None:
        self.factor = factor

    def panels(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Rows of X `[b, stop]`, as far as they are not zero."""
        for rows, values in self.factor.panels():
            yield rows, np.tril(values[:, : rows.stop], rows.start)

    def apply(self, values: np.ndarray) -> np.ndarray:
        """`values @ P`, `[K, n]`."""
        found = np.zeros(values.shape)
        for rows, part in self.panels():
            part = part.astype(np.float64)
            found[:, : rows.stop] += (values[:, : rows.stop] @ part.T) @ part
        return found

    def halves(self, values: np.ndarray) -> np.ndarray:
        """`values @ X^T`, `[K, n]`, in the type of the values."""
        found = np.empty(values.shape, values.dtype)
        for rows, part in self.panels():
            found[:, rows] = values[:, : rows.stop] @ part.T.astype(values.dtype, copy=False)
        return found

    def block(self, rows: np.ndarray) -> np.ndarray:
        """P between some rows, `[k, k]`."""
        found = np.zeros((len(rows), len(rows)))
        for there, part in self.panels():
            within = rows < there.stop
            some = np.zeros((len(part), len(rows)))
            some[:, within] = part[:, rows[within]]
            found += some.T @ some
        return found


# ---- where they lie ------------------------------------------------------------------------------


def directory_for(wanted: Path, needed: int) -> Path | None:
    """Where files of so many bytes can be written: the wanted directory, else that for temporary
    files; None where neither has the room.
    """
    for place in (wanted, Path(tempfile.gettempdir())):
        if os.access(place, os.W_OK) and shutil.disk_usage(place).free > needed:
            return place
    return None


def lay_out(
    wanted: Path, rows: Mapping[str, tuple[tuple[int, ...], Any]], attrs: Mapping[str, Any]
) -> Path:
    """Create a file of these datasets under a name of its own, full of zeros.

    Raises `StoreError` where there is no room for it.
    """
    needed = sum(int(np.prod(shape)) * np.dtype(kind).itemsize for shape, kind in rows.values())
    place = directory_for(wanted, needed)
    if place is None:
        raise StoreError(
            f"{needed / 1e9:.2f} GB of disk are needed in {wanted} or in "
            f"{tempfile.gettempdir()}: free some space, or set TMPDIR"
        )
    _delete_left_behind(place)
    maker = f"{MAKING}{_machine()}-{os.getpid()}-"
    handle, name = tempfile.mkstemp(prefix=maker, suffix=".h5", dir=place)
    os.close(handle)
    try:
        write_file(Path(name), rows=rows, attrs=attrs)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return Path(name)


def _machine() -> str:
    """A few letters for this machine: processes of others write into the same directory."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _delete_left_behind(place: Path) -> None:
    """Delete what killed processes of this machine left half made."""
    for path in place.glob(f"{MAKING}{_machine()}-*.h5"):
        maker = path.name.removeprefix(f"{MAKING}{_machine()}-").split("-")[0]
        if maker.isdecimal() and not psutil.pid_exists(int(maker)):
            path.unlink(missing_ok=True)


def delete_with(owner: object, path: Path) -> None:
    """Delete a file once nobody uses its owner any more, at the latest when the process ends."""
    weakref.finalize(owner, path.unlink, missing_ok=True)
