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
import torch
from torch import Tensor

from influence.errors import NumericalError, StoreError
from influence.store import RowFile, write_file

#: How the names of files begin that are not whole yet; then the machine and the process.
MAKING = "kernel-making-"
#: Rows and columns of a tile, of which a few are held at a time: 2 MB each in float64, and on a GPU
#: 134 MB: its products are of larger ones, and less is read.
TILE, GPU_TILE = 512, 4_096
#: Rows of a lower triangle that are stored as wide as the last of them. Part of the file's form.
BAND = 512
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


class LowerFile(RowFile):
    """The lower triangle of a matrix [n, n], in a file of half its size.

    `BAND` rows are as wide as the last of them, and follow each other. What lies above the diagonal
    is not written, and read as whatever the band has there.
    """

    def __init__(self, path: Path, name: str, n: int, *, write: bool = False) -> None:
        super().__init__(path, name, write=write)
        if self.shape != LowerFile.layout(n):
            raise StoreError(
                f"{path}: {name} holds {self.shape} numbers; expected {LowerFile.layout(n)}, the "
                f"lower triangle of {n} rows: move the file away, it is made again"
            )
        self.shape = (n, n)

    @staticmethod
    def layout(n: int) -> tuple[int]:
        """The shape of the dataset."""
        whole, rest = divmod(n, BAND)
        return (BAND * BAND * whole * (whole + 1) // 2 + rest * n,)

    def width(self, row: int) -> int:
        """Numbers of a row that are stored."""
        return min(len(self), BAND * (row // BAND + 1))

    def panels(self) -> Iterator[tuple[slice, np.ndarray]]:
        """`(rows, values [b, rows.stop])` of all rows, `PANEL_BYTES` at a time, zero above the
        diagonal.
        """
        start = 0
        while start < len(self):
            width = self.width(start)
            step = max(1, PANEL_BYTES // (width * self.dtype.itemsize))
            rows = slice(start, min(start + step, width))
            values = self.block(rows, slice(0, rows.stop))
            values[:, start:] = np.tril(values[:, start:])
            yield rows, values
            start = rows.stop

    def write(self, indices: np.ndarray, rows: np.ndarray, column: int = 0) -> None:
        """Write `rows` [b, k] at the positions `indices` [b], from a column on, as far as they are
        stored.
        """
        for index, row in zip(indices.tolist(), rows, strict=True):
            kept = row[: max(0, self.width(index) - column)]
            if len(kept):
                super().write(np.array([index]), kept[None], column)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows `[stop - start, n]`, zero where nothing is stored, copied."""
        return self.block(slice(start, stop), slice(0, len(self)))

    def block(self, rows: slice, columns: slice) -> np.ndarray:
        """A block `[b, c]`, zero where nothing is stored, copied."""
        out = np.zeros((rows.stop - rows.start, columns.stop - columns.start), self.dtype)
        for place, row in enumerate(range(rows.start, rows.stop)):
            count = min(columns.stop, self.width(row)) - columns.start
            if count > 0:
                self._fill(out[place, :count], self._place_of(row, columns.start))
        return out

    def _place_of(self, row: int, column: int = 0) -> int:
        band = row // BAND
        before = BAND * BAND * band * (band + 1) // 2 + (row - BAND * band) * self.width(row)
        return self._offset + (before + column) * self.dtype.itemsize


def tiles(n: int, size: int | None = None) -> list[slice]:
    """Positions 0 ... n - 1 in tiles of so many, `TILE` by default."""
    size = size or TILE
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


class Tiles:
    """Tiles of a matrix in a file, as float64 on a device."""

    def __init__(self, file: LowerFile, device: torch.device) -> None:
        self.file, self.device = file, device

    def read(self, rows: slice, columns: slice) -> Tensor:
        """A tile `[b, c]`."""
        return torch.from_numpy(self.file.block(rows, columns)).to(self.device).double()

    def write(self, rows: slice, columns: slice, values: Tensor) -> None:
        """Put a tile in its place."""
        self.file.write(np.arange(rows.start, rows.stop), values.cpu().numpy(), columns.start)


def invert_in_tiles(
    source: LowerFile,
    target: LowerFile,
    *,
    factor: float,
    ridge: float,
    refusal: str,
    device: torch.device,
) -> np.ndarray:
    """X = L^-1 of `L L^T = factor A + ridge I`, tile by tile, and the diagonal of the inverse
    `X^T X`, `[n]`.

    A is in `source`, X comes into `target`, which may be the same file. Products are made on the
    device, in float64. Raises `NumericalError` with the words of `refusal` where the matrix is not
    positive.
    """
    if device.type == "mps":  # has no float64
        device = torch.device("cpu")
    every = tiles(len(source), TILE if device.type == "cpu" else GPU_TILE)
    given, made = Tiles(source, device), Tiles(target, device)
    for i, rows in enumerate(every):
        for j, columns in enumerate(every[: i + 1]):
            part = factor * given.read(rows, columns)
            if i == j:
                part.diagonal().add_(ridge)
            for before in every[:j]:
                part -= made.read(rows, before) @ made.read(columns, before).T
            if i == j:
                part, failed = torch.linalg.cholesky_ex(part)
                if int(failed):
                    raise NumericalError(refusal)
            else:
                corner = made.read(columns, columns)
                part = torch.linalg.solve_triangular(corner.T, part, upper=True, left=False)
            if not bool(part.isfinite().all()):
                raise NumericalError(refusal)
            made.write(rows, columns, part)
    diagonal = torch.zeros(len(source), dtype=torch.float64, device=device)
    for i, rows in enumerate(every):
        corner = made.read(rows, rows).tril()
        unit = torch.eye(len(corner), dtype=torch.float64, device=device)
        corner = torch.linalg.solve_triangular(corner, unit, upper=False)
        for j, columns in enumerate(every[: i + 1]):
            part = corner
            if j < i:  # of L's row those from j on are still there, and of X all rows above
                part = torch.zeros(len(corner), columns.stop - columns.start).to(corner)
                for between in every[j:i]:
                    part -= made.read(rows, between) @ made.read(between, columns)
                part = corner @ part
            made.write(rows, columns, part)
            diagonal[columns] += part.square().sum(0)
    return diagonal.cpu().numpy()


class LowerInverse:
    """`P = X^T X`, of the lower triangle X [n, n] in a file."""

    def __init__(self, factor: LowerFile) -> None:
        self.factor = factor

    def apply(self, values: np.ndarray) -> np.ndarray:
        """`values @ P`, `[K, n]`."""
        found = np.zeros(values.shape)
        for rows, part in self.factor.panels():
            part = part.astype(np.float64)
            found[:, : rows.stop] += (values[:, : rows.stop] @ part.T) @ part
        return found

    def halves(self, values: np.ndarray) -> np.ndarray:
        """`values @ X^T`, `[K, n]`, in the type of the values."""
        found = np.empty(values.shape, values.dtype)
        for rows, part in self.factor.panels():
            found[:, rows] = values[:, : rows.stop] @ part.T.astype(values.dtype, copy=False)
        return found

    def block(self, rows: np.ndarray) -> np.ndarray:
        """P between some rows, `[k, k]`."""
        found = np.zeros((len(rows), len(rows)))
        for there, part in self.factor.panels():
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
