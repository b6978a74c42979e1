"""The files of the rows' similarities and of their inverses (`influence.kernel`).

Those of the fit's own setting are kept in the run; those of another one lie in files until they are
no more used.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from influence import distributed
from influence.at_point import AtPoint
from influence.curvature.base import Damped
from influence.errors import StoreError
from influence.matrix_file import LowerFile, delete_with, lay_out
from influence.store import RowFile, open_file, read, write_file


def dtype_of(point: AtPoint) -> type[np.floating]:
    """The type that K is kept in: the model's, at least float32."""
    return np.float64 if point.model.dtype == torch.float64 else np.float32


def put(path: Path, name: str, values: np.ndarray) -> None:
    """Write a dataset that was laid out."""
    with RowFile(path, name, write=True) as file:
        file.write(np.arange(len(values)), values)


def get(path: Path, name: str) -> np.ndarray:
    """Read one."""
    with open_file(path) as file:
        return read(file, name)


Layout = dict[str, tuple[tuple[int, ...], Any]]


def layouts(n: int, landmarks: int, kind: Any) -> dict[str, Layout]:
    """The datasets of K of n rows, in numbers of a kind, and of its inverse, by the names of their
    files.

    `landmarks`: how many rows stand for all; 0: none.
    """
    own: Layout = {"diagonal": ((n,), np.float64)}
    if landmarks:
        m = min(n, landmarks)
        kernel: Layout = {"root": ((n, m), kind), "rest": ((n,), np.float64)}
        return {"kernel": kernel, "inverse": {"factor": (LowerFile.layout(m), np.float64), **own}}
    lower = (LowerFile.layout(n), kind)
    return {"kernel": {"lower": lower}, "inverse": {"factor": lower, **own}}


def bytes_of(layout: Layout) -> int:
    """What datasets take in a file."""
    return sum(math.prod(shape) * np.dtype(kind).itemsize for shape, kind in layout.values())


@dataclass(frozen=True, eq=False)
class Files:
    """The files of K at a point under an operator, and of its inverse.

    Those of the fit's own operator are kept in the run.
    """

    point: AtPoint
    operator: Damped

    @property
    def device(self) -> torch.device:
        """Where products are made."""
        return self.point.model.device

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
        arrays = {"kernel": values.astype(dtype_of(self.point))}
        try:
            write_file(self.point.file("kernel"), arrays, attrs=self.attrs())
        except (OSError, StoreError):
            return
