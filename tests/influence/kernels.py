"""Kernels of few rows in the forms of many, and what is asked of them."""

from __future__ import annotations

import numpy as np

from influence import kernel as kernel_module
from influence.kernel import LandmarkKernel, row_kernel
from tests.oracles import close

N = 12


def whole_of(kernel) -> np.ndarray:
    """What a kernel in files stands for, `[n, n]`."""
    if isinstance(kernel, LandmarkKernel):
        root = kernel.root.read(0, kernel.root.shape[0]).astype(float)
        return root @ root.T + np.diag(kernel.rest)
    whole = slice(0, len(kernel.values))
    lower = np.tril(kernel.values.block(whole, whole)).astype(float)
    return lower + np.tril(lower, -1).T


def like(found, expected: np.ndarray, tolerance: float = 1e-8) -> None:
    """An inverse that is the expected matrix, in all that is asked of it."""
    rng, some = np.random.default_rng(5), np.array([1, len(expected) - 1])
    values = rng.normal(size=(3, len(expected)))
    close(found.diagonal, np.diagonal(expected), tolerance)
    close(found.block(some), expected[np.ix_(some, some)], tolerance)
    given = values.copy()
    close(found.apply(given), values @ expected, tolerance)
    np.testing.assert_array_equal(given, values)  # who asks twice gives the same again
    close(found.apply(given, overwrite=True), values @ expected, tolerance)


FORMS = {"tiles": {"WHOLE_ROWS": 0}, "landmarks": {"EXACT_ROWS": 0, "MOST_ROWS": 0, "LANDMARKS": 5}}


def kernel_of(monkeypatch, form: str, point, operator):
    """K of few rows in the form of many."""
    with monkeypatch.context() as patch:
        for name, value in FORMS[form].items():
            patch.setattr(kernel_module, name, value)
        return row_kernel(point, operator)
